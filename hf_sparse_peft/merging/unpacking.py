"""Files of small codes where a folder with an adapter is wanted."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import binary, ternary
from .binary import read_binary, restore_adapter
from .compact_files import kind_of
from .ternary import decompress_adapter


@contextmanager
def unpacked(path: str | os.PathLike) -> Iterator[Path]:
    """`path` itself if it is a folder; of a ComPEFT or BitDelta file a temporary folder with its adapter, exactly.

    Raises:
        ValueError: another file, a damaged one, or a BitDelta file of dense updates, which no adapter holds exactly.
    """
    path = Path(path)
    if not path.is_file():
        yield path
        return
    kind = kind_of(path)
    if kind not in (ternary.KIND, binary.KIND):
        raise ValueError(f"'{path}' is neither an adapter folder nor a ComPEFT or BitDelta file.")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / path.stem
        if kind == ternary.KIND:
            decompress_adapter(path, out, show_progress=False)
        else:
            dense = [name for name, read in read_binary(path)[1].items() if read().positions is None]
            if dense:
                raise ValueError(
                    f"'{path}' has signs of all entries of '{dense[0]}', which are no adapter. Write the dense model: "
                    "merging.restore_adapter(path, out, form='dense')."
                )
            restore_adapter(path, out, show_progress=False)
        yield out
