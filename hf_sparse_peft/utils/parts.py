"""Parts: frozen dataclasses that a config file names by their type, and that anybody can register.

    @register_part("prune")
    @dataclass(frozen=True)
    class Prune(Rule):               # Rule sets part_kind = "rule"
        final_fraction: PositiveFraction = 0.5

    Prune(0.25).to_dict()                                            {"type": "prune", "final_fraction": 0.25}
    load_part(Rule, {"type": "prune", "final_fraction": 0.25}, "schedule[0]")       Prune(0.25)

Annotations say what an option takes, its range included (`option_types`); a part refuses anything else when it is made.
What concerns several options is checked in `__post_init__`, with `require`, after `super().__post_init__()`.

A field whose value is the default is left out, so that files stay short. A part of a plugin that is not installed, or
of a newer release, loads as an `UnknownPart`: it is kept as it was, written back as it was, and what needs to run it
refuses it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from .option_docs import document_options
from .option_types import check_types

PartT = TypeVar("PartT", bound="Part")
ClassT = TypeVar("ClassT")

_PARTS: dict[tuple[str, str], type[Part]] = {}


class FrozenDict(dict):
    """A dict that never changes and may be a key, as the options of a part are."""

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type, tuple[dict]]:
        return FrozenDict, (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("An option of a part does not change: make another part, e.g. with dataclasses.replace.")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


@dataclass(frozen=True)
class Part:
    """Base of the parts of a config: values that never change, so that a part may be a key. A kind of parts is a
    subclass that sets `part_kind`.

    Lists, sets and dicts that are given as options become tuples, frozen sets and frozen dicts.

    Raises:
        ValueError: an option of another type than its annotation's, or out of its range; names it.
    """

    part_kind: ClassVar[str] = ""
    """What may stand where: "rule", "curve", "score", ..."""
    part_type: ClassVar[str] = ""
    """Its name in files; set by `register_part`."""

    def __post_init__(self) -> None:
        # JSON gives dicts, names and lists; frozen fields are set as dataclasses themselves do.
        nested = _nested_bases(type(self))
        for field in fields(self):
            value, place = getattr(self, field.name), f"{type(self).__name__}.{field.name}"
            if field.name in nested and not isinstance(value, (Part, int, float, type(None))):
                value = _load_field(nested[field.name], value, place)
            value = _frozen(value)
            object.__setattr__(self, field.name, value)
            unknown = next((part for part in _flat(value) if isinstance(part, UnknownPart)), None)
            if unknown is not None:
                raise _HoldsUnknownPart(unknown.reason)
        check_types(self)

    def to_dict(self) -> dict[str, Any]:
        """`type` and every option that is not at its default, nested parts included."""
        found = {"type": self.part_type}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != _frozen(field.default if field.default_factory is MISSING else field.default_factory()):
                found[field.name] = plain(value)
        return found


@dataclass(frozen=True)
class UnknownPart:
    """A part that cannot be made here: kept as the file has it."""

    kind: str
    data: dict[str, Any]
    reason: str
    """Why, as the end of a sentence: "its type 'x' is not registered"."""

    @property
    def part_type(self) -> str:
        """Its type in the file."""
        return self.data["type"]

    def to_dict(self) -> dict[str, Any]:
        """What the file had."""
        return dict(self.data)

    def __hash__(self) -> int:
        return hash((self.kind, str(self.data)))


class _HoldsUnknownPart(ValueError):
    """A part that would be made of an unknown one; says why that is unknown."""


def register_part(name: str) -> Callable[[type[PartT]], type[PartT]]:
    """Class decorator: enter a frozen dataclass under `name` among the parts of its kind.

    Raises:
        TypeError: no frozen dataclass, or of no kind.
        ValueError: the name is taken, or is not lower case with underscores.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"part type {name!r} must be lower case with underscores, as in 'aged_adamw'.")

    def enter(cls: type[PartT]) -> type[PartT]:
        if not (isinstance(cls, type) and issubclass(cls, Part) and cls.part_kind):
            raise TypeError(f"{cls!r} is no part: derive it from one of the kinds, e.g. hf_sparse_peft.Rule.")
        if "__dataclass_params__" not in vars(cls) or not cls.__dataclass_params__.frozen:
            raise TypeError(f"{cls.__name__} is no frozen dataclass: put @dataclass(frozen=True) below the decorator.")
        known = _PARTS.setdefault((cls.part_kind, name), cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{cls.part_kind} {name!r} is taken by {known.__module__}.{known.__qualname__}; choose another name."
            )
        _PARTS[cls.part_kind, name] = cls  # a module that is reloaded brings its class anew
        cls.part_type = name
        return document_options(cls)

    return enter


