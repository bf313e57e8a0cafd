"""What the tuner models share: plans, injection whole or not at all, dtypes, deletion."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from .base_weight import keep_4bit_weight_stable
from .combination import add_weighted_adapter, no_combination
from .copies import copy_adapter, copy_heads, tell_copy
from .fp32_masters import restore_before_ddp
from .heads import (
    check_no_biases,
    drop_heads,
    name_task_heads,
)
from .idle_layers import belongs_to, watch_forwards
from .layer import AdapterLayer, is_supported
from .mixed_batches import MixedBatches
from .model_files import ModelFiles
from .model_merging import ModelMerging
from .model_units import ModelUnits
from .module_patterns import matches
from .names import check_adapter_name
from .parameters import ParameterHost, ParameterWeight, host_of, target_parameters
from .pieces import Piece
from .quantised import backend_of
from .ranks import leave_buffers_to_ranks
from .rollback import unchanged_on_error
from .target_checks import keep_forward, name_left_out, refuse_unworkable, target_layers
from .wrapped_names import plain_name


@dataclass(frozen=True)
class AdapterPlan:
    """What is decided for a whole model before any of its layers changes, by module name."""

    sizes: Mapping[str, Any] = field(default_factory=dict)
    """What `tensor_specs` takes as sizes."""
    first: Mapping[str, Any] = field(default_factory=dict)
    """What a layer starts with, where that is chosen together with other modules'."""
    progress: Any = None
    """A progress bar that each new layer advances, where making one takes long."""


