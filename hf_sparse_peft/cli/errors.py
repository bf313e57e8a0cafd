"""Errors in the words of the one who typed the command: flags, where functions name their Python arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_VALUE = r"(?:'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[^\s,;:)\]]+?(?=[\s,;:)\]]|$|\.(?:\s|$)))"
_COMMANDS = {
    "export_lora": "export --to lora",
    "export_shira": "export --to shira",
    "export_patch": "export --to patch",
    "merge_to_dense": "export --to dense",
}
"""Functions that errors recommend, and what does the same here."""
_CALL = re.compile(rf"(?:\w+\.)*\b(?P<name>{'|'.join(_COMMANDS)})\b(?:\((?P<arguments>[^()]*)\))?")


def in_flags(message: str, command: Any, aliases: Mapping[str, str] | None = None) -> str:
    """`message` with `name=value` of the command's own parameters as `--name value`, and of its arguments as `value`;
    calls of functions that are verbs here as those verbs.

    Options that a command does not have (those of a config, say) stay as they are. `aliases` are names that functions
    give what the command calls otherwise, with its flag, or "" for an argument; `path` always is an argument.
    """
    flags = {"path": None, **{name: flag or None for name, flag in (aliases or {}).items()}}
    for parameter in getattr(command, "params", ()):
        long = (name for name in getattr(parameter, "opts", ()) if name.startswith("--"))
        flags[parameter.name] = next(long, None)
    message = _CALL.sub(lambda found: _as_command(found["name"], found["arguments"]), message)
    for name, flag in flags.items():
        # After a dot or an opening bracket it is a field of a config, or part of a call: meant as Python.
        pattern = re.compile(rf"(?<![\w.(-]){re.escape(name)}=(?P<value>{_VALUE})?")
        message = pattern.sub(lambda found, flag=flag: _shown(flag, found["value"]), message)
    return message


def _shown(flag: str | None, value: str | None) -> str:
    bare = (value or "").strip("'\"") if flag else value or ""
    return f"{flag} {bare}".rstrip() if flag else bare


def _as_command(function: str, arguments: str | None) -> str:
    named = re.findall(rf"(\w+)=({_VALUE})", arguments or "")  # the others are the model and the path
    flags = [f"--{name.replace('_', '-')} {value.strip(chr(39))}" for name, value in named]
    return " ".join(["'sparse-peft", _COMMANDS[function], *flags]) + "'"
