"""`sparse-peft`: the command line. A file holds a verb or a family of verbs; importing it enters them.

Every verb is a thin form of public functions of the floors below: it reads flags, calls, and prints a table, or JSON
with `--json`. Exit codes: 0, 1 after a mistake in the data or values given, 2 after a mistake in the command itself.
"""

from . import analysis, card, combine, evaluate, export, inspect, methods, preflight, train  # noqa: F401
from .app import app, main, verb

__all__ = ["app", "main", "verb"]
