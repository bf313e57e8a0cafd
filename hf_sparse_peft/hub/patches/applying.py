"""Patches on a plain model, in place, and back to the bit."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...tuners.shared.rollback import uninterrupted
from .checkpoint_names import CheckpointNames
from .patch_files import read_patch
from .weight_patch import Patch, digest

_ATTRIBUTE = "_applied_weight_patch"


class _Held(NamedTuple):
    """Entries of one parameter: where, and the base's values there."""

    positions: Tensor
    """Strictly increasing."""
    base: Tensor


def apply_patch(model: nn.Module, patch: Patch | str | os.PathLike) -> int:
    """Write a patch (or the file or folder of one) into the weights of a plain model; returns the number of entries.

    The base's values at these entries stay in memory until `revert_patch` puts them back, bit for bit. Whole or not at
    all: everything is checked before the first value is written.

    Raises:
        ValueError: a patch is applied already, the model has adapters or other tensors or values than the patch was
            made against, or a weight is quantised.
    """
    if applied_entries(model):
        raise ValueError(
            "A patch is applied to this model, and a second one on top would leave entries of the first. Call "
            "swap_patch to go from one to the other, revert_patch to go back, or make one patch of both adapters, "
            "make_patch(adapter_names=[...])."
        )
    return swap_patch(model, patch)


@torch.no_grad()
def swap_patch(model: nn.Module, patch: Patch | str | os.PathLike) -> int:
    """Go from the patch that is applied, if there is one, to `patch`: its values on its entries, the base's own on
    entries that only the former had. Returns the number of entries of `patch`; raises as `apply_patch` does."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model has adapters of peft; patches are for a plain model. Unload or merge them first.")
    patch = patch if isinstance(patch, Patch) else read_patch(patch)
    names = CheckpointNames(model)
    old: dict[str, _Held] = getattr(model, _ATTRIBUTE, {})
    new, values = _planned(names, patch, old)
    restored = [(name, held.positions, held.base) for name, held in old.items()]
    _write(names, restored + [(name, held.positions, values[name]) for name, held in new.items()])
    setattr(model, _ATTRIBUTE, new)
    return patch.entries


def revert_patch(model: nn.Module) -> int:
    """Put back the base's values, bit for bit; returns the number of entries.

    Raises:
        ValueError: no patch is applied.
    """
    held: dict[str, _Held] | None = getattr(model, _ATTRIBUTE, None)
    if held is None:
        raise ValueError("No patch is applied to this model; apply_patch comes first.")
    _write(CheckpointNames(model), [(name, *one) for name, one in held.items()])
    delattr(model, _ATTRIBUTE)
    return sum(one.positions.numel() for one in held.values())


def applied_entries(model: nn.Module) -> int:
    """Number of entries of the patch that is applied to `model`; 0 without one."""
    return sum(held.positions.numel() for held in getattr(model, _ATTRIBUTE, {}).values())


def _planned(
    names: CheckpointNames, patch: Patch, applied: dict[str, _Held]
) -> tuple[dict[str, _Held], dict[str, Tensor]]:
    """What `patch` writes, by parameter: positions with the base's values there, and the new values."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for weight in patch.weights:
        places = names.to_memory(weight.name, weight.indices, weight.shape)
        before = torch.empty_like(weight.values)
        for place in places:
            parameter = names.parameters[place.name]
            if parameter.dtype != weight.dtype or tuple(parameter.shape) != names.shapes[place.name]:
                raise ValueError(
                    f"'{weight.name}' is {weight.dtype} in the patch, and the model holds '{place.name}' as "
                    f"{parameter.dtype}{'' if parameter.dtype.is_floating_point else ', quantised'}. Load the model in "
                    f"{weight.dtype}, or make the patch with dtype=."
                )
            base = _base_values(parameter, place.positions, applied.get(place.name))
            order = slice(None) if place.order is None else place.order
            before[order] = base.cpu()
            device = parameter.device
            values = weight.values[order].to(device)
            found.setdefault(place.name, []).append((place.positions.to(device), values, base))
        expected = patch.base_digests.get(weight.name)
        if expected is not None and digest(before) != expected:
            raise ValueError(
                f"The model's '{weight.name}' does not have the values that this patch was made against: it is another "
                "checkpoint, or something was merged or trained into it. Load the base checkpoint again."
            )
    held, values = {}, {}
    for name, parts in found.items():
        positions, new, base = parts[0]
        if len(parts) > 1:
            positions, new, base = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            positions, order = positions.sort()
            new, base = new[order], base[order]
            if bool((positions[1:] == positions[:-1]).any()):
                raise ValueError(f"The patch writes entries of '{name}' twice, under two names of one tied weight.")
        held[name], values[name] = _Held(positions, base), new
    return held, values


def _base_values(parameter: Tensor, positions: Tensor, applied: _Held | None) -> Tensor:
    """The base's values at `positions`, under a patch that may be applied."""
    positions = positions.to(parameter.device)
    values = parameter.data.reshape(-1).index_select(0, positions)
    if applied is None or not applied.positions.numel():
        return values
    known, base = applied.positions.to(parameter.device), applied.base.to(parameter.device)
    # A mask of the whole parameter is ten times as fast as a search for each position.
    mask = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device).index_fill_(0, known, True)
    hit = mask.index_select(0, positions).nonzero().view(-1)
    values[hit] = base[torch.searchsorted(known, positions[hit])]
    return values


def _write(names: CheckpointNames, writes: list[tuple[str, Tensor, Tensor]]) -> None:
    """Write values at positions of parameters, one after the other, once all of them were checked."""
    for name, _, values in writes:
        parameter = names.parameters[name]
        if not parameter.data.is_contiguous():
            raise ValueError(f"'{name}' is not contiguous in memory; call contiguous() on it before patching.")
        if parameter.dtype != values.dtype:
            raise ValueError(
                f"'{name}' was cast from {values.dtype} to {parameter.dtype} while a patch was applied; load the base "
                "again, its exact values are lost."
            )
    with uninterrupted():
        for name, positions, values in writes:
            flat = names.parameters[name].data.view(-1)
            flat.index_copy_(0, positions.to(flat.device), values.to(flat.device))
