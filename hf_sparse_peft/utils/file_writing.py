"""Writing files that are whole or absent: under a temporary name first, then renamed over the target."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MARK = ".writing-"
_in_use: set[Path] = set()
_numbers = itertools.count()


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it replaces `path` when the block ends without an error.

    After an error, or if the process is killed, `path` is what it was. What a killed process left is removed the next
    time. The temporary name has the ending of `path`. Missing parent folders are made.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path.parent, path.name, path.suffix)
    try:
        yield temporary
        replace_file(temporary, path)
    finally:
        _in_use.discard(temporary)
        temporary.unlink(missing_ok=True)


def replace_file(source: Path, target: Path) -> None:
    """Rename `source` over `target` once its bytes are on the disk."""
    with source.open("rb+") as file:
        try:
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it
                raise
    os.replace(source, target)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder in `parent` for what is about to replace `name`; it is removed when the block ends."""
    folder = _temporary_name(parent, name, "")
    try:
        folder.mkdir()
        yield folder
    finally:
        _in_use.discard(folder)
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(parent: Path, name: str) -> None:
    """Remove what an interrupted process of this machine left in `parent` while it wrote `name`."""
    start = _start(name)
    for entry in parent.glob(f"{_escaped(start)}*"):
        pid = entry.name.removeprefix(start).partition(".")[0]
        if entry in _in_use or not pid.isdigit() or (int(pid) != os.getpid() and _is_alive(int(pid))):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether that is a temporary name of this module."""
    return path.name.startswith(".") and _MARK in path.name


def _temporary_name(parent: Path, name: str, ending: str) -> Path:
    remove_leftovers(parent, name)
    temporary = parent / f"{_start(name)}{os.getpid()}.{next(_numbers)}{ending}"
    _in_use.add(temporary)
    return temporary


def _start(name: str) -> str:
    host = "".join(c for c in socket.gethostname() if c.isalnum()) or "host"
    return f".{name}{_MARK}{host}-"


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # os.kill would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