class AdapterModel(ModelFiles, ModelUnits, ModelMerging, MixedBatches, BaseTuner):
    """Base of the tuner models, which say their `prefix`, `tuner_layer_cls` and, the module itself, `linear_cls`."""

    tuner_layer_cls: type[AdapterLayer]
    """By default `linear_cls` itself."""
    linear_cls: type[AdapterLayer]
    parameter_cls: type[AdapterLayer] | None = None
    """The layer over a parameter of `target_parameters`, for tuners whose config has that option."""
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    beside_others: bool = False
    """Whether the model is a mixed one: layers of other tuners may lie around ours."""
    _targets_of_state_dict: set[str] | None = None
    _asked_targets: Any = None
    _copied_from: MappingProxyType[str, str] = MappingProxyType({})
    _plan: AdapterPlan | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "linear_cls" in vars(cls):
            cls.tuner_layer_cls = vars(cls).get("tuner_layer_cls", cls.linear_cls)
            cls.prefix = cls.tuner_layer_cls.prefix

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        check_adapter_name(adapter_name, self.prefix, model)
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
        """Inject the adapter into every target or, where one of them refuses it, into none.

        The adapter gets a copy of its config: sizes and targets that follow from the model are written there, so that
        one config object serves several models and adapters. With the config that another adapter of this model has,
        `model.peft_config[name]` itself, it starts as that one's copy (`adapter_copy`).
        """
        check_adapter_name(adapter_name, self.prefix, model)
        given = self.peft_config[adapter_name]
        source = next((name for name, own in self.peft_config.items() if own is given and name != adapter_name), None)
        self.peft_config[adapter_name] = copy.deepcopy(given)
        self.peft_config[adapter_name].meet_needs()
        name_task_heads(self.peft_config[adapter_name])
        self._asked_targets = given.target_modules
        self._targets_of_state_dict = None
        if state_dict is not None:
            self._targets_of_state_dict = {
                key.rsplit(f".{self.prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict
            }
        with unchanged_on_error(model):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            if self._plan.progress is not None:
                self._plan.progress.close()
            self._plan = None
            for layer in self.adapted_layers():
                belongs_to(layer, model)
            watch_forwards(model)
            restore_before_ddp()
            leave_buffers_to_ranks()
            if source is not None and state_dict is None and not low_cpu_mem_usage:
                for layer in self.adapted_layers():
                    copy_adapter(layer, source, adapter_name)
                self._copied_from = MappingProxyType({**self._copied_from, adapter_name: source})
                tell_copy(source, adapter_name)
            self._check_surplus(adapter_name)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        for module in model.modules():  # one repacked layer, adapted or not, cuts the gradient of all before it
            keep_4bit_weight_stable(module)
        targets = target_layers(peft_config, model, self._is_target)
        targets |= target_parameters(peft_config, model, self._is_target_parameter)
        refuse_unworkable(model, targets)
        if targets and not peft_config.inference_mode and self._targets_of_state_dict is None:
            name_left_out(peft_config, self._asked_targets, model, targets)
        self._plan = self.plan(peft_config, model, {plain_name(name): base for name, base in targets.items()})

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        # Upstream matches patterns with `re`, which cannot be stopped: it is shown their outcome instead.
        shown = copy.copy(peft_config)
        for name in ("target_modules", "exclude_modules"):
            pattern = getattr(peft_config, name)
            if isinstance(pattern, str) and pattern:
                setattr(shown, name, {key} if matches(pattern, key, name) else set())
        return BaseTuner._check_target_module_exists(shown, key)

    def _is_target(self, peft_config: PeftConfig, key: str) -> bool:
        if self._targets_of_state_dict is not None:
            return key in self._targets_of_state_dict
        return bool(self._check_target_module_exists(peft_config, key))

    def _is_target_parameter(self, peft_config: PeftConfig, key: str) -> bool:
        shown = copy.copy(peft_config)
        shown.target_modules = set(peft_config.target_parameters)
        return bool(self._check_target_module_exists(shown, key))

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        unknown = model_config["model_type"] not in self.target_module_mapping
        if peft_config.target_modules is None and unknown and getattr(peft_config, "target_parameters", None):
            peft_config.target_modules = set()
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def plan(self, peft_config: PeftConfig, model: nn.Module, targets: dict[str, Any]) -> AdapterPlan:
        """What is decided for the whole model before a layer of it changes; `targets` are base layers by name.

        Raises:
            ValueError: the adapter does not fit the model.
        """
        return AdapterPlan()

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target.get_base_layer() if isinstance(target, BaseTunerLayer) else None, ParameterWeight):
            return  # named like a target module: the layer over a parameter
        name = plain_name(current_key)  # configs and files know nothing of a compiled base
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kwargs = get_quantization_kwargs(self.model)
        if not is_supported(base, backend_of(base, **kwargs)):
            tuner = self.linear_cls.__name__.removesuffix("Linear")
            raise TypeError(
                f"Target module '{current_key}' of type {type(base).__name__} is not supported. {tuner} adapts "
                "nn.Linear, transformers' Conv1D and quantised linear layers; leave it out with exclude_modules."
            )
        update = self._update_of(peft_config, name, base)
        if self.beside_others and isinstance(target, BaseTunerLayer):
            parent, target_name, target = _next_to_base(parent, target_name, target, self.tuner_layer_cls)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, **update)
            self._advance()
            return
        layer = self.linear_cls(target, adapter_name, name, update, **kwargs)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        keep_forward(self.model, current_key)
        self._advance()

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        found = target_parameters(peft_config, model, self._is_target_parameter)
        for key, weight in found.items():
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._adapt_parameter(peft_config, adapter_name, model, key, weight)
        return list(found)

    def _adapt_parameter(
        self, peft_config: PeftConfig, adapter_name: str, model: nn.Module, key: str, weight: ParameterWeight
    ) -> None:
        name = plain_name(key)
        update = self._update_of(peft_config, name, weight)
        host = host_of(model, weight, key)
        layer = host._modules.get(weight.name)
        if layer is not None:
            layer.update_layer(adapter_name, **update)
        else:
            layer = self.parameter_cls(weight, adapter_name, name, update)
            layer.train(host.training)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(host, weight.name, layer)
        self._advance()

    def _update_of(self, peft_config: PeftConfig, name: str, base: Any) -> dict[str, Any]:
        cols, rows = _get_in_out_features(base)
        sizes, first = self._plan.sizes.get(name), self._plan.first.get(name)
        self._check_file_fits(peft_config, name, rows, cols, sizes)
        return {"config": peft_config, "sizes": sizes, "first": first, "inference_mode": peft_config.inference_mode}

    def _advance(self) -> None:
        if self._plan.progress is not None:
            self._plan.progress.update()

    # Layers

    def adapted_layers(self) -> list[AdapterLayer]:
        """All layers with an adapter of this tuner, in model order."""
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ParameterHost) or any(p.is_meta for p in new_module.parameters()):
            # Upstream moves the whole layer around an 8-bit base, which tensors on meta refuse; loading moves them. And
            # of what a host stands for it asks the weight.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Adapter values are fp32 masters by construction; only the wish for the base's dtype needs work. It holds when
        # a checkpoint is loaded into the adapter, which asks for fp32 whatever the adapter is.
        if adapter_name in self._copied_from:  # the heads were added after the layers, just now
            copied = dict(self._copied_from)
            copy_heads(self.model, copied.pop(adapter_name), adapter_name)
            self._copied_from = MappingProxyType(copied)
        layers = [layer for layer in self.adapted_layers() if adapter_name in layer.adapter_configs]
        if autocast_adapter_dtype and layers and all(adapter_name in layer.any_dtype for layer in layers):
            return
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in layers:
            layer.any_dtype.add(adapter_name)
            dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
            for name in layer.adapter_layer_names:
                held = getattr(layer, name)
                if adapter_name in held and dtype is not None and dtype.is_floating_point:
                    cast = held[adapter_name].data.to(dtype)
                    held[adapter_name] = nn.Parameter(cast, requires_grad=held[adapter_name].requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter with all its parts. Where it was active, what else was active stays so, or else the first
        adapter that is left becomes active, heads included.

        Raises:
            ValueError: no such adapter, it is merged, or it trained the base model's own biases.
        """
        merged = any(adapter_name in layer.merged_adapters for layer in self.adapted_layers())
        if adapter_name in self.peft_config and not merged:  # else peft says so
            stay = "they would stay when it is deleted. Load the base model again instead"
            check_no_biases(self.peft_config, [adapter_name], stay)
            if adapter_name in self.active_adapters:
                self._activate_others(adapter_name)
            drop_heads(self.model, adapter_name)
        super().delete_adapter(adapter_name)

    def _activate_others(self, adapter_name: str) -> None:
        """Make others than that adapter active in every layer and head alike; peft would choose in each by itself."""
        active = [name for name in self.active_adapters if name != adapter_name]
        flags = {name: p.requires_grad for name, p in self.model.named_parameters()}
        if active:
            self.set_adapter(active)
            for name, parameter in self.model.named_parameters():
                if f".{adapter_name}" not in name:
                    parameter.requires_grad_(flags[name])
            return
        left = [name for name in self.peft_config if name != adapter_name]
        if left:
            self.set_adapter(left[0], inference_mode=self.peft_config[left[0]].inference_mode)
            warnings.warn(
                f"Adapter '{adapter_name}' was active and is deleted; '{left[0]}' is active now.", stacklevel=4
            )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> None:
        """Add an adapter that combines others; see `combination.add_weighted_adapter`."""
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, **options)

    def config_of_pieces(self, like: PeftConfig, pieces: dict[str, list[Piece]]) -> PeftConfig:
        """Config of an adapter of this tuner whose update is `pieces`, by module name: at most one `LowRank` of scale 1
        and one `Entries` each. `like` is the config of one of the adapters that it combines, and stays as it is.

        Raises:
            ValueError: this tuner has no such adapter; that is so unless a tuner says how.
        """
        raise no_combination(like.peft_type.value)


def _next_to_base(
    parent: nn.Module, target_name: str, target: nn.Module, kind: type[AdapterLayer]
) -> tuple[nn.Module, str, nn.Module]:
    """In a nest of layers that begins with `target`: the layer of that kind, else the base, with what holds it."""
    while isinstance(target, BaseTunerLayer) and not isinstance(target, kind):
        parent, target_name, target = target, "base_layer", target.base_layer
    return parent, target_name, target
