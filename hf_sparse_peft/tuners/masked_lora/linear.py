"""The adapted linear layer of masked adapters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops import Source
from ..shared.base_weight import compute_dtype, weight_source
from ..shared.linear import AdditiveLinear
from ..shared.quantised import base_product
from .layer import MaskedLoraLayer
from .product import ProductPlan, masked_product


class MaskedLoraLinear(AdditiveLinear, MaskedLoraLayer):
    r""":math:`Y = X (M \odot (W + D))^\top + b`; where the base is 0 off the mask, its own output plus
    :math:`X (M \odot D)^\top`.

    Several active adapters add up: :math:`W' = M_1 \odot \dots \odot M_n \odot W + \sum_i M_i \odot D_i`.
    """

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        source = weight_source(self)
        dtype = compute_dtype(self, x, source)
        names = [name for name in names if not self.awaits_calibration(name)]
        removing = [name for name in names if self.masks_base(name)]
        for name in removing:
            self.check_mask(name)  # an unknown mask would take the whole weight for removed
        result, done = None, None
        if removing and source is not None and not args and not kwargs:
            # One product with the masked weight; the others' updates come beside it.
            done = removing[0]
            result = masked_product(x, *self._plan(done, names, dtype, "whole", source))
            bias = self.base_layer.bias
            result = result if bias is None else result + bias.to(result.dtype)
            result = result.to(x.dtype) if self.quantization_backend is not None else result
        else:
            result = base_product(self, x, *args, **kwargs)
        for name in (name for name in names if name != done):
            gives = "change" if name in removing else "masked_delta"
            before = removing[: removing.index(name)] if name in removing else []
            update = masked_product(x, *self._plan(name, names, dtype, gives, source, before))
            # Out of place: some 4-bit kernels return views that must not be written to.
            result = result + update.to(result.dtype)
        return result

    def _plan(
        self, name: str, names: list[str], dtype: torch.dtype, gives: str, source: Source | None, before: Sequence = ()
    ) -> tuple[ProductPlan, dict[str, Tensor]]:
        config, tensors = self.adapter_configs[name], self.own_tensors(name)
        reader = passive = None
        if name == names[0] and torch.is_grad_enabled():  # one product of a pass shows the gradient
            reader, passive = self._shared_reader(names), self.passive_gradient_reader
            for one in (reader, passive):
                if hasattr(one, "expect"):
                    one.expect()
        plan = ProductPlan(
            tuple(tensors),
            partial(self.masked_weight, name, source=source),
            config.update,
            config.masking,
            dtype,
            gives,
            tuple(partial(self.mask, other) for other in before),
            reader,
            passive,
        )
        return plan, tensors
