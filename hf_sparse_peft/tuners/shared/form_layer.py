"""Layers whose tensors are those that a registered form among the options declares, under names of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from ...utils.tensors import TensorSpec
from .linear import AdditiveLinear


class NamesOfForms:
    """Names of containers, of all forms that are registered; a layer has those of its own adapters' forms."""

    def __init__(self, *kinds: str, besides: tuple[str, ...] = ()) -> None:
        self.kinds, self.besides = kinds, besides

    def __get__(self, layer: Any, owner: Any = None) -> tuple[str, ...]:
        prefixes = [getattr(owner, kind) for kind in self.kinds]
        return tuple(f"{prefix}{name}" for prefix in prefixes for name in owner.form_names) + self.besides


class FormLayer(AdditiveLinear):
    """A layer with a container for each tensor that the form of one of its adapters declares: `{prefix}{name}` for what
    trains, `{frozen_prefix}{name}` for what is saved beside it."""

    form_names: ClassVar[Mapping[str, None]] = {}
    """Names of the tensors of all forms that there are, in the order in which they were registered; grows."""
    frozen_prefix: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._values = tuple(name for name in cls.other_param_names if name not in cls.buffer_names)
        cls.adapter_layer_names = NamesOfForms("prefix")
        cls.buffer_names = NamesOfForms("frozen_prefix")
        cls.saved_names = NamesOfForms("prefix", "frozen_prefix")
        cls.other_param_names = NamesOfForms("frozen_prefix", besides=cls._values)

    def _first_names(self, kind: str) -> tuple[str, ...]:
        """None but for values: containers come with the adapters that have them."""
        return type(self)._values if kind == "other_param_names" else ()

    @classmethod
    def named(cls, specs: Iterable[TensorSpec]) -> list[TensorSpec]:
        """A form's specs under the names of the containers."""
        return [replace(s, name=f"{cls.prefix if s.role == 'trained' else cls.frozen_prefix}{s.name}") for s in specs]

    def add_containers(self, specs: Iterable[TensorSpec]) -> None:
        """Make the containers that `specs`, under the names of containers, ask for."""
        for spec in specs:
            if hasattr(self, spec.name):
                continue
            if spec.role == "trained":
                setattr(self, spec.name, nn.ParameterDict({}))
                self.adapter_layer_names = (*self.adapter_layer_names, spec.name)
            else:
                setattr(self, spec.name, BufferDict({}, persistent=True))
                self.buffer_names = (*self.buffer_names, spec.name)
                self.other_param_names = (*self.other_param_names, spec.name)
            self.saved_names = (*self.adapter_layer_names, *self.buffer_names)

    def replace_form(
        self, adapter_name: str, config: PeftConfig, sizes: Any, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Give the adapter the form of `config`, with `tensors`, none of which trains; those of the old form that the
        new one has too stay as they are."""
        self.adapter_configs[adapter_name] = config
        self.add_containers(self.tensor_specs(config, self.module_name, self.out_features, self.in_features, sizes))
        self.resize(adapter_name, sizes)
        for name, tensor in tensors.items():
            getattr(self, f"{self.frozen_prefix}{name}")[adapter_name] = tensor

    def hold(self, adapter_name: str, config: PeftConfig, sizes: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hold tensors of a file that were checked, as they are: a layer to read from."""
        self.add_containers(self.tensor_specs(config, self.module_name, self.out_features, self.in_features, sizes))
        super().hold(adapter_name, config, sizes, tensors)

    def form_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The tensors of the adapter's form, by its own names for them."""
        return {
            name.removeprefix(self.frozen_prefix if name in self.buffer_names else self.prefix): tensor
            for name, tensor in self.tensors(adapter_name).items()
        }
