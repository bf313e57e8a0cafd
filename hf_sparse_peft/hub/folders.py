"""Folders that are replaced file by file, each file whole: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..utils.file_writing import is_temporary, remove_leftovers, replace_file, temporary_folder

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_INSIDE = "save"


@contextmanager
def staged_folder(path: str | os.PathLike, peft_type: str | None = None) -> Iterator[Path]:
    """An empty temporary folder whose files go to `path` when the block ends without an error.

    What may be there already: nothing, an empty folder, or (with `peft_type`) an adapter of that type, whose files are
    replaced; other files of that folder (tokenizer, checkpoints, other adapters) stay in place all the time. A new
    folder appears whole or not at all. After an error `path` is as it was; a process that is killed while files are
    renamed leaves some old and some new ones, every one of them whole, and saving again replaces them all.

    Raises:
        ValueError: `path` is a file, or a folder that holds something else.
    """
    place = Path(path).expanduser().resolve()
    check_place(place, peft_type)
    if _content(place) or (place.exists() and not os.access(place.parent, os.W_OK)):
        with staged_files(place) as stage:
            yield stage
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(place.parent, place.name) as stage:
        yield stage
        try:
            os.rename(stage, place)
        except OSError:  # a mount point, or a system that renames over no folder, even an empty one
            move_files(stage, place)


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """An empty temporary folder inside `folder` whose files, subfolders included, replace `folder`'s own one by one
    when the block ends without an error."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(folder, _INSIDE) as outer:
            # One level deeper: Trainer takes a checkpoint's subfolder with weights in it for one more adapter.
            stage = outer / "new"
            stage.mkdir()
            yield stage
            move_files(stage, folder)
    except BaseException:
        if new:
            with suppress(OSError):  # something is there all the same
                folder.rmdir()
        raise


def move_files(source: Path, target: Path) -> None:
    """Rename every file of `source` to its place in `target`; an adapter's pickled weights make way for new ones.
    After an error `target` has its old files again."""
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    moved: list[tuple[Path, Path | None]] = []
    try:
        # The config goes first: it is what tells the next save that the folder may be written to.
        for name in sorted(files, key=lambda file: (file.name != ADAPTER_FILES[0], file)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            moved.append((target / name, _second_name(target / name, source / f".before-{len(moved)}")))
            replace_file(source / name, target / name)
    except BaseException:
        for file, before in reversed(moved):
            with suppress(OSError):
                os.replace(before, file) if before is not None else file.unlink(missing_ok=True)
        raise
    for name in files:
        if name.name == ADAPTER_FILES[1]:
            (target / name).with_name("adapter_model.bin").unlink(missing_ok=True)


def _second_name(file: Path, name: Path) -> Path | None:
    """`file` as `name` too, while it stays in its place; None if there is no such file."""
    if not file.exists():
        return None
    try:
        os.link(file, name)
    except OSError:  # a file system without hard links
        shutil.copy2(file, name)
    return name


def _content(place: Path) -> list[Path]:
    """What is in the folder, without what an interrupted save left there."""
    if not place.exists():
        return []
    remove_leftovers(place, _INSIDE)
    return [entry for entry in place.iterdir() if not is_temporary(entry)]


def check_place(path: str | os.PathLike, peft_type: str | None = None) -> None:
    """Refuse what `staged_folder` would refuse, before work is done for it.

    Raises:
        ValueError: `path` is a file, or a folder that holds something else.
    """
    place = Path(path).expanduser().resolve()
    if place.exists() and not place.is_dir():
        raise ValueError(f"path='{place}' is a file; give a folder to write to.")
    if not _content(place):
        return
    if peft_type is None:
        raise ValueError(f"path='{place}' is not empty; give a new folder, or empty this one first.")
    config, weights = (place / name for name in ADAPTER_FILES)
    if not config.is_file():
        if weights.is_file():
            return  # an interrupted save: peft writes the config behind the weights
        raise ValueError(
            f"path='{place}' is not empty and holds no adapter (no adapter_config.json); give a new or empty folder, "
            "or one with an adapter to replace."
        )
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError):
        return  # an interrupted save: a config that was cut is replaced
    if found != peft_type:
        raise ValueError(
            f"path='{place}' holds an adapter of type {found}, and a {peft_type} adapter would replace it; give "
            "another folder."
        )
