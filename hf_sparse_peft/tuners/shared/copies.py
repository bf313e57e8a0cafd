"""Copies of adapters inside one model: values mean nothing without the support and the masks they belong to.

Reference adapters, moving averages and synchronisation copy *parameters* by name. Supports and masks are buffers and
would stay behind. So an adapter that is added with another one's own config starts as its copy, and an adapter whose
parameters were overwritten with another one's while it was inactive takes that one's buffers when it is activated.
"""

from __future__ import annotations

import warnings

import torch
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .tensors import AdapterTensors


@torch.no_grad()
def copy_adapter(layer: AdapterTensors, source: str, target: str) -> None:
    """Make `target` in this layer what `source` is: parameters, supports, masks and scalings, in storage of its own."""
    layer.set_sizes(target, layer.sizes[source])
    for name in layer.saved_names:
        held = getattr(layer, name)
        if source not in held:
            if target in held:
                del held[target]
        elif isinstance(held, nn.ParameterDict):
            if target not in held:
                held[target] = nn.Parameter(held[source].data.clone(), requires_grad=False)
            held[target].data = held[source].data.clone()
        else:
            held[target] = held[source].clone()
    layer.forget_decoded(target)
    layer.copied_from[target] = source
    (layer.any_dtype.add if source in layer.any_dtype else layer.any_dtype.discard)(target)
    if any(target in getattr(layer, name) for name in layer.training_state_names):
        layer.drop_training_state(target)  # its shapes follow the values'
        layer.allocate_training_state(target)
    note_parameters(layer, [target])


@torch.no_grad()
def copy_heads(model: nn.Module, source: str, target: str) -> None:
    """Copy what else the adapter `source` trains (`modules_to_save`, token embeddings) to `target`."""
    for module in model.modules():
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        if isinstance(module, ModulesToSaveWrapper):
            if source in module.modules_to_save and target in module.modules_to_save:
                module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())
            continue
        by_name = dict(module.named_parameters())
        for name, parameter in by_name.items():
            twin = by_name.get(".".join(target if part == source else part for part in name.split(".")))
            if twin is not None and twin is not parameter and twin.shape == parameter.shape:
                twin.data.copy_(parameter.data)


def tell_copy(source: str, target: str) -> None:
    """Say that `target` is no fresh adapter."""
    warnings.warn(
        f"Adapter '{target}' was added with the config object of adapter '{source}' of this model, so it starts as its "
        f"copy: same supports, same values. For a fresh adapter pass copy.deepcopy(model.peft_config['{source}']).",
        stacklevel=2,
    )


# Parameters that were overwritten


def _parameters(layer: AdapterTensors, kinds: tuple[str, ...], adapter_name: str) -> list[torch.Tensor]:
    return [getattr(layer, kind)[adapter_name].data for kind in kinds if adapter_name in getattr(layer, kind)]


def _fingerprint(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """Sum and sum of squares of each tensor, fp64, left on the device: reading it would wait for the device."""
    if not tensors or any(tensor.is_meta for tensor in tensors):
        return None
    wide = [tensor.double() for tensor in tensors]
    return torch.stack([number for tensor in wide for number in (tensor.sum(), tensor.square().sum())])


@torch.no_grad()
def note_parameters(layer: AdapterTensors, names: list[str]) -> None:
    """Note the parameters of adapters that are not active, to see later whether somebody has written into them."""
    if len(layer.adapter_configs) < 2:
        return
    for name in names:
        for space, (parameters, _) in layer.kept_together(name).items():
            layer.noted_parameters[name, space] = _fingerprint(_parameters(layer, parameters, name))


@torch.no_grad()
def follow_copied_parameters(layer: AdapterTensors, adapter_name: str) -> None:
    """Give an adapter that is about to be activated the buffers of the one whose parameters it was overwritten with.

    Raises:
        ValueError: it was a copy of another adapter, was overwritten with something else, for instance an average, and
            the two have different supports or masks by now.
    """
    for space, (parameters, buffers) in layer.kept_together(adapter_name).items():
        mine = _parameters(layer, parameters, adapter_name)
        noted = layer.noted_parameters.get((adapter_name, space))
        if noted is None or torch.equal(noted, _fingerprint(mine)):
            continue
        others = [
            name
            for name in layer.adapter_configs
            if name != adapter_name
            and _comparable(layer, parameters, adapter_name, name, mine)
            and not _same_buffers(layer, buffers, adapter_name, name)
        ]
        for name in others:
            theirs = _parameters(layer, parameters, name)
            if all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True)):
                for buffer in buffers:
                    if name in (held := getattr(layer, buffer)):
                        held[adapter_name] = held[name].clone()
                layer.forget_decoded(adapter_name)
                break
        else:
            _refuse_mixture(layer, adapter_name, others)


def _comparable(layer: AdapterTensors, kinds: tuple[str, ...], name: str, other: str, mine: list[torch.Tensor]) -> bool:
    theirs = _parameters(layer, kinds, other)
    grids = [getattr(layer.sizes[one], "grid", None) for one in (name, other)]
    return (
        bool(mine)
        and [tensor.shape for tensor in mine] == [tensor.shape for tensor in theirs]
        and [tensor.dtype for tensor in mine] == [tensor.dtype for tensor in theirs]
        and grids[0] == grids[1]
    )


def _same_buffers(layer: AdapterTensors, kinds: tuple[str, ...], name: str, other: str) -> bool:
    for held in (getattr(layer, kind) for kind in kinds):
        if (name in held) != (other in held) or (name in held and not torch.equal(held[name], held[other])):
            return False
    return True


def _refuse_mixture(layer: AdapterTensors, adapter_name: str, others: list[str]) -> None:
    source = layer.copied_from.get(adapter_name)
    if source in others:
        raise ValueError(
            f"Parameters of adapter '{adapter_name}' in '{layer.module_name}' were written while it was inactive, and "
            f"are no copy of those of '{source}', whose support or rank mask has moved since '{adapter_name}' was "
            "copied from it: numbers at the same place belong to different weights. Combine adapters with "
            "model.add_weighted_adapter(...), copy all of it, or train without rules that move it."
        )
    config = layer.adapter_configs[adapter_name]
    if others and not getattr(config, "_writing_told", False):
        config._writing_told = True
        warnings.warn(
            f"Parameters of adapter '{adapter_name}' were written while it was inactive, and its support or rank mask "
            f"differs from that of '{others[0]}'. If they are an average or another mixture with those of "
            f"'{others[0]}', numbers at the same place belong to different weights: use "
            "model.add_weighted_adapter(...), or add the adapter with "
            f"model.peft_config['{others[0]}'] itself, which makes it a copy, before averaging.",
            stacklevel=3,
        )
