"""Dense x sparse factorizations: columns as sums of a few vectors of a dictionary."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def matching_pursuit(dictionary: Tensor, targets: Tensor, nonzeros: int) -> Tensor:
    r"""Coefficients `[k, c]` with at most `nonzeros` that are not 0 in each column, of a low :math:`\|D S - T\|`:
    orthogonal matching pursuit (Pati et al., 1993), all columns at once.

    A round takes, for each column, the vector that the residual projects most onto, and solves least squares over those
    that it has. `dictionary`: fp32 or fp64 `[d, k]`, any norms; `targets`: `[d, c]`.
    """
    norms = dictionary.norm(dim=0).clamp_min(torch.finfo(dictionary.dtype).tiny)
    unit = dictionary / norms
    k, c = dictionary.shape[1], targets.shape[1]
    gram, projected = unit.t() @ unit, unit.t() @ targets
    chosen = torch.zeros(c, 0, dtype=torch.long, device=targets.device)
    taken = torch.zeros(k, c, dtype=torch.bool, device=targets.device)
    explained = torch.zeros_like(projected)
    for _ in range(nonzeros):
        best = (projected - explained).abs().masked_fill(taken, -1.0).argmax(0)
        chosen = torch.cat([chosen, best[:, None]], 1)
        taken[best, torch.arange(c, device=best.device)] = True
        held = gram[chosen[:, :, None], chosen[:, None, :]]
        wanted = projected.gather(0, chosen.t()).t()
        # Vectors that are multiples of one another leave the system without an inverse; a ridge of rounding's size.
        held.diagonal(dim1=1, dim2=2).add_(10 * torch.finfo(held.dtype).eps)
        weights = torch.cholesky_solve(wanted[:, :, None], torch.linalg.cholesky_ex(held).L)
        found = torch.zeros_like(projected).scatter_(0, chosen.t(), weights.squeeze(2).t())
        explained = gram @ found
    return found / norms[:, None]


@torch.no_grad()
def dense_sparse(matrix: Tensor, atoms: int, nonzeros: int, rounds: int = 15) -> tuple[Tensor, Tensor]:
    r"""`D` `[d, atoms]` and `S` `[atoms, c]` with `nonzeros` numbers in each column, of a low :math:`\|M - D S\|_F`.

    `D` starts as the leading singular vectors and, where there are more atoms than those, as the columns that these
    explain worst; then S by matching pursuit and D by least squares in turns (MOD; Engan et al., 1999), as long as
    that gains. With `nonzeros = atoms` it is the truncated SVD. `matrix`: `[d, c]`, fp32 or fp64.
    """
    U, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    D = U[:, :atoms] * values[:atoms]
    if D.shape[1] < atoms:
        D = torch.cat([D, matrix[:, : atoms - D.shape[1]]], 1)
    S = matching_pursuit(D, matrix, nonzeros)
    error = (matrix - D @ S).norm()
    if nonzeros >= min(atoms, *matrix.shape):
        return D, S
    # A dictionary of singular vectors shares one subspace; some of the targets themselves open others.
    seeded = _spread_columns(matrix, atoms)
    other = matching_pursuit(seeded, matrix, nonzeros)
    if (matrix - seeded @ other).norm() < error:
        D, S, error = seeded, other, (matrix - seeded @ other).norm()
    for _ in range(rounds):
        fitted = matrix @ torch.linalg.pinv(S)
        unused = (S != 0).sum(1) == 0
        if unused.any():
            worst = (matrix - fitted @ S).norm(dim=0).topk(min(int(unused.sum()), matrix.shape[1])).indices
            fitted[:, unused.nonzero().squeeze(1)[: worst.numel()]] = matrix[:, worst]
        found = matching_pursuit(fitted, matrix, nonzeros)
        left = (matrix - fitted @ found).norm()
        if left >= error:
            break
        gained, (D, S, error) = 1 - left / error, (fitted, found, left)
        if gained < 1e-4:
            break
    return D, S


def _spread_columns(matrix: Tensor, count: int) -> Tensor:
    """`count` columns, each the one that those before explain least (pivoted Gram-Schmidt)."""
    left, chosen = matrix.clone(), []
    for _ in range(count):
        norms = left.norm(dim=0)
        if chosen:
            norms[torch.stack(chosen)] = -1.0
        at = norms.argmax()
        chosen.append(at)
        direction = left[:, at] / left[:, at].norm().clamp_min(torch.finfo(matrix.dtype).tiny)
        left = left - torch.outer(direction, direction @ left)
        if len(chosen) % matrix.shape[0] == 0:
            left = matrix.clone()  # a basis of all rows is full: another one beside it
    return matrix[:, torch.stack(chosen)]


def largest_of_columns(latent: Tensor, nonzeros: int) -> Tensor:
    """bool, like `latent` `[..., k, c]`: its `nonzeros` largest magnitudes in each column; the first of equal ones."""
    order = latent.abs().sort(dim=-2, descending=True, stable=True).indices[..., :nonzeros, :]
    return torch.zeros_like(latent, dtype=torch.bool).scatter_(-2, order, True)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latent: Tensor, nonzeros: int) -> Tensor:  # type: ignore[override]
        return latent.masked_fill(~largest_of_columns(latent, nonzeros), 0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def straight_through_sparse(latent: Tensor, nonzeros: int) -> Tensor:
    """`latent` with all but the `nonzeros` largest magnitudes of each column at 0; the gradient goes to all of them."""
    return _StraightThrough.apply(latent, nonzeros)
