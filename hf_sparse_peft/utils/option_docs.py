"""The options of parts and configs as help texts show them: what stands in a dataclass, read once."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

from .option_types import described

ClassT = TypeVar("ClassT", bound=type)


@dataclass(frozen=True)
class Option:
    """One option of a part or config."""

    name: str
    """The field's name."""
    accepts: str
    """What its annotation takes, in words: "an integer >= 1 or None"."""
    default: Any
    """Its default; `dataclasses.MISSING` where it must be given."""
    description: str
    """The docstring below the field, or the `help` of its metadata; empty without one."""


def options_of(cls: type) -> list[Option]:
    """The options of a dataclass, inherited ones first.

    Args:
        cls: its source must be readable where options are described by docstrings.
    """
    hints, docs = get_type_hints(cls, include_extras=True), _docstrings(cls)
    return [
        Option(
            field.name,
            described(hints[field.name]),
            field.default if field.default_factory is MISSING else field.default_factory(),
            field.metadata.get("help") or docs.get(field.name, ""),
        )
        for field in fields(cls)
        if field.init
    ]


def document_options(cls: ClassT) -> ClassT:
    """Class decorator: `help(cls)`, editors and the reference list the options of the dataclass `cls` in its docstring.

    The list is made when the docstring is read, for sources are parsed for it, which an import is not to wait for.
    """
    if not isinstance(vars(cls).get("__doc__"), _DocstringWithOptions):
        cls.__doc__ = _DocstringWithOptions(cls.__doc__)
    return cls


class _DocstringWithOptions:
    """A docstring with an `Args:` section made of `options_of`; Python asks descriptors for docs of classes."""

    def __init__(self, text: str | None) -> None:
        self.text = inspect.cleandoc(text or "")

    def __get__(self, instance: Any, owner: type) -> str:
        return _with_options(owner, self.text)


@cache
def _with_options(cls: type, text: str) -> str:
    options = options_of(cls)
    if not options:
        return text
    section = "\n".join(["Args:", *(_argument(option) for option in options)])
    before, marker, behind = text.partition("\nRaises:")
    return f"{before.rstrip()}\n\n{section}\n{marker}{behind}".rstrip() + "\n"


def _argument(option: Option) -> str:
    required = option.default is MISSING
    default = "required" if required else f"default {_shown(option.default)}"
    text = f"{option.name} ({option.accepts}; {default}): {option.description}"
    return textwrap.fill(
        " ".join(text.split()), 116, initial_indent="    ", subsequent_indent=" " * 8, break_on_hyphens=False
    )


def _shown(value: Any) -> str:
    """`repr`, of a dataclass without fields at their defaults: napoleon reads no default over two lines."""
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(value)
    }
    held = {name: getattr(value, name) for name in defaults}
    given = (f"{name}={_shown(one)}" for name, one in held.items() if one != defaults[name])
    return f"{type(value).__name__}({', '.join(given)})"


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """Field -> the string below it, of the class that declared it last."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        if "__annotations__" not in vars(base) and "__annotate_func__" not in vars(base):
            continue
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # made at run time: there is no source
            continue
        for line, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr) and _is_text(below.value):
                found[line.target.id] = inspect.cleandoc(below.value.value)
    return found


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
