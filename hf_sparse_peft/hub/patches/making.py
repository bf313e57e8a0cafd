"""Adapter -> `Patch`: new values at its support, in the checkpoint's coordinates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from ...tuners import AdapterLayer, adapter_layers
from ...tuners.shared.heads import head_owners
from ...tuners.shared.merge import refuse_merged, refuse_shared_modules
from ...tuners.shared.pieces import EVERYWHERE, Nonlinear, Piece, summed_entries
from ..dense import active_adapters
from .base_values import BaseTensor, base_tensors
from .checkpoint_names import CheckpointNames
from .weight_patch import Patch, WeightPatch, differs, digest, weight_patch

Only = Literal["support", "modules"]


@torch.no_grad()
def make_patch(
    model: nn.Module,
    *,
    base: nn.Module | str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    adapter_names: Iterable[str] | None = None,
    weights: Iterable[float] | None = None,
    only: Only | None = None,
    keep_unchanged: bool = False,
) -> Patch:
    r"""New values of the checkpoint's entries that adapters change: :math:`\mathrm{round}(W + \sum_i w_i \Delta W_i)`,
    added in fp32 and rounded once, as `merge_to_dense` does, to the bit.

    Costs the support, not the weights, where the checkpoint holds a parameter as the model does.

    Args:
        model: has the adapters; its base may be quantised if `base` is given.
        base: where W comes from, the checkpoint that is served: its folder or a plain model. None: the model's own
            dense weights.
        dtype: that of the served weights. None: that of `base`.
        adapter_names: which adapters; None: the active ones. Several are added, the whole anew: patches of single
            adapters cannot be added, for each holds values and not differences.
        weights: w, one an adapter; None: ones.
        only: "support": without heads (`modules_to_save`) and biases; "modules": these alone, as whole tensors. None:
            all.
        keep_unchanged: keep entries whose rounded sum is W itself, which are left out and counted otherwise. With them
            rows and blocks stay runs, and files of them are small.

    Raises:
        ValueError: an adapter is unknown or merged, or changes its weight by a product of factors, which touches every
            entry; its layer has a second name without it, or a weight that is tied to another module's; heads of
            several adapters differ; a weight is quantised and `base` is not given, or `base` lacks it or has another
            shape.
    """
    if only not in (None, "support", "modules"):
        raise ValueError(f"only={only!r} is no part of an adapter; choose 'support', 'modules' or None for both.")
    names = active_adapters(model) if adapter_names is None else list(adapter_names)
    if not names:
        raise ValueError("No adapter of this package is active; pass adapter_names=, or call set_adapter first.")
    given = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(names):
        raise ValueError(f"weights has {len(given)} numbers for {len(names)} adapters; give one each.")
    for name in names:
        adapter_layers(model, adapter_name=name)  # refuses unknown names
    layers = [layer for layer in adapter_layers(model) if any(layer.holds(name) for name in names)]
    refuse_merged(layers)
    refuse_shared_modules(model)  # a patch reaches a module under all of its names
    peft_model = next((module for module in model.modules() if isinstance(module, PeftModel)), None)  # under wrappers
    inner = model if peft_model is None else peft_model.get_base_model()
    places = CheckpointNames(inner)
    stored = base_tensors(places if base is None else base)
    made: list[tuple[WeightPatch, Tensor | None, int]] = []
    if only != "modules":
        for layer in layers:
            _refuse_several_masks(layer, names)
            if only is None:
                _refuse_factors(layer, names)
        for layer in layers:
            made += _changed(layer, list(zip(names, given, strict=True)), places, stored, dtype, only, keep_unchanged)
    if only != "support":
        made += [(one, None, 0) for one in _whole_tensors(inner, layers, names, places, dtype)]
        if base is not None:
            _check_shapes(made, stored)
    found: dict[str, list[tuple[WeightPatch, Tensor | None]]] = {}
    for item, before, _ in made:
        if item.values.numel():
            found.setdefault(item.name, []).append((item, before))
    joined = [_joined(parts) for parts in found.values()]
    digests = {item.name: digest(before) for item, before in joined if before is not None}
    return Patch(tuple(item for item, _ in joined), digests, sum(unchanged for _, _, unchanged in made))


@torch.no_grad()
def patch_between(
    applied: Patch, wanted: Patch | None, base: nn.Module | str | os.PathLike, dtype: torch.dtype | None = None
) -> Patch:
    """The patch that takes a server from `applied` to `wanted` (None: to the base): `wanted`'s values, and the base's
    where only `applied` has an entry. Both were made against `base`, whose weights are served in `dtype` (None: its
    own).

    Raises:
        ValueError: `base` lacks a tensor of `applied` or has another shape of it.
    """
    stored = base_tensors(base)
    targets = {one.name: one for one in (wanted.weights if wanted else ())}
    items, digests = [], {}
    for before in applied.weights:
        after = targets.pop(before.name, None)
        whole = stored(before.name)
        _check_shape(before.name, before.shape, whole)
        whole = whole.to(dtype or before.dtype)
        item, present = _between(before, after, whole.reshape(-1))
        items.append(item)
        digests[item.name] = digest(present)
    for name, after in targets.items():
        items.append(after)
        if wanted.base_digests.get(name):
            digests[name] = wanted.base_digests[name]
    return Patch(tuple(items), digests)


def _between(before: WeightPatch, after: WeightPatch | None, base: Tensor) -> tuple[WeightPatch, Tensor]:
    """The item that changes `before` to `after`, and the values that it replaces."""
    if before.indices is None or (after is not None and after.indices is None):
        present, wanted = base.clone(), base.clone()
        for one, target in ((before, present), (after, wanted)):
            if one is not None:
                target[slice(None) if one.indices is None else one.indices.long()] = one.values
        return weight_patch(before.name, before.shape, wanted, None), present
    held = before.indices.long()
    union = held if after is None else torch.unique(torch.cat((held, after.indices.long())))
    present = base[union]
    wanted = present.clone()
    present[torch.searchsorted(union, held)] = before.values
    if after is not None:
        wanted[torch.searchsorted(union, after.indices.long())] = after.values
    return weight_patch(before.name, before.shape, wanted, union), present


def _joined(parts: list[tuple[WeightPatch, Tensor | None]]) -> tuple[WeightPatch, Tensor | None]:
    """One item of several of one tensor: the checkpoint holds several modules' weights in it."""
    if len(parts) == 1:
        return parts[0]
    indices, order = torch.cat([item.indices for item, _ in parts]).sort()
    values = torch.cat([item.values for item, _ in parts])[order]
    return weight_patch(*parts[0][0][:2], values, indices), torch.cat([before for _, before in parts])[order]


