"""The tensors of the adapters of one layer: declared once, by `tensor_specs`; everything else follows from it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...optim import note_removed
from ...rules import Follower, ModuleSpace, Rule, TensorSpace, UnitSpace
from ...utils.tensors import TensorSpec
from .tensor_checks import weight_sides


class AdapterTensors(BaseTunerLayer):
    """Base of the adapted layers: containers of tensors keyed by adapter name, and what is done to all of them alike.

    A tuner's layer declares its containers as annotated attributes, `nn.ParameterDict` for what trains and `BufferDict`
    for what is saved beside it, and says in `tensor_specs` which of them an adapter has, of which shape and dtype:

        class CoreLayer(AdapterLayer):
            core_lora_R: nn.ParameterDict

            @classmethod
            def tensor_specs(cls, config, module_name, rows, cols, sizes):
                return [TensorSpec("core_lora_R", (config.r, config.r))]
    """

    prefix: str = ""
    """What the names of the tuner's tensors begin with."""
    adapter_layer_names: tuple[str, ...] = ()
    """Parameters; upstream trains, casts and saves what it finds in them."""
    buffer_names: tuple[str, ...] = ()
    """Buffers without which the parameters mean nothing."""
    saved_names: tuple[str, ...] = ()
    """Both: all tensors that a file holds whether or not a rule runs."""
    training_state_names: tuple[str, ...] = ()
    """Buffers that only a running schedule needs."""
    other_param_names: tuple[str, ...] = ()
    """Everything else that is keyed by adapter."""
    adapter_configs: dict[str, PeftConfig]
    """Config of each adapter of this layer, one object for all of its layers."""
    sizes: dict[str, Any]
    """What was decided for this module when the adapter was added: the part of `tensor_specs` that follows from neither
    the config nor the weight. None where nothing is to decide."""
    _rule_specs: dict[str, dict[str, TensorSpec]]

    brought: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Containers that parts among the options bring (`declare`), by name: "ParameterDict" or "BufferDict"."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._name_containers()

    @classmethod
    def declare(cls, containers: Mapping[str, str]) -> None:
        """Add containers that a part among the options brings, by name: "ParameterDict" for what trains, "BufferDict"
        for what is saved beside it. Layers that are there already get them with the first adapter that has such
        tensors."""
        cls.brought = MappingProxyType({**cls.brought, **containers})
        found = [cls]
        for one in found:
            one._name_containers()
            found += one.__subclasses__()

    @classmethod
    def _name_containers(cls) -> None:
        layers = [base for base in cls.__mro__ if issubclass(base, AdapterTensors)]
        declared = {name: str(kind) for base in layers for name, kind in inspect.get_annotations(base).items()}
        declared |= cls.brought
        cls.adapter_layer_names = tuple(name for name in declared if "ParameterDict" in declared[name])
        cls.buffer_names = tuple(name for name in declared if "BufferDict" in declared[name])
        cls.saved_names = (*cls.adapter_layer_names, *cls.buffer_names)
        values = tuple(name for name in declared if declared[name].startswith("dict["))
        cls.other_param_names = (*cls.buffer_names, *cls.training_state_names, *values)

    def _make_containers(self) -> None:
        # Its own tuples: a part that is registered later adds to the class what this layer has no container of.
        for kind in ("adapter_layer_names", "buffer_names", "saved_names", "other_param_names"):
            setattr(self, kind, self._first_names(kind))
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        for name in (*self.buffer_names, *self.training_state_names):
            setattr(self, name, BufferDict({}, persistent=True))
        for name in self.other_param_names:
            if name not in (*self.buffer_names, *self.training_state_names):
                setattr(self, name, {})

    def _first_names(self, kind: str) -> tuple[str, ...]:
        """Names of the containers of that kind that the layer begins with."""
        return getattr(type(self), kind)

    def _make_brought_containers(self) -> None:
        """Make those that were declared since the layer was made."""
        for name, kind in type(self).brought.items():
            if name in self.saved_names:
                continue
            trained = kind == "ParameterDict"
            setattr(self, name, nn.ParameterDict({}) if trained else BufferDict({}, persistent=True))
            for names in ("adapter_layer_names",) if trained else ("buffer_names", "other_param_names"):
                setattr(self, names, (*getattr(self, names), name))
            self.saved_names = (*self.adapter_layer_names, *self.buffer_names)

    # The declaration

    @classmethod
    def tensor_specs(cls, config: PeftConfig, module_name: str, rows: int, cols: int, sizes: Any) -> list[TensorSpec]:
        """The tensors of an adapter on the module of that name, whose weight is `[rows, cols]`; no model is needed.

        `sizes` is what was decided for the module when the adapter was added, or what its file says.
        """
        raise NotImplementedError

    @classmethod
    def read_sizes(cls, config: PeftConfig, module_name: str, held: Mapping[str, torch.Tensor]) -> tuple[int, int, Any]:
        """Rows and columns of a module's weight, and the `sizes` of its specs, read from its tensors in a file.

        Here, for tuners with nothing to decide: the sides of the tensors that have the weight's (0 where none has).

        Raises:
            ValueError: a tensor that says so is missing or damaged, or says otherwise than the config.
        """
        return *weight_sides(lambda rows, cols: cls.tensor_specs(config, module_name, rows, cols, None), held), None

    @classmethod
    def sizes_to_load(cls, config: PeftConfig, module_name: str, sizes: Any, held: Mapping[str, torch.Tensor]) -> Any:
        """`sizes` with what only the file knows: `held` are its tensors of the module, by name."""
        return sizes

    def specs(self, adapter_name: str) -> dict[str, TensorSpec]:
        """The tensors that the adapter has in this layer, by name."""
        config, sizes = self.adapter_configs[adapter_name], self.sizes[adapter_name]
        found = self.tensor_specs(config, self.module_name, self.out_features, self.in_features, sizes)
        return {spec.name: spec for spec in found}

    def tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The tensors of the adapter that a file holds, by name."""
        held = {name: getattr(self, name) for name in self.saved_names}
        return {name: tensors[adapter_name] for name, tensors in held.items() if adapter_name in tensors}

    def trained_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """The parameters of the adapter in this layer."""
        held = (getattr(self, name) for name in self.adapter_layer_names)
        return [tensors[adapter_name] for tensors in held if adapter_name in tensors]

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has a part of that adapter."""
        return any(adapter_name in getattr(self, name) for name in self.adapter_layer_names)

    def kept_together(self, adapter_name: str) -> Mapping[str | None, tuple[tuple[str, ...], tuple[str, ...]]]:
        """By kind of unit: parameters, and the buffers without which they mean nothing."""
        specs = list(self.specs(adapter_name).values())
        return {
            space: (
                tuple(spec.name for spec in specs if spec.space == space and spec.role == "trained"),
                tuple(spec.name for spec in specs if spec.space == space and spec.role == "saved"),
            )
            for space in dict.fromkeys(spec.space for spec in specs)
        }

    # Allocation

    def set_sizes(self, adapter_name: str, sizes: Any) -> None:
        """Note what was decided for the adapter in this layer."""
        self.sizes[adapter_name] = sizes

    def allocate(self, adapter_name: str) -> None:
        """Allocate the adapter's tensors, in the order of their declaration, with their first content.

        Raises:
            TypeError: a spec has no container of its role.
        """
        self._make_brought_containers()
        for name, spec in self.specs(adapter_name).items():
            trained = spec.role == "trained"
            kind = "ParameterDict" if trained else "BufferDict"
            if name not in (self.adapter_layer_names if trained else self.buffer_names):
                raise TypeError(
                    f"{type(self).__name__} declares '{name}' of role '{spec.role}' and has no {kind} of that name: "
                    f"annotate it in the class, `{name}: {kind}`."
                )
            tensor = spec.allocate()
            getattr(self, name)[adapter_name] = nn.Parameter(tensor) if trained else tensor

    @torch.no_grad()
    def resize(self, adapter_name: str, sizes: Any, kept: Mapping[str, torch.Tensor] | None = None) -> None:
        """Give the adapter other sizes in this layer, in the same parameters, before or after an optimizer holds them.

        `kept` has, by kind of unit, the slots that stay along the axis of that kind, in their new order. Other tensors
        whose shape changes are zero afterwards; those that the sizes leave nothing of are deleted.
        """
        kept = kept or {}
        had_state = any(adapter_name in getattr(self, name) for name in self.training_state_names)
        if had_state:
            self.drop_training_state(adapter_name)  # its shapes follow the others'
        self.set_sizes(adapter_name, sizes)
        self.forget_decoded(adapter_name)
        specs = self.specs(adapter_name)
        for name, old in self.tensors(adapter_name).items():
            held, spec = getattr(self, name), specs.get(name)
            if spec is None:
                if isinstance(old, nn.Parameter):
                    note_removed(old)
                del held[adapter_name]
                continue
            if spec.axis is not None and spec.space in kept:
                new = old.detach().index_select(spec.axis, kept[spec.space])
            elif tuple(old.shape) != spec.shape:
                new = torch.zeros(spec.shape, dtype=old.dtype, device=old.device)
            else:
                continue
            if spec.role == "trained":
                old.data, old.grad = new, None
            else:
                held[adapter_name] = new
        if had_state:
            self.allocate_training_state(adapter_name)

    def compact(self, adapter_name: str) -> None:
        """Shrink the adapter's tensors to the units that live, and free what only rules need."""
        self.drop_training_state(adapter_name)

    def frozen_parameters(self, adapter_name: str) -> int:
        """Numbers of living units that are frozen: they add to the weight and do not train."""
        return 0

    def hold(self, adapter_name: str, config: PeftConfig, sizes: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hold tensors of a file that were checked, as they are: a layer to read from."""
        self.adapter_configs[adapter_name] = config
        self.set_sizes(adapter_name, sizes)
        for name, tensor in tensors.items():
            trained = name in self.adapter_layer_names
            getattr(self, name)[adapter_name] = nn.Parameter(tensor, requires_grad=False) if trained else tensor

    # Units, and the state that rules keep of them

    def unit_spaces(self, adapter_name: str) -> list[UnitSpace]:
        """The unit spaces of an adapter that this layer holds: one for every kind of unit that its trained tensors
        declare, and the module itself."""
        axes: dict[str, list[tuple[str, int]]] = {}
        for name, spec in self.specs(adapter_name).items():
            if spec.role == "trained" and spec.space is not None and adapter_name in getattr(self, name):
                axes.setdefault(spec.space, []).append((name, spec.axis))
        found = [TensorSpace(self, adapter_name, kind, tuple(held)) for kind, held in axes.items()]
        return [*found, ModuleSpace(self, adapter_name)]

    def allocate_training_state(self, adapter_name: str, passing: Collection[str] = ()) -> None:
        """Allocate, at fixed shapes, what the rules of this adapter keep between steps and across a resume."""
        self.allocate_rule_state(adapter_name, self.adapter_configs[adapter_name].rules, passing)

    def allocate_rule_state(self, adapter_name: str, rules: Iterable[Rule], passing: Collection[str] = ()) -> None:
        """Allocate the tensors that `rules` declare for this adapter, as zeros; what is there stays. Of those that are
        there for some steps only (`TensorSpec.passing`), the ones that `passing` names.

        Raises:
            ValueError: two rules declare a tensor of one name and different shapes.
        """
        specs = self._rule_specs.setdefault(adapter_name, {})
        spaces = self.unit_spaces(adapter_name)
        for rule in rules:
            for spec in (s for space in spaces if space.kind in rule.acts_on for s in rule.state(space)):
                if spec.passing and spec.name not in passing:
                    continue
                known = specs.setdefault(spec.name, spec)
                if (known.shape, known.dtype) != (spec.shape, spec.dtype):
                    raise ValueError(
                        f"{type(rule).__name__} keeps '{spec.name}' of shape {spec.shape} in '{self.module_name}', and "
                        f"another rule keeps one of {known.shape}. Give it another name."
                    )
                kind = f"{self.prefix}rule_{spec.name}"
                if not hasattr(self, kind):
                    setattr(self, kind, BufferDict({}, persistent=True))
                    self.training_state_names = (*self.training_state_names, kind)
                    self.other_param_names = (*self.other_param_names, kind)
                self._add_state(kind, adapter_name, torch.zeros(spec.shape, dtype=spec.dtype))

    @classmethod
    def is_training_state(cls, kind: str) -> bool:
        """Whether a tensor of that name is state that only a running rule needs."""
        return kind in cls.training_state_names or kind.startswith(f"{cls.prefix}rule_")

    def rule_state(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The state that rules keep for this adapter here, by the names of their specs."""
        held = {name: getattr(self, f"{self.prefix}rule_{name}") for name in self._rule_specs.get(adapter_name, {})}
        return {name: tensors[adapter_name] for name, tensors in held.items() if adapter_name in tensors}

    def free_rule_state(self, adapter_name: str, names: Iterable[str]) -> None:
        """Free these tensors of it, where they are there."""
        for name in names:
            held = getattr(self, f"{self.prefix}rule_{name}", {})
            if adapter_name in held:
                del held[adapter_name]
            self._rule_specs.get(adapter_name, {}).pop(name, None)

    def rule_followers(self, adapter_name: str, kind: str) -> list[Follower]:
        """The part of it that follows the units of spaces of that kind."""
        specs = self._rule_specs.get(adapter_name, {})
        state = self.rule_state(adapter_name)
        return [Follower(state[name], specs[name].axis) for name in state if specs[name].space == kind]

    def _add_state(self, name: str, adapter_name: str, tensor: torch.Tensor) -> None:
        state = getattr(self, name)
        if adapter_name not in state:
            state[adapter_name] = tensor.to(self.get_base_layer_device())

    def drop_training_state(self, adapter_name: str) -> None:
        """Free what only a running schedule needs, so that it is not shipped with the adapter."""
        for name in self.training_state_names:
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        self._rule_specs.pop(adapter_name, None)

    def forget_decoded(self, adapter_name: str) -> None:
        """Forget what was derived from buffers of this adapter, which have been replaced."""

    # Devices

    def get_base_layer_device(self) -> torch.device | None:
        """Device of the base layer's weight."""
        return self._get_base_layer_device_and_dtype(self.get_base_layer())[0]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Unlike upstream's, this keeps the dtype: values are fp32 masters, also over bf16 and 4-bit bases.
        target = device if device is not None else self.get_base_layer_device()
        if target is None:
            return
        for name in self.adapter_layer_names + self.other_param_names:
            held = getattr(self, name)
            if (
                isinstance(held, (nn.ParameterDict, BufferDict))
                and adapter_name in held
                and not held[adapter_name].is_meta
            ):
                held[adapter_name] = held[adapter_name].to(target)

    def _is_away(self, adapter_name: str) -> bool:
        return next((parameter.is_meta for parameter in self.trained_parameters(adapter_name)), False)
