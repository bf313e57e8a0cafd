"""Quantised layers that peft does not know: FP8 weights with scales, and packed ones that run and cannot be read.

Whatever quantises, the base layer computes its product by its own kernel, and updates are added beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import nn
from torch.autograd.function import once_differentiable

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("weight_scale_inv", "weight_scale")


class ScaledFp8Backend(ForwardOnlyQuantizationBackend):
    r"""A linear layer with an FP8 weight and scales, :math:`W = s \odot W_8`: one of the whole weight, of each output,
    or of each block (`block_size`). Read, and never written: merging would round the sum to FP8.

    The layers of transformers' `finegrained_fp8`, `compressed_tensors` and `fbgemm_fp8` are such.
    """

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """The weight `[out, in]`, fp32."""
        weight = base_layer.weight.detach().float()
        name = next(name for name in _SCALES if getattr(base_layer, name, None) is not None)
        scale, block = getattr(base_layer, name).detach().float(), getattr(base_layer, "block_size", None)
        if scale.numel() == 1:
            return weight * scale.reshape(())
        if block is None:
            return weight * scale.reshape(-1, 1)
        rows, cols = weight.shape
        scale = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :cols]
        return weight * scale


def backend_of(base: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """How the weight of `base` is reached where it is quantised: peft's access, or that of a layer that peft does not
    know; None for what is dense. `kwargs` as `peft.utils.quantization_utils.get_quantization_kwargs` gives them."""
    found = resolve_quantization_backend(base, **kwargs)
    weight = getattr(base, "weight", None)
    if found is not None or not isinstance(weight, torch.Tensor) or not hasattr(base, "in_features"):
        return found
    name = type(base).__name__.removesuffix("Linear")
    if weight.dtype in _FP8 and any(getattr(base, scale, None) is not None for scale in _SCALES):
        return ScaledFp8Backend(f"FP8 ({name})" if name else "FP8")
    if weight.dtype in _FP8 or not (weight.dtype.is_floating_point or weight.dtype.is_complex):
        return ForwardOnlyQuantizationBackend(name or str(weight.dtype))
    return None


def base_product(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The base layer's own output; over FP8 weights with a gradient for `x`, whose kernels often have none."""
    scaled = isinstance(layer.quantization_backend, ScaledFp8Backend) and layer.base_layer is layer.get_base_layer()
    if not (scaled and x.requires_grad and torch.is_grad_enabled()) or args or kwargs:
        return layer.base_layer(x, *args, **kwargs)
    return _ThroughFp8.apply(x, layer.base_layer, layer.quantization_backend)


class _ThroughFp8(torch.autograd.Function):
    r"""Forward by the layer's kernel, backward :math:`dX = dY\,W` through the weight that its codes stand for, which
    lives for that product only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: nn.Module, backend: ScaledFp8Backend) -> torch.Tensor:
        ctx.base, ctx.backend = base, backend
        return base(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad_output @ ctx.backend.get_base_weight(ctx.base).to(grad_output.dtype), None, None
