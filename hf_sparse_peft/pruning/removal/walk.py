"""`prune_model`: a model's weights pruned for good, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...ops import autocast_off
from ...sparsity import pack_bits
from ...tuners.shared.rollback import uninterrupted
from ...utils.parts import load_part_by_name
from ..criteria.one_shot_methods import PruningMethod
from ..criteria.pruning_patterns import PruningPattern, Unstructured
from ..criteria.structured_methods import StructuredPruning
from ..criteria.structured_patterns import Heads, Rows
from ..reading.block_inputs import Block, BlockInputs, blocks_of, collect
from ..reading.block_statistics import block_statistics, evaluating
from ..reading.expert_matrices import ExpertMatrix, expert_matrices
from ..reading.input_statistics import SQUARES
from ..reading.one_shot import PrunableLayer, check_own_weight, prunable_layers
from ..units.structure import CHANNELS, HEADS
from .pruning_report import PruningReport
from .structured_walk import prune_units
from .walk_checkpoint import Pruned, WalkCheckpoint


@torch.no_grad()
def prune_model(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    *,
    method: str | PruningMethod = "wanda",
    sparsity: float | None = None,
    pattern: str | PruningPattern | Sequence[str | PruningPattern] | None = None,
    target_modules: Any = "all-linear",
    exclude_modules: Any = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> PruningReport:
    """Set weights of the trunk's linear layers, and of experts in 3-D parameters, to 0 in one shot, in place.

    Methods that read inputs walk from block to block, as their papers do: the calibration data runs through one block,
    whose layers are then pruned, and through it again, so that the next block sees what pruned ones give. Statistics of
    one block are alive at a time, and the hidden states of all batches. Padding that `attention_mask` hides does not
    count. Weights of a block are written together, so that whatever ends the walk leaves whole blocks.

    Args:
        model: a transformers model with dense weights and no adapter.
        dataloader: batches as the model takes them, `input_ids` and perhaps `attention_mask`; None where the method
            reads no inputs.
        method: "magnitude", "random", "wanda", "sparsegpt", "dsnot", or such a part with options; of heads and channels
            the first three, "cfsp", "lora_prune", "oba" and "hessian_saliency". The last three read gradients of the
            model's loss: labels of the batches, or their input_ids where the model predicts them.
        sparsity: fraction of zeros, in [0, 1); None: 0.5, or what the pattern fixes.
        pattern: None: anywhere (`Unstructured()`), or the units that a structured method scores; `NM(2, 4)`; tiles,
            `Blocks(16, 16)`; `Heads()`, `Rows()` (intermediate channels), or both in a list.
        target_modules, exclude_modules: as in a peft config; embeddings and heads stay out.
        checkpoint: a folder that every finished block is written to. A walk that was killed goes on from there, on the
            model as it was first loaded, with the same arguments and data, and ends as if it had never stopped.
        seed: of random draws.
        show_progress: whether a bar shows on stderr.

    Raises:
        ValueError: an option out of range; a model with 4-bit weights, adapters or shared weights, or weights that are
            computed at each forward; experts of a layout, heads or channels of blocks that are not understood; blocks
            that run twice in a pass, not at all, or do not feed one another; data that is missing or not finite; a
            checkpoint of another walk or model.
        TypeError: a batch that is no mapping.
    """
    method = _part(PruningMethod, method, "method")
    patterns = _patterns(pattern, method)
    pattern = patterns[0]
    sparsity = _sparsity(sparsity, pattern)
    experts = [] if pattern.kind else expert_matrices(model, target_modules, exclude_modules)
    layers = prunable_layers(model, target_modules, exclude_modules, required=not experts)
    _refuse(model, layers, pattern)
    reads = method.all_reads()
    if (reads or isinstance(method, StructuredPruning)) and dataloader is None:
        raise ValueError(f"method='{method.part_type}' reads the inputs of layers: pass a dataloader.")
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if pattern.kind is not None:
        return prune_units(model, dataloader, layers, method, patterns, sparsity, seed, checkpoint, show_progress)
    _refuse_experts(experts, method, pattern)
    layers += experts
    blocks = blocks_of(model, layers) if reads else _alone(layers)
    walk = _Walk(method, sparsity, pattern, seed)
    finished = WalkCheckpoint(checkpoint)
    finished.begin(walk.about(), layers)
    report = PruningReport(method, pattern)
    with evaluating(model):
        inputs = collect(model, blocks, dataloader, _device(layers)) if reads else None
        finished.data = "" if inputs is None else inputs.digest
        for number, block in enumerate(tqdm(blocks, desc="Pruning", unit="block", disable=not show_progress)):
            pruned = finished.load(number, block) or walk.prune(block, inputs, reads)
            finished.save(number, block, pruned)
            with uninterrupted():
                for layer in block.layers:
                    weight, gone = pruned[layer.name]
                    layer.weight().copy_(weight)
                    report.entries[layer.name] = weight.numel()
                    report.zeros[layer.name] = int((weight == 0).sum())
                    report.masks[layer.name] = pack_bits(gone).cpu()
            if inputs is not None and number + 1 < len(blocks):
                inputs.hidden = [inputs.call(block, at) for at in range(len(inputs.hidden))]
    return report


@dataclass
class _Walk:
    """How each block is pruned."""

    method: PruningMethod
    sparsity: float
    pattern: PruningPattern
    seed: int

    def about(self) -> dict[str, Any]:
        """The options, as JSON has them."""
        return {
            "method": self.method.to_dict(),
            "sparsity": self.sparsity,
            "pattern": self.pattern.to_dict(),
            "seed": self.seed,
        }

    def prune(self, block: Block, inputs: BlockInputs | None, reads: frozenset[str]) -> Pruned:
        """Pruned weight, in its dtype, and mask of each layer of a block; the layers stay as they are."""
        read = {} if inputs is None else block_statistics(block, inputs, reads)
        found = {}
        for layer in block.layers:
            weight = layer.weight()
            statistics = read.get(layer.name)
            if not weight.isfinite().all():
                raise ValueError(f"The weight of '{layer.name}' is not finite: load the model again.")
            with autocast_off(weight.device.type):
                values, gone = self.method.prune(
                    weight.float(), statistics, self.sparsity, self.pattern, layer.name, self.seed
                )
            values = values.to(weight.dtype)  # fp16 has a narrower range
            if not values.isfinite().all():
                raise ValueError(
                    f"method='{self.method.part_type}' gives '{layer.name}' weights that are not finite in "
                    f"{weight.dtype}. Calibrate with more tokens than its inputs, load the model in bf16 or fp32, or "
                    "choose method='wanda'."
                )
            found[layer.name] = (values, gone)
        return found


def _part(kind: type, value: Any, field_name: str) -> Any:
    found = load_part_by_name(kind, value, field_name)
    if not isinstance(found, kind):
        raise ValueError(f"{field_name}={value!r} cannot prune here: {found.reason}.")
    return found


def _patterns(pattern: Any, method: PruningMethod) -> tuple[PruningPattern, ...]:
    """The pattern, or patterns of different units of a block."""
    if pattern is None and isinstance(method, StructuredPruning):
        pattern = [{HEADS: Heads(), CHANNELS: Rows()}[kind] for kind in (HEADS, CHANNELS) if kind in method.kinds]
    given = pattern if isinstance(pattern, (list, tuple)) else [Unstructured() if pattern is None else pattern]
    found = tuple(_part(PruningPattern, one, "pattern") for one in given)
    kinds = [one.kind for one in found]
    if not found or (len(found) > 1 and (None in kinds or len(set(kinds)) < len(kinds))):
        raise ValueError(
            f"pattern={pattern!r}: several are units of different kinds, [Heads(), Rows()]; else pass one."
        )
    if isinstance(method, StructuredPruning) and None in kinds:
        raise ValueError(
            f"method='{method.part_type}' scores heads and channels, and pattern={found[0]} is of single weights: pass "
            "Heads(), Rows(), or both in a list."
        )
    if (
        not isinstance(method, StructuredPruning)
        and any(one.whole_units for one in found)
        and not method.scores_entries()
    ):
        raise ValueError(
            f"method='{method.part_type}' judges single entries as it goes, and pattern={found[0]} removes whole "
            "units: choose 'magnitude', 'wanda', 'random' or a structured method."
        )
    return found


def _sparsity(sparsity: float | None, pattern: PruningPattern) -> float:
    fixed = pattern.fixed_sparsity()
    if sparsity is None:
        return 0.5 if fixed is None else fixed
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r} is no fraction in [0, 1): it is how much of the weights goes.")
    if fixed is not None and abs(sparsity - fixed) > 1e-9:
        raise ValueError(
            f"sparsity={sparsity} does not go with pattern={pattern}, which removes {fixed:g}. Leave it out."
        )
    return float(sparsity)


def _refuse(model: nn.Module, layers: list[PrunableLayer], pattern: PruningPattern) -> None:
    """Refuse what cannot be pruned in place, before anything is touched."""
    if hasattr(model, "peft_config"):
        raise ValueError("The model has adapters, which were trained on the weights as they are. Prune the base first.")
    quantised = next((layer.name for layer in layers if layer.backend is not None), None)
    if quantised is not None:
        raise ValueError(
            f"'{quantised}' is quantised, and writing it would round it again. Prune the dense model, then quantise: "
            "zeros stay zeros in NF4, FP4 and int8."
        )
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name.removesuffix(".weight"))
    for layer in layers:
        check_own_weight(layer)
        pattern.check(layer.grid.rows, layer.grid.cols, layer.name)
        if layer.weight().is_meta:
            raise ValueError(
                f"The weight of '{layer.name}' is on the meta device: load the model whole, without offload."
            )
        one, *others = owners.get(layer.weight().data_ptr(), [layer.name])
        if others:
            raise ValueError(f"'{one}' and '{others[0]}' share one weight: name both in exclude_modules.")


def _refuse_experts(found: list[ExpertMatrix], method: PruningMethod, pattern: PruningPattern) -> None:
    """Refuse experts in 3-D parameters of which the method asks for what cannot be read, or that have no weights."""
    if found and method.all_reads() - {SQUARES}:
        raise ValueError(
            f"method='{method.part_type}' reads more than norms, and of experts in 3-D parameters, such as "
            f"'{found[0].name}', norms are known: choose 'wanda', 'magnitude' or 'random', or name the experts in "
            "exclude_modules."
        )
    for layer in found:
        if layer.weight().is_meta:
            raise ValueError(f"'{layer.name}' is on the meta device: load the model whole, without offload.")
        pattern.check(layer.grid.rows, layer.grid.cols, layer.name)


def _alone(layers: list[PrunableLayer]) -> list[Block]:
    """A block a layer; the experts of one module together."""
    found: dict[Any, Block] = {}
    for layer in layers:
        key = id(layer.module) if isinstance(layer, ExpertMatrix) else layer.name
        found.setdefault(key, Block(layer.name, layer.module, [])).layers.append(layer)
    return list(found.values())


def _device(layers: list[PrunableLayer]) -> torch.device:
    return layers[0].weight().device