def _refuse_factors(layer: AdapterLayer, names: list[str]) -> None:
    for name in names:
        if layer.holds(name):
            _sparse_pieces(layer, name, None)


def _sparse_pieces(layer: AdapterLayer, adapter_name: str, only: str | None) -> list[Piece]:
    pieces = layer.pieces(adapter_name)
    nonlinear = next((piece for piece in pieces if isinstance(piece, Nonlinear)), None)
    if nonlinear is not None:
        raise nonlinear.refusal()
    dense = [piece for piece in pieces if isinstance(piece, EVERYWHERE)]
    if not dense or (only == "support" and len(dense) < len(pieces)):
        return [piece for piece in pieces if piece not in dense]
    products = any(isinstance(piece, EVERYWHERE[1:]) for piece in dense)
    if only == "support" and not products:
        return []
    raise ValueError(
        f"Adapter '{adapter_name}' changes '{layer.module_name}' by a product of matrices, which touches every entry: "
        "a patch of it is the whole weight. Serve the factors as a LoRA beside the patch, export_patch(only='support') "
        "and export_lora(only='low_rank'), or everything as a dense model, merge_to_dense."
    )


def _refuse_several_masks(layer: AdapterLayer, names: list[str]) -> None:
    masking = [name for name in names if layer.holds(name) and layer.masks_base(name)]
    if len(masking) > 1:
        raise ValueError(
            f"Adapters {masking} all remove weights of '{layer.module_name}', and what two of them remove is removed "
            "once, so that their changes do not add up. Make a patch of one, or a dense model, merge_to_dense."
        )


