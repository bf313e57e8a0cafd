"""Adapters of a model without weights, made to see what they would take: nothing ranks units there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ASSUMED: ContextVar[bool] = ContextVar("units_are_assumed", default=False)


@contextmanager
def units_assumed() -> Iterator[None]:
    """Within it, budgets that rank units by weights give each module its share of the total, as if all units tied."""
    token = _ASSUMED.set(True)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def units_are_assumed() -> bool:
    """Whether this is called within `units_assumed`."""
    return _ASSUMED.get()
