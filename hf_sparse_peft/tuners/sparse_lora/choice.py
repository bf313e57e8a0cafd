"""An adapter's budget, spent on the units that score best in data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...sparsity import top_units
from ...sparsity.ranking import GlobalRanking
from .config import SparseLoraConfig
from .layer import SparseLoraLayer
from .structures import StructureRanking


class Choice:
    """The budget of an adapter, spent on the units that score best, layer by layer or over the whole model."""

    def __init__(
        self,
        model: nn.Module,
        config: SparseLoraConfig,
        layers: list[SparseLoraLayer],
        adapter_name: str,
        share: float = 1.0,
    ) -> None:
        self.model, self.config, self.layers, self.adapter_name = model, config, layers, adapter_name
        sizes = {layer.module_name: layer.sparse_lora_start[adapter_name] for layer in layers}
        self.sizes = {name: max(1, int(share * size)) for name, size in sizes.items()}
        self.ranking: GlobalRanking | None = None
        self._units: dict[str, torch.Tensor] = {}
        self.structures: StructureRanking | None = None
        if config.structures:
            _check_open_sizes(config)
            grids = {layer.module_name: layer.sparse_lora_grid[adapter_name] for layer in layers}
            self.structures = StructureRanking(config, grids, model, share)
        elif config.sizes_from_data:
            total = _global_budget(model, config, layers, adapter_name)
            self.ranking = GlobalRanking(max(len(layers), int(share * total)))

    def add(self, scores: dict[str, Any]) -> None:
        """Score chunks of more modules."""
        structured = [name for name in scores if self.config.structure_of(name) is not None]
        for name in structured:
            self.structures.add(name, scores[name])
        scores = {name: chunks for name, chunks in scores.items() if name not in structured}
        if self.ranking is not None:
            self.ranking.add(scores)
        else:
            self._units |= {name: top_units(chunks, self.sizes[name]) for name, chunks in scores.items()}

    def units(self) -> dict[str, torch.Tensor]:
        """Sorted units of every module."""
        if self.ranking is not None:
            return self.ranking.units()
        return self._units | (self.structures.units() if self.structures is not None else {})


def _check_open_sizes(config: SparseLoraConfig) -> None:
    if any(one.scope == "model" for one in config.structures) and not config.sizes_from_data:
        raise ValueError(
            "Structures of scope='model' leave it to the criterion how many units each module has, and support_pattern "
            f"has fixed that already (criterion='{config.criterion}'). Start from a fresh SparseLoraConfig with the "
            "criterion that is estimated from data, e.g. criterion='activation', or set scope='block'."
        )


def _global_budget(model: nn.Module, config: SparseLoraConfig, layers: list[SparseLoraLayer], adapter_name: str) -> int:
    grids = [layer.sparse_lora_grid[adapter_name] for layer in layers]
    entries = sum(grid.rows * grid.cols for grid in grids)
    density = config.density if config.num_entries is None else config.num_entries / entries
    total = int(density * sum(grid.num_units for grid in grids) + 1e-9)
    if not config.head_in_budget:
        return total
    head = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if f".modules_to_save.{adapter_name}." in name and parameter.requires_grad
    )
    if total - head < len(layers):
        raise ValueError(
            f"head_in_budget: the budget of {total} entries has to pay for {head} numbers of modules_to_save and one "
            f"entry for each of {len(layers)} modules. Raise density to at least {(head + len(layers)) / entries:.1e}, "
            "or set head_in_budget=False."
        )
    return total - head
