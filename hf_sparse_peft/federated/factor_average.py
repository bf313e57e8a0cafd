r"""Averages of low-rank factors: one by one, or the best product of their rank to the mean of the products."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

_A = re.compile(r"^(.+)\.(sparse_lora_A|masked_lora_A|lora_A\.weight)$")
_ELSEWHERE = re.compile(r"(values|support|subnet\w*|mask|weight_A|weight_B)$")
"""Tensors of a module that are no part of the product of its factors."""


def factor_pairs(names: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Module, and the names of its A `[r, in]` and B `[out, r]`."""
    for name in names:
        found = _A.match(name)
        b = None if found is None else f"{found[1]}.{found[2].replace('_A', '_B')}"
        if b in names:
            yield found[1], name, b


def average_factors(
    module: str,
    held: Mapping[str, list[Tensor]],
    pair: tuple[str, str],
    weights: Sequence[float],
    result: Any,
    how: Literal["apart", "product"],
) -> None:
    """Measure the error of the factors' mean, and with "product" replace it; of factors that all clients share one of,
    the mean is exact and stays.

    Raises:
        ValueError: "product" for a module with a tensor between its factors; names it.
    """
    As, Bs = ([one.double() for one in held[name]] for name in pair)
    if all(torch.equal(As[0], A) for A in As) or all(torch.equal(Bs[0], B) for B in Bs):
        return
    between = [name for name in held if name not in pair and _is_between(name, module)]
    if how == "product":
        if between:
            raise ValueError(
                f"factors='product' fits B A, and '{module}' has '{between[0]}' too. Take factors='apart', or freeze a "
                "factor."
            )
        product = best_product(Bs, As, weights)
        for name, factor in zip(pair, product, strict=True):
            result.tensors[name] = factor.to(held[name][0].dtype)
    if between:
        return
    A, B = (result.tensors[name].double() for name in pair)
    signed = [B * -1, *(weight * one for weight, one in zip(weights, Bs, strict=True))]
    whole = product_norm(signed[1:], As)
    result.factor_errors[module] = product_norm(signed, [A, *As]) / whole if whole else 0.0


def _is_between(name: str, module: str) -> bool:
    """Whether the tensor is of that module's low-rank half: a gate, a map, a magnitude."""
    kind = name.removeprefix(f"{module}.")
    ours = kind != name and kind.startswith(("sparse_lora_", "masked_lora_", "lora_"))
    return ours and not _ELSEWHERE.search(kind)


def best_product(Bs: Sequence[Tensor], As: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    r"""A `[r, in]` and B `[out, r]` of the rank of each, with :math:`B A` nearest to :math:`\sum_k p_k B_k A_k`: a
    truncated SVD, of which each factor has the root of the singular values. Nothing of the weight's size is built."""
    left = torch.cat([weight * B for weight, B in zip(weights, Bs, strict=True)], dim=1)
    Q, R = torch.linalg.qr(left)
    P, S = torch.linalg.qr(torch.cat(list(As)).t())
    U, sizes, Vh = torch.linalg.svd(R @ S.t(), full_matrices=False)
    rank = As[0].shape[0]
    found = min(rank, sizes.numel())
    root = sizes[:found].sqrt()
    A, B = As[0].new_zeros(rank, As[0].shape[1]), Bs[0].new_zeros(Bs[0].shape[0], rank)
    A[:found] = root[:, None] * (Vh[:found] @ P.t())
    B[:, :found] = (Q @ U[:, :found]) * root
    return A, B


def product_norm(Bs: Sequence[Tensor], As: Sequence[Tensor]) -> float:
    r""":math:`\|\sum_k B_k A_k\|_F` by the triangular factors of both sides."""
    R = torch.linalg.qr(torch.cat(list(Bs), dim=1))[1]
    S = torch.linalg.qr(torch.cat(list(As)).t())[1]
    return float(torch.linalg.matrix_norm(R @ S.t()))
