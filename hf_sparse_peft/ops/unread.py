"""Backward passes beside the loss's, whose dense gradients are nobody's business."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_unread = 0  # of the process: autograd calls backward functions in threads of its own


@contextmanager
def gradients_unread() -> Iterator[None]:
    """Inside, no reader of dense gradients is shown any."""
    global _unread
    _unread += 1
    try:
        yield
    finally:
        _unread -= 1


def are_read() -> bool:
    """Whether readers are to be shown the gradients of the current backward pass."""
    return not _unread
