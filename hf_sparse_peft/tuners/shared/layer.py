"""What the adapted layers of every tuner share: their place in the model, training state, mixed batches, warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...rules import Follower, ModuleSpace, Rule, UnitSpace
from ...utils.tensors import TensorSpec
from .copies import follow_copied_parameters, note_parameters
from .fp32_masters import remember_masters, restore_masters
from .idle_layers import note_that_it_runs
from .live_run import first_warning, run_on
from .pieces import Piece


def is_supported(base: nn.Module, backend: Any) -> bool:
    """Whether a tuner can adapt `base`: `nn.Linear`, `Conv1D`, or a quantised linear layer that peft knows."""
    if backend is not None:
        return backend.layer_type == "linear"
    return isinstance(base, (nn.Linear, Conv1D))


class AdapterLayer(BaseTunerLayer):
    r"""A linear layer with additive adapters, :math:`W + \sum \Delta W`, keyed by adapter name.

    A tuner's layer names its tensors in `adapter_layer_names` (trained), `other_param_names` (everything else that is
    keyed by adapter) and `training_state_names` (buffers that only a running schedule needs), and says what an adapter
    is by `adapter_configs`, `holds`, `pieces` and `_adapted`.
    """

    prefix: str = ""
    """What the names of the tuner's tensors begin with."""
    training_state_names: tuple[str, ...] = ()
    copied_state_names: tuple[str, ...] = ()
    """What else than its parameters makes an adapter: buffers and numbers that a copy takes along."""
    kept_together: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    """Parameters, and the buffers without which they mean nothing."""
    saved_names: tuple[str, ...] = ()
    """All tensors that a file holds whether or not a schedule runs."""

    def place_over(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        """Take `base_layer`'s place; the first thing a layer's constructor does."""
        self.base_layer = base_layer
        self.module_name = module_name
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.any_dtype: set[str] = set()
        """Adapters whose dtype is the user's choice: no cast of theirs is undone."""
        self.ran_in_training: set[str] = set()
        self.copied_from: dict[str, str] = {}
        self.noted_parameters: dict[tuple[str, tuple[str, ...]], torch.Tensor | None] = {}
        self._rule_specs: dict[str, dict[str, TensorSpec]] = {}
        base = self.get_base_layer()
        self.in_features, self.out_features = _get_in_out_features(base)
        self.quantization_backend = resolve_quantization_backend(base, **kwargs)
        self.register_load_state_dict_post_hook(_after_loading)

    @property
    def adapter_configs(self) -> dict[str, PeftConfig]:
        """Config of each adapter of this layer, one object for all of its layers."""
        raise NotImplementedError

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has a part of that adapter."""
        raise NotImplementedError

    def unit_spaces(self, adapter_name: str) -> list[UnitSpace]:
        """The unit spaces of an adapter that this layer holds; the module itself is one."""
        return [ModuleSpace(self, adapter_name)]

    def add_gradient_reader(self, adapter_name: str, reader: Callable[[torch.Tensor], None]) -> None:
        """Show `reader` the weight's dense gradient in every backward pass until it is removed.

        Raises:
            ValueError: the tuner's backward pass has none to show.
        """
        raise ValueError(f"{type(self).__name__} computes no dense gradient of '{self.module_name}'.")

    def remove_gradient_reader(self, adapter_name: str, reader: Callable[[torch.Tensor], None]) -> None:
        """Show it no more."""

    # State of rules

    def allocate_training_state(self, adapter_name: str) -> None:
        """Allocate, at fixed shapes, what the rules of this adapter keep between steps and across a resume."""
        self.allocate_rule_state(adapter_name, self.adapter_configs[adapter_name].rules)

    def allocate_rule_state(self, adapter_name: str, rules: Iterable[Rule]) -> None:
        """Allocate the tensors that `rules` declare for this adapter, as zeros; what is there stays.

        Raises:
            ValueError: two rules declare a tensor of one name and different shapes.
        """
        specs = self._rule_specs.setdefault(adapter_name, {})
        spaces = self.unit_spaces(adapter_name)
        for rule in rules:
            for spec in (s for space in spaces if space.kind in rule.acts_on for s in rule.state(space)):
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

    def rule_followers(self, adapter_name: str, kind: str) -> list[Follower]:
        """The part of it that follows the units of spaces of that kind."""
        specs = self._rule_specs.get(adapter_name, {})
        state = self.rule_state(adapter_name)
        return [Follower(state[name], specs[name].axis) for name in state if specs[name].space == kind]

    def _add_state(self, name: str, adapter_name: str, tensor: torch.Tensor) -> None:
        state = getattr(self, name)
        if adapter_name not in state:
            state[adapter_name] = tensor.to(self.get_base_layer_device())

    def forget_decoded(self, adapter_name: str) -> None:
        """Forget what was derived from buffers of this adapter, which have been replaced."""

    def drop_training_state(self, adapter_name: str) -> None:
        """Free what only a running schedule needs, so that it is not shipped with the adapter."""
        for name in self.training_state_names:
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        self._rule_specs.pop(adapter_name, None)

    # Dtype of what trains

    def train(self, mode: bool = True) -> AdapterLayer:
        """Set the training mode, as every module; values that were cast since injection are fp32 again for it."""
        nn.Module.train(self, mode)
        if mode:
            restore_masters(self)
            remember_masters(self)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> AdapterLayer:
        nn.Module._apply(self, *args, **kwargs)  # other storage: moved, or cast
        note_parameters(self, [name for name, _ in self.noted_parameters])
        remember_masters(self)
        return self

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters and, without `inference_mode`, train them and no others.

        Raises:
            ValueError: the parameters of one were overwritten meanwhile with numbers that fit no support of this layer.
        """
        asked, active = [adapter_names] if isinstance(adapter_names, str) else adapter_names, self.active_adapters
        for name in asked:
            if name not in active and self.holds(name):
                follow_copied_parameters(self, name)
        super().set_adapter(adapter_names, inference_mode)
        fresh = {name for name, _ in self.noted_parameters}
        held = [name for name in self.adapter_configs if self.holds(name) and name not in asked]
        note_parameters(self, [name for name in held if name in active or name not in fresh])
        remember_masters(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter from this layer."""
        self.any_dtype.discard(adapter_name)
        self.copied_from.pop(adapter_name, None)
        self.noted_parameters = {k: v for k, v in self.noted_parameters.items() if k[0] != adapter_name}
        super().delete_adapter(adapter_name)
        remember_masters(self)

    # Base weights and deltas

    def get_base_layer_device(self) -> torch.device | None:
        """Device of the base layer's weight."""
        return self._get_base_layer_device_and_dtype(self.get_base_layer())[0]

    def dense_base_weight(self) -> torch.Tensor:
        """The base weight as `[out, in]`, dequantised if need be; for dense layers it shares the layer's memory."""
        weight = self.get_base_weight()
        return weight.t() if self.fan_in_fan_out else weight

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores its weight as `[in, out]`."""
        return type(self.get_base_layer()).__name__ == "Conv1D" and self.quantization_backend is None

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The adapter's update as a dense fp32 `[out, in]` matrix, `[in, out]` where the base stores it so."""
        delta = torch.zeros(self.out_features, self.in_features, device=self.get_base_layer_device())
        self._add_delta_(delta, adapter_name)
        return delta.t() if self.fan_in_fan_out else delta

    def _add_delta_(self, weight: torch.Tensor, adapter_name: str) -> None:
        """Add the adapter's update to the `[out, in]` matrix `weight`, fp32 or wider, in place."""
        for piece in self.pieces(adapter_name):
            piece.add_(weight)

    def pieces(self, adapter_name: str) -> list[Piece]:
        """What the adapter adds to this layer's `[out, in]` weight: its update is the sum of the pieces, in this order.
        Their tensors may be the adapter's own and are only read. Empty where the adapter has no part of this layer.
        """
        raise NotImplementedError

    def write_pieces(self, adapter_name: str, pieces: list[Piece]) -> None:
        """Fill an adapter that was allocated by the model's `config_of_pieces` for these pieces."""
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is additive, so peft may fit a LoRA to it."""
        return True

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

    # Forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Output of the base layer plus the active adapters' updates.

        `adapter_names` (one name a sample, `"__base__"` for none) runs a mixed batch.

        Raises:
            ValueError: `adapter_names` has another length than the batch, or comes with merged adapters.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        active = [name for name in self.active_adapters if self.holds(name)]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if not x.is_meta and self._is_away(active[0]):
            raise ValueError(
                f"The tensors of adapter '{active[0]}' in '{self.module_name}' are on the meta device: the model was "
                "offloaded (accelerate's cpu_offload, disk_offload, dispatch_model) after the adapter was added, or "
                "the adapter was never loaded. Load the base without offload, device_map={'': 0}."
            )
        if self.training and not torch.compiler.is_compiling():
            note_that_it_runs(self, active)
            if torch.is_grad_enabled():
                self._before_training(active)
        return self._adapted(x, active, *args, **kwargs)

    def _adapted(self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Output with the adapters `names`, at least one, all held."""
        raise NotImplementedError

    def _mixed_batch(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter`."
            )
        result = None
        for name in sorted(set(adapter_names)):
            rows = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
            part = x.index_select(0, rows)
            y = (
                self._adapted(part, [name], *args, **kwargs)
                if self.holds(name)
                else self.base_layer(part, *args, **kwargs)
            )
            result = y.new_empty(len(x), *y.shape[1:]) if result is None else result
            result = result.index_copy(0, rows, y)
        return result

    def _is_away(self, adapter_name: str) -> bool:
        held = (getattr(self, kind) for kind in self.adapter_layer_names)
        return next((one[adapter_name].is_meta for one in held if adapter_name in one), False)

    def _before_training(self, active: list[str]) -> None:
        """Asked in every training forward: may these adapters train as they are?"""
        restore_masters(self)
        self._notice_frozen(active)
        self._notice_missing_callbacks(active)

    def _notice_frozen(self, active: list[str]) -> None:
        configs = [self.adapter_configs[name] for name in active]
        if not active or any(not config.inference_mode or getattr(config, "_frozen_told", False) for config in configs):
            return
        held = [getattr(self, kind) for kind in self.adapter_layer_names]
        if any(one[name].requires_grad for one in held for name in active if name in one):
            return
        for config in configs:
            config._frozen_told = True
        warnings.warn(
            f"Adapter '{active[0]}' was loaded with is_trainable=False (peft's default) and stays as it is in this "
            "training. To train it, load it with PeftModel.from_pretrained(base, path, is_trainable=True).",
            stacklevel=2,
        )

    def _notice_missing_callbacks(self, active: list[str]) -> None:
        run = run_on(self)  # also ends one that was broken off, before it could act on this one
        for name in active:
            config = self.adapter_configs[name]
            if not config.has_schedule:
                continue
            attended = set() if run is None else run.attended(config)
            asked = [option for option in config.asked_schedules if option not in attended]
            config.check_runnable()
            if not asked or not first_warning(config):
                continue
            warnings.warn(
                f"Adapter '{name}' asks for {', '.join(asked)}, and it trains without the callback that does it: "
                f"{config.unattended} Pass callbacks=hf_sparse_peft.callbacks_for(model) to the Trainer, or set "
                f"{_without(asked, config)} in its {type(config).__name__}.",
                stacklevel=2,
            )


def _without(asked: list[str], config: PeftConfig) -> str:
    fields = [name for name in asked if hasattr(config, name)]
    said = [f"{name} to None" for name in fields] + (["schedule=[]"] if len(fields) < len(asked) else [])
    return " and ".join(said)


def _after_loading(layer: AdapterLayer, incompatible_keys: Any) -> None:
    note_parameters(layer, [name for name in layer.adapter_configs if name not in layer.active_adapters])
    remember_masters(layer)


def adapter_layers(model: nn.Module, adapter_name: str | None = None) -> list[AdapterLayer]:
    """All layers of `model` with an adapter of this package, of whichever tuner, in model order; with `adapter_name`
    those that this adapter reaches.

    Raises:
        ValueError: `model` has no adapter of that name.
    """
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    if adapter_name is None:
        return layers
    reached = [layer for layer in layers if adapter_name in layer.adapter_configs]
    if not reached:
        known = sorted({name for layer in layers for name in layer.adapter_configs})
        raise ValueError(
            f"adapter_name={adapter_name!r} is no adapter of this package on this model; it has {known or 'none'}."
        )
    return reached


def restore_fp32(model: nn.Module) -> None:
    """Give trained adapters of `model` back the fp32 values that somebody cast to bf16 or fp16 since they were added.

    `model.train()`, the first training forward, DistributedDataParallel taking the model over and the callbacks of this
    package do so by themselves. Adapters that were added with `autocast_adapter_dtype=False` keep their dtype.
    """
    for layer in adapter_layers(model):
        restore_masters(layer, wrapped=False)
