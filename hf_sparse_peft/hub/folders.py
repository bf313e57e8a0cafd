"""Folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADAPTER_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_config.json",
    "README.md",
)


@contextmanager
def staged_folder(path: str | os.PathLike, peft_type: str | None = None) -> Iterator[Path]:
    """An empty temporary folder beside `path` that takes its place when the block ends without an error.

    What may be there already: nothing, an empty folder, or (with `peft_type`) an adapter of that type, whose files are
    replaced together; other files of that folder (tokenizer, checkpoints) stay. After an error `path` is as it was.

    Raises:
        ValueError: `path` is a file, or a folder that holds something else.
    """
    place = Path(path).expanduser().resolve()
    _check_place(place, peft_type)
    place.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{place.name}.writing-", dir=place.parent))
    try:
        stage.chmod(0o777 & ~_umask())  # mkdtemp makes private folders; an adapter is readable as others are
        yield stage
        _swap(stage, place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_place(place: Path, peft_type: str | None) -> None:
    if place.exists() and not place.is_dir():
        raise ValueError(f"path='{place}' is a file; give a folder to write to.")
    if not place.exists() or not any(place.iterdir()):
        return
    if peft_type is None:
        raise ValueError(f"path='{place}' is not empty; give a new folder, or empty this one first.")
    config = place / "adapter_config.json"
    if not config.is_file():
        raise ValueError(
            f"path='{place}' is not empty and holds no adapter (no adapter_config.json); give a new or empty folder, "
            "or one with an adapter to replace."
        )
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("peft_type")
    except ValueError:
        found = "unreadable"
    if found != peft_type:
        raise ValueError(
            f"path='{place}' holds an adapter of type {found}, and a {peft_type} adapter would replace it; give "
            "another folder."
        )


def _swap(stage: Path, place: Path) -> None:
    if not place.exists():
        os.rename(stage, place)
        return
    old = stage.with_name(stage.name.replace("writing", "replaced"))
    os.rename(place, old)
    try:
        os.rename(stage, place)
    except OSError:
        os.rename(old, place)
        raise
    for entry in list(old.iterdir()):
        if entry.name not in ADAPTER_FILES and not (place / entry.name).exists():
            os.rename(entry, place / entry.name)
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
