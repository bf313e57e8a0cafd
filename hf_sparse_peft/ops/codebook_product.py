"""The product with a weight that is held as codes and codebooks, gathered in each pass and kept in none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import autocast_off


def codebook_product(
    x: Tensor, codebooks: Tensor, codes: Tensor, dtype: torch.dtype, keep_zeros: bool = False
) -> Tensor:
    r""":math:`X W^\top` with :math:`W_{ij} =` `codebooks[i, group(j), codes[i, j]]`, in `dtype`.

    The codebooks' gradient is :math:`dY^\top X` summed over the entries of each code. Kept for the backward pass: `x`
    in its own dtype, codebooks and codes; dense matrices of the weight's shape live for one layer at a time.

    Args:
        x: `[..., cols]`.
        codebooks: `[rows, groups, size]`, floating point.
        codes: uint8 `[rows, cols]`, or two 4-bit codes a byte `[rows, ceil(cols / 2)]`, the first in the low half.
        dtype: of the product.
        keep_zeros: values that are 0 get no gradient, so that entries that are 0 stay 0.
    """
    return _CodebookProduct.apply(x, codebooks, codes, dtype, keep_zeros)


def unpack_codes(codes: Tensor, cols: int) -> Tensor:
    """uint8 `[rows, cols]` of codes that may be packed two a byte (`pack_codes`)."""
    if codes.shape[1] == cols:
        return codes
    return torch.stack([codes & 15, codes >> 4], 2).flatten(1)[:, :cols]


def pack_codes(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 `[rows, cols]`, two a byte: `[rows, ceil(cols / 2)]`."""
    if codes.shape[1] % 2:
        codes = torch.cat([codes, codes.new_zeros(codes.shape[0], 1)], 1)
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def coded_weight(codebooks: Tensor, codes: Tensor, cols: int) -> Tensor:
    """The dense `[rows, cols]` weight, in the codebooks' dtype."""
    rows, groups, _ = codebooks.shape
    at = unpack_codes(codes, cols).view(rows, groups, -1)
    return codebooks.gather(2, at.long()).view(rows, cols)


class _CodebookProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codebooks: Tensor, codes: Tensor, dtype: torch.dtype, keep_zeros: bool) -> Tensor:
        ctx.save_for_backward(x, codebooks, codes)
        ctx.dtype, ctx.keep_zeros = dtype, keep_zeros
        with autocast_off(x.device.type):
            return x.to(dtype) @ coded_weight(codebooks.to(dtype), codes, x.shape[-1]).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, codebooks, codes = ctx.saved_tensors
        cols, dtype = x.shape[-1], ctx.dtype
        dx = dcodebooks = None
        with autocast_off(x.device.type):
            gradient = gradient.to(dtype)
            if ctx.needs_input_grad[0]:
                dx = (gradient @ coded_weight(codebooks.to(dtype), codes, cols)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                dense = gradient.reshape(-1, gradient.shape[-1]).t() @ x.reshape(-1, cols).to(dtype)
                rows, groups, _ = codebooks.shape
                at = unpack_codes(codes, cols).view(rows, groups, -1).long()
                dense = dense.to(codebooks.dtype).view(rows, groups, -1)  # sums of many: in the masters' dtype
                dcodebooks = torch.zeros_like(codebooks).scatter_add_(2, at, dense)
                if ctx.keep_zeros:
                    dcodebooks.masked_fill_(codebooks == 0, 0)
        return dx, dcodebooks, None, None, None
