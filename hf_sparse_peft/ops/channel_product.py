"""The product with a weight whose rows are rounded to bit depths and exponents that train (self-compression)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import autocast_off


def channel_product(x: Tensor, W: Tensor, bits: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    r""":math:`X\,q(W)^\top` in `dtype`, with `q` as in `channel_quantised`, whose gradients it has.

    Kept for the backward pass: `x` in its own dtype and the parameters; dense matrices of the weight's shape live for
    one layer at a time.

    Args:
        x: `[..., cols]`.
        W: `[rows, cols]`, floating point.
        bits: `[rows]`, bit depths b, real numbers.
        exponents: `[rows]`, exponents e, real numbers.
        dtype: of the product.
    """
    return _ChannelProduct.apply(x, W, bits, exponents, dtype)


def channel_quantised(W: Tensor, bits: Tensor, exponents: Tensor) -> Tensor:
    r"""The dense weight of a channel (row) quantiser with trained bit depths (Csefalvay and Imber, 2023):

    :math:`q(w) = 2^e\,\mathrm{round}(\mathrm{clip}(2^{-e} w, -2^{b' - 1}, 2^{b' - 1} - 1))`, :math:`b' = \max(b, 0)`,

    halves rounded to even, so that a row with :math:`b \le 0` is exactly 0. `W` `[rows, cols]`, `bits` and `exponents`
    `[rows]`; computed and returned in `W`'s dtype.

    Gradients pass the rounding as if it were not there. With :math:`G = \partial L / \partial q`:

    * :math:`\partial L / \partial w = G`, 0 where w is clipped;
    * :math:`\partial L / \partial e = \ln 2 \sum G\,(q - w)` over what is inside, and :math:`\ln 2 \sum G\,q` over
      what is clipped;
    * :math:`\partial L / \partial b = \ln 2\;2^{e + b - 1} (\sum_\mathrm{above} G - \sum_\mathrm{below} G)`.

    All are 0 where :math:`b \le 0`: such a row never returns.
    """
    return _ChannelQuantised.apply(W, bits, exponents)


def channel_codes(W: Tensor, bits: Tensor, exponents: Tensor) -> Tensor:
    """The integers of `channel_quantised` before the factor 2^e, `[rows, cols]` in `W`'s dtype."""
    return _parts(W, bits, exponents).codes


class _Parts(NamedTuple):
    codes: Tensor
    above: Tensor
    """Whether an entry is clipped from above, `[rows, cols]`."""
    below: Tensor
    half: Tensor
    """:math:`2^{b' - 1}`, `[rows, 1]`."""
    step: Tensor
    """:math:`2^e`, `[rows, 1]`."""
    dead: Tensor
    """Whether b is not above 0, `[rows, 1]`."""


def _parts(W: Tensor, bits: Tensor, exponents: Tensor) -> _Parts:
    bits, exponents = bits.to(W.dtype)[:, None], exponents.to(W.dtype)[:, None]
    half, dead = torch.exp2(bits.clamp_min(0) - 1), bits <= 0
    scaled = W * torch.exp2(-exponents)
    above, below = scaled > half - 1, scaled < -half
    codes = torch.minimum(torch.maximum(scaled, -half), half - 1).round_().masked_fill_(dead, 0)
    return _Parts(codes + 0.0, above, below, half, torch.exp2(exponents), dead)  # + 0.0: no -0


def _quantised(W: Tensor, bits: Tensor, exponents: Tensor) -> Tensor:
    parts = _parts(W, bits, exponents)
    return parts.codes * parts.step


def _gradients(G: Tensor, W: Tensor, bits: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `W`, `bits` and `exponents`, each in its own dtype."""
    parts = _parts(W, bits, exponents)
    G = G.to(W.dtype).masked_fill(parts.dead, 0)
    inside = G.masked_fill(parts.above | parts.below, 0)
    de = (G * parts.codes * parts.step - inside * W).sum(1) * math.log(2)
    db = (G.masked_fill(~parts.above, 0) - G.masked_fill(~parts.below, 0)).sum(1)
    db = db * (parts.step * parts.half).squeeze(1) * math.log(2)
    return inside, db.to(bits.dtype), de.to(exponents.dtype)


class _ChannelQuantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, bits: Tensor, exponents: Tensor) -> Tensor:
        ctx.save_for_backward(W, bits, exponents)
        return _quantised(W, bits, exponents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _gradients(G, *ctx.saved_tensors)


class _ChannelProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bits: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, W, bits, exponents)
        ctx.dtype = dtype
        with autocast_off(x.device.type):
            return x.to(dtype) @ _quantised(W, bits, exponents).to(dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, W, bits, exponents = ctx.saved_tensors
        dtype, dx, trained = ctx.dtype, None, (None, None, None)
        with autocast_off(x.device.type):
            gradient = gradient.to(dtype)
            if ctx.needs_input_grad[0]:
                dx = (gradient @ _quantised(W, bits, exponents).to(dtype)).to(x.dtype)
            if any(ctx.needs_input_grad[1:4]):
                G = gradient.reshape(-1, gradient.shape[-1]).t() @ x.reshape(-1, x.shape[-1]).to(dtype)
                trained = _gradients(G, W, bits, exponents)
        return dx, *trained, None
