r"""Curves: what fraction, rate or count holds at a given progress of training; frozen dataclasses, `p -> value`.

`p` is progress in `[0, 1]`, a step over the number of steps. At `p = 0` and `p = 1` the end points come out exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..utils.option_types import PositiveFraction, PositiveInt, Range
from ..utils.parts import Part, part_types, register_part


@dataclass(frozen=True)
class Curve(Part):
    """Base of the curves: a value over progress."""

    part_kind: ClassVar[str] = "curve"

    def __call__(self, progress: float) -> float:
        """The value at `progress` in [0, 1]. Raises `ValueError` outside."""
        raise NotImplementedError


@register_part("constant")
@dataclass(frozen=True)
class Constant(Curve):
    """`value` at every progress. Raises `ValueError` for progress outside [0, 1]."""

    value: float
    """What it returns."""

    def __call__(self, progress: float) -> float:
        _progress(progress)
        return self.value


@register_part("linear")
@dataclass(frozen=True)
class Linear(Curve):
    r""":math:`(1-p)\,start + p\,end`. Raises `ValueError` for progress outside [0, 1]."""

    start: float
    """Value at progress 0."""
    end: float
    """Value at progress 1."""

    def __call__(self, progress: float) -> float:
        return _between(self.start, self.end, 1.0 - _progress(progress))


@register_part("cosine")
@dataclass(frozen=True)
class Cosine(Curve):
    r""":math:`end + (start-end)(1+\cos \pi p)/2` (RigL's, with `end = 0`; Evci et al., 2020).

    Raises `ValueError` for progress outside [0, 1].
    """

    start: float
    """Value at progress 0."""
    end: float
    """Value at progress 1."""

    def __call__(self, progress: float) -> float:
        return _between(self.start, self.end, (1.0 + math.cos(math.pi * _progress(progress))) / 2.0)


@register_part("cubic")
@dataclass(frozen=True)
class Cubic(Curve):
    r""":math:`end + (start-end)(1-p)^3` (Zhu & Gupta, 2017). Raises `ValueError` for progress outside [0, 1]."""

    start: float
    """Value at progress 0."""
    end: float
    """Value at progress 1."""

    def __call__(self, progress: float) -> float:
        return _between(self.start, self.end, (1.0 - _progress(progress)) ** 3)


@register_part("exponential")
@dataclass(frozen=True)
class Exponential(Curve):
    r""":math:`start\,(end/start)^p`, a constant factor per step.

    Raises:
        ValueError: end points that are zero or of different sign; progress outside [0, 1].
    """

    start: float
    """Value at progress 0."""
    end: float
    """Value at progress 1, of the sign of `start`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start * self.end > 0:
            raise ValueError(
                f"An exponential curve from {self.start} to {self.end} does not exist: both must be non-zero and "
                f"of one sign. Use linear, cosine or cubic to reach 0."
            )

    def __call__(self, progress: float) -> float:
        progress = _progress(progress)
        if progress == 1.0:
            return self.end
        return self.start * (self.end / self.start) ** progress


@register_part("window")
@dataclass(frozen=True)
class Window(Curve):
    r"""`inner` squeezed into `[begin, end]`: `inner(0)` before, `inner(1)` after, `inner((p-begin)/(end-begin))`
    between.

    Raises:
        ValueError: unless `0 <= begin < end <= 1`; progress outside [0, 1].
    """

    inner: Curve
    """The curve that runs inside the window."""
    begin: Annotated[float, Range(least=0, below=1)]
    """Progress at which `inner` starts to move."""
    end: PositiveFraction
    """Progress at which it has arrived."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.begin < self.end:
            raise ValueError(f"A window from {self.begin} to {self.end} must satisfy 0 <= begin < end <= 1.")

    def __call__(self, progress: float) -> float:
        inside = (_progress(progress) - self.begin) / (self.end - self.begin)
        return self.inner(min(1.0, max(0.0, inside)))


@register_part("staircase")
@dataclass(frozen=True)
class Staircase(Curve):
    r"""`inner` as it is where a stage begins, held through the stage: :math:`inner(\lfloor p\,n \rfloor / n)`. With as
    many stages as a run has epochs, the value of each epoch. Raises `ValueError` for progress outside [0, 1]."""

    inner: Curve
    """The curve whose values are held."""
    stages: PositiveInt
    """Stages of equal length, n."""

    def __call__(self, progress: float) -> float:
        return self.inner(whole_steps(_progress(progress), self.stages) / self.stages)


def make_curve(name: str, start: float, end: float, begin: float = 0.0, end_at: float = 1.0) -> Curve:
    """The curve `name` from `start` to `end`, moving between progress `begin` and `end_at` and still outside.

    `constant` holds `start`; `end`, `begin` and `end_at` say nothing about it.

    Raises:
        ValueError: unknown name, unless `0 <= begin < end_at <= 1`, or end points that the curve cannot join.
    """
    known = {key: cls for key, cls in part_types(Curve).items() if key not in ("window", "staircase")}
    if name not in known:
        raise ValueError(f"schedule='{name}' is unknown. Accepted: {', '.join(sorted(known))}.")
    if name == "constant":
        return Constant(start)
    inner = known[name](start, end)
    return inner if (begin, end_at) == (0.0, 1.0) else Window(inner, begin, end_at)


def _progress(progress: float) -> float:
    # A step over a step count is exact at both ends, but a caller may sum up fractions.
    if not -1e-9 <= progress <= 1.0 + 1e-9:
        raise ValueError(f"progress={progress} must be in [0, 1]: the current step over the number of steps.")
    return min(1.0, max(0.0, float(progress)))


def _between(start: float, end: float, weight: float) -> float:
    return start * weight + end * (1.0 - weight)


def whole_steps(fraction: float, total_steps: int) -> int:
    """`floor(fraction * total_steps)`; 0.29 of 100 steps are 29, though the product of the floats is 28.999...."""
    return int(fraction * total_steps + 1e-9)
