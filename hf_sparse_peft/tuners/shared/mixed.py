"""Adapters of this package beside others' in one model, `get_peft_model(base, config, mixed=True)`.

    q_proj                          lora.Linear          others' layers outside, as peft nests them
    q_proj.base_layer               SparseLoraLinear     ours next to the base, whose product it fuses
    q_proj.base_layer.base_layer    nn.Linear

Files do not know of the nesting: each adapter is saved as from a model of its own, and loads there.
"""

from __future__ import annotations

import os
from functools import reduce
from operator import or_
from typing import Any

import peft.mixed_model
import peft.tuners.mixed.model as upstream
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import AdapterConfig
from .layer import AdapterLayer, adapter_layers
from .model import AdapterModel
from .model_units import ModelUnits
from .registration import TUNERS


class MixedAdapters(ModelUnits, MixedModel):
    """peft's `MixedModel`, with adapters of this package among those that it takes."""

    def __init__(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        try:
            super().__init__(model, config, adapter_name)
        except Exception:
            getattr(model, "peft_config", {}).pop(adapter_name, None)
            raise

    def adapted_layers(self) -> list[AdapterLayer]:
        """All layers with an adapter of this package, in model order."""
        return adapter_layers(self.model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter; one of this package whole or not at all (`AdapterModel.inject_adapter`).

        Raises:
            ValueError: the config asks for what cannot be had beside other adapters: `target_parameters`, biases.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, AdapterConfig):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        _check(config)
        tuner = self._tuner(config)
        tuner.inject_adapter(self.model, adapter_name, *args, **kwargs)  # peft passes itself, by other names

    def _tuner(self, config: PeftConfig) -> AdapterModel:
        """The tuner of `config` at work on this model."""
        tuner = TUNERS[config.peft_type].__new__(TUNERS[config.peft_type])
        nn.Module.__init__(tuner)
        for name in ("model", "peft_config", "active_adapter", "targeted_module_names", "targeted_parameter_names"):
            setattr(tuner, name, getattr(self, name))
        tuner.beside_others = True
        return tuner

    @staticmethod
    def _create_new_module(config: PeftConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if (
            type(config) is LoraConfig
        ):  # upstream's checks keep quantised bases from all types; LoRA has layers for them
            return LoraModel._create_new_module(config, adapter_name, target, **kwargs)
        return MixedModel._create_new_module(config, adapter_name, target, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        config = self.peft_config[adapter_name]
        if isinstance(config, AdapterConfig):
            self._tuner(config)._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        else:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def compact(self, adapter_name: str | None = None, **options: Any) -> None:
        """Shrink adapters of this package (default: the active ones) to their living units (`ModelUnits.compact`)."""
        for name in [adapter_name] if adapter_name else self.active_adapters:
            if isinstance(self.peft_config[name], AdapterConfig):
                self._tuner(self.peft_config[name]).compact(name, **options)

    # Merging: others' layers write into the base weight, and ours put another one in its place. So ours go first, and
    # are undone last.

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (default: the active ones) into the base weights.

        Where it ends early, what was merged is taken out again: bit for bit where a layer of this package is, and as
        exactly as peft takes LoRA out where there is none.
        """
        self._check_merge_allowed()
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        before = list(dict.fromkeys(name for layer in layers for name in layer.merged_adapters))
        names = self.active_adapters if adapter_names is None else adapter_names
        if before:
            self.unmerge_adapter()
        try:
            self._merge(layers, [*before, *(name for name in names if name not in before)], safe_merge)
        except BaseException:
            self.unmerge_adapter()
            if before:
                self._merge(layers, before, False)
            raise

    def _merge(self, layers: list[BaseTunerLayer], names: list[str], safe_merge: bool) -> None:
        for layer in [one for one in reversed(layers) if isinstance(one, AdapterLayer)]:
            layer.merge(safe_merge=safe_merge, adapter_names=names)
        for layer in [one for one in layers if not isinstance(one, AdapterLayer)]:
            layer.merge(safe_merge=safe_merge, adapter_names=names)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights."""
        for layer in (module for module in self.model.modules() if isinstance(module, BaseTunerLayer)):
            if layer.merged:
                layer.unmerge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(False, progressbar, safe_merge, adapter_names)


def _check(config: AdapterConfig) -> None:
    if getattr(config, "target_parameters", None):
        raise ValueError(
            f"target_parameters={config.target_parameters} cannot be had in a mixed model: peft nests layers there, "
            "and a parameter has none. Leave them out, or use get_peft_model without mixed=True."
        )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"bias={config.bias!r} cannot be had in a mixed model: the base's biases would be several adapters' at "
            "once. Set bias='none'."
        )


def serve_mixed_models() -> None:
    """Let peft's mixed models take adapters of this package; does nothing the second time."""
    if peft.mixed_model.MixedModel is MixedAdapters:
        return
    peft.mixed_model.MixedModel = MixedAdapters
    upstream.Configs = reduce(or_, (*upstream.Configs.__args__, AdapterConfig))
    upstream.Layers = (*upstream.Layers, AdapterLayer)
    # peft's prefix of LoRA lies within ours; tuners from outside have theirs.
    PeftMixedModel.save_pretrained = _save_pretrained
    PeftMixedModel.create_or_update_model_card = _no_card
    PeftMixedModel._get_base_model_class = PeftModel._get_base_model_class


def _save_pretrained(
    self: PeftMixedModel,
    save_directory: str | os.PathLike,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    **kwargs: Any,
) -> None:
    """Write each adapter into a folder of its name, "default" into `save_directory` itself, as `PeftModel` does; each
    loads in a model of its own or in a mixed one."""
    PeftModel.save_pretrained(self, save_directory, safe_serialization, selected_adapters, **kwargs)


def _no_card(self: PeftMixedModel, output_dir: str) -> None:
    return None
