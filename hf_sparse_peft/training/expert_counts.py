"""Tokens of each expert of routed adapters, in a step's training passes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..rules import UnitSpace

FIELDS = ("tokens", "dropped")
"""Of a record, by module."""


class ExpertCounts:
    """What the experts of `spaces` (those among them that have any) take in this process, until `close`."""

    def __init__(self, spaces: Mapping[str, UnitSpace]) -> None:
        self._stack = ExitStack()
        self._counts: dict[str, Tensor] = {}
        for key, space in spaces.items():
            if space.kind == "expert":
                self._counts[key] = torch.zeros(2, space.size, dtype=torch.int64)
                self._stack.enter_context(space.reading(partial(self._count, key)))

    @torch.no_grad()
    def _count(self, key: str, routing: Tensor) -> None:
        self._counts[key] = self._counts[key].to(routing.device) + routing[1:].sum(1).long()

    def close(self) -> None:
        """Count no more."""
        self._stack.close()

    def fields(self) -> dict[str, dict[str, Any]]:
        """`tokens`: the tokens that each expert took; `dropped`: the part of assignments that found no room."""
        found: dict[str, dict[str, Any]] = {name: {} for name in FIELDS} if self._counts else {}
        for key, (chosen, served) in self._counts.items():
            found["tokens"][key] = served.tolist()
            found["dropped"][key] = 1 - int(served.sum()) / max(int(chosen.sum()), 1) if chosen.any() else 0.0
        return found
