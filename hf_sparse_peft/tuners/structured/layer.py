"""What every adapted layer holds of structured adapters, and the adapted linear layer itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...rules import UnitSpace
from ...utils.tensors import TensorSpec
from ..shared.base_weight import compute_dtype, weight_source
from ..shared.file_check import file_being_loaded
from ..shared.form_layer import FormLayer
from ..shared.pieces import Nonlinear, Piece
from ..shared.quantised import base_product
from ..shared.sharing import read_shape, shape_spec, tensor_of
from .config import StructuredConfig
from .form import NAMES, Call, Form, Site, Tensors

TRAINED, FROZEN = "structured_", "structured_frozen_"
SHAPE = f"{FROZEN}shape"
Reader = Callable[[str, str, Tensor], None]


class StructuredLayer(FormLayer):
    """What a layer holds per adapter: the tensors that its form declares, `structured_<name>` where they train (fp32
    masters) and `structured_frozen_<name>` where they do not, and the shape of the weight."""

    prefix: str = TRAINED
    frozen_prefix = FROZEN
    form_names = NAMES
    without_biases = "Keep the adapter as it is, or keep the merged model by torch.save."
    structured_owner: dict[str, StructuredLayer]
    """The layer that has what this one shares, where that is another."""
    structured_users: dict[str, list[StructuredLayer]]
    """The other layers that share what this one has."""
    structured_memory: dict[str, dict[str, Tensor]]
    """What the layers that share with this one leave for each other within a pass."""
    structured_scaling: dict[str, float]
    """Factor on what the adapter adds to the output; 1 but in steps of a rule that suppresses layers."""
    structured_tasks: dict[str, str]
    """The task that was named last, for adapters of several."""

    def place_over(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        """Take `base_layer`'s place."""
        super().place_over(base_layer, module_name, **kwargs)
        self.pass_readers: list[Reader] = []
        self.token_mask: Tensor | None = None

    # The declaration

    @classmethod
    def tensor_specs(
        cls, config: StructuredConfig, module_name: str, rows: int, cols: int, sizes: None = None
    ) -> list[TensorSpec]:
        """The shape of the weight, and the form's tensors."""
        return [shape_spec(SHAPE, rows, cols), *cls.named(config.form.specs(config.site(module_name, rows, cols)))]

    @classmethod
    def read_sizes(
        cls, config: StructuredConfig, module_name: str, held: Mapping[str, Tensor]
    ) -> tuple[int, int, None]:
        """Rows and columns as the file says; every other tensor is checked against them.

        Raises:
            ValueError: the tensor that says so is missing or damaged.
        """
        return *read_shape(held, SHAPE, module_name), None

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has a part of that adapter; all of its tensors may belong to another layer."""
        return adapter_name in self.adapter_configs

    def form(self, adapter_name: str) -> Form:
        """The adapter's form."""
        return self.adapter_configs[adapter_name].form

    def site(self, adapter_name: str) -> Site:
        """What the adapter's form knows of this module."""
        return self.adapter_configs[adapter_name].site(self.module_name, self.out_features, self.in_features)

    def form_tensors(self, adapter_name: str) -> Tensors:
        """The tensors of the adapter's form, by its own names for them, those of the layer that it shares with too."""
        found, owner = super().form_tensors(adapter_name), self.structured_owner.get(adapter_name)
        device = found.pop("shape").device
        if owner is not None:
            found |= {
                name: tensor_of(owner, self, f"{TRAINED}{name}", adapter_name, device)
                for name in self.form(adapter_name).shared
            }
        return found

    def update_layer(self, adapter_name: str, config: StructuredConfig, sizes: None = None, **kwargs: Any) -> None:
        """Add an adapter."""
        self.add_containers(self.tensor_specs(config, self.module_name, self.out_features, self.in_features))
        self.structured_scaling[adapter_name] = 1.0
        super().update_layer(adapter_name, config, sizes, **kwargs)

    def assume_units(self, adapter_name: str) -> None:
        """On the meta device: see `AdapterLayer.assume_units`; of several tasks, the first is assumed."""
        super().assume_units(adapter_name)
        self.structured_tasks.update((adapter_name, task) for task in self.form(adapter_name).tasks[:1])

    @torch.no_grad()
    def _begin(self, adapter_name: str, first: Any) -> None:
        form, base = self.form(adapter_name), self.get_base_layer()
        if not form.reads_weight or file_being_loaded() is not None or base.weight.is_meta:
            return
        held = super().form_tensors(adapter_name)
        if any(tensor.is_meta for tensor in held.values()):
            return
        for name, tensor in form.start(self.dense_base_weight().float(), self.site(adapter_name)).items():
            held[name].data.copy_(tensor)

    def unit_spaces(self, adapter_name: str) -> list[UnitSpace]:
        """The form's units, and the module itself."""
        found, own = super().unit_spaces(adapter_name), self.form(adapter_name).spaces(self, adapter_name)
        return found if own is None else [*own, *(space for space in found if space.kind == "module")]

    # Leaving

    def pieces(self, adapter_name: str) -> list[Piece]:
        """Those of the form."""
        if not self.holds(adapter_name):
            return []
        tensors, site = self.form_tensors(adapter_name), self.site(adapter_name)
        return self.form(adapter_name).pieces(tensors, site, self.dense_base_weight)

    @torch.no_grad()
    def bias_change(self, adapter_name: str) -> Tensor | None:
        """That of the form."""
        if not self.holds(adapter_name) or not self.form(adapter_name).shifts_bias:
            return None
        bias = getattr(self.get_base_layer(), "bias", None) if not self.merged else self._merge_backup.bias
        tensors, site = self.form_tensors(adapter_name), self.site(adapter_name)
        return self.form(adapter_name).bias_change(tensors, site, None if bias is None else bias.detach())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is a change of the weight alone."""
        alone = not self.form(adapter_name).shifts_bias
        return alone and not any(isinstance(piece, Nonlinear) for piece in self.pieces(adapter_name))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight and bias; see `MergeMixin.merge`.

        Raises:
            ValueError: a form is no change of a weight; names the adapter.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        for name in (name for name in names if self.holds(name)):
            for piece in self.pieces(name):
                if isinstance(piece, Nonlinear):
                    raise Nonlinear(f"Adapter '{name}' of form {type(self.form(name)).__name__}").refusal()
        super().merge(safe_merge, adapter_names)

    # Passes

    @contextmanager
    def read_passes(self, reader: Reader) -> Iterator[None]:
        """Inside, `reader(adapter_name, name, tensor)` is shown what forms note in this layer's passes, with its graph:
        gates of routers, for balance losses and telemetry. What gradient checkpointing repeats in a backward pass is
        not shown again. It may not change what it is shown, nor keep it beyond the model's pass."""
        self.pass_readers.append(reader)
        try:
            yield
        finally:
            self.pass_readers.remove(reader)

    def _call(self, adapter_name: str, dtype: torch.dtype) -> Call:
        def note(name: str, tensor: Tensor) -> None:
            if torch._C._current_graph_task_id() != -1:
                return
            for reader in self.pass_readers:
                reader(adapter_name, name, tensor)

        bias, owner = getattr(self.get_base_layer(), "bias", None), self.structured_owner.get(adapter_name, self)
        memory = owner.structured_memory.setdefault(adapter_name, {})
        task = self.structured_tasks.get(adapter_name)
        return Call(self.site(adapter_name), dtype, self.training, bias, note, task, memory, self.token_mask)

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        alone = [name for name in adapter_names if self.holds(name) and self.form(name).alone]
        if alone:
            raise ValueError(
                f"Adapter '{alone[0]}' takes the place of '{self.module_name}' and of others with it, so that a batch "
                "cannot be mixed there. Run it by itself, with set_adapter."
            )
        return super()._mixed_batch(x, adapter_names, *args, **kwargs)


class StructuredLinear(StructuredLayer):
    r""":math:`Y = f_\theta(X W^\top + b)` of the one active form; of several, the base's output and the sum of what
    each adds to it."""

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        dtype = compute_dtype(self, x, weight_source(self))

        def base(inner: Tensor) -> Tensor:
            return base_product(self, inner, *args, **kwargs)

        held = [(self.form(name), self.form_tensors(name), self._call(name, dtype)) for name in names]
        if len(names) == 1 and self.structured_scaling[names[0]] == 1:
            form, tensors, call = held[0]
            return form.output(x, base, tensors, call)
        y = result = base(x)
        for name, (form, tensors, call) in zip(names, held, strict=True):
            change = form.change(x, y, base, tensors, call)
            result = result + (self.structured_scaling[name] * change).to(result.dtype)
        return result
