"""Models without adapters as unit spaces: rules that hold modules still act on weights that train themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..rules import ModuleSpace


@dataclass(frozen=True)
class WholeModuleSpace(ModuleSpace):
    """A module that owns parameters, as one unit: all of its own, which train without an adapter."""

    @property
    def config(self) -> Any:
        """There is none."""
        return None

    def scalings(self) -> list[dict[str, float]]:
        """A weight has nothing that it is multiplied by."""
        return []

    def state(self) -> dict[str, Tensor]:
        """Rules keep none here."""
        return {}

    def check_needs(self, needs: frozenset[str]) -> None:
        """Raises `ValueError` where a rule needs what weights do not have."""
        if missing := needs - {"batches", "all_modules", "two_passes"}:
            raise ValueError(
                f"'{self.name}' has weights and no adapter, and a rule needs {' and '.join(sorted(missing))} there. "
                "Add an adapter of hf_sparse_peft."
            )

    def _parameters(self) -> Iterator[nn.Parameter]:
        yield from (parameter for parameter in self.layer._parameters.values() if parameter is not None)


def whole_spaces(model: nn.Module) -> list[WholeModuleSpace]:
    """Modules of a model without adapters that own floating-point parameters of which some train, in model order; a
    parameter that several modules share belongs to the first. Empty for a model with any tuner of peft."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return []
    seen: set[int] = set()
    found = []
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None and torch.is_floating_point(p)]
        shared = frozenset(id(p) for p in own if id(p) in seen)
        seen |= {id(p) for p in own}
        space = WholeModuleSpace(module, "", name.removeprefix("module."), shared)
        if any(parameter.requires_grad for parameter in space.parameters()):
            found.append(space)
    return found
