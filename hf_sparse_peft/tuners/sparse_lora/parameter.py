"""The adapter of a parameter that belongs to no linear layer, such as the fused experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...ops import are_read
from ..shared.layer import AdapterLayer
from ..shared.merge import MergeMixin
from ..shared.parameters import ParameterWeight
from .factors import forward_factors
from .layer import SparseLoraLayer
from .linear import is_idle, united


class SparseLoraParameter(nn.Module, MergeMixin, SparseLoraLayer):
    r""":math:`W + S + s\,B\,\mathrm{diag}(g)\,A` of the active adapters, as a tensor.

    `W` `[experts, rows, cols]` is one matrix `[experts * rows, cols]` here, so that one budget holds over all experts.

    A row is a row of one expert, a column runs through all of them, and the low-rank half has one `A` for all and rows
    of `B` for each. The sum is rounded once, to the dtype of `W`, as merging rounds it. An adapted copy of
    the parameter lives while its module runs, and is made again in the backward pass, beside its dense gradient.
    """

    def __init__(
        self, base_layer: ParameterWeight, adapter_name: str, module_name: str, update: dict[str, Any]
    ) -> None:
        super().__init__()
        SparseLoraLayer.__init__(self, base_layer, module_name)
        self._active_adapter = adapter_name
        self.register_load_state_dict_post_hook(_refresh_units)
        self.update_layer(adapter_name, **update)

    train, _apply = AdapterLayer.train, AdapterLayer._apply

    @property
    def weight_name(self) -> str:
        """Name of the parameter in the model without adapters."""
        return self.module_name

    def get_base_weight(self) -> torch.Tensor:
        """The parameter as `[experts * rows, cols]`, in its own memory."""
        return self.base_layer.matrix

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: peft converts linear layers."""
        return False

    def forward(self, adapter_names: list[str] | None = None) -> torch.Tensor:
        """The adapted parameter in its own shape; the parameter itself where no adapter acts.

        Raises:
            ValueError: a mixed batch: samples of several adapters meet in the same experts.
        """
        if adapter_names is not None and not self.disable_adapters:
            raise ValueError(
                f"adapter_names: samples of several adapters meet in one product with '{self.module_name}', which has "
                "one adapted value at a time. Run the samples of each adapter by themselves, with set_adapter."
            )
        parameter = self.base_layer.weight
        names = self._acting(parameter.is_meta)
        if not names:
            return parameter
        adapted = self._adapted_matrix(names).view(parameter.shape)
        self._lend_gradient(adapted, names)
        return adapted

    def recompute(self) -> Callable[[], torch.Tensor]:
        """How to make the adapted parameter of now once more, in a backward pass."""
        names = [name for name in self.active_adapters if self.holds(name)]
        version = self._version(names)

        def make() -> torch.Tensor:
            if self._version(names) != version:
                raise RuntimeError(
                    f"An adapter of '{self.module_name}' was changed between a forward pass and its backward pass, "
                    "which needs the parameter as it was. Step the optimizer, and move supports, after backward()."
                )
            return self._adapted_matrix(names).view(self.base_layer.weight.shape)

        return make

    def _version(self, names: list[str]) -> tuple:
        tensors = [tensor for name in names for tensor in self.trained_parameters(name)]
        return tuple(tensor._version for tensor in tensors), self.units_version(names)

    def _adapted_matrix(self, names: list[str]) -> torch.Tensor:
        weight = self.get_base_weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        sparse = [self.sparse_entries(name)[::-1] for name in names if self._has_living_support(name)]
        if any(self._has_dense_update(name) for name in names):
            total = weight.to(wide)
            for name in names:
                total = self._with_dense_updates(total, name)
            for values, positions in sparse:
                total = total.flatten().index_add(0, positions, values.to(wide)).view_as(weight)
            return total.to(weight.dtype)
        if not sparse:
            return weight.clone()
        one = united(sparse) if len(sparse) > 1 else dict(zip(("values", "units"), sparse[0], strict=True))
        flat, positions = weight.reshape(-1), one["units"]
        changed = (flat[positions].to(wide) + one["values"]).to(weight.dtype)
        return flat.index_copy(0, positions, changed).view_as(weight)

    def _has_dense_update(self, name: str) -> bool:
        return name in self.sparse_lora_A or name in self.sparse_lora_dense_delta or self.accumulated(name) is not None

    def _with_dense_updates(self, total: torch.Tensor, name: str) -> torch.Tensor:
        for dense in (self.sparse_lora_dense_delta.get(name), self.accumulated(name)):
            total = total if dense is None else total + dense
        if name not in self.sparse_lora_A:
            return total
        A, B = (factor.to(total.dtype) for factor in forward_factors(self, name))
        gate = self.sparse_lora_gate.get(name, None)
        return torch.addmm(total, B if gate is None else B * gate, A, alpha=self.sparse_lora_scaling[name])

    def _has_living_support(self, name: str) -> bool:
        return self.has_sparse_half(name) and name not in self.sparse_lora_dense_delta and not is_idle(self, name)

    def _lend_gradient(self, adapted: torch.Tensor, names: list[str]) -> None:
        readers = [self._shared_reader(names), self.passive_gradient_reader]
        for reader in (one for one in readers if one is not None):
            if hasattr(reader, "expect"):
                reader.expect()
            if adapted.requires_grad:
                adapted.register_hook(partial(_read, reader))

    def __repr__(self) -> str:
        return "sparse_lora." + super().__repr__()


def _read(reader: Callable[[torch.Tensor], None], gradient: torch.Tensor) -> None:
    if are_read():
        reader(gradient.detach().flatten(0, -2))


def _refresh_units(layer: SparseLoraParameter, incompatible_keys: Any) -> None:
    layer.refresh_units()