def part_types(base: type[Part]) -> dict[str, type[Part]]:
    """Registered types of the kind of `base`, by name."""
    return {name: cls for (kind, name), cls in sorted(_PARTS.items()) if kind == base.part_kind}


def load_part(base: type[PartT], value: Any, where: str) -> PartT | UnknownPart:
    """`value` (a part, a dict with `type` as files have it, or the bare type) as a part of the kind of `base`.

    A type that is not registered and an option that its class does not have give an `UnknownPart`.

    Args:
        where: the option, for messages.

    Raises:
        ValueError: neither of these, or an option out of range.
    """
    if isinstance(value, Part) and value.part_kind == base.part_kind:
        return value
    if isinstance(value, UnknownPart) and value.kind == base.part_kind:
        return value
    data = {"type": value} if isinstance(value, str) else value
    if not isinstance(data, Mapping) or not isinstance(data.get("type"), str):
        raise ValueError(
            f"{where}={value!r} is not understood: pass {_with_article(base.part_kind)} (one of "
            f"{[cls.__name__ for cls in part_types(base).values()]}), or a dict with its 'type' and options."
        )
    cls = _PARTS.get((base.part_kind, data["type"]))
    if cls is None:
        return UnknownPart(base.part_kind, dict(data), f"its type {data['type']!r} is not registered")
    options = {name: option for name, option in data.items() if name != "type"}
    surplus = sorted(set(options) - {field.name for field in fields(cls)}, key=str)
    if surplus:
        return UnknownPart(base.part_kind, dict(data), f"{cls.__name__} has no option {surplus}")
    _check_complete(cls, options, f"{where}={value!r}")
    try:
        return cls(**options)
    except _HoldsUnknownPart as error:
        return UnknownPart(base.part_kind, dict(data), str(error))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def load_part_by_name(base: type[PartT], value: Any, where: str) -> PartT | UnknownPart:
    """`load_part`, but a bare type that is not registered, as a slip of the pen in code gives, is refused.

    Raises:
        ValueError: as `load_part`, or an unknown name; lists what is accepted.
    """
    if isinstance(value, str) and value not in part_types(base):
        raise ValueError(f"{where}={value!r} is unknown; choose one of {sorted(part_types(base))}.")
    return load_part(base, value, where)


def load_options(cls: type[ClassT], value: Any, where: str) -> ClassT:
    """`value` (an instance of the dataclass `cls`, or a dict of its options as files have it) as an instance.

    Raises:
        ValueError: neither of these, an option that `cls` does not have, or one out of range.
    """
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}={value!r} is not understood: pass a {cls.__name__} or a dict of its options.")
    known = {field.name for field in fields(cls)}
    unknown = sorted(set(value) - known, key=str)
    if unknown:
        raise ValueError(f"{where} has no option {unknown}; it takes {sorted(known)}.")
    _check_complete(cls, value, f"{where}={value!r}")
    try:
        return cls(**value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_complete(cls: type, options: Mapping[str, Any], where: str) -> None:
    """Refuse options that lack one without a default."""
    required = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in options]
    if missing:
        raise ValueError(f"{where} is incomplete: {cls.__name__} has no default for {missing}. Give a value for each.")


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def plain(value: Any) -> Any:
    """`value` as JSON takes it."""
    if isinstance(value, (Part, UnknownPart)):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return value


def require(condition: bool, owner: Any, field: str, accepted: str) -> None:
    """Raise `ValueError` naming the field of the dataclass `owner`, its value and what it takes, unless `condition`."""
    if not condition:
        value = getattr(owner, field)
        raise ValueError(f"{type(owner).__name__}.{field}={value!r} is out of range: it takes {accepted}.")


def _load_field(base: type[Part], value: Any, where: str) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(load_part(base, item, f"{where}[{number}]") for number, item in enumerate(value))
    return load_part_by_name(base, value, where)


@cache
def _nested_bases(cls: type) -> dict[str, type[Part]]:
    """Field -> kind of part, for the fields whose annotation names one."""
    found = {}
    hints = get_type_hints(cls)
    for field in fields(cls):
        kinds = [leaf for leaf in _leaves(hints[field.name]) if isinstance(leaf, type) and issubclass(leaf, Part)]
        if kinds:
            found[field.name] = kinds[0]
    return found


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({key: _frozen(item) for key, item in value.items()})
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _flat(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _leaves(hint: Any) -> list[Any]:
    inner = get_args(hint)
    return [leaf for argument in inner for leaf in _leaves(argument)] if inner else [hint]
