"""What the adapted layers of every tuner share: their place in the model, training state, mixed batches, warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from .base_weight import gathered_weight
from .calibration import CalibratedTensors
from .config import AdapterConfig
from .copies import follow_copied_parameters, note_parameters
from .fp32_masters import remember_masters, restore_masters
from .idle_layers import note_that_it_runs
from .live_run import first_warning, run_on
from .parameters import ParameterWeight
from .pieces import BaseMask, Piece, zero_removed_
from .quantised import backend_of


def is_supported(base: nn.Module, backend: Any) -> bool:
    """Whether a tuner can adapt `base`: `nn.Linear`, `Conv1D`, a quantised linear layer that peft knows, or a matrix of
    a parameter."""
    if backend is not None:
        return backend.layer_type == "linear"
    return isinstance(base, (nn.Linear, Conv1D, ParameterWeight))


class AdapterLayer(CalibratedTensors):
    r"""A linear layer with additive adapters, :math:`W + \sum \Delta W`, keyed by adapter name.

    A tuner's layer declares its tensors (`AdapterTensors`), says what an adapter does by `pieces` and `_adapted` and,
    where it starts from data, what it reads of them (`CalibratedTensors`).
    """

    without_biases: ClassVar[str] = ""
    """How its merged layers do without biases that the architecture has no place for, for a warning."""
    passive_gradient_reader: Callable[[torch.Tensor], None] | None = None
    """Shown the weight's dense gradient `[out, in]` in every eager backward pass, where the tuner computes one, without
    any effect on training; set and taken off by diagnostics."""

    def place_over(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        """Take `base_layer`'s place; the first thing a layer's constructor does."""
        self.base_layer = base_layer
        self.module_name = module_name
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.any_dtype: set[str] = set()
        """Adapters whose dtype is the user's choice: no cast of theirs is undone."""
        self.ran_in_training: set[str] = set()
        self.assumed: set[str] = set()
        """Adapters whose units and start are assumed (`assume_units`)."""
        self.copied_from: dict[str, str] = {}
        self.noted_parameters: dict[tuple[str, str | None], torch.Tensor | None] = {}
        self._make_containers()
        base = self.get_base_layer()
        self.in_features, self.out_features = _get_in_out_features(base)
        self.quantization_backend = backend_of(base, **kwargs)
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)

    def update_layer(
        self,
        adapter_name: str,
        config: AdapterConfig,
        sizes: Any = None,
        first: Any = None,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter to this layer.

        `sizes` and `first` are what the tuner's plan says of the module: its sizes, and what it starts with.

        Raises:
            ValueError: they do not fit the weight.
        """
        self.adapter_configs[adapter_name] = config
        self.set_sizes(adapter_name, sizes)
        self.allocate(adapter_name)
        self._begin(adapter_name, first)
        if config.has_schedule and not config.inference_mode:
            self.allocate_training_state(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def assume_units(self, adapter_name: str) -> None:
        """On the meta device: take as many units as the adapter starts with to be chosen, at places that nobody knows,
        so that a step can be followed for the shapes that it makes, and as if data had been seen where it waits for
        that."""
        self.assumed.add(adapter_name)

    def _begin(self, adapter_name: str, first: Any) -> None:
        """Write what the new adapter starts with, where that is more than its tensors' first content."""

    def add_gradient_reader(self, adapter_name: str, reader: Callable[[torch.Tensor], None]) -> None:
        """Show `reader` the weight's dense gradient in every backward pass until it is removed.

        Raises:
            ValueError: the tuner's backward pass has none to show.
        """
        raise ValueError(f"{type(self).__name__} computes no dense gradient of '{self.module_name}'.")

    def remove_gradient_reader(self, adapter_name: str, reader: Callable[[torch.Tensor], None]) -> None:
        """Show it no more."""

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

    def resize(self, adapter_name: str, sizes: Any, kept: Mapping[str, torch.Tensor] | None = None) -> None:
        """Give the adapter other sizes in this layer; see `AdapterTensors.resize`."""
        super().resize(adapter_name, sizes, kept)
        remember_masters(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter from this layer."""
        self.any_dtype.discard(adapter_name)
        self.copied_from.pop(adapter_name, None)
        self.noted_parameters = {k: v for k, v in self.noted_parameters.items() if k[0] != adapter_name}
        super().delete_adapter(adapter_name)
        remember_masters(self)

    # Base weights and deltas

    def get_base_weight(self) -> torch.Tensor:
        """The base weight as its layer stores it, dequantised if need be; gathered where `fully_shard` has sharded it,
        which every rank must ask for at the same time."""
        gathered = gathered_weight(self.get_base_layer())
        return super().get_base_weight() if gathered is None else gathered

    def dense_base_weight(self) -> torch.Tensor:
        """The base weight as `[out, in]`, dequantised if need be; for dense layers it shares the layer's memory."""
        weight = self.get_base_weight()
        return weight.t() if self.fan_in_fan_out else weight

    @property
    def weight_name(self) -> str:
        """Name of the base weight in the model without adapters."""
        return f"{self.module_name}.weight"

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores its weight as `[in, out]`."""
        return type(self.get_base_layer()).__name__ == "Conv1D" and self.quantization_backend is None

    def get_delta_weight(self, adapter_name: str, *, with_removed: bool = True) -> torch.Tensor:
        """The adapter's update as a dense fp32 `[out, in]` matrix, `[in, out]` where the base stores it so.

        Without `with_removed` what a mask takes from the base is left out, for `zero_removed_` to do.
        """
        delta = torch.zeros(self.out_features, self.in_features, device=self.get_base_layer_device())
        self._add_delta_(delta, adapter_name)
        for piece in self.pieces(adapter_name) if with_removed and self.masks_base(adapter_name) else []:
            if isinstance(piece, BaseMask):
                piece.add_(delta)
        return delta.t() if self.fan_in_fan_out else delta

    def _add_delta_(self, weight: torch.Tensor, adapter_name: str) -> None:
        """Add the adapter's update to the `[out, in]` matrix `weight`, fp32 or wider, in place; all but what it takes
        from the base (`BaseMask`), which merging does before."""
        for piece in self.pieces(adapter_name):
            if not isinstance(piece, BaseMask):
                piece.add_(weight)

    def zero_removed_(self, weight: torch.Tensor, terms: Iterable[tuple[str, float]]) -> None:
        """Set what the masks of several adapters, each of weight 1, take from the base to 0 in its `[out, in]` copy,
        once however many take it. The rest of their updates is `_add_delta_`.

        Raises:
            ValueError: a weight is not 1: a share of a mask is none.
        """
        masking = [(name, scale) for name, scale in terms if self.masks_base(name)]
        told = ", ".join(f"{scale:g} x '{name}'" for name, scale in masking)
        if any(scale != 1 for _, scale in masking):
            raise ValueError(
                f"{told}: several adapters remove weights of '{self.module_name}', where a weight that two of them "
                "remove is removed once, so that they cannot be weighted. Give each the weight 1, or merge one alone."
            )
        for name, _ in masking:
            zero_removed_(weight, self.pieces(name))

    def masks_base(self, adapter_name: str) -> bool:
        """Whether the adapter may set weights of the base to 0: whether a `BaseMask` may be among its pieces."""
        return False

    def pieces(self, adapter_name: str) -> list[Piece]:
        """What the adapter adds to this layer's `[out, in]` weight: its update is the sum of the pieces, in this order.
        Their tensors may be the adapter's own and are only read. Empty where the adapter has no part of this layer.
        """
        raise NotImplementedError

    def bias_change(self, adapter_name: str) -> torch.Tensor | None:
        """What the adapter adds to the layer's bias beside its pieces, detached `[out]` fp32; None: nothing."""
        return None

    def write_pieces(self, adapter_name: str, pieces: list[Piece]) -> None:
        """Fill an adapter that was allocated by the model's `config_of_pieces` for these pieces."""
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is additive, so peft may fit a LoRA to it."""
        return True

    # Forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Output of the base layer plus the active adapters' updates.

        `adapter_names` (one name a sample, `"__base__"` for none) runs a mixed batch.

        Raises:
            ValueError: `adapter_names` has another length than the batch, or comes with merged adapters.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        active = self._acting(x.is_meta)
        return self._adapted(x, active, *args, **kwargs) if active else self.base_layer(x, *args, **kwargs)

    def _acting(self, on_meta: bool) -> list[str]:
        """The adapters that a forward pass adds now; none where they are disabled or merged.

        Raises:
            ValueError: an adapter's tensors are on the meta device and the pass is not, or it cannot train yet.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        active = [name for name in self.active_adapters if self.holds(name)]
        if self.merged or not active:
            return []
        if not on_meta and self._is_away(active[0]):
            raise ValueError(
                f"The tensors of adapter '{active[0]}' in '{self.module_name}' are on the meta device: the model was "
                "offloaded (accelerate's cpu_offload, disk_offload, dispatch_model) after the adapter was added, or "
                "the adapter was never loaded. Load the base without offload, device_map={'': 0}."
            )
        if self.training and not torch.compiler.is_compiling():
            note_that_it_runs(self, active)
            if torch.is_grad_enabled():
                self._before_training(active)
        return active

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

    def _before_training(self, active: list[str]) -> None:
        """Asked in every training forward: may these adapters train as they are?"""
        for name in active:
            if self.awaits_calibration(name):
                raise ValueError(self.calibration_message(name))
        restore_masters(self)
        self._notice_frozen(active)
        self._notice_missing_callbacks(active)

    def _notice_frozen(self, active: list[str]) -> None:
        configs = [self.adapter_configs[name] for name in active]
        if not active or any(not config.inference_mode or getattr(config, "_frozen_told", False) for config in configs):
            return
        if any(parameter.requires_grad for name in active for parameter in self.trained_parameters(name)):
            return
        for config in configs:
            config._frozen_told = True
        warnings.warn(
            f"Adapter '{active[0]}' was loaded with is_trainable=False (peft's default) and stays as it is in this "
            "training. To train it, load it with PeftModel.from_pretrained(base, path, is_trainable=True).",
            stacklevel=2,
        )

    def _notice_missing_callbacks(self, active: list[str]) -> None:
        run = run_on(self)
        for name in active:
            config = self.adapter_configs[name]
            if not config.inference_mode:
                config.check_runnable()
            if not config.has_schedule:
                continue
            rules_run_for = set() if run is None else {rule.part_type for rule in run.rules_run_for(config)}
            asked = [name for name in config.rule_types if name not in rules_run_for]
            if not asked or not first_warning(config):
                continue
            warnings.warn(
                f"Adapter '{name}' asks for {', '.join(asked)}, and it trains without the callback that does it: "
                "nothing of that happens. Pass callbacks=hf_sparse_peft.callbacks_for(model) to the Trainer, use "
                f"hf_sparse_peft.Controller in a loop of your own, or set schedule=[] in its {type(config).__name__}.",
                stacklevel=2,
            )


Layer = TypeVar("Layer", bound=AdapterLayer)


def _before_loading(layer: AdapterLayer, state_dict: Mapping[str, torch.Tensor], prefix: str, *_: Any) -> None:
    # State that is there at some steps only, in a checkpoint from such a step.
    state = f"{prefix}{layer.prefix}rule_"
    for key in [key for key in state_dict if key.startswith(state)]:
        name, _, adapter_name = key.removeprefix(state).partition(".")
        if adapter_name in layer.adapter_configs and name not in layer.rule_state(adapter_name):
            layer.allocate_training_state(adapter_name, passing=[name])


def _after_loading(layer: AdapterLayer, incompatible_keys: Any) -> None:
    note_parameters(layer, [name for name in layer.adapter_configs if name not in layer.active_adapters])
    remember_masters(layer)


def adapter_layers(
    model: nn.Module, layer_class: type[Layer] = AdapterLayer, adapter_name: str | None = None
) -> list[Layer]:
    """The layers of `model` with an adapter of this package, in model order.

    Args:
        model: the model or a part of it.
        layer_class: the layers of one tuner, such as `SparseLoraLayer`.
        adapter_name: only those that this adapter reaches.

    Raises:
        ValueError: `model` has no adapter of that name.
    """
    layers = [module for module in model.modules() if isinstance(module, layer_class)]
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
