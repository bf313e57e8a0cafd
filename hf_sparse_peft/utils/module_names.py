"""Names of modules: the transformer block that one lies in, and the endings by which options choose among them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PLAIN_NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")


def block_of(module_name: str) -> str:
    """The transformer block that a module lies in: its name up to the last number, or "" without one."""
    found = re.match(r"(.*\.)?\d+(?=\.|$)", module_name)
    return found.group(0) if found else ""


def ends_with(module_name: str, ending: str) -> bool:
    """Whether `ending` ends the module's name in whole parts: "c_proj" and "mlp.c_proj" of "h.0.mlp.c_proj"."""
    return module_name == ending or module_name.endswith(f".{ending}")


def check_names(names: Iterable[str] | str | None, field: str) -> None:
    """Refuse names that are more than names: upstream puts them into regular expressions as they are.

    Raises:
        ValueError: names `field` and the name.
    """
    names = [names] if isinstance(names, str) and names else names or ()
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(
                f"{field}: {name!r} is no module name; give names of letters, digits, '_', '-' and dots, such as "
                "'layers' or 'model.layers'."
            )
