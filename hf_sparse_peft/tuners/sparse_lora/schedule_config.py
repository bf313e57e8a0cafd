"""What happens to an adapter during training, as plain data that survives the round trip of `adapter_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

ConfigT = TypeVar("ConfigT")


def nested(cls: type[ConfigT], value: Any, field: str) -> ConfigT | None:
    """`value` (None, a dict from JSON, or an instance) as an instance of `cls`.

    Raises:
        ValueError: `value` is none of these, or names an option that `cls` does not have.
    """
    if value is None or isinstance(value, cls):
        return value
    known = {f.name for f in fields(cls)}
    if not isinstance(value, dict):
        raise ValueError(f"{field}={value!r} is not understood: pass None, a {cls.__name__} or a dict of its options.")
    unknown = sorted(set(value) - known)
    if unknown:
        raise ValueError(f"{field} has no option {unknown}; it takes {sorted(known)}.")
    return cls(**value)


def _require(condition: bool, owner: str, field: str, value: Any, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{owner}.{field}={value!r} is out of range: it takes {accepted}.")


@dataclass
class RegrowthConfig:
    """When and how a support moves: every `interval` optimizer steps a share of each layer's units is dropped and as
    many are grown. The defaults are SpIEL-AG (Ansell et al., 2024)."""

    interval: int = 20
    """Optimizer steps between two moves (SpIEL: 20)."""
    collect_steps: int = 5
    """Steps before a move in which candidate gradients are summed (SpIEL-AG: 5). Costs one transient dense gradient a
    layer in these steps."""
    drop: Literal["magnitude"] = "magnitude"
    """Which units leave: those with the smallest sum of |value|."""
    grow: Literal["accumulated_gradient"] = "accumulated_gradient"
    """Which units enter: the candidates with the largest |sum of gradients| over the collecting steps."""
    fraction: float = 0.2
    """Share of a layer's living units replaced at the first step of the schedule (SpIEL: 0.2)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How `fraction` falls over the run: `linear` to 0 (SpIEL's default), `cosine` to 0, or `constant`."""
    replace_all_first: bool = True
    """Whether the very first move replaces every unit, as SpIEL's linear policy does with its random start. False keeps
    a start that was chosen on purpose."""
    seed_moments: bool = True
    """Whether grown units start with moments and age estimated from their candidate gradients (SpIEL), instead of
    zeros. The age needs an optimizer with per-unit steps (`hf_sparse_peft.optim.AgedAdamW`)."""

    def __post_init__(self) -> None:
        name = "RegrowthConfig"
        _require(self.interval >= 1, name, "interval", self.interval, "an integer >= 1")
        ok = 1 <= self.collect_steps <= self.interval
        _require(ok, name, "collect_steps", self.collect_steps, f"an integer from 1 to interval={self.interval}")
        _require(self.drop == "magnitude", name, "drop", self.drop, "'magnitude'")
        _require(self.grow == "accumulated_gradient", name, "grow", self.grow, "'accumulated_gradient'")
        _require(0 < self.fraction <= 1, name, "fraction", self.fraction, "a number in (0, 1]")
        schedules = ("linear", "cosine", "constant")
        _require(self.schedule in schedules, name, "schedule", self.schedule, f"one of {schedules}")


@dataclass
class PruningConfig:
    """How the support thins out during training: the living share falls from 1 to `final_fraction` along a cubic curve
    (Zhu and Gupta, 2017), the units with the smallest sum of |value| leaving first."""

    final_fraction: float = 0.5
    """Share of the injected units that live at the end: a density d ends as `final_fraction * d`."""
    begin: float = 0.25
    """Where pruning starts, as a share of the run."""
    end: float = 0.75
    """Where pruning has reached `final_fraction`, as a share of the run."""
    interval: int = 10
    """Optimizer steps between two prunings."""
    scope: Literal["layer", "global"] = "layer"
    """Whether every layer loses the same share, or units of all layers compete (by mean |value| of a unit)."""

    def __post_init__(self) -> None:
        name = "PruningConfig"
        _require(0 < self.final_fraction <= 1, name, "final_fraction", self.final_fraction, "a number in (0, 1]")
        _require(0 <= self.begin < self.end <= 1, name, "begin, end", (self.begin, self.end), "0 <= begin < end <= 1")
        _require(self.interval >= 1, name, "interval", self.interval, "an integer >= 1")
        _require(self.scope in ("layer", "global"), name, "scope", self.scope, "'layer' or 'global'")


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
    beta1: float = 0.85
    """Smoothing of the sensitivity |w g|."""
    beta2: float = 0.85
    """Smoothing of the uncertainty |I - I_mean|."""
    orthogonality: float = 0.5
    """Weight of the regulariser mean ||A A^T - I||_F, ||B^T B - I||_F (paper: 0.1 to 0.5 by task). Its gradient is
    added once per optimizer step, after clipping; it never shows in the loss."""

    def __post_init__(self) -> None:
        name = "RankAllocationConfig"
        _require(self.target_r >= 1, name, "target_r", self.target_r, "an integer >= 1")
        for field in ("initial_warmup", "final_warmup"):
            _require(0 <= getattr(self, field) < 1, name, field, getattr(self, field), "a share in [0, 1)")
        total = self.initial_warmup + self.final_warmup
        _require(total < 1, name, "initial_warmup + final_warmup", total, "less than 1")
        _require(self.interval >= 1, name, "interval", self.interval, "an integer >= 1")
        for field in ("beta1", "beta2"):
            _require(0 < getattr(self, field) < 1, name, field, getattr(self, field), "a number in (0, 1)")
        _require(self.orthogonality >= 0, name, "orthogonality", self.orthogonality, "a number >= 0")
