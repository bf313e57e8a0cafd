"""Files that break at a chosen place: every change of a file below a folder is counted, and one of them kills or fails.

Counted are Python's own operations (an audit hook sees each open for writing, rename, link, removal and new folder)
and, half-way through its bytes, every write: of Python's files, of `torch.save`, and of safetensors. The last two write
by other languages, unseen by Python; here they give their bytes to Python's files.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch

CHANGES = ("os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
FREES = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
"""What a full disk still does."""


def kill(what: str) -> NoReturn:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


class FileFaults:
    """Numbers the operations below `folder` in this process, from 0, and acts at some. It cannot be taken off: only for
    processes that end soon.

    Args:
        folder: where files are watched.
        at: the operation at which `act` is called first.
        act: what happens; it is given the operation's name, and raises, kills, or returns.
        onwards: whether it is called at all later ones too.
    """

    def __init__(self, folder: Path, at: int, act: Callable[[str], Any], onwards: bool = False) -> None:
        self.folder, self.at, self.act, self.onwards = str(folder), at, act, onwards
        self.count, self._quiet = 0, False
        sys.addaudithook(self._audit)
        self._open = builtins.open
        builtins.open = io.open = self._watched_open
        torch.save = self._save
        safetensors.torch.serialize_file = self._serialize

    def operation(self, what: str) -> None:
        """One more; acts where it is due."""
        number, self.count = self.count, self.count + 1
        if number == self.at or (self.onwards and number > self.at):
            self.act(what)

    def _audit(self, event: str, args: tuple) -> None:
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in CHANGES
        if changes and any(isinstance(one, (str, os.PathLike)) and self._inside(one) for one in args[:2]):
            self.operation(event)

    def _inside(self, path: Any) -> bool:
        return os.path.abspath(os.fspath(path)).startswith(self.folder)

    def _watched_open(self, file, mode="r", *args, **kwargs):
        opened = self._open(file, mode, *args, **kwargs)
        if isinstance(file, (str, os.PathLike)) and set(mode) & set("wax+") and self._inside(file):
            write = opened.write

            def halves(data):
                data = bytes(data) if isinstance(data, (bytearray, memoryview)) else data
                half = len(data) // 2
                write(data[:half])
                opened.flush()
                self.operation("write")
                write(data[half:])
                return len(data)

            opened.write = halves
        return opened

    def _save(self, value, file, *args, **kwargs):
        content = io.BytesIO()
        _torch_save(value, content, *args, **kwargs)
        if hasattr(file, "write"):
            file.write(content.getvalue())
            return
        with builtins.open(file, "wb") as opened:
            opened.write(content.getvalue())

    def _serialize(self, tensors, filename, metadata=None):
        with builtins.open(filename, "wb") as opened:
            opened.write(safetensors.serialize(tensors, metadata))


_torch_save = torch.save


def full_disk(what: str) -> None:
    """No room from now on; what frees some is still done."""
    if what not in FREES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken_disk(what: str) -> NoReturn:
    """One operation fails."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def read_only(what: str) -> NoReturn:
    """Nothing may be changed."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
