"""What a user is told of data that says nothing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


def tell_missing(none: str, some: str, without: Sequence[str], count: int, stacklevel: int) -> None:
    """Refuse data that says nothing about any of `count` modules, and warn where it does of a few, `without`.

    Args:
        none: how the refusal begins, a sentence without its full stop.
        some: how the warning begins, up to the names.
        without: names of the modules that the data says nothing about.
        count: of all modules.
        stacklevel: of the warning, as its caller would have it.

    Raises:
        ValueError: `without` has all of them.
    """
    if len(without) == count:
        raise ValueError(
            f"{none}. Check that the labels of the batches are not all masked (-100), that the loss is finite (under "
            "fp16 use bf16 or fp32), and that the adapted modules take part in it."
        )
    if without:
        shown = ", ".join(without[:20]) + (", ..." if len(without) > 20 else "")
        warnings.warn(
            f"{some}: {shown}. Did the batches reach them? Use more or other data, or leave them out of "
            "target_modules.",
            stacklevel=stacklevel + 1,
        )
