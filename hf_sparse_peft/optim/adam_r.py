"""AdamR: Adam with a decay towards the values that training began with, as strong as gradients are small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..utils.option_types import Decay
from ..utils.parts import register_part
from ._fp32_state import Fp32StateOptimizer, state_dtype
from .groups import parameter_groups
from .optimizer_kinds import refuse_partitioned
from .spec import OptimizerSettings, OptimizerSpec


class AdamR(Fp32StateOptimizer):
    r"""Adam whose weight decay pulls to the start :math:`\theta_0`, over the root mean square of all gradients (DAREx;
    Deng et al., 2025): changes stay small, so that most of them can be dropped afterwards.

    .. math::
        q &= \sqrt{\tfrac{1}{d}\textstyle\sum_i \hat v_i} \;\text{over all } d \text{ numbers that have a gradient}, \\
        \theta &\leftarrow \theta - \frac{\eta\lambda}{q}\,(\theta - \theta_0), \qquad
        \theta \leftarrow \theta - \eta\,\frac{\hat m}{\sqrt{\hat v} + \epsilon}

    with Adam's :math:`\hat m, \hat v` of this step; q is 1 where all gradients are 0. `l1` decays by
    :math:`\mathrm{sign}(\theta - \theta_0)`.

    State: `exp_avg`, `exp_avg_sq` fp32, `step`, and `start`, a copy of the values in their dtype, made at the first
    step; with `start="zero"` none: for deltas, such as the values of a support, whose start is 0. On LoRA's factors a
    pull to their start is no pull of their product to 0.

    Args:
        params, lr, betas, eps: as `torch.optim.Adam`'s.
        weight_decay: :math:`\lambda` (released: 1e-4).
        norm: "l2", or "l1".
        start: "first", or "zero".

    Raises:
        ValueError: an option out of range, a sharded gradient: q is a sum over all of them.

    Source: Deng et al., 2025. `start="zero"`, "l2" is Adam with stable weight decay (Xie et al., 2023).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        norm: Literal["l2", "l1"] = "l2",
        start: Literal["first", "zero"] = "first",
    ) -> None:
        for name, value, accepted in (("norm", norm, ("l2", "l1")), ("start", start, ("first", "zero"))):
            if value not in accepted:
                raise ValueError(f"{name}={value!r}: AdamR takes {accepted[0]!r} or {accepted[1]!r}.")
        if not (float(lr) >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise ValueError(
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}: AdamR takes lr and weight_decay "
                ">= 0, eps > 0, betas in [0, 1)."
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "norm": norm, "start": start}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moments of all parameters, q, then every update; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        total, count = None, 0
        for group, p in found:
            v = self._moments(group, p)
            total = v.sum() if total is None else total + v.sum().to(total.device)
            count += v.numel()
        if total is None:
            return loss
        q = (total / count).sqrt()
        q = torch.where(q == 0, torch.ones_like(q), q)
        for group, p in found:
            self._apply(group, p, q)
        return loss

    def _moments(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """The corrected second moment, after this step's gradient."""
        refuse_partitioned(p.grad, f"The gradient of a parameter of shape {tuple(p.shape)}")
        state, dtype = self.state[p], state_dtype(p)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=dtype) for _ in range(2))
            if group["start"] == "first" and group["weight_decay"]:
                state.setdefault("start", p.detach().clone())
        beta1, beta2 = group["betas"]
        grad = p.grad.to(dtype)
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        return state["exp_avg_sq"] / (1 - beta2 ** state["step"].item())

    def _apply(self, group: dict[str, Any], p: Tensor, q: Tensor) -> None:
        state, lr, (beta1, beta2) = self.state[p], float(group["lr"]), group["betas"]
        w, t = p.to(state_dtype(p)), state["step"].item()
        if group["weight_decay"]:
            change = w - state["start"] if "start" in state else w
            pull = change.sign() if group["norm"] == "l1" else change
            w = w - pull * (lr * group["weight_decay"] / q.to(w.device, w.dtype))
        denominator = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
        p.copy_(w.addcdiv(state["exp_avg"], denominator, value=-lr / (1 - beta1**t)))

    def _restored(self, group: dict[str, Any], p: Tensor, name: str, value: Tensor) -> Tensor:
        if name == "step":
            return value.to(torch.float32, copy=True)
        if value.shape != p.shape:
            raise ValueError(
                f"Loaded state '{name}' has shape {tuple(value.shape)}, its parameter {tuple(p.shape)}. Build the "
                "model as when it was saved."
            )
        return value.to(device=p.device, dtype=p.dtype if name == "start" else state_dtype(p), copy=True)


@register_part("adam_r")
@dataclass(frozen=True)
class AdamRSpec(OptimizerSpec):
    """`optim.AdamR`: decay towards the values that training began with, for deltas of which most are dropped afterwards
    (DAREx; Deng et al., 2025). Its strength is the run's weight decay."""

    norm: Literal["l2", "l1"] = "l2"
    """Whether the pull is the change, or its sign."""
    start: Literal["first", "zero"] = "first"
    """Where it pulls to: the values at the first step, of which a copy is kept, or 0, for values that are deltas."""
    betas: tuple[Decay, Decay] | None = None
    """Decay rates of the moments; None: the run's."""

    builds: ClassVar[type[torch.optim.Optimizer]] = AdamR

    def build(self, model: nn.Module, settings: OptimizerSettings) -> AdamR:
        """Groups as Trainer makes them: biases and norms are not pulled."""
        own = {"norm": self.norm, "start": self.start}
        groups = parameter_groups(model, settings.weight_decay)
        return AdamR(groups, settings.lr, self.betas or settings.betas, settings.eps, settings.weight_decay, **own)
