"""Floor 8: before a run: what it takes in memory, and what is wrong with its settings, from a model's config alone."""

from .examination import DoctorCallback, doctor
from .findings import Diagnosis, Finding
from .memory import Estimate, Part, estimate

__all__ = ["Diagnosis", "DoctorCallback", "Estimate", "Finding", "Part", "doctor", "estimate"]
