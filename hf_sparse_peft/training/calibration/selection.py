"""An adapter's budget, spent on the units that score best in data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...sparsity import Everywhere, Targets, region_of, stream_seed, top_units
from ...sparsity.budget import Competition
from ...sparsity.ranking import GlobalRanking, raised
from ...tuners.sparse_lora.config import SparseLoraConfig
from ...tuners.sparse_lora.layer import SparseLoraLayer
from ...tuners.sparse_lora.plan import find_pattern, matrix_entries
from ...tuners.sparse_lora.structures import StructureRanking
from .evidence import tell_missing


class SupportSelection:
    """The budget of an adapter, or a fraction of it, spent on the units that score best, layer by layer or over the
    whole model.

    A module whose scores are all 0 or not finite has no evidence. Where a module's size is its own, it gets random
    units; where all modules compete, it gets none (a structure's module: what its structures get). Ties and random
    units are drawn from the config's seed and the module's name, the same on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[SparseLoraLayer],
        adapter_name: str,
        fraction: float = 1.0,
    ) -> None:
        self.model, self.layers, self.adapter_name = model, layers, adapter_name
        self.config = config = layers[0].adapter_configs[adapter_name]
        sizes = {layer.module_name: layer.sizes[adapter_name].units for layer in layers}
        self.sizes = {name: max(1, int(fraction * size)) for name, size in sizes.items()}
        self.grids = {layer.module_name: layer.sparse_lora_grid[adapter_name] for layer in layers}
        self.rankings: dict[str, GlobalRanking] = {}
        """Module name -> the ranking in which its units compete."""
        self._units: dict[str, torch.Tensor] = {}
        self.without_evidence: list[str] = []
        self.structures: StructureRanking | None = None
        if config.structures:
            _check_open_sizes(config)
            self.structures = StructureRanking(config.structures, config.seed, self.grids, model, fraction)
        elif config.calibrates_sizes:
            for group in _competitions(model, config, layers, adapter_name):
                total = max(group.least * len(group.modules), int(fraction * group.units))
                self.rankings |= dict.fromkeys(group.modules, GlobalRanking(total, config.seed, group.least))

    def add(self, scores: dict[str, Any], kept: dict[str, torch.Tensor] | None = None) -> None:
        """Take score chunks of more modules; the sorted units in `kept` are chosen before all others."""
        without = [name for name, chunks in scores.items() if not is_evidence(chunks)]
        self.without_evidence += without
        structured = [name for name in scores if self.config.structure_of(name) is not None]
        for name in structured:
            self.structures.add(name, self._zeros(name) if name in without else scores[name])
        kept = kept or {}
        scores = {
            name: self._inside(name, self._zeros(name, kept[name].device) if name in without else chunks, kept)
            for name, chunks in scores.items()
            if name not in structured and (name not in without or kept.get(name, _NONE).numel())
        }
        for name in set(without) - set(structured) - set(scores):
            self._units[name] = self._arbitrary(name)
        for ranking in self._distinct_rankings():
            ranking.add({name: chunks for name, chunks in scores.items() if self.rankings.get(name) is ranking})
        if self._competes:
            in_no_group = [name for name in scores if name not in self.rankings]
            self._units |= {name: self._arbitrary(name) for name in in_no_group}
            return
        seeds = {name: stream_seed(self.config.seed, name) for name in scores}
        self._units |= {name: top_units(chunks, self.sizes[name], seed=seeds[name]) for name, chunks in scores.items()}

    @property
    def _competes(self) -> bool:
        """Whether modules have no size of their own."""
        return bool(self.rankings)

    def _distinct_rankings(self) -> list[GlobalRanking]:
        return list({id(ranking): ranking for ranking in self.rankings.values()}.values())

    def _inside(self, name: str, chunks: Any, kept: dict[str, torch.Tensor]) -> Any:
        """The scores that compete: those that the config's pattern allows, and `kept` before all others."""
        seed, own = stream_seed(self.config.seed, name), kept.get(name)
        region = region_of(self.config.known_pattern, chunks, self.grids[name], own, seed)
        return region.masked(chunks) if own is None else raised(region.masked(chunks), own)

    def _zeros(self, name: str, device: torch.device | str = "cpu") -> Callable[[], Iterable[torch.Tensor]]:
        zeros = torch.zeros(self.grids[name].num_units, device=device)
        return lambda: iter((zeros,))

    def _arbitrary(self, name: str) -> torch.Tensor:
        grid = self.grids[name]
        if self._competes:
            return torch.empty(0, dtype=grid.index_dtype)
        seed, pattern = stream_seed(self.config.seed, name), self.config.known_pattern
        region = Everywhere(grid) if pattern is None else pattern.random_region(grid, seed)
        return region.random_units(self.sizes[name], torch.Generator().manual_seed(seed)).to(grid.index_dtype)

    def units(self) -> dict[str, torch.Tensor]:
        """Sorted units of every module."""
        ranked = {name: units for ranking in self._distinct_rankings() for name, units in ranking.units().items()}
        return ranked | self._units | (self.structures.units() if self.structures is not None else {})

    def check_evidence(self, what: str) -> None:
        """Look whether the scores of `what` rank anything; warns of the modules where they do not.

        Raises:
            ValueError: they do in no module.
        """
        names, count = self.without_evidence, len(self.layers)
        got = "none of the shared budget" if self._competes else "random units"
        tell_missing(
            f"criterion='{what}' has nothing to choose a support by: the scores of all {count} modules are 0 or not "
            "finite",
            f"criterion='{what}' says nothing about {len(names)} of {count} modules, whose scores are all 0 or not "
            f"finite; they get {got}",
            names,
            count,
            stacklevel=3,
        )


_NONE = torch.empty(0)


@torch.no_grad()
def is_evidence(chunks: Callable[[], Iterable[torch.Tensor]]) -> bool:
    """Whether scores can rank: all are finite, and not all are 0."""
    found = False
    for chunk in chunks():
        if not bool(torch.isfinite(chunk).all()):
            return False
        found = found or bool(chunk.any())
    return found


def _check_open_sizes(config: SparseLoraConfig) -> None:
    if any(one.scope == "model" for one in config.structures) and not config.calibrates_sizes:
        raise ValueError(
            "Structures of scope='model' leave it to the criterion how many units each module has, and sizes "
            f"has fixed that already (criterion='{config.criterion.part_type}'). Start from a fresh SparseLoraConfig "
            "with the criterion that is estimated from data, e.g. criterion='activation', or set scope='block'."
        )


def _competitions(
    model: nn.Module, config: SparseLoraConfig, layers: list[SparseLoraLayer], adapter_name: str
) -> list[Competition]:
    grids = {layer.module_name: layer.sparse_lora_grid[adapter_name] for layer in layers}
    factors = {name: config.rank_of(name) * (grid.rows + grid.cols) for name, grid in grids.items()}
    head = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if f".modules_to_save.{adapter_name}." in name and parameter.requires_grad
    )
    targets = Targets(grids, factor_numel=factors, find=find_pattern, model_entries=partial(matrix_entries, model))
    return config.budget.competitions(targets, head)
