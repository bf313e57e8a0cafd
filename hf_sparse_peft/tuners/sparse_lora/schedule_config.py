"""What happens to an adapter during training, as plain data that survives the round trip of `adapter_config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from ...sparsity import LowRankMagnitude, make_score
from ...utils.option_types import check_options, check_types

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


DROPS = ("magnitude", "signed_magnitude", "sensitivity", "age", "none")
GROWTHS = ("accumulated_gradient", "sm3", "gradient", "random", "random_unfired", "low_rank_magnitude")
REGROWTH_SCHEDULES = ("linear", "cosine", "constant", "exponential")
_SPIEL = ("accumulated_gradient", "sm3")
_GROW_OPTIONS = {"sm3": ("score",), "gradient": ("candidates",)}


@dataclass
class RegrowthConfig:
    """When and how a support moves: every `interval` optimizer steps a share of each layer's units is dropped and as
    many are grown, so that the number of trained units never changes. The defaults are SpIEL-AG (Ansell et al., 2024).
    """

    interval: int = 20
    """Optimizer steps between two moves (SpIEL: 20, RigL: 100)."""
    collect_steps: int = 5
    """Steps before a move in which `accumulated_gradient` sums candidate gradients (SpIEL-AG: 5). Costs one transient
    dense gradient a layer in these steps."""
    first_move: int | None = None
    """Step after which the first move comes; None: `collect_steps` for SpIEL's two rules, `interval` for the others."""
    stop_at: float = 1.0
    """Share of the run after which nothing moves and at which `schedule` has reached `final_fraction` (RigL: 0.75)."""
    drop: Literal["magnitude", "signed_magnitude", "sensitivity", "age", "none"] = "magnitude"
    """Which units leave: those with the smallest sum of |value| (`magnitude`), the same share of the positive ones and
    of the negative ones (`signed_magnitude`, SET; units that are still 0 first), those with the smallest sum of
    |value x gradient| at the move's own step (`sensitivity`: what removing them costs, to first order), or by how long
    they are in the support (`age`, see `drop_first`; among equal ages the smallest |value| first). `none`:
    `low_rank_magnitude` chooses the whole support anew and whoever it leaves out goes (LIFT)."""
    drop_first: Literal["oldest", "youngest"] = "oldest"
    """Which end of the ages `drop='age'` starts from."""
    grow: Literal["accumulated_gradient", "sm3", "gradient", "random", "random_unfired", "low_rank_magnitude"] = (
        "accumulated_gradient"
    )
    """Which units enter: the candidates with the largest |sum of gradients| over the collecting steps
    (`accumulated_gradient`, SpIEL-AG); the largest product of SM3's row and column accumulators (`sm3`, SpIEL-MA; needs
    `optim.SparseSM3`); the largest |dense gradient| of the move's own step (`gradient`, RigL); any (`random`, SET), or
    first those that were never in the support (`random_unfired`); the largest entries of the current weight's rank-q
    approximation (`low_rank_magnitude`, LIFT)."""
    grow_options: dict[str, Any] = field(default_factory=dict)
    """`sm3`: `score`, 'product' (the paper's) or 'min' (SM3's own estimate). `gradient`: `candidates`, a factor: with
    gradient accumulation a dense fp32 gradient of every adapted weight is summed during the move's step; a factor c
    keeps the c x as many best units as the move grows from the first micro-batch instead. `low_rank_magnitude`: `rank`,
    `exact`, `oversampling`, `power_iterations`, as the criterion of that name takes them."""
    fraction: float = 0.2
    """Share of a layer's trained units replaced at the first step of the schedule (SpIEL: 0.2, RigL and SET: 0.3)."""
    schedule: Literal["linear", "cosine", "constant", "exponential"] = "linear"
    """How `fraction` falls to `final_fraction`: `linear` (SpIEL), `cosine` (RigL), `exponential`, or not (`constant`,
    SET)."""
    final_fraction: float = 0.0
    """Where the schedule ends (RigL and SpIEL: 0; random-pruning's code: 0.005). `exponential` needs one above 0."""
    replace_all_first: bool | None = None
    """Whether the very first move replaces every unit. None: as SpIEL publishes it, with its two rules and the `linear`
    schedule (its cosine policy has no such move), and only where the support is still the random draw of injection: a
    support that was chosen (by a criterion, from data, from a file) or trained before is kept, with a warning. True
    replaces any start, False none."""
    seed_moments: bool | None = None
    """Whether grown units start with moments and age estimated from their candidate gradients (SpIEL-AG; None: there),
    instead of zeros. The age needs an optimizer with per-unit steps (`hf_sparse_peft.optim.AgedAdamW`)."""
    skip_step: bool = False
    """Whether a move takes the place of its step's update, as RigL publishes it."""
    retired_share: float = 0.0
    """Room for retired units, as a share of the trained ones. A unit that leaves with a learned change then keeps it:
    it is frozen, goes on adding to the weight, merges and saves like any other, and may be trained again later. 0: its
    change is lost. Costs as much memory a unit as a trained one (about 16 bytes an entry with Adam) and one byte for
    the mark. When the room is full, the retired units with the smallest sum of |value| lose their change, which is
    counted (`MaskRegrowthCallback.replaced`, `lost`) and warned of once."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.seed_moments is None:
            self.seed_moments = self.grow == "accumulated_gradient"
        self._check_timing()
        self._check_rules()

    @property
    def first(self) -> int:
        """Step after which the first move comes."""
        if self.first_move is not None:
            return self.first_move
        return min(self.collect_steps, self.interval) if self.grow in _SPIEL else self.interval

    @property
    def replaces_random_start(self) -> bool:
        """Whether the first move replaces every unit of a support that is a random draw without trained values."""
        if self.replace_all_first is None:
            return self.grow in _SPIEL and self.schedule == "linear"
        return self.replace_all_first

    def moves_after(self, update: int, total_steps: int | None = None) -> bool:
        """Whether the support moves after the `update`-th optimizer step: after `first` and every `interval` on, as
        long as `update` is less than `stop_at` of `total_steps`. Never after the last update, where units would enter
        untrained."""
        if update < self.first or (update - self.first) % self.interval:
            return False
        return total_steps is None or update < self.stop_at * total_steps

    @property
    def collects(self) -> bool:
        """Whether candidate gradients are summed over several steps."""
        return self.grow == "accumulated_gradient"

    def _check_timing(self) -> None:
        name = "RegrowthConfig"
        require(self.interval >= 1, name, "interval", self.interval, "an integer >= 1")
        if self.collects:
            ok = 1 <= self.collect_steps <= self.interval
            require(ok, name, "collect_steps", self.collect_steps, f"an integer from 1 to interval={self.interval}")
        require(self.collect_steps >= 1, name, "collect_steps", self.collect_steps, "an integer >= 1")
        least = self.collect_steps if self.collects else 1
        ok = self.first_move is None or self.first_move >= least
        require(ok, name, "first_move", self.first_move, f"None or a step >= {least}")
        require(0 < self.stop_at <= 1, name, "stop_at", self.stop_at, "a share of the run in (0, 1]")

    def _check_rules(self) -> None:
        name = "RegrowthConfig"
        choices = (
            ("drop", DROPS), ("drop_first", ("oldest", "youngest")), ("grow", GROWTHS), ("schedule", REGROWTH_SCHEDULES)
        )  # fmt: skip
        for option, accepted in choices:
            require(getattr(self, option) in accepted, name, option, getattr(self, option), f"one of {accepted}")
        require(0 < self.fraction <= 1, name, "fraction", self.fraction, "a number in (0, 1]")
        low = self.schedule == "exponential"
        ok = 0 <= self.final_fraction <= self.fraction and not (low and self.final_fraction == 0)
        accepted = f"a number from {'above 0' if low else '0'} to fraction={self.fraction}"
        require(ok, name, "final_fraction", self.final_fraction, accepted)
        require(self.retired_share >= 0, name, "retired_share", self.retired_share, "a number >= 0")
        whole = self.drop != "none" or self.grow == "low_rank_magnitude"
        require(whole, name, "drop", self.drop, f"a rule for who leaves with grow={self.grow!r}: {DROPS[:-1]}")
        ok = self.replace_all_first in (None, True, False)
        require(ok, name, "replace_all_first", self.replace_all_first, "None, True or False")
        ok = self.collects or not self.seed_moments
        require(ok, name, "seed_moments", self.seed_moments, f"None or False with grow={self.grow!r}")
        self._check_grow_options()

    def _check_grow_options(self) -> None:
        options, name = self.grow_options, "RegrowthConfig"
        if self.grow == "low_rank_magnitude":
            check_options(LowRankMagnitude, options, f"{name}.grow_options")
            make_score("low_rank_magnitude", **options)  # refuses unknown options and bad values by name
            return
        accepted = _GROW_OPTIONS.get(self.grow, ())
        require(set(options) <= set(accepted), name, "grow_options", options, f"{accepted} with grow={self.grow!r}")
        score = options.get("score", "product")
        require(score in ("product", "min"), name, "grow_options['score']", score, "'product' or 'min'")
        factor = options.get("candidates", 1)
        number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        require(number and 1 <= factor < math.inf, name, "grow_options['candidates']", factor, "a factor >= 1")


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