def _changed(
    layer: AdapterLayer,
    terms: list[tuple[str, float]],
    places: CheckpointNames,
    stored: BaseTensor,
    dtype: torch.dtype | None,
    only: str | None,
    keep_unchanged: bool,
) -> Iterator[tuple[WeightPatch, Tensor, int]]:
    """Items of one layer's weight, the values that each replaces, and how many entries were left out."""
    found = [(summed_entries(_sparse_pieces(layer, n, only)), scale) for n, scale in terms if layer.holds(n)]
    found = [(entries, scale) for entries, scale in found if entries is not None]
    if not found:
        return
    name = places.aliases[layer.weight_name]
    if name in places.tied:
        raise ValueError(
            f"'{layer.module_name}' shares its weight with another module ('{name}'), and a patch would change both, "
            "which the adapter does not. Leave it out of target_modules, or use merge_to_dense, which unties them."
        )
    scaled = [(at.cpu(), values.float().cpu() * scale) for (at, values), scale in found]
    positions = scaled[0][0] if len(scaled) == 1 else torch.unique(torch.cat([at for at, _ in scaled]))
    deltas = [values if at is positions else _spread(positions, at, values) for at, values in scaled]
    if layer.fan_in_fan_out:  # stored as [in, out]
        positions = positions % layer.in_features * layer.out_features + positions // layer.in_features
        positions, order = positions.sort()
        deltas = [term[order] for term in deltas]
    for place in places.to_checkpoint(name, positions):
        whole = stored(place.name)
        _check_shape(place.name, place.shape, whole)
        before = whole.reshape(-1)[place.positions.to(whole.device)].cpu()
        before = before if dtype is None else before.to(dtype)
        after = before.to(torch.promote_types(before.dtype, torch.float32), copy=True)
        for term in deltas:
            after += term if place.order is None else term[place.order]
        after = after.to(before.dtype)
        kept = torch.ones(after.numel(), dtype=torch.bool) if keep_unchanged else differs(before, after)
        item = weight_patch(place.name, place.shape, after[kept], place.positions[kept])
        yield item, before[kept], int((~kept).sum())


def _spread(positions: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """`values` at `at` as values at all of `positions`, zeros elsewhere."""
    return values.new_zeros(positions.numel()).index_copy_(0, torch.searchsorted(positions, at), values)


def _whole_tensors(
    inner: nn.Module,
    layers: list[AdapterLayer],
    names: list[str],
    places: CheckpointNames,
    dtype: torch.dtype | None,
) -> Iterator[WeightPatch]:
    """Heads and trained biases."""
    found = {}
    for name, owner in head_owners(inner, names).items():
        head = inner.get_submodule(name).modules_to_save[owner]
        found |= {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    kinds = {layer.adapter_configs[n].bias for layer in layers for n in names if n in layer.adapter_configs}
    if "all" in kinds:
        found |= {n: p for n, p in places.parameters.items() if n.endswith("bias") and n not in found}
    elif kinds - {"none"}:
        biases = (f"{layer.module_name}.bias" for layer in layers)
        found |= {name: places.parameters[name] for name in biases if name in places.parameters}
    for name, tensor in found.items():
        if places.aliases.get(name) in places.tied:
            raise ValueError(
                f"'{name}' (modules_to_save) is tied to another module's weight in the checkpoint, and a patch would "
                "change both. Use merge_to_dense, which unties them, or only='support' without it."
            )
        if name not in places.stored:
            raise ValueError(f"'{name}' lies in the checkpoint in another form or not at all; use merge_to_dense.")
        served = dtype or (places.parameters[name].dtype if tensor.dtype.is_floating_point else tensor.dtype)
        yield weight_patch(places.stored[name], tuple(tensor.shape), tensor.detach().reshape(-1).to(served), None)


def _check_shapes(made: list[tuple[WeightPatch, Tensor | None, int]], stored: BaseTensor) -> None:
    for item, _, _ in made:
        _check_shape(item.name, item.shape, stored(item.name))


def _check_shape(name: str, shape: tuple[int, ...], whole: Tensor) -> None:
    if tuple(whole.shape) != tuple(shape):
        raise ValueError(
            f"'{name}' is {tuple(whole.shape)} in the base checkpoint and {tuple(shape)} in the adapter's model. Give "
            "the checkpoint that the adapter's base was loaded from."
        )
