"""Merging adapters into a dense copy of the model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from ..tuners import AdapterLayer, adapter_layers
from ..tuners.factored import FactoredLayer
from ..tuners.shared.heads import head_owners
from ..tuners.shared.merge import refuse_merged, untie_embeddings, warn_of_biases
from ..tuners.shared.parameters import ParameterHost
from ..tuners.shared.quantised import backend_of
from .folders import staged_folder
from .processors import load_processor


@torch.no_grad()
def merge_to_dense(
    model: nn.Module,
    path: str | os.PathLike | None = None,
    adapter_names: Iterable[str] | None = None,
    weights: Iterable[float] | None = None,
    dtype: torch.dtype | None = None,
    modules_to_save_from: str | None = None,
    tokenizer: Any = "base",
) -> nn.Module:
    r"""A plain, dense model with the adapters (default: the active ones) merged in; `model` itself is left as it is.

    Merged weights are :math:`W + \sum_i w_i \Delta W_i` with `weights` w, one an adapter (default: ones), added in fp32
    and rounded once, to `dtype` (default: what the layer holds or dequantises to). Quantised layers become `nn.Linear`
    with their dequantised weight. Nothing is quantised again, so nothing is lost to a grid. A head that shared its
    weight with the embedding no longer does, and the config says so. With `path` the model is saved there by
    `save_pretrained`, and the tokenizer or processor beside it: that of the base, if its folder or Hub repo has one
    (`tokenizer="base"`), another one, a folder or Hub id of one, or none (None). Peak memory: one dense model beside
    `model`.

    Heads (`modules_to_save`) are those of the one adapter that has them, equal ones, or those of the adapter
    `modules_to_save_from`. Biases are the base model's own and come along.

    Raises:
        ValueError: an adapter is unknown or merged, `weights` has another length, two adapters have different heads,
            another tuner's layer lies underneath, a quantised layer cannot be read, a weight was released and not one
            form alone, of weight 1, takes its place, `path` is not empty, or `tokenizer` is none.
    """
    names = active_adapters(model) if adapter_names is None else list(adapter_names)
    if not names:
        raise ValueError("No adapter of this package is active; pass adapter_names=, or call set_adapter first.")
    given = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(names):
        raise ValueError(f"weights has {len(given)} numbers for {len(names)} adapters; give one each.")
    terms = list(zip(names, given, strict=True))
    for name in names:
        adapter_layers(model, adapter_name=name)  # refuses unknown names
    refuse_merged(adapter_layers(model))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if path is not None and not hasattr(base, "save_pretrained"):
        raise ValueError(f"{type(base).__name__} has no save_pretrained; pass path=None and save the result yourself.")
    owners = head_owners(base, names, modules_to_save_from)
    processor = None if path is None else load_processor(tokenizer, getattr(base, "name_or_path", None))
    if path is None:
        return _merged_copy(base, terms, dtype, owners)
    with staged_folder(path) as stage:
        dense = _merged_copy(base, terms, dtype, owners)
        dense.save_pretrained(stage)
        if processor is not None:
            processor.save_pretrained(stage)
    return dense


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters of this package that are active."""
    held = (n for layer in adapter_layers(model) for n in layer.active_adapters if layer.holds(n))
    return list(dict.fromkeys(held))


def _merged_copy(
    base: nn.Module, terms: list[tuple[str, float]], dtype: torch.dtype | None, heads: dict[str, str]
) -> nn.Module:
    owners: dict[int, int] = {}
    for _, parameter in base.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    kwargs = get_quantization_kwargs(base)
    replaced: dict[int, nn.Module] = {}
    untied, done = False, ()
    biased: dict[str, list[str]] = {}
    for name, module in base.named_modules():
        if done and name.startswith(done):
            continue
        new = _replacement(name, module, terms, kwargs, heads)
        if new is not None:
            replaced[id(module)] = new
            done = (*done, f"{name}.")
            bare = isinstance(module, AdapterLayer) and getattr(module.get_base_layer(), "bias", None) is None
            if bare and getattr(new, "bias", None) is not None:
                biased.setdefault(module.without_biases, []).append(name)
            untied |= any(owners.get(id(p), 0) > 1 for p in _original(module).parameters())
    # What deepcopy finds in its memo it takes: adapted and quantised layers are swapped without being copied first.
    dense = copy.deepcopy(base, dict(replaced))
    _forget_adapters_and_quantisation(dense)
    if untied and getattr(dense, "config", None) is not None:
        untie_embeddings(dense)
    dense.requires_grad_(False)
    for mend, names in biased.items():
        warn_of_biases(names, mend)
    return dense if dtype is None else dense.to(dtype)


