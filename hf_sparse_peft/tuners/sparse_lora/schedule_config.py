"""What happens to an adapter during training, as plain data that survives the round trip of `adapter_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from ...utils.option_types import check_types

ConfigT = TypeVar("ConfigT")


def nested(cls: type[ConfigT], value: Any, option: str) -> ConfigT | None:
    """`value` (None, a dict from JSON, or an instance) as an instance of `cls`.

    Raises:
        ValueError: `value` is none of these, or names an option that `cls` does not have.
    """
    if value is None or isinstance(value, cls):
        return value
    known = {f.name for f in fields(cls)}
    if not isinstance(value, dict):
        raise ValueError(f"{option}={value!r} is not understood: pass None, a {cls.__name__} or a dict of its options.")
    unknown = sorted(set(value) - known, key=str)
    if unknown:
        raise ValueError(f"{option} has no option {unknown}; it takes {sorted(known)}.")
    try:
        return cls(**value)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def require(condition: bool, owner: str, field: str, value: Any, accepted: str) -> None:
    """Raise `ValueError` naming `owner.field`, its value and what it accepts, unless `condition`."""
    if not condition:
        raise ValueError(f"{owner}.{field}={value!r} is out of range: it takes {accepted}.")


@dataclass
class RankAllocationConfig:
    """How rank moves between layers: AdaLoRA's rule (Zhang et al., 2023) on the gate. The adapter starts with `r`
    components in every layer and ends with `target_r` a layer on average, kept where sensitivity x uncertainty is
    largest over the whole model. Factors start as N(0, 0.02^2), the gate at 0."""

    target_r: int = 4
    """Components a layer has on average at the end; the budget is `target_r * layers` components."""
    initial_warmup: float = 0.1
    """Share of the run before the budget starts to fall (t_init / T)."""
    final_warmup: float = 0.3
    """Share of the run at the end with the budget reached and the mask fixed (t_final / T)."""
    interval: int = 10
    """Optimizer steps between two allocations while the budget falls (delta T)."""
    count_from: Literal[0, 1] = 1
    """Number of the first optimizer step: 1, as in the paper's algorithm, or 0, as in the official training loop, where
    all of the above comes one step later."""
    beta1: float = 0.85
    """Smoothing of the sensitivity |w g|."""
    beta2: float = 0.85
    """Smoothing of the uncertainty |I - I_mean|."""
    orthogonality: float = 0.5
    """Weight of the regulariser mean ||A A^T - I||_F, ||B^T B - I||_F (paper: 0.1 to 0.5 by task). Its gradient is
    added once per optimizer step, after clipping; it never shows in the loss."""

    def __post_init__(self) -> None:
        check_types(self)
        name = "RankAllocationConfig"
        require(self.target_r >= 1, name, "target_r", self.target_r, "an integer >= 1")
        for option in ("initial_warmup", "final_warmup"):
            require(0 <= getattr(self, option) < 1, name, option, getattr(self, option), "a share in [0, 1)")
        require(self.count_from in (0, 1), name, "count_from", self.count_from, "0 or 1")
        total = self.initial_warmup + self.final_warmup
        require(total < 1, name, "initial_warmup + final_warmup", total, "less than 1")
        require(self.interval >= 1, name, "interval", self.interval, "an integer >= 1")
        for option in ("beta1", "beta2"):
            require(0 < getattr(self, option) < 1, name, option, getattr(self, option), "a number in (0, 1)")
        require(self.orthogonality >= 0, name, "orthogonality", self.orthogonality, "a number >= 0")
