"""What the fields of a config take, said in their annotations, and checking values against them.

every: PositiveInt | None = None
sparsity: Annotated[float, Range(least=0, below=1)] = 0.3
betas: tuple[Decay, Decay] | None = None
kind: Literal["soft", "dead_zone"] = "soft"
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Which numbers an option takes: `Annotated[int, Range(least=1)]`. Holds inside of lists, dicts and unions too."""

    least: float | None = None
    """The smallest number that is accepted."""
    most: float | None = None
    """The largest number that is accepted."""
    above: float | None = None
    """Accepted numbers are larger than it."""
    below: float | None = None
    """Accepted numbers are smaller than it."""

    def __contains__(self, number: float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """As an error says it after "a number": ">= 1", "in (0, 1]"."""
        lower = None if (self.least, self.above) == (None, None) else self.least if self.above is None else self.above
        upper = None if (self.most, self.below) == (None, None) else self.most if self.below is None else self.below
        if lower is None:
            return f"{'<=' if self.below is None else '<'} {upper}"
        if upper is None:
            return f"{'>=' if self.above is None else '>'} {lower}"
        return f"in {'[' if self.above is None else '('}{lower}, {upper}{']' if self.below is None else ')'}"


PositiveInt = Annotated[int, Range(least=1)]
NonNegativeInt = Annotated[int, Range(least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(least=0)]
PositiveFraction = Annotated[float, Range(above=0, most=1)]
"""A fraction that may be all, and is not nothing."""
Fraction = Annotated[float, Range(least=0, most=1)]
"""A fraction that may be nothing or all."""
Decay = Annotated[float, Range(least=0, below=1)]
"""A fraction that may be nothing, and is not all, as the decay rate of a moving average."""


def check_types(config: Any) -> None:
    """Refuse a field whose value is not of the annotated type, or not in the annotated range. JSON and YAML bring
    strings for numbers, floats for integers and NaN, and most of them would go unnoticed until a layer computes
    something else.

    A bool is no number, an integer is a float, a float is no integer, a float is finite. Lists may come as tuples or
    sets; the elements of lists and the keys and values of dicts are checked too. `Range` says which numbers are
    accepted, `Literal` which strings.

    Raises:
        ValueError: names the class and the field, the value and what is accepted.
    """
    hints = _hints(type(config))
    for field in fields(config):
        check_value(getattr(config, field.name), hints[field.name], f"{type(config).__name__}.{field.name}")


def check_value(value: Any, accepted: Any, where: str) -> None:
    """Refuse a `value` that the annotation `accepted` does not take.

    Raises:
        ValueError: "`where`=`value` is of the wrong type" or "is out of range", and what is accepted.
    """
    if fits(value, accepted):
        return
    cause = "out of range" if _fits(value, accepted, ranges=False) else "of the wrong type"
    raise ValueError(f"{where}={_short(value)} is {cause}: it takes {described(accepted)}.")


def fits(value: Any, accepted: Any) -> bool:
    """Whether the annotation `accepted` takes `value`."""
    return _fits(value, accepted, ranges=True)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _fits(value: Any, accepted: Any, ranges: bool) -> bool:
    origin, inner = get_origin(accepted), get_args(accepted)
    if accepted is Any:
        return True
    if origin is Annotated:
        limits = [limit for limit in inner[1:] if isinstance(limit, Range)] if ranges else []
        return _fits(value, inner[0], ranges) and all(value in limit for limit in limits)
    if origin in (Union, types.UnionType):
        return any(_fits(value, hint, ranges) for hint in inner)
    if origin is Literal:
        same_type = [choice for choice in inner if type(choice) is type(value)]
        return value in same_type if ranges else bool(same_type)
    if accepted is None or accepted is type(None):
        return value is None
    if accepted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)
    if accepted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return _fits_container(value, origin or accepted, inner, ranges)


def _fits_container(value: Any, kind: Any, inner: tuple[Any, ...], ranges: bool) -> bool:
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        sizes = isinstance(value, (list, tuple)) and (not ranges or len(value) == len(inner))
        return sizes and all(_fits(*pair, ranges) for pair in zip(value, inner, strict=False))
    if kind in (list, set, tuple):
        items = isinstance(value, (list, set, tuple, frozenset))
        return items and all(_fits(item, inner[0], ranges) for item in value if inner)
    if kind is dict:
        if not isinstance(value, Mapping):
            return False
        return not inner or all(_fits(k, inner[0], ranges) and _fits(v, inner[1], ranges) for k, v in value.items())
    return isinstance(value, kind)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond the largest float
        return False


def _plural(what: str) -> str:
    kind, *limits = what.removeprefix("a ").removeprefix("an ").replace("finite number", "number").split(" ", 1)
    return " ".join([f"{kind}s", *limits])


_NAMES = {str: "a string", int: "an integer", float: "a finite number", bool: "true or false", dict: "a dict"}


def described(accepted: Any) -> str:
    """What an annotation takes, as an error and a help text say it: "an integer >= 1 or None"."""
    origin, inner = get_origin(accepted), get_args(accepted)
    if origin is Annotated:
        limits = [str(limit) for limit in inner[1:] if isinstance(limit, Range)]
        kind = "a number" if limits and inner[0] is float else described(inner[0])
        return " ".join([kind, *limits])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(described, inner)))
    if origin is Literal:
        return " or ".join(map(repr, inner)) if len(inner) <= 2 else f"one of {list(inner)}"
    if accepted is None or accepted is type(None):
        return "None"
    if origin in (list, set, tuple):
        fixed = origin is tuple and inner[-1] is not Ellipsis
        return f"{len(inner) if fixed else 'a list of'} {_plural(described(inner[0]))}"
    if origin is dict:
        return f"a dict of {described(inner[0])} -> {described(inner[1])}"
    if isinstance(accepted, type) and issubclass(accepted, Enum):
        return f"a {accepted.__name__}"
    return _NAMES.get(accepted, getattr(accepted, "__name__", str(accepted)))