def _original(module: nn.Module) -> nn.Module:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    if isinstance(module, ParameterHost):
        return module.base_layer
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _replacement(
    name: str, module: nn.Module, terms: list[tuple[str, float]], kwargs: dict, heads: dict[str, str]
) -> nn.Module | None:
    """What stands in for `module` in the dense copy; None: a copy of itself."""
    if isinstance(module, ParameterHost):
        return _merged_parameters(module, terms)
    if isinstance(module, AdapterLayer):
        return _merged_layer(name, module, terms)
    if isinstance(module, ModulesToSaveWrapper):
        return copy.deepcopy(module.modules_to_save[heads[name]] if name in heads else module.original_module)
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise ValueError(f"'{name}' is a layer of another tuner ({type(module).__name__}); merge or unload that first.")
    backend = backend_of(module, **kwargs)
    if backend is None:
        return None
    return _linear(module, _dequantised(name, backend, module))


def _merged_layer(name: str, layer: AdapterLayer, terms: list[tuple[str, float]]) -> nn.Module:
    base, backend = layer.base_layer, layer.quantization_backend
    if isinstance(base, BaseTunerLayer):
        raise ValueError(
            f"'{name}' wraps a layer of another tuner ({type(base).__name__}); merge or unload that first."
        )
    if isinstance(layer, FactoredLayer):
        held = [term for term in terms if layer.holds(term[0])]
        if layer.released or [scale for _, scale in held] == [1.0]:
            # deepcopy: its bias may be the live layer's.
            return copy.deepcopy(layer.dense_layer(held))
        layer.check_sum([adapter for adapter, _ in held])
    stored = base.weight.data if backend is None else _dequantised(name, backend, base)
    merged, bias = _merged_weight(layer, stored, terms), _merged_bias(layer, stored.dtype, terms)
    if backend is not None:
        new = _linear(base, merged)
    else:
        new = copy.deepcopy(base, {id(base.weight): nn.Parameter(merged, requires_grad=False)})
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new


def _merged_bias(layer: AdapterLayer, dtype: torch.dtype, terms: list[tuple[str, float]]) -> torch.Tensor | None:
    """The bias with what adapters add to it; None: none adds anything."""
    changes = [(layer.bias_change(name), scale) for name, scale in terms if layer.holds(name)]
    changes = [change * scale for change, scale in changes if change is not None]
    if not changes:
        return None
    own = getattr(layer.get_base_layer(), "bias", None)
    return (sum(changes) if own is None else sum(changes, own.float())).to(dtype if own is None else own.dtype)


def _merged_parameters(host: ParameterHost, terms: list[tuple[str, float]]) -> nn.Module:
    merged = {}
    for _, layer in host.parameter_layers():
        own = layer.get_base_layer().weight
        matrix = _merged_weight(layer, layer.get_base_weight(), terms)
        merged[id(own)] = nn.Parameter(matrix.view(own.shape), requires_grad=False)
    return copy.deepcopy(host.base_layer, merged)


def _merged_weight(layer: AdapterLayer, stored: torch.Tensor, terms: list[tuple[str, float]]) -> torch.Tensor:
    merged = stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True)
    terms = [term for term in terms if layer.holds(term[0])]
    several = sum(layer.masks_base(name) for name, _ in terms) > 1
    if several:
        layer.zero_removed_(merged.t() if layer.fan_in_fan_out else merged, terms)
    for adapter_name, scale in terms:
        merged += layer.get_delta_weight(adapter_name, with_removed=not several) * scale
    return merged.to(stored.dtype)


def _dequantised(name: str, backend, module: nn.Module) -> torch.Tensor:
    if backend.layer_type != "linear":
        raise ValueError(
            f"'{name}' is a quantised {backend.layer_type} layer; only linear ones can be dequantised here."
        )
    try:
        return backend.get_base_weight(module)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"'{name}' is quantised with {backend.backend_name}, whose weights cannot be read back ({error}). Load the "
            "base without quantisation and merge there."
        ) from error


def _linear(module: nn.Module, weight: torch.Tensor) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    if getattr(module, "bias", None) is not None:
        new.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return new.train(module.training)


def _forget_adapters_and_quantisation(dense: nn.Module) -> None:
    for name in ("peft_config", "hf_quantizer", "quantization_method"):
        if name in dense.__dict__:
            delattr(dense, name)
    for name in ("_hf_peft_config_loaded", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(dense, name, False):
            setattr(dense, name, False)
    config = getattr(dense, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
