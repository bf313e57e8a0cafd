"""JSON out of files: each name once, nested as deep as people write, so that no text takes a parser long."""

from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 64
"""Levels of objects and lists. Parsing what is nested deeper takes long; comparing it may end in a RecursionError."""
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def read_json_text(text: str | bytes) -> Any:
    """What the text says.

    Raises:
        ValueError: it is no JSON, names something twice in one object, or nests more than `DEEPEST` deep.
    """
    text = text.decode() if isinstance(text, bytes) else text
    depth = 0
    for found in _BRACKETS.finditer(text):
        first = text[found.start()]
        depth += (first in "[{") - (first in "]}")
        if depth > DEEPEST:
            raise ValueError(f"it nests more than {DEEPEST} deep")
    return json.loads(text, object_pairs_hook=_each_name_once)


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers keep the last of two equal names in silence.
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name[:200]!r} comes twice in one object")
        found[name] = value
    return found
