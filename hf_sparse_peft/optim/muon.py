"""Muon: momentum, orthogonalised, for parameters that are matrices of linear maps; AdamW for the others."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ._fp32_state import state_dtype
from .aged_adamw import AgedAdamW
from .optimizer_kinds import refuse_partitioned

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(AgedAdamW):
    r"""Muon (Jordan et al., 2024) for groups with `orthogonal=True`, `AgedAdamW` for the others.

    For a matrix `[m, n]` with the gradient :math:`G`:

    .. math::
        B &\leftarrow \mu B + (1-\mu) G, \qquad U = (1-\mu) G + \mu B \;\text{(Nesterov) or}\; B \\
        W &\leftarrow (1-\eta\lambda) W - \eta\, c\, \mathrm{NS}(U), \qquad c = \sqrt{\max(1, m/n)}

    where NS is five steps of the quintic Newton-Schulz iteration, after which all singular values lie near 1
    (`newton_schulz`). Unlike `torch.optim.Muon` it takes stacks `[k, m, n]` too, each matrix of its own, and updates
    what is no matrix by AdamW in the same optimizer, as it needs for an adapter. On matrices it is torch's otherwise.

    State of an orthogonal group: `momentum_buffer` of the parameter's shape, fp32; it moves with units.

    Args:
        params: parameters or groups; a group may set any option below.
        lr, weight_decay: as `torch.optim.Muon`'s; decay is not adjusted.
        betas, eps: of the groups of AdamW.
        orthogonal: whether a group's parameters are matrices, or stacks of matrices.
        transposed: whether a group's matrices are kept transposed, as the columns of a support: it decides c alone.
        momentum: :math:`\mu`.
        nesterov: whether the update looks ahead.
        adjust: "original", c as above; "match_rms_adamw", :math:`c = 0.2\sqrt{\max(m, n)}`, with which a learning rate
            of AdamW's fits (Liu et al., 2025).
        iteration_dtype: of the iteration, "bfloat16" as published, or "float32". fp64 parameters have fp64.

    Raises:
        ValueError: an option out of range; a parameter of an orthogonal group that is no matrix.

    Source: Jordan et al., 2024.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        orthogonal: bool = True,
        transposed: bool = False,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust: Literal["original", "match_rms_adamw"] = "original",
        iteration_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        self._options = {"orthogonal": orthogonal, "transposed": transposed, "momentum": momentum}
        self._options |= {"nesterov": nesterov, "adjust": adjust, "iteration_dtype": iteration_dtype}
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after checking its options and shapes."""
        group = {**self._options, **param_group}
        for name, accepted, right in (
            ("momentum", "a number in [0, 1)", 0 <= group["momentum"] < 1),
            ("adjust", "'original' or 'match_rms_adamw'", group["adjust"] in ("original", "match_rms_adamw")),
            ("iteration_dtype", "'bfloat16' or 'float32'", group["iteration_dtype"] in ("bfloat16", "float32")),
        ):
            if not right:
                raise ValueError(f"{name}={group[name]!r} is out of range: Muon takes {accepted}.")
        super().add_param_group(group)
        added = self.param_groups[-1]
        wrong = [p for p in added["params"] if p.dim() not in (2, 3)]
        if added["orthogonal"] and wrong:
            self.param_groups.pop()
            raise ValueError(
                f"Muon orthogonalises matrices [m, n] and stacks of them [k, m, n], not a parameter of shape "
                f"{tuple(wrong[0].shape)}. Put it into a group with orthogonal=False, which AdamW "
                "updates."
            )

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        if not group["orthogonal"]:
            return super()._update(group, p, grad)
        if grad.is_sparse or grad.is_complex():
            raise RuntimeError("Muon takes dense real gradients.")
        refuse_partitioned(grad, f"The gradient of a parameter of shape {tuple(p.shape)}")
        state, dtype, mu, lr = self.state[p], state_dtype(p), group["momentum"], float(group["lr"])
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
        grad, buffer = grad.to(dtype), state["momentum_buffer"]
        buffer.lerp_(grad, 1 - mu)
        update = grad.lerp(buffer, mu) if group["nesterov"] else buffer
        update = newton_schulz(
            update if dtype == torch.float64 else update.to(getattr(torch, group["iteration_dtype"]))
        )
        w = p.to(dtype)  # p itself for fp32
        if group["weight_decay"]:
            w.mul_(1 - lr * group["weight_decay"])
        w.add_(update.to(dtype), alpha=-lr * _factor(group, p))
        if w is not p:
            p.copy_(w)

    def _restored(self, group: dict[str, Any], p: Tensor, name: str, value: Tensor) -> Tensor:
        if group["orthogonal"] and name == "step":  # of torch's AdamW
            raise ValueError(
                "The file has AdamW's state for a matrix that Muon updates. Start without the file's state."
            )
        return super()._restored(group, p, name, value)


def newton_schulz(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    r""":math:`X \leftarrow a X + (b A + c A^2) X`, :math:`A = X X^\top`, from :math:`X = G / \|G\|_F`, with
    (a, b, c) = (3.4445, -4.7750, 2.0315): singular values go to about 0.7 to 1.2. It is not :math:`U V^\top`.

    Args:
        matrix: `[m, n]` or `[k, m, n]`, each matrix of its own; in its dtype.
        steps: of the iteration.
        eps: least norm that a matrix is divided by: one of zeros stays so.

    Source: Jordan et al., 2024.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm  # rounded as torch.optim.Muon does
    for _ in range(steps):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _factor(group: dict[str, Any], p: Tensor) -> float:
    rows, columns = p.shape[-2:][::-1] if group["transposed"] else p.shape[-2:]
    if group["adjust"] == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5
