"""Floor 8: before a run: what it takes in memory, and what is wrong with its settings, from a model's config alone."""

from .communication import Traffic
from .estimates import Estimate, Part
from .examination import DoctorCallback, doctor
from .findings import Diagnosis, Finding
from .memory import estimate
from .overview import MethodRow, families, method_rows, methods_table

__all__ = [
    "Diagnosis",
    "DoctorCallback",
    "Estimate",
    "Finding",
    "MethodRow",
    "Part",
    "Traffic",
    "doctor",
    "estimate",
    "families",
    "method_rows",
    "methods_table",
]
