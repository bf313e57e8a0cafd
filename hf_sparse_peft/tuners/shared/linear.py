"""`AdditiveLinear`: the adapted linear layer of a tuner that only says what its update is."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.quantization_utils import quantization_extra_repr
from torch import nn

from .base_weight import compute_dtype, weight_source
from .layer import AdapterLayer
from .merge import MergeMixin
from .pieces import LowRank
from .quantised import base_product


class AdditiveLinear(nn.Module, MergeMixin, AdapterLayer):
    r""":math:`Y = X W^\top + b + \sum X\,\Delta W^\top` over the active adapters, the base layer running as it is.

    A tuner derives its linear layer from this and declares its tensors (`tensor_specs`) and `pieces`; an update that is
    no product of factors, or that should be cheaper than its pieces, also says `update`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, module_name: str, update: dict[str, Any] | None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.place_over(base_layer, module_name, **kwargs)
        self._active_adapter = adapter_name
        if update is not None:
            self.update_layer(adapter_name, **update)

    # nn.Module comes first, with a forward that only raises.
    forward, train, _apply = AdapterLayer.forward, AdapterLayer.train, AdapterLayer._apply

    def _adapted(self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        base = result = base_product(self, x, *args, **kwargs)
        dtype = compute_dtype(self, x, weight_source(self))
        for name in (name for name in names if not self.awaits_calibration(name)):
            # Out of place: some 4-bit kernels return views that must not be written to.
            result = result + self._update_beside(base, x, name, dtype).to(result.dtype)
        return result

    def _update_beside(self, base: torch.Tensor, x: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
        """`update`, for forms that the base layer's output `base` is cheaper for."""
        return self.update(x, name, dtype)

    def update(self, x: torch.Tensor, adapter_name: str, dtype: torch.dtype) -> torch.Tensor:
        r""":math:`X\,\Delta W^\top` of one adapter, `[..., out]`, computed in `dtype`: here the sum over its pieces.

        Raises:
            TypeError: a piece is no product of factors, and the tuner has no `update` of its own.
        """
        x, result = x.to(dtype), None
        for piece in self.pieces(adapter_name):
            if not isinstance(piece, LowRank):
                raise TypeError(
                    f"{type(self).__name__} has a piece of type {type(piece).__name__} and no update() of its own, and "
                    "only LowRank pieces say how gradients go through them. Define update(x, adapter_name, dtype)."
                )
            inner = x @ piece.A.to(dtype).t()
            inner = inner if piece.gate is None else inner * piece.gate.to(dtype)
            product = piece.scale * (inner @ piece.B.to(dtype).t())
            result = product if result is None else result + product
        return x.new_zeros(*x.shape[:-1], self.out_features) if result is None else result

    def extra_repr(self) -> str:
        """Name of the quantisation backend, as upstream's layers show it."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return self.prefix.removesuffix("_") + "." + super().__repr__()
