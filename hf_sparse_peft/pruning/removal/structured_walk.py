"""Heads and channels removed for good: decided on the dense model or block by block, written block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...ops import autocast_off
from ...sparsity import pack_bits
from ...tuners.shared.rollback import uninterrupted
from ..criteria.one_shot_methods import PruningMethod
from ..criteria.pruning_patterns import PruningPattern
from ..criteria.structured_methods import Scored, StructuredPruning
from ..reading.block_inputs import Block, BlockInputs, collect
from ..reading.block_statistics import block_statistics, evaluating
from ..reading.calibration_batches import CalibrationBatches, read_batches
from ..reading.input_statistics import InputStatistics
from ..reading.one_shot import PrunableLayer
from ..units.kept_units import KeptUnits
from ..units.structure import BlockStructure, Kind, structures_of
from ..units.unit_scores import kept_by_block, sum_by_unit
from .pruning_report import PruningReport
from .unit_checkpoint import UnitCheckpoint


def prune_units(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None,
    layers: list[PrunableLayer],
    method: PruningMethod,
    patterns: tuple[PruningPattern, ...],
    sparsity: float,
    seed: int,
    checkpoint: Path | None,
    show_progress: bool,
) -> PruningReport:
    """`prune_model` for patterns of heads and channels; `layers` have been checked.

    Raises:
        ValueError: as `prune_model`.
    """
    kinds = frozenset(pattern.kind for pattern in patterns)
    structures = _targeted(structures_of(model, kinds), kinds, {layer.name for layer in layers})
    walk = _UnitWalk(model, structures, kinds, method, sparsity, seed, {layer.name: layer for layer in layers})
    walk.check()
    finished = UnitCheckpoint(checkpoint)
    about = {"method": method.to_dict(), "sparsity": sparsity, "seed": seed,
             "pattern": [pattern.to_dict() for pattern in patterns]}  # fmt: skip
    finished.begin(about, [layer for structure in structures for layer in walk.block(structure).layers])
    report = PruningReport(method, patterns, kept=KeptUnits.all_of(structures))
    with evaluating(model):
        inputs = walk.begin(dataloader, finished, report, show_progress)
        bar = tqdm(structures, desc="Pruning", unit="block", disable=not show_progress)
        for number, structure in enumerate(bar):
            block = walk.block(structure)
            kept = finished.load_units(number, block, structure, kinds)
            if kept is None:
                kept = walk.kept(structure, block, inputs)
            finished.save_units(number, block, structure, kept)
            with uninterrupted():
                walk.write(structure, block, kept, report)
            if inputs is not None and number + 1 < len(structures):
                inputs.hidden = [inputs.call(block, at) for at in range(len(inputs.hidden))]
    return report


@dataclass
class _UnitWalk:
    """What goes of each block, and writing it."""

    model: nn.Module
    structures: list[BlockStructure]
    kinds: frozenset[Kind]
    method: PruningMethod
    sparsity: float
    seed: int
    layers: dict[str, PrunableLayer]
    decided: dict[str, dict[Kind, Tensor]] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse a method that cannot, and a fraction that takes nothing from a block."""
        if isinstance(self.method, StructuredPruning):
            if self.kinds - self.method.kinds:
                raise ValueError(
                    f"method='{self.method.part_type}' scores {sorted(self.method.kinds)} and no "
                    f"{sorted(self.kinds - self.method.kinds)}: choose another pattern."
                )
            return
        for structure in self.structures:
            for kind in sorted(self.kinds):
                units = structure.units(kind)
                if self.sparsity > 0 and int(self.sparsity * units + 1e-9) == 0:
                    raise ValueError(
                        f"sparsity={self.sparsity} removes none of the {units} {kind} of '{structure.name}': take at "
                        f"least {1 / units:.3g}, or name its modules in exclude_modules."
                    )

    def block(self, structure: BlockStructure) -> Block:
        """The block and those of its layers that units go from."""
        names = dict.fromkeys(member.module for kind in sorted(self.kinds) for member in structure.members(kind))
        return Block(structure.name, self.model.get_submodule(structure.name), [self.layers[name] for name in names])

    def begin(
        self, dataloader: Any, finished: UnitCheckpoint, report: PruningReport, show_progress: bool
    ) -> BlockInputs | None:
        """Decide all blocks on the dense model, or read what the first one is called with."""
        device = next(iter(self.layers.values())).weight().device
        if not isinstance(self.method, StructuredPruning):
            if not self.method.all_reads():
                return None
            inputs = collect(self.model, [self.block(s) for s in self.structures], dataloader, device)
            finished.data = inputs.digest
            return inputs
        data = read_batches(dataloader, device)
        finished.data = data.digest
        blocks = [self.block(structure) for structure in self.structures]
        found = finished.load_scores(blocks)
        if found is None:
            found = self._scored(data, show_progress)
            finished.save_scores(found, blocks)
        report.importance.update(found.importance)
        self.decided = self.method.keep(self.model, self.structures, found, self.sparsity)
        self._refuse_nothing(found)
        return None

    def _refuse_nothing(self, found: Scored) -> None:
        gone = {kind: sum(len(kinds[kind]) - len(self.decided[block][kind]) for block, kinds in found.scores.items())
                for kind in sorted(self.kinds)}  # fmt: skip
        if self.sparsity > 0 and (not any(gone.values()) or (not self.method.competes and not all(gone.values()))):
            raise ValueError(
                f"sparsity={self.sparsity} removes no {' and no '.join(k for k, n in gone.items() if not n)} of any "
                "block: raise it, or leave their pattern out."
            )

    def _scored(self, data: CalibrationBatches, show_progress: bool) -> Scored:
        data.progress = tqdm(total=len(data.inputs), desc="Scoring", unit="batch", disable=not show_progress)
        with data.progress, torch.enable_grad():
            found = self.method.score(self.model, self.structures, self.kinds, data, self.seed)
        for block, kinds in found.scores.items():
            for kind, scores in kinds.items():
                if not scores.isfinite().all():
                    raise ValueError(f"method='{self.method.part_type}' gives {kind} of '{block}' scores that are not "
                                     "finite. Under fp16 use bf16 or fp32; else look for the batch.")  # fmt: skip
                if len(scores) > 1 and not scores.any():
                    raise ValueError(
                        f"method='{self.method.part_type}' says nothing about the {kind} of '{block}': all scores are "
                        "0. Check the labels of the data, or name the block in exclude_modules."
                    )
        return found

    def kept(self, structure: BlockStructure, block: Block, inputs: BlockInputs | None) -> dict[Kind, Tensor]:
        """Sorted units that stay."""
        if isinstance(self.method, StructuredPruning):
            own = self.decided.get(structure.name, {})
            return {kind: own.get(kind, torch.arange(structure.units(kind))) for kind in sorted(self.kinds)}
        read = {} if inputs is None else block_statistics(block, inputs, self.method.all_reads())
        return {kind: kept_by_block(self._norms(structure, kind, read), self.sparsity) for kind in sorted(self.kinds)}

    def _norms(self, structure: BlockStructure, kind: Kind, read: dict[str, InputStatistics]) -> Tensor:
        """Norm of the method's scores over the entries of each unit, `[units]`; squared, which ranks alike."""
        total = torch.zeros(structure.units(kind))
        for member in structure.members(kind):
            weight = self.layers[member.module].weight()
            if not weight.isfinite().all():
                raise ValueError(f"The weight of '{member.module}' is not finite: load the model again.")
            with autocast_off(weight.device.type):
                scores = self.method.scores(weight.float(), read.get(member.module), member.module, self.seed)
                total += sum_by_unit(scores.square(), member, structure.units(kind)).cpu()
        return total

    def write(self, structure: BlockStructure, block: Block, kept: dict[Kind, Tensor], report: PruningReport) -> None:
        """Zero the units that go, with their entries of biases, and report them."""
        gone = {layer.name: torch.zeros(layer.weight().shape, dtype=torch.bool) for layer in block.layers}
        for kind, units in kept.items():
            report.kept.keep(structure.name, kind, units)
            removed = report.kept.blocks[structure.name].removed(kind)
            for member in structure.members(kind):
                lines = member.lines(removed)
                layer = self.layers[member.module]
                gone[member.module].index_fill_(member.axis, lines, True)
                layer.weight().index_fill_(member.axis, lines.to(layer.weight().device), 0)
                if member.axis == 0 and layer.module.bias is not None:
                    layer.module.bias.index_fill_(0, lines.to(layer.module.bias.device), 0)
        for layer in block.layers:
            report.entries[layer.name] = layer.weight().numel()
            report.zeros[layer.name] = int((layer.weight() == 0).sum())
            report.masks[layer.name] = pack_bits(gone[layer.name])


def _targeted(structures: list[BlockStructure], kinds: frozenset[Kind], targets: set[str]) -> list[BlockStructure]:
    """Blocks whose units lie in `targets`; those of which nothing does are left out.

    Raises:
        ValueError: a unit lies partly in them, or no block is left.
    """
    found = []
    for structure in structures:
        for kind in sorted(kinds):
            names = sorted({member.module for member in structure.members(kind)})
            inside = [name for name in names if name in targets]
            if inside and inside != names:
                outside = next(name for name in names if name not in targets)
                raise ValueError(
                    f"The {kind} of '{structure.name}' lie in {len(names)} layers that go together, and '{outside}' is "
                    "none of the targets: name all of them in exclude_modules, or none."
                )
        whole = {member.module for kind in kinds for member in structure.members(kind)} <= targets
        if whole:
            found.append(structure)
    if not found:
        raise ValueError(f"The targets hold the {' and '.join(sorted(kinds))} of no block: look at target_modules.")
    return found
