"""Methods that train with forward passes only. Their `trainer_class` is `ZerothOrderTrainer`.

A whole model trains the same way, without a config:

    optimizer = zeroth_order_optimizer(model, args, epsilon=1e-3, sparsity=0.75)
    ZerothOrderTrainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None)).train()
"""

from __future__ import annotations

from typing import Any

from ..training import ZerothOrderSpec
from .registry import Method, register, row


@register(
    "mezo",
    paper="Malladi et al., 2023",
    moves="nothing",
    use_when="only a forward pass fits into memory, and the task can be put as a prompt",
    cost="memory of an evaluation; two forwards a step, and many more steps than with gradients",
)
def mezo(r: int = 8, epsilon: float = 1e-2, perturbation: str = "in_place", **overrides: Any) -> Method:
    """MeZO on LoRA, the paper's adapter and its epsilon for it, on the query and value matrices (peft's default
    targets). The paper trains LoRA at a constant learning rate of 5e-5 or 1e-4 (`lr_scheduler_type="constant"`), 16
    examples a step, 20,000 steps.

    Any field of the config changes what is trained: `density > 0` adds a support; `perturbation="layerwise"` restores
    bit for bit in every dtype.
    """
    optimizer = ZerothOrderSpec(epsilon=epsilon, perturbation=perturbation)
    return row(overrides, r=r, density=0.0, optimizer=optimizer)


@register(
    "sparse-mezo",
    paper="Liu et al., 2024",
    moves="nothing",
    use_when="as mezo; noise on the large weights is what hurts, so only the small ones move",
    cost="as mezo; 4 bytes a value plus 1 to 2 of index, which is much at the paper's density of a quarter",
)
def sparse_mezo(
    sparsity: float = 0.75, epsilon: float = 1e-3, perturbation: str = "in_place", **overrides: Any
) -> Method:
    """MeZO on the smallest `1 - sparsity` of every weight's entries, as a support.

    The paper perturbs the weights themselves where |theta| <= h. A 4-bit weight cannot move, and an adapter's own
    values, which start at 0, have no magnitude to choose by. So the adapter's support is the paper's mask, chosen from
    the weights as they are before training, and its values are what MeZO trains: `W + S` moves as theta does. Two
    differences: the mask stays as it was before training (the paper's follows theta, with h fixed), and a 16-bit base
    keeps its weights while the moves live in fp32. For the paper's form on a whole dense model, pass `sparsity` to
    `zeroth_order_optimizer` (module docstring).
    """
    if not 0 < sparsity < 1:
        raise ValueError(
            f"sparsity={sparsity} is not a fraction in (0, 1): it is how much of each weight stays (paper: 0.75)."
        )
    options = {"r": 0, "density": 1 - sparsity, "criterion": "smallest_magnitude", "target_modules": "all-linear"}
    options["optimizer"] = ZerothOrderSpec(epsilon=epsilon, perturbation=perturbation)
    return row(overrides, **options)
