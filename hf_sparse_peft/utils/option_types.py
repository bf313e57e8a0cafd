"""Checking what the fields of a config hold against their annotations, for every config of the package."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_types(config: Any) -> None:
    """Refuse a field whose value is not of the annotated type. JSON and YAML bring strings for numbers, floats for
    integers and NaN, and most of them would go unnoticed until a layer computes something else.

    A bool is no number, an integer is a float, a float is no integer, a float is finite. Lists may come as tuples or
    sets; the elements of lists and the keys and values of dicts are checked too. Which strings and which numbers are
    in range is left to the config.

    Raises:
        ValueError: names the class and the field, the value and what is accepted.
    """
    hints = _hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if not _fits(value, hints[field.name]):
            raise ValueError(
                f"{type(config).__name__}.{field.name}={_short(value)} is of the wrong type: it takes "
                f"{_described(hints[field.name])}."
            )


def check_options(cls: type, options: Mapping[str, Any], field: str) -> None:
    """Refuse an option whose value is not of the type that the dataclass `cls` gives it; unknown ones are left to it.

    Raises:
        ValueError: names `field` and the option, the value and what is accepted.
    """
    hints = _hints(cls)
    for name, value in options.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(
                f"{field}[{name!r}]={_short(value)} is of the wrong type: it takes {_described(hints[name])}."
            )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, accepted: Any) -> bool:
    origin, inner = get_origin(accepted), get_args(accepted)
    if accepted is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return type(value) in {type(one) for one in inner}
    if accepted is None or accepted is type(None):
        return value is None
    if accepted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)
    if accepted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or accepted
    if kind in (list, set, tuple):
        items = isinstance(value, (list, set, tuple, frozenset))
        return items and all(_fits(item, inner[0]) for item in value if inner)
    if kind is dict:
        if not isinstance(value, Mapping):
            return False
        return not inner or all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    return isinstance(value, kind)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond the largest float
        return False


_NAMES = {str: "a string", int: "an integer", float: "a finite number", bool: "true or false", dict: "a dict"}


def _described(accepted: Any) -> str:
    origin, inner = get_origin(accepted), get_args(accepted)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_described(one) for one in inner))
    if origin is Literal:
        return f"one of {list(inner)}"
    if accepted is None or accepted is type(None):
        return "None"
    if origin in (list, set, tuple):
        return f"a list of {_described(inner[0]).removeprefix('a ').removeprefix('an ')}s"
    if origin is dict:
        return f"a dict of {_described(inner[0])} -> {_described(inner[1])}"
    if isinstance(accepted, type) and issubclass(accepted, Enum):
        return f"a {accepted.__name__}"
    return _NAMES.get(accepted, getattr(accepted, "__name__", str(accepted)))
