"""`SparseLoraModel`: injects, saves, checks and combines sparse + low-rank adapters."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from tqdm.auto import tqdm

from .adapter_file import for_file, from_file
from .base_weight import keep_4bit_weight_stable
from .budget import unit_counts
from .combination import add_weighted_adapter
from .compaction import compact
from .config import SparseLoraConfig
from .layer import SparseLoraLayer
from .linear import create_layer


class SparseLoraModel(BaseTuner):
    r"""Sparse + low-rank adapters, :math:`\Delta W = s\,B\,\mathrm{diag}(g)\,A + S`, on dense and quantised linears.

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    prefix: str = "sparse_lora_"
    tuner_layer_cls = SparseLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _selection_bar: tqdm | None = None
    _unit_counts: dict[str, int]
    _targets_of_state_dict: set[str] | None = None
    _unloaded_layers: list[SparseLoraLayer] | None = None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        try:
            super().__init__(model, peft_config, adapter_name, **kwargs)
        except Exception:
            getattr(model, "peft_config", {}).pop(adapter_name, None)
            raise

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Inject the adapter into every target or, where one of them refuses it, into none."""
        if hasattr(nn.ParameterDict, adapter_name) or hasattr(nn.Module(), adapter_name):
            raise ValueError(f"adapter_name={adapter_name!r} is taken by torch's own modules; choose another name.")
        self._targets_of_state_dict = None
        if state_dict is not None:
            self._targets_of_state_dict = {
                key.rsplit(f".{self.prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict
            }
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            _take_out(model, adapter_name)
            raise

    def _prepare_model(self, peft_config: SparseLoraConfig, model: nn.Module) -> None:
        for module in model.modules():  # one repacked layer, adapted or not, cuts the gradient of all before it
            keep_4bit_weight_stable(module)
        self._unit_counts = unit_counts(peft_config, model, self._is_target)
        slow = self._unit_counts and peft_config.criterion == "low_rank_magnitude" and not peft_config.inference_mode
        total = len(self._unit_counts)
        self._selection_bar = tqdm(total=total, desc="Selecting supports", delay=3) if slow else None

    def _is_target(self, peft_config: SparseLoraConfig, key: str) -> bool:
        if self._targets_of_state_dict is not None:
            return key in self._targets_of_state_dict
        return bool(self._check_target_module_exists(peft_config, key))

    def _create_and_replace(
        self,
        peft_config: SparseLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        rank_key = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        alpha_key = get_pattern_key(peft_config.alpha_pattern.keys(), current_key)
        update = {
            "config": peft_config,
            "r": peft_config.rank_pattern.get(rank_key, peft_config.r),
            "lora_alpha": peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha),
            "num_units": self._unit_counts.get(current_key, 0),
            "inference_mode": peft_config.inference_mode,
        }
        if isinstance(target, SparseLoraLayer):
            target.update_layer(adapter_name, **update)
        else:
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            kwargs = get_quantization_kwargs(self.model)
            backend = resolve_quantization_backend(base, **kwargs)
            layer = create_layer(target, adapter_name, current_key, update, backend, **kwargs)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        if getattr(self, "_selection_bar", None) is not None:
            self._selection_bar.update()
            if self._selection_bar.n == self._selection_bar.total:
                self._selection_bar.close()
                self._selection_bar = None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if any(p.is_meta for p in new_module.parameters()):
            # Upstream moves the whole layer around an 8-bit base, which tensors on meta refuse; loading moves them.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Adapter values are fp32 masters by construction; only the wish for the base's dtype needs work.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in sparse_layers(self.model):
            dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
            for name in layer.adapter_layer_names:
                held = getattr(layer, name)
                if adapter_name in held and dtype is not None and dtype.is_floating_point:
                    cast = held[adapter_name].data.to(dtype)
                    held[adapter_name] = nn.Parameter(cast, requires_grad=held[adapter_name].requires_grad)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        layers = sparse_layers(self.model)
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        self._unloaded_layers = layers  # merge_errors() is asked afterwards
        return unloaded

    # Mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in sparse_layers(self.model) for name in layer.sparse_lora_config}
        unknown = sorted({name for name in adapter_names if name != "__base__"} - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        repeated = adapter_names
        if isinstance(beams, int) and beams > 1:
            repeated = [name for name in adapter_names for _ in range(beams)]
        # Beam search repeats the decoder's inputs only: an encoder keeps one name a sample.
        encoder = (
            self.model.get_encoder()
            if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
            else None
        )
        in_encoder = set(encoder.modules()) if encoder is not None else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, adapter_names=adapter_names if module in in_encoder else repeated),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, (SparseLoraLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # Files

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        for layer in sparse_layers(model):
            if adapter_name in layer.sparse_lora_support:
                layer.units(adapter_name)  # a support that is still to be chosen is chosen now, not saved blank
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return for_file(selected, config)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return from_file(remapped, model, config, adapter_name)

    # Adapters together, and at the end

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="svd", **options) -> None:
        """Add an adapter that combines others; see `combination.add_weighted_adapter`."""
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, **options)

    def compact(self, adapter_name: str | None = None, values_dtype: str | None = None) -> None:
        """Drop dead units and components for good; see `compaction.compact`."""
        for name in [adapter_name] if adapter_name else self.active_adapters:
            compact(self.model, self.peft_config[name], name, values_dtype)

    def merge_errors(self) -> dict[str, float]:
        """Relative Frobenius error of each merged quantised weight, by module name: what re-rounding lost."""
        layers = self._unloaded_layers or sparse_layers(self.model)
        return {layer.module_name: layer.merge_error for layer in layers if layer.merge_error is not None}

    def dead_parameters(self) -> int:
        """Trainable numbers that belong to no living unit or component."""
        return sum(
            layer.dead_parameters(name)
            for layer in sparse_layers(self.model)
            for name in layer.sparse_lora_config
            if _is_trainable(layer, name)
        )


def sparse_layers(model: nn.Module) -> list[SparseLoraLayer]:
    """All adapted layers of `model`, in model order."""
    return [module for module in model.modules() if isinstance(module, SparseLoraLayer)]


def _take_out(model: nn.Module, adapter_name: str) -> None:
    """Undo an injection that failed half-way."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, SparseLoraLayer) or adapter_name not in module.sparse_lora_config:
            continue
        if set(module.sparse_lora_config) == {adapter_name}:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
        else:
            module.delete_adapter(adapter_name)


def _is_trainable(layer: SparseLoraLayer, adapter_name: str) -> bool:
    held = [getattr(layer, name) for name in layer.adapter_layer_names]
    return any(adapter_name in tensors and tensors[adapter_name].requires_grad for tensors in held)


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs
