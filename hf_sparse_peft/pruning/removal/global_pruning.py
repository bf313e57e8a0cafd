"""Magnitude pruning for good in which entries of all weights compete, also beside an adapter that was trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...sparsity import pack_bits, stream_seed, top_units
from ...sparsity.scores import Magnitude
from ...sparsity.selection import Source, count_selected, find_cut
from ...tuners.shared.rollback import uninterrupted
from ..criteria.one_shot_methods import MagnitudePruning
from ..criteria.pruning_patterns import Unstructured
from ..reading.one_shot import PrunableLayer, check_own_weight, prunable_layers
from .pruning_report import PruningReport

_Read = Callable[[], Tensor]


@torch.no_grad()
def prune_globally(
    model: nn.Module,
    sparsity: float,
    *,
    by: Literal["base", "update", "sum"] = "base",
    target_modules: Any = "all-linear",
    exclude_modules: Any = None,
    seed: int = 0,
) -> PruningReport:
    r"""Set the smallest entries of the trunk's linear layers to 0, in place: exactly `round(sparsity * entries)` of all
    together, so that layers lose different fractions (one-shot magnitude pruning; ties are drawn for from `seed`).

    With an adapter beside the base, `by="update"` judges an entry by :math:`|\Delta W|` of the active adapters and
    zeroes the base there, :math:`W \leftarrow W \odot S_1` (DSEE; Chen et al., 2023): call it once for query and value
    matrices, by the update, and once for the others, and train the adapter on. `by="sum"` judges by
    :math:`|W + \Delta W|` (the released code's WABS, which scales the sparse part of the update alone). The adapter
    stays dense: merging it fills the zeros.

    Raises:
        ValueError: sparsity or `by` out of range, quantised or shared weights, weights that are not finite, adapters
            that are merged, or layers without one where the update is to judge, or with one that is 0. Nothing is
            changed then.
    """
    if by not in ("base", "update", "sum"):
        raise ValueError(f"by={by!r} is unknown; choose 'base', 'update' or 'sum'.")
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r} is no fraction in [0, 1): it is how much of the weights goes.")
    layers = prunable_layers(model, target_modules, exclude_modules)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    refuse_unwritable(base, layers)
    judged = {layer.name: judged_weight(base.get_submodule(layer.name), layer, by) for layer in layers}
    scores = {layer.name: _scores(layer, judged[layer.name]) for layer in layers}
    sources = [Source(name, chunks, stream_seed(seed, name)) for name, chunks in scores.items()]
    cut = find_cut(sources, round(sparsity * sum(layer.grid.num_units for layer in layers)), largest=False)
    report = PruningReport(MagnitudePruning(), Unstructured())
    for layer, source in zip(layers, sources, strict=True):
        units = top_units(source.chunks, count_selected(source, cut, largest=False)[0], largest=False, seed=source.seed)
        gone = torch.zeros(layer.grid.num_units, dtype=torch.bool, device=units.device)
        gone[units.long()] = True
        report.masks[layer.name] = pack_bits(gone)
        report.entries[layer.name] = gone.numel()
        judged[layer.name] = gone.view(layer.grid.rows, layer.grid.cols)
    with uninterrupted():  # all layers or none
        for layer in layers:
            weight = layer.weight().masked_fill_(judged[layer.name].to(layer.module.weight.device), 0)
            report.zeros[layer.name] = int((weight == 0).sum())
            report.masks[layer.name] = report.masks[layer.name].cpu()
    return report


def _scores(layer: PrunableLayer, read: _Read) -> Callable[[], Iterable[Tensor]]:
    """Magnitudes, made anew in each pass: one dense update is alive at a time."""
    return lambda: Magnitude()(read(), layer.grid)()


def judged_weight(module: nn.Module, layer: PrunableLayer, by: str) -> _Read:
    r"""What judges the entries of a layer, `[out, in]`, made anew in each call: W for `by="base"`, :math:`\Delta W` of
    the active adapters of `module` for "update", the sum of both for "sum".

    Raises:
        ValueError: no active adapter, one that is not finite, or, for "update", one that is 0 throughout: an update
            that nothing was learnt in judges nothing.
    """
    if by == "base":
        return layer.weight
    names = [name for name in getattr(module, "active_adapters", ()) if _holds(module, name)]
    if not names:
        raise ValueError(
            f"by={by!r} judges by an adapter's update, and '{layer.name}' has no active adapter. Name adapted modules "
            "in target_modules, or take by='base' for the others."
        )

    def update() -> Tensor:
        found = sum(module.get_delta_weight(name).float() for name in names)
        found = found.t() if isinstance(layer.module, Conv1D) else found
        return found if by == "update" else found + layer.weight().float()

    first = update()
    if not first.isfinite().all():
        raise ValueError(f"The update of '{layer.name}' is not finite: load an earlier checkpoint of the adapter.")
    if by == "update" and not first.any():
        raise ValueError(
            f"The update of '{layer.name}' is 0, and says nothing about its weights. Train the adapter first, or leave "
            "the module out with exclude_modules."
        )
    return update


def _holds(module: nn.Module, name: str) -> bool:
    holds = getattr(module, "holds", None)
    return holds(name) if holds is not None else name in getattr(module, "lora_A", ())


def refuse_unwritable(base: nn.Module, layers: list[PrunableLayer]) -> None:
    """Raises `ValueError` where a layer's weight cannot be written: merged, quantised, shared, computed, not finite."""
    owners: dict[int, int] = {}
    for parameter in (p for _, p in base.named_parameters(remove_duplicate=False)):
        owners[parameter.data_ptr()] = owners.get(parameter.data_ptr(), 0) + 1
    for layer in layers:
        wrapper = base.get_submodule(layer.name)
        if isinstance(wrapper, BaseTunerLayer) and wrapper.merged_adapters:
            raise ValueError(f"Adapters are merged into '{layer.name}'. Call model.unmerge_adapter() first.")
        if layer.backend is not None:
            raise ValueError(
                f"'{layer.name}' is quantised, and writing it would round it again. Prune the dense model, then "
                "quantise: zeros stay zeros in NF4, FP4 and int8."
            )
        check_own_weight(layer)
        if layer.module.weight.is_meta:
            raise ValueError(f"The weight of '{layer.name}' is on the meta device: load the model whole.")
        if owners[layer.module.weight.data_ptr()] > 1:
            raise ValueError(f"The weight of '{layer.name}' is shared: name its owners in exclude_modules.")
        if not layer.weight().isfinite().all():
            raise ValueError(f"The weight of '{layer.name}' is not finite: load the model again.")
