"""SM3 for values that sit at scattered entries of a matrix: m + n numbers of state instead of 2 per entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._fp32_state import Fp32StateOptimizer, state_dtype

IndicesOf = Callable[[Tensor], "tuple[Tensor, int, int] | None"]


class SparseSM3(Fp32StateOptimizer):
    r"""SM3 with one row and one column accumulator per matrix, also where only some entries are trained (SpIEL-MA).

    For values at entries :math:`(i,j)` of an :math:`m \times n` matrix, accumulators :math:`R \in \mathbb{R}^m`,
    :math:`C \in \mathbb{R}^n` that start at 0, and :math:`g` the gradient of the value:

    .. math::
        \nu_{ij} &= \min(R_i, C_j) + g_{ij}^2, \quad w_{ij} \leftarrow w_{ij} - \eta g_{ij}/\sqrt{\nu_{ij}+\epsilon} \\
        R_i &\leftarrow \max(R_i, \max_j \nu_{ij}), \qquad C_j \leftarrow \max(C_j, \max_i \nu_{ij})

    Accumulators belong to rows and columns, not to entries: a move leaves them alone, and a grown entry inherits the
    damped step of its row and column. They never decrease, so learning rates are larger than Adam's (SpIEL: 4e-4 to
    2e-3). Other parameters get plain SM3 with one accumulator per dimension, and 1-D ones get Adagrad, which SM3 is
    there.

    State (fp32 also for bf16 parameters): `sm3_row [m]`, `sm3_col [n]` for sparse values; `sm3_dim0`, `sm3_dim1`, ...,
    each of its own length, for dense ones; `momentum_buffer` of the parameter's shape only with `momentum > 0`
    (`move_optimizer_state` moves it, where the paper's code leaves replaced entries their old momentum).

    Args:
        params: parameters or groups.
        lr: step size.
        indices_of: parameter -> `(indices, rows, columns)` with `indices` integer `[k]`, row-major flat positions of
            the values `[k]`, read anew at every step; None for parameters that are dense. Not part of the state dict.
        momentum: :math:`\mu` in :math:`u \leftarrow \mu u + (1-\mu)\, g/\sqrt{\nu+\epsilon}`; 0 as in SpIEL keeps no
            buffer.
        eps: :math:`\epsilon` under the root, SpIEL: 1e-8; `> 0`, since an entry without gradient would be 0/0.
        weight_decay: decoupled, on the values (towards the pretrained weight); 0 in SpIEL.

    Raises:
        ValueError: an option out of range; indices that do not fit the values or the matrix.
        RuntimeError: sparse or complex gradients.

    Source: Anil et al., 2019; sparse form Ansell et al., 2024.
    """

    state_not_per_unit = frozenset({"sm3_row", "sm3_col", *(f"sm3_dim{d}" for d in range(1, 8))})
    """Names that `move_optimizer_state` leaves as they are: they follow rows and columns of the matrix."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        indices_of: IndicesOf | None = None,
        momentum: float = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not float(lr) >= 0:
            raise ValueError(f"lr={lr} must be >= 0.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1).")
        if not eps > 0:
            raise ValueError(f"eps={eps} must be > 0: entries that never had a gradient would become 0/0.")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay={weight_decay} must be >= 0.")
        self.indices_of: IndicesOf = indices_of or (lambda _: None)
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})

    def accumulators(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """`(R [rows], C [columns])` of a sparse parameter, the live tensors; None before its first step or if dense.

        SpIEL-MA grows the inactive positions with the largest product `R[i] * C[j]`.
        """
        state = self.state.get(parameter) or {}
        return (state["sm3_row"], state["sm3_col"]) if "sm3_row" in state else None

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        if grad.is_sparse or grad.is_complex():
            raise RuntimeError("SparseSM3 takes dense real gradients.")
        grad = grad.to(state_dtype(p))
        support = self.indices_of(p)
        nu = self._dense_nu(p, grad) if support is None else self._sparse_nu(p, grad, *support)
        update = grad * nu.add_(group["eps"]).rsqrt_()
        mu = group["momentum"]
        if mu > 0:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            update = state["momentum_buffer"].mul_(mu).add_(update, alpha=1 - mu)
        lr = float(group["lr"])
        w = p.to(update.dtype)  # p itself for fp32
        if group["weight_decay"] != 0:
            w.mul_(1 - lr * group["weight_decay"])
        w.add_(update, alpha=-lr)
        if w is not p:
            p.copy_(w)

    def _sparse_nu(self, p: Tensor, grad: Tensor, indices: Tensor, rows: int, columns: int) -> Tensor:
        if p.dim() != 1 or indices.shape != p.shape:
            raise ValueError(
                f"indices_of returned indices of shape {tuple(indices.shape)} for values of shape {tuple(p.shape)}. "
                "Both must be [k]; return None for a dense parameter."
            )
        state = self.state[p]
        known = "sm3_row" in state or indices.is_meta  # only once: reading the result waits for the GPU
        if not known and indices.numel() and not 0 <= indices.min() <= indices.max() < rows * columns:
            raise ValueError(f"indices_of gave positions outside 0..{rows * columns - 1}, matrix {rows}x{columns}.")
        for name, size in (("sm3_row", rows), ("sm3_col", columns)):
            if name not in state:
                state[name] = torch.zeros(size, dtype=grad.dtype, device=p.device)
            elif state[name].numel() != size:
                raise ValueError(
                    f"State '{name}' has {state[name].numel()} elements, the matrix is {rows}x{columns}. The "
                    "checkpoint belongs to another layer: build the groups as when it was saved."
                )
        indices = indices.to(device=p.device, dtype=torch.int64)
        i, j = torch.div(indices, columns, rounding_mode="floor"), indices % columns
        row, col = state["sm3_row"], state["sm3_col"]
        nu = torch.minimum(row[i], col[j]).addcmul_(grad, grad)
        row.scatter_reduce_(0, i, nu, "amax", include_self=True)
        col.scatter_reduce_(0, j, nu, "amax", include_self=True)
        return nu

    def _dense_nu(self, p: Tensor, grad: Tensor) -> Tensor:
        state = self.state[p]
        if p.dim() < 2:
            if "sum" not in state:
                state["sum"] = torch.zeros_like(grad)
            return state["sum"].addcmul_(grad, grad).clone()
        for d, size in enumerate(p.shape):
            state.setdefault(f"sm3_dim{d}", torch.zeros(size, dtype=grad.dtype, device=p.device))
        bounds = [_along(state[f"sm3_dim{d}"], d, p.dim()) for d in range(p.dim())]
        least = bounds[0]
        for bound in bounds[1:]:
            least = torch.minimum(least, bound)
        nu = torch.addcmul(least, grad, grad)
        for d in range(p.dim()):
            others = [o for o in range(p.dim()) if o != d]
            torch.maximum(state[f"sm3_dim{d}"], nu.amax(dim=others), out=state[f"sm3_dim{d}"])
        return nu


def _along(vector: Tensor, dim: int, dims: int) -> Tensor:
    return vector.view(*[-1 if d == dim else 1 for d in range(dims)])
