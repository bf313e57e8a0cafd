"""DSEE's second stage by whole units, and what keeps its zeros when the adapter is merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...tuners.masked_lora.masks import RemovedWeights
from ...tuners.shared.rollback import uninterrupted
from ..reading.one_shot import prunable_layers
from ..removal.global_pruning import judged_weight, refuse_unwritable
from ..units.kept_units import KeptUnits
from ..units.structure import CHANNELS, HEADS, Kind, structures_of
from ..units.unit_scores import kept_by_block, sum_by_unit


@torch.no_grad()
def kept_by_update(
    model: nn.Module, sparsity: float, *, kinds: Iterable[Kind] = (HEADS,), by: Literal["update", "sum"] = "update"
) -> KeptUnits:
    r"""The heads, or channels, of every block that an adapter changed most (DSEE's structured form; Chen et al., 2023).

    A unit's score is the sum of :math:`|\Delta W_{ij}|` over the rows (and columns) that it owns in all weights of its
    block that have an adapter: of a `dsee` adapter's query and value matrices. `int(sparsity * units)` with the lowest
    go from each block, of equals the earlier (0.25: 3 of 12). Under grouped-query attention a unit is a key and value
    head with all its query heads. `by="sum"` scores by :math:`|W + \Delta W|`.

    Nothing is changed: `mask_units(model, kept)` masks what goes while the adapter trains on, and
    `slice_model(model.merge_and_unload())` cuts it. The released code cuts first and trains on; a masked unit gets no
    gradient, which is the same. The base may be quantised until it is cut.

    Args:
        model: the adapted model, nothing of it merged.
        sparsity: fraction of each block's units that goes, in (0, 1).
        kinds: "heads", "channels", or both.
        by: what judges.

    Raises:
        ValueError: an argument out of range, a sparsity at which nothing goes, a block none of whose weights of that
            kind has an adapter, or an update that is 0 or not finite.
    """
    kinds = tuple(kinds)
    if not kinds or set(kinds) - {HEADS, CHANNELS}:
        raise ValueError(f"kinds={kinds} is unknown; choose of 'heads' and 'channels'.")
    if by not in ("update", "sum"):
        raise ValueError(f"by={by!r} is unknown; choose 'update' or 'sum'. By the base: prune_model(pattern=Heads()).")
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r} is no fraction in (0, 1): it is how much of each block's units goes.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {layer.name: layer for layer in prunable_layers(model)}
    structures = structures_of(base, kinds)
    kept = KeptUnits.all_of(structures)
    for structure in structures:
        for kind in kinds:
            units = structure.units(kind)
            scores: Tensor | int = 0
            for member in structure.members(kind):
                module = base.get_submodule(member.module)
                if isinstance(module, BaseTunerLayer):
                    judged = judged_weight(module, layers[member.module], by)()
                    scores = scores + sum_by_unit(judged.abs(), member, units)
            if not isinstance(scores, Tensor):
                raise ValueError(
                    f"No weight that the {kind} of '{structure.name}' lie in has an adapter, so that nothing judges "
                    "them. Adapt one of them, or leave the kind out of kinds."
                )
            found = kept_by_block(scores, sparsity)
            if len(found) == units:
                raise ValueError(f"sparsity={sparsity} takes none of {units} {kind}. Raise it to {1 / units:.3g}.")
            kept.keep(structure.name, kind, found)
    return kept


@torch.no_grad()
def apply_masks(model: nn.Module, removed: Mapping[str, Tensor] | str | Path) -> dict[str, float]:
    r"""Set the entries that a mask removed to 0 again, in place, in a model that an adapter was merged into.

    A low-rank update fills zeros where it is merged. This takes out what it put there, so that the merged model is
    as sparse as the base was (the mask of PERP's LoRA-Prune, of LoRA, DSEE or any other adapter). It is not what was
    trained: the returned numbers say by how much. `MaskedLoraConfig` trains under the mask what it merges.

    Args:
        model: a dense model without an adapter, as `merge_and_unload()` gives it.
        removed: by module name the bits of what is gone, as `PruningReport.masks` has them, or a file (`save_masks`).

    Returns: by module name, :math:`\|M_{gone} \odot W\|_F / \|W\|_F` of what was there.

    Raises:
        ValueError: adapters, a module that the model does not have, bits of another weight, or weights that cannot be
            written (quantised, shared, not finite). Nothing is changed then.
        TypeError: `removed` is no mapping.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model has adapters. Pass what model.merge_and_unload() returns.")
    masks = RemovedWeights(removed)
    layers = [layer for layer in prunable_layers(model) if masks.bits_of(layer.name) is not None]
    if len(layers) < len(masks.masks):
        told = sorted(set(masks.masks) - {layer.name for layer in layers})
        raise ValueError(
            f"removed has {len(masks.masks)} weights, and the model has {len(layers)} of them; it lacks one of "
            f"{told[:3]}. Pass the masks of the walk that pruned this base."
        )
    refuse_unwritable(model, layers)
    gone = {
        layer: masks.of(layer.name, layer.grid.rows, layer.grid.cols, layer.module.weight.device) for layer in layers
    }
    found = {}
    with uninterrupted():  # all layers or none
        for layer, mask in gone.items():
            weight = layer.weight()
            size = weight.float().norm()
            found[layer.name] = float(weight.masked_fill(~mask, 0).float().norm() / size) if size > 0 else 0.0
            weight.masked_fill_(mask, 0)
    return found
