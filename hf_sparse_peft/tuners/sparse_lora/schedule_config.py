"""What happens to an adapter during training, as plain data that survives the round trip of `adapter_config.json`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

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
