"""Floor 8: before a run: what it takes in memory, and what is wrong with its settings, from a model's config alone."""

from .memory import Estimate, Part, estimate

__all__ = ["Estimate", "Part", "estimate"]
