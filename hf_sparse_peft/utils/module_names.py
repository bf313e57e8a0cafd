"""Names of modules: the transformer block that one lies in, and the endings by which options choose among them."""

from __future__ import annotations

import re


def block_of(module_name: str) -> str:
    """The transformer block that a module lies in: its name up to the last number, or "" without one."""
    found = re.match(r"(.*\.)?\d+(?=\.|$)", module_name)
    return found.group(0) if found else ""


def ends_with(module_name: str, ending: str) -> bool:
    """Whether `ending` ends the module's name in whole parts: "c_proj" and "mlp.c_proj" of "h.0.mlp.c_proj"."""
    return module_name == ending or module_name.endswith(f".{ending}")
