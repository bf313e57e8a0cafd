"""What the tuners share in writing and reading adapter files: all of an adapter is written, and what is read is checked
against the model, every tensor before one is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .config import AdapterConfig
from .file_check import PREFIX, file_being_loaded, is_head
from .layer import AdapterLayer
from .tensor_checks import check_module, check_numbers
from .wrapped_names import plain_name

SOURCE = "the adapter file"


def check_layer(state_dict: dict[str, torch.Tensor], prefix: str, layer: AdapterLayer, adapter_name: str) -> Any:
    """Check the file's tensors of one layer, and give `state_dict` copies in the layer's dtypes.

    Returns the adapter's sizes in this layer, those of the file where only that knows them.

    Raises:
        ValueError: a tensor is missing, surplus, of another dtype or shape, not finite, or fails its spec's own check:
            a support that is truncated, out of range, unsorted, duplicated or made for another base; names the tensor.
    """

    def key_of(name: str) -> str:
        return f"{prefix}{name}.{adapter_name}"

    held = {name: state_dict[key_of(name)] for name in layer.saved_names if key_of(name) in state_dict}
    sizes, specs = None, []
    if adapter_name in layer.adapter_configs:
        config, rows, cols = layer.adapter_configs[adapter_name], layer.out_features, layer.in_features
        sizes = layer.sizes_to_load(config, layer.module_name, layer.sizes[adapter_name], held)
        specs = layer.tensor_specs(config, layer.module_name, rows, cols, sizes)
    for name in set(layer.saved_names) - {spec.name for spec in specs}:
        # The file's own names for a tensor that the layer does not have, which upstream cannot map.
        unmapped = [key for key in (f"{prefix}{name}", f"{PREFIX}{prefix}{name}") if key in state_dict]
        if unmapped:
            held[name] = state_dict[unmapped[0]]
    check_module(held, specs, key_of, SOURCE)
    for spec in specs:
        # The file may hold bf16, masters are fp32. A copy, because with low_cpu_mem_usage the layer would keep the
        # mapped file itself, and BLAS rounds by how its operands are aligned.
        key = key_of(spec.name)
        state_dict[key] = _cast(held[spec.name], getattr(layer, spec.name)[adapter_name].dtype, key)
    return sizes


def check_others(
    state_dict: dict[str, torch.Tensor],
    model: nn.Module,
    config: AdapterConfig,
    adapter_name: str,
    layer_cls: type[AdapterLayer],
    biases: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> None:
    """Check what stands beside the layers' tensors, which were checked: heads, biases, embeddings; nothing else may.

    `biases` picks those that train from a state dict. Biases of heads that `bias="all"` saves twice are taken out.

    Raises:
        ValueError: a tensor is not the adapter's, is missing, or does not fit the model's; names it.
    """
    state = model.state_dict()
    heads = {
        f"{name}.{target}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for target in module.adapter_state_dict_load_map(adapter_name).values()
    }
    trained_biases = set(biases(state))
    file = file_being_loaded()
    declared = (config, *([] if file is None else [file.config]))  # a resumed run's own config knows of none yet
    embeddings = {key for one in declared for key in one.saved_base_weights or ()}
    by_plain_name = {plain_name(key): key for key in state}  # files know nothing of a compiled base
    for key, tensor in list(state_dict.items()):
        parts = key.split(".")
        own = parts[-2] in layer_cls.saved_names or layer_cls.is_training_state(parts[-2])
        if parts[-1] == adapter_name and own and key in state:
            continue
        if any(layer_cls.is_training_state(part) for part in parts[-2:]):
            continue
        place = by_plain_name.get(plain_name(key), by_plain_name.get(plain_name(key).removeprefix(PREFIX), key))
        if place not in heads and config.bias == "all" and parts[-1] == "bias" and "modules_to_save" in parts:
            del state_dict[key]
        elif place in state and (place in heads or place in trained_biases or _in_file(place) in embeddings):
            del state_dict[key]
            state_dict[place] = _fitting(tensor, state[place], key)  # a copy, as in check_layer
        elif file is None and place in state and _equal(tensor, state[place]):
            # Upstream adds the base's embedding under an adapted one, which configs of files alone declare.
            del state_dict[key]
        else:
            raise ValueError(
                f"'{key}' in {SOURCE} has no place in this model: it is not adapted there, or it is not the adapter's. "
                "Load the adapter on the base that it was trained on, with the config saved with it."
            )
    for place in sorted(trained_biases):
        inside_head = {"modules_to_save", "original_module"} & set(place.split("."))
        if not inside_head and place not in state_dict:
            raise ValueError(f"'{place}' is missing from {SOURCE}: its config has bias={config.bias!r}.")


def _equal(tensor: torch.Tensor, held: torch.Tensor) -> bool:
    return tensor.dtype == held.dtype and not held.is_meta and torch.equal(tensor.to(held.device), held)


def _in_file(key: str) -> str:
    plain = plain_name(key)
    return plain if plain.startswith(PREFIX) else PREFIX + plain


def _fitting(tensor: torch.Tensor, held: torch.Tensor, key: str) -> torch.Tensor:
    check_numbers(tensor, key, SOURCE, trained=held.is_floating_point())
    if tensor.is_floating_point() != held.is_floating_point() or tensor.shape != held.shape:
        raise ValueError(
            f"'{key}' in {SOURCE} is {tensor.dtype} of shape {tuple(tensor.shape)}, and the model's is {held.dtype} of "
            f"{tuple(held.shape)}. Load the adapter on the base that it was trained on."
        )
    return _cast(tensor, held.dtype, key)


def _cast(tensor: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    if not dtype.is_floating_point and tensor.dtype != dtype:
        raise ValueError(f"'{key}' in {SOURCE} is {tensor.dtype}; it takes {dtype}. Save the adapter again.")
    cast = tensor.to(dtype, copy=True)
    if dtype.is_floating_point and dtype != tensor.dtype and not torch.isfinite(cast).all():
        raise ValueError(
            f"'{key}' in {SOURCE} has values that are not finite in {dtype}, which the model keeps it in. Load the "
            "base in a wider dtype."
        )
    return cast


def check_complete(state_dict: dict[str, torch.Tensor], model: nn.Module, adapter_name: str) -> None:
    """Refuse to save an adapter from a state dict that does not have all of it.

    Raises:
        ValueError: a tensor of the adapter's layers or heads is not in `state_dict`, or the adapter has none at all.
    """
    expected = []
    for name, module in model.named_modules():
        name = name.removeprefix("_fsdp_wrapped_module.")  # as peft does; the state dict of FSDP has no such names
        if isinstance(module, AdapterLayer):
            kinds = [kind for kind in _kinds(module) if adapter_name in getattr(module, kind)]
            expected += [f"{name}.{kind}.{adapter_name}".removeprefix(".") for kind in kinds]
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            inside = f"{name}.modules_to_save.{adapter_name}."
            expected += [inside + key for key in module.modules_to_save[adapter_name].state_dict()]
    missing = [key for key in expected if key not in state_dict]
    if missing:
        raise ValueError(
            f"The state dict to save adapter '{adapter_name}' from lacks {len(missing)} of its {len(expected)} "
            f"tensors, '{missing[0]}' first; it has {sorted(state_dict)[:2]}. Pass the state dict of the whole model, "
            "buffers included, or none (DeepSpeed ZeRO-3: stage3_gather_16bit_weights_on_model_save=true)."
        )
    if not expected:
        raise ValueError(f"Adapter '{adapter_name}' has no tensor in any layer; there is nothing to save.")


def _kinds(layer: AdapterLayer) -> list[str]:
    names = (*layer.adapter_layer_names, *layer.other_param_names)
    return [
        name
        for name in names
        if isinstance(held := getattr(layer, name), nn.ParameterDict)
        or (isinstance(held, BufferDict) and held.persistent)
    ]


def fit_training_state(
    state_dict: dict[str, torch.Tensor], prefix: str, layer: AdapterLayer, adapter_name: str
) -> None:
    """Fit the file's training state to the layer's: a run that goes on gets its own, nobody else does.

    Raises:
        ValueError: a tensor of it has another dtype or shape than the layer's, or is not finite; names it.
    """
    trained = any(
        adapter_name in held and held[adapter_name].requires_grad
        for held in (getattr(layer, kind) for kind in layer.adapter_layer_names)
    )
    for kind in _state_names(state_dict, prefix, layer):
        key = f"{prefix}{kind}.{adapter_name}"
        # The file's own names for a buffer that the layer does not have (any more), which upstream cannot map.
        for unmapped in (f"{prefix}{kind}", plain_name(f"{prefix}{kind}"), _in_file(f"{prefix}{kind}")):
            if unmapped in state_dict:
                state_dict[key] = state_dict.pop(unmapped)
        held = getattr(layer, kind, {})
        if adapter_name not in held and trained and key in state_dict:
            # A finished run freed it, and goes on from a checkpoint; or it is there at some steps only.
            layer.allocate_training_state(adapter_name, passing=[kind.removeprefix(f"{layer.prefix}rule_")])
            held = getattr(layer, kind, {})
        if adapter_name not in held:
            state_dict.pop(key, None)
        elif key not in state_dict:
            state_dict[key] = torch.zeros_like(held[adapter_name])
        else:
            state_dict[key] = _fitting(state_dict[key], held[adapter_name], key)


def _state_names(state_dict: dict[str, torch.Tensor], prefix: str, layer: AdapterLayer) -> list[str]:
    """Names of state that the layer has, or that the file has for it."""
    here = (prefix, plain_name(prefix), _in_file(prefix))
    found = {
        part
        for key in state_dict
        for start in here
        if key.startswith(start)
        for part in [key.removeprefix(start).partition(".")[0]]
        if layer.is_training_state(part)
    }
    return list(dict.fromkeys([*layer.training_state_names, *sorted(found)]))


class SelectedTensors(dict):
    """The tensors that an adapter is saved as. What upstream adds that is no head is a weight of the base, an embedding
    whose vocabulary was resized: the config says so, or no loader would accept it."""

    def __init__(self, tensors: dict[str, torch.Tensor], config: AdapterConfig) -> None:
        super().__init__(tensors)
        self.config = config
        config.saved_base_weights = None

    def update(self, more: dict[str, torch.Tensor]) -> None:
        # Upstream adds resized embeddings by name, and of those that are heads the parts of the wrapper once more.
        more = {key: t for key, t in more.items() if not {"original_module", "modules_to_save"} & set(key.split("."))}
        base = [key for key in more if not is_head(key, self.config.modules_to_save)]
        if base:
            named = {_in_file(key) for key in base}
            self.config.saved_base_weights = sorted(named | set(self.config.saved_base_weights or ()))
        super().update(more)
