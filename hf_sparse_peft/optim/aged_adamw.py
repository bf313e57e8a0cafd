"""AdamW that knows the age of every unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._fp32_state import Fp32StateOptimizer, state_dtype
from .groups import parameter_groups
from .moves import bias_correction

# Where int16 ages stop counting: 1 - beta^age has been 1 in fp32 for long by then, for every beta2 up to 0.9994.
_LARGEST_AGE = 32767


class AgedAdamW(Fp32StateOptimizer):
    r"""AdamW with a bias correction per unit, for parameters whose units come and go.

    With :math:`a` the number of steps a unit has seen, counted up before use,

    .. math::
        \theta &\leftarrow (1-\eta\lambda)\,\theta, \qquad
        m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        \theta &\leftarrow \theta - \eta\,\frac{m/(1-\beta_1^a)}{\sqrt{v/(1-\beta_2^a)}+\epsilon}

    In groups with `per_unit_age=True`, `a` is a tensor `step` of shape `[k]` for a parameter `[k]` or `[k, ...]`, or
    one with `k` units along `unit_axis`; a unit that `move_optimizer_state` has just placed there starts at 0 (or at
    SpIEL's seed), all others go on. In other groups `a` is one scalar and the update equals
    `torch.optim.AdamW(foreach=False)` bit for bit on fp32 parameters. A unit whose value, moments and gradient are 0
    stays exactly 0.

    Weight decay acts on the values. These are differences to the pretrained weights, so it pulls back to the base
    model; SpIEL's grid for it is 1 to 30.

    State: `exp_avg`, `exp_avg_sq` in fp32 also for bf16 and fp16 parameters. Ages are int16 and stop at 32767, where
    the bias correction has long been 1 (fp32 for a beta above 0.9994, and never bf16, where they stick at 256); a
    scalar `step` is fp32. The state dict holds tensors only and loads with `weights_only=True`, every tensor in the
    dtype it had (ages are int32 in state dicts of distributed runs). A state dict of `torch.optim.AdamW` loads too: its
    scalar step becomes the age of every unit.

    Args:
        params: parameters or groups; a group may set any option below.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; `eps > 0`, since a dead unit would be 0/0 without it.
        per_unit_age: whether `step` is kept per unit.
        unit_axis: the dimension that units lie along.

    Raises:
        ValueError: an option out of range, a scalar parameter in a `per_unit_age` group, loaded state of the wrong
            shape.
        RuntimeError: sparse or complex gradients.

    Source: Loshchilov & Hutter, 2019; ages from Ansell et al., 2024.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        per_unit_age: bool = False,
        unit_axis: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "per_unit_age": per_unit_age}
        defaults["unit_axis"] = unit_axis
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after checking its options and shapes."""
        group = {**self.defaults, **param_group}
        if not float(group["lr"]) >= 0:
            raise ValueError(f"lr={group['lr']} must be >= 0.")
        if not group["eps"] > 0:
            raise ValueError(f"eps={group['eps']} must be > 0: units that never had a gradient would become 0/0.")
        if len(group["betas"]) != 2 or not all(0 <= b < 1 for b in group["betas"]):
            raise ValueError(f"betas={group['betas']} must be two numbers in [0, 1).")
        if not group["weight_decay"] >= 0:
            raise ValueError(f"weight_decay={group['weight_decay']} must be >= 0.")
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        if added["per_unit_age"] and any(p.dim() <= added["unit_axis"] for p in added["params"]):
            self.param_groups.pop()
            raise ValueError(
                f"per_unit_age=True needs units along dim {added['unit_axis']}, got a scalar parameter or one of fewer "
                "dimensions. Move it to another group."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("per_unit_age", False)
            group.setdefault("unit_axis", 0)

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        if grad.is_sparse or grad.is_complex():
            raise RuntimeError("AgedAdamW takes dense real gradients.")
        state = self.state[p]
        if not state:
            state["step"] = _age(group, p)
            state["exp_avg"] = torch.zeros_like(p, dtype=state_dtype(p))
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=state_dtype(p))
        lr, eps, decay, (beta1, beta2) = float(group["lr"]), group["eps"], group["weight_decay"], group["betas"]
        m, v, age = state["exp_avg"], state["exp_avg_sq"], state["step"]
        grad = grad.to(m.dtype)
        w = p.to(m.dtype)  # p itself for fp32
        age += age < _LARGEST_AGE if age.dtype == torch.int16 else 1
        if decay != 0:
            w.mul_(1 - lr * decay)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if age.dim() == 0:  # the order of operations of torch's single-tensor AdamW, for equal bits
            t = age.item()
            denominator = (v.sqrt() / (1 - beta2**t) ** 0.5).add_(eps)
            w.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))
        else:
            age = age.float().view([-1 if axis == group["unit_axis"] else 1 for axis in range(p.dim())])
            denominator = v.sqrt().div_(bias_correction(beta2, age).sqrt_()).add_(eps).mul_(bias_correction(beta1, age))
            w.addcdiv_(m, denominator, value=-lr)
        if w is not p:
            p.copy_(w)

    def _restored(self, group: dict[str, Any], p: Tensor, name: str, value: Tensor) -> Tensor:
        if name != "step":
            if value.shape != p.shape:
                raise ValueError(
                    f"Loaded state '{name}' has shape {tuple(value.shape)}, its parameter {tuple(p.shape)}. The model "
                    "was built with another density or rank than the checkpoint's: build it from the checkpoint's "
                    "config."
                )
            return super()._restored(group, p, name, value)
        age = _age(group, p)
        if value.dim() > 0 and value.shape != age.shape:
            raise ValueError(
                f"Loaded 'step' has shape {tuple(value.shape)}, the optimizer keeps {tuple(age.shape)} for a "
                f"parameter of shape {tuple(p.shape)} with per_unit_age={group['per_unit_age']}. Build the groups as "
                "when it was saved."
            )
        return age.copy_(value.clamp(max=_LARGEST_AGE) if age.dtype == torch.int16 else value)


def _age(group: dict[str, Any], p: Tensor) -> Tensor:
    # A scalar step is on the CPU, as in torch: reading it must not wait for the GPU.
    if group["per_unit_age"]:
        # 2 bytes an age are enough where Adam no longer tells the largest from any older one.
        short = max(group["betas"]) ** _LARGEST_AGE < 2.0**-25
        units = p.movedim(group["unit_axis"], 0).flatten(1).select(1, 0) if p.dim() > 1 else p
        # Of `p` itself, so that each rank has the ages of its units where they are sharded.
        return torch.zeros_like(units.detach(), dtype=torch.int16 if short else torch.float32)
    return torch.zeros((), dtype=torch.float32)


def aged_adamw_groups(
    model: nn.Module, is_unit_parameter: Callable[[str, nn.Parameter], bool], weight_decay: float
) -> list[dict[str, Any]]:
    """`parameter_groups` for `AgedAdamW`, times units or no units. Without unit parameters, as in an adapter of factors
    alone, `AgedAdamW` of these groups is `torch.optim.AdamW`.

    Args:
        model: any module.
        is_unit_parameter: called with name and parameter; True where units along dim 0 move.
        weight_decay: for the groups that decay.

    Returns: at most four dicts with `params`, `weight_decay`, `per_unit_age`.

    Raises:
        ValueError: nothing trainable.
    """
    return parameter_groups(model, weight_decay, lambda *of: {"per_unit_age": bool(is_unit_parameter(*of))})
