"""Penalties and optimizers that pull units to 0 while they train, and let them leave."""

from __future__ import annotations

from typing import Any

from ..rules import GroupEnvelope, HalfSpace, Hesso, Lobster, MaskSparsity, PlateauThreshold, SeReNe
from ..training import AdamWSpec
from .registry import Method, register, row

_ALL_LINEAR = {"density": 0.0, "target_modules": "all-linear"}


@register(
    "lobster",
    paper="Tartaglione et al., 2022 (LOBSTER)",
    moves="support: entries below the largest threshold that the loss bears leave, once it is flat",
    use_when="a sparse adapter is to lose the entries that the loss does not need, with a bound on the loss",
    cost="some evaluations at each plateau; a copy of the adapter",
)
def lobster(
    density: float = 0.02,
    weight: float = 1e-4,
    tolerance: float = 0.05,
    patience: int = 2,
    every: int | None = None,
    data: str = "evaluation",
    **overrides: Any,
) -> Method:
    """LOBSTER: decay by insensitivity, pruning at plateaus; the paper prunes single weights of whole networks, this row
    entries of a sparse adapter. The authors train with SGD without momentum or weight decay, lr 0.1, a patience of 20
    epochs, and take a flat loss for no plateau (`PlateauThreshold.slack=0.01`; here 0)."""
    rules = [Lobster(weight), PlateauThreshold(tolerance, patience, every, slack=0.0, data=data)]
    return row(overrides, r=0, density=density, schedule=rules, target_modules="all-linear")


@register(
    "serene",
    paper="Tartaglione et al., 2021 (SeReNe)",
    moves="rank: components below the largest threshold that the loss bears die, once it is flat",
    use_when="a LoRA is to lose the ranks that its outputs do not depend on, with a bound on the loss",
    cost="a backward pass more a batch (`kind='full'`: some); evaluations at each plateau; a copy of the adapter",
)
def serene(
    r: int = 16,
    weight: float = 1e-4,
    kind: str = "lower_bound",
    tolerance: float = 0.05,
    patience: int = 2,
    every: int | None = None,
    data: str = "evaluation",
    **overrides: Any,
) -> Method:
    """SeReNe: decay of neurons by the outputs' insensitivity; the paper prunes neurons of whole networks, this row
    components of a LoRA, each a neuron, and rows of its `B`."""
    rules = [SeReNe(weight, kind), PlateauThreshold(tolerance, patience, every, slack=0.0, data=data)]
    return row(overrides, r=r, schedule=rules, **_ALL_LINEAR)


@register(
    "mask-sparsity",
    paper="Jiang et al., 2023 (MaskSparsity)",
    moves="rank: components are marked, pulled to 0 and removed",
    use_when="it is known how many ranks go, and what stays is not to feel it",
    cost="a byte a component",
)
def mask_sparsity(r: int = 16, fraction: float = 0.5, weight: float = 5e-4, **overrides: Any) -> Method:
    """MaskSparsity: an L1 pull on what is to go alone. The paper prunes channels by the scales of their norms, this row
    components of a LoRA by their gates."""
    return row(overrides, r=r, schedule=[MaskSparsity(weight, fraction)], optimizer=AdamWSpec(), **_ALL_LINEAR)


@register(
    "wgsef",
    paper="Refael et al., 2022 (WGSEF)",
    moves="rank: all but k components of the model are thresholded to 0",
    use_when="a given number of ranks is to be left, wherever they are needed",
    cost="one number a component",
)
def wgsef(r: int = 16, kept: float = 0.5, weight: float = 1.0, **overrides: Any) -> Method:
    """Group sparse envelope of `kept` of the components, on the gates of a LoRA, which start at N(0, 1) as SoRA's; the
    paper prunes groups of whole networks. `weight` is this project's."""
    return row(overrides, r=r, schedule=[GroupEnvelope(weight, kept)], optimizer=AdamWSpec(), **_ALL_LINEAR)


@register(
    "hspg",
    paper="Chen et al., 2021 (Only Train Once)",
    moves="rank: components that a step turns out of their half-space become 0",
    use_when="as many ranks are to go as a penalty finds",
    cost="a copy of the adapter in the step",
)
def hspg(r: int = 16, weight: float = 1e-3, epsilon: float = 0.0, **overrides: Any) -> Method:
    """HSPG on the components of a LoRA, each a zero-invariant group: its row of `A`, its column of `B`, its gate. The
    paper prunes groups of whole networks and trains with SGD."""
    return row(overrides, r=r, schedule=[HalfSpace(weight, epsilon)], optimizer=AdamWSpec(), **_ALL_LINEAR)


@register(
    "hesso",
    paper="Chen et al., 2024 (HESSO)",
    moves="rank: the lowest by five scores shrink to 0, some in each period",
    use_when="a given fraction of the ranks is to go, without anything to tune",
    cost="a copy of the adapter at the first step of a period",
)
def hesso(r: int = 16, fraction: float = 0.5, periods: int = 10, **overrides: Any) -> Method:
    """HESSO on the components of a LoRA, around AdamW; the paper prunes groups of whole networks."""
    return row(overrides, r=r, schedule=[Hesso(fraction, periods=periods)], optimizer=AdamWSpec(), **_ALL_LINEAR)
