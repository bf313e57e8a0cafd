"""Schedules that change nothing: said at the start of training, by layer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Run

_NAMED = 3


def some_of(names: list[str]) -> str:
    """The first names, quoted, and how many there are: "'a', 'b', 'c' and 4 more"."""
    listed = ", ".join(f"'{name}'" for name in names[:_NAMED])
    more = len(names) - _NAMED
    return f"{listed} and {more} more" if more > 0 else listed


def report_idle(idle: list[str], layers: int, cause: str, mend: str) -> None:
    """Warn that a schedule changes nothing in the layers `idle` of `layers`; nothing where there are none.

    Args:
        idle: module names.
        layers: how many layers the schedule has.
        cause: the option, its value and what it comes to.
        mend: what to change.
    """
    if not idle:
        return
    which = f"all {layers} layers" if len(idle) == layers else f"{len(idle)} of {layers} layers"
    warnings.warn(f"{cause} in {which} ({some_of(idle)}). {mend}", stacklevel=4)


def report_unfinished(run: Run, start: int, every: int, rounds: int, cause: str, mend: str) -> None:
    """Warn that a run is too short for a schedule that acts after updates that are multiples of `every` and beyond
    `start`; nothing in a resumed run, which said it at its start.

    Args:
        rounds: how often it is to act.
        cause: the options, their values and what takes so long.
        mend: what to change.
    """
    last = (start // every + rounds) * every
    if rounds > 0 and last >= run.total_steps and not run.resumed:
        warnings.warn(f"{cause} up to step {last}, and the run has {run.total_steps}. {mend}", stacklevel=4)
