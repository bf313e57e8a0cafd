"""AdamS: Adam that drives the masked weights of a dense matrix to 0 while all of it trains (CAST)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..sparsity import n_of_m_mask
from ._fp32_state import state_dtype
from .aged_adamw import AgedAdamW

OffsetOf = Callable[[Tensor], "Tensor | None"]


class AdamS(AgedAdamW):
    r"""Adam with a growing L1 decay of the weights that an N:M mask does not keep (CAST; Huang et al., 2025).

    For weights :math:`w` `[m, n]` of groups with `cast_scope=True`, with the mask :math:`M` of the `keep` largest
    :math:`|w|` of every `of` inputs, chosen anew before every `mask_every`-th step, and :math:`a_t = t / T`,
    :math:`t = 0, 1, ...`:

    .. math::
        \mu_t &= \beta_1 \mu_{t-1} + (1-\beta_1) g_t \\
        \tilde\mu_t &= \mu_t \;\text{where } M, \quad (1-a_t)\,\mu_t + a_t \lambda\,\mathrm{sign}(w_{t-1})
            \;\text{elsewhere} \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2)\,\tilde\mu_t^2 \\
        w_t &= w_{t-1} - \eta_t\,\frac{\tilde\mu_t / (1-\beta_1^{t+1})}{\sqrt{v_t/(1-\beta_2^{t+1})}+\epsilon}

    The decay never enters :math:`\mu`. Steps are normalised, so decayed weights travel :math:`\sum_t \eta_t a_t` and
    end within about the last learning rate of 0: let it decrease. Since :math:`v` is made of the momentum, the first
    step is :math:`\eta/(1-\beta_1)` an entry, ten times Adam's: warm up. Other groups are those of `AgedAdamW`.

    Where the parameter is a change of a frozen matrix, `offset_of` gives that matrix, and `w` is their sum.

    State of a group in scope: `exp_avg` (:math:`\mu`), `exp_avg_sq` (:math:`v`), both fp32 `[m, n]`, `mask` bool
    `[m, n]`, `step`.

    Args:
        params, lr, betas, eps: as `AgedAdamW`'s.
        weight_decay: decoupled, on `w`; 0 in CAST.
        decay: :math:`\lambda` (CAST, LLaMA-2-7B: 4e-7). It says when the decay outweighs the gradient.
        keep, of: N and M.
        mask_every: steps between two choices of the mask (CAST: 10).
        total_steps: T; a group may get it later, before its first step. Beyond it :math:`a_t` stays 1.
        cast_scope: whether a group is in scope, 2-D parameters in fp32 or fp64 only.
        offset_of: parameter -> the frozen matrix that it is added to, of its shape, read anew at every step; None where
            the parameter is the weight itself. Not part of the state dict.

    Raises:
        ValueError: an option out of range; a parameter that cannot be in scope, such as a flattened or 16-bit one, in
            which :math:`\lambda` is lost; no `total_steps`; an offset of another shape.

    Source: arXiv 2509.25996, equations as an independent reproduction quotes them; there is no official code.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay: float = 4e-7,
        keep: int = 2,
        of: int = 4,
        mask_every: int = 10,
        total_steps: int | None = None,
        cast_scope: bool = False,
        offset_of: OffsetOf | None = None,
    ) -> None:
        self.offset_of = offset_of or (lambda parameter: None)
        self._options = {"decay": decay, "keep": keep, "of": of, "mask_every": mask_every}
        self._options |= {"total_steps": total_steps, "cast_scope": cast_scope}
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after checking its options and shapes."""
        group = {**self._options, **param_group}
        _check_options(group)
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            if added["cast_scope"]:
                _check_scope(added)
        except ValueError:
            self.param_groups.pop()
            raise

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        if not group["cast_scope"]:
            return super()._update(group, p, grad)
        if group["total_steps"] is None and not p.is_meta:  # on meta a step is followed for its shapes
            raise ValueError("AdamS has no total_steps: set it in the groups, or train with the rule Cast, which does.")
        state, dtype = self.state[p], state_dtype(p)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=dtype) for _ in range(2))
            state["mask"] = torch.zeros_like(p, dtype=torch.bool)
        weight = self._weight(p)
        mu, v, mask = state["exp_avg"], state["exp_avg_sq"], state["mask"]
        done = int(state["step"].item())
        state["step"] += 1
        if done % group["mask_every"] == 0:
            mask.copy_(n_of_m_mask(weight.abs(), group["keep"], group["of"]))
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        share = min(1.0, done / (group["total_steps"] or 1))
        mu.lerp_(grad.to(dtype), 1 - beta1)
        pulled = (1 - share) * mu + share * group["decay"] * weight.sign()
        pulled = torch.where(mask, mu, pulled)
        v.mul_(beta2).addcmul_(pulled, pulled, value=1 - beta2)
        if group["weight_decay"]:
            p.sub_(weight, alpha=lr * group["weight_decay"])
        denominator = (v.sqrt() / (1 - beta2 ** (done + 1)) ** 0.5).add_(group["eps"])
        p.addcdiv_(pulled, denominator, value=-lr / (1 - beta1 ** (done + 1)))

    def _weight(self, p: Tensor) -> Tensor:
        offset = self.offset_of(p)
        if offset is None:
            return p.detach()
        if offset.shape != p.shape:
            raise ValueError(
                f"AdamS: a parameter of shape {tuple(p.shape)} is added to a matrix of shape {tuple(offset.shape)}, "
                "so that mask and weight do not lie on each other. Sharded and flattened weights cannot be in scope."
            )
        return offset.to(p.device, p.dtype) + p.detach()

    def _restored(self, group: dict[str, Any], p: Tensor, name: str, value: Tensor) -> Tensor:
        if name == "mask" and value.shape == p.shape:
            return value.to(device=p.device, dtype=torch.bool, copy=True)
        return super()._restored(group, p, name, value)


def _check_options(group: dict[str, Any]) -> None:
    if not group["decay"] >= 0:
        raise ValueError(f"decay={group['decay']} must be >= 0.")
    if not 1 <= group["keep"] < group["of"]:
        raise ValueError(f"keep={group['keep']} of={group['of']}: AdamS keeps at least 1, and fewer than all.")
    for name in ("mask_every", "total_steps"):
        if group[name] is not None and not group[name] >= 1:
            raise ValueError(f"{name}={group[name]} must be at least 1.")


def _check_scope(group: dict[str, Any]) -> None:
    for p in group["params"]:
        if p.dim() != 2 or p.shape[1] % group["of"]:
            raise ValueError(
                f"cast_scope=True takes matrices whose inputs are a multiple of of={group['of']}, got a parameter of "
                f"shape {tuple(p.shape)}. Move it to another group."
            )
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"cast_scope=True and a parameter in {p.dtype}: decay={group['decay']} is below its resolution. Keep "
                "it in fp32."
            )
    if group["per_unit_age"]:
        raise ValueError("cast_scope=True has one step count a matrix: leave per_unit_age out of that group.")
