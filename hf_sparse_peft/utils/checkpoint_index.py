"""`model.safetensors.index.json`: which file of a checkpoint has which tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .json_text import read_json_text


def read_index(index: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """File name of each tensor, and the metadata.

    Raises:
        ValueError: it is no such file, or names one outside of its folder.
    """
    try:
        found = read_json_text(index.read_text(encoding="utf-8"))
        where, about = found["weight_map"], found.get("metadata", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{index}' is no index of a checkpoint ({type(error).__name__}: {str(error)[:200]}); copy or fetch it "
            "again."
        ) from error
    for what, held in (("weight_map", where), ("metadata", about)):
        if not isinstance(held, dict):
            raise ValueError(f"'{index}' has {what}={str(held)[:100]}, where an object is due; copy or fetch it again.")
    for name, file in where.items():
        if not isinstance(file, str) or not file or Path(file).name != file or "\0" in file:
            raise ValueError(
                f"'{index}' says that '{name}' is in {str(file)[:200]!r}: that is no name of a file beside it. Copy or "
                "fetch it again."
            )
    return where, about
