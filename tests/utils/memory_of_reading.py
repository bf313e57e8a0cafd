"""Reads a file, and prints the bytes that the process held for it and those of the file; in a process of its own, since
what freed memory an allocator has, and in which pieces, is left over from all that ran before."""

import ctypes
import gc
import sys
from pathlib import Path

from hf_sparse_peft.hub import read_patch
from hf_sparse_peft.tuners.shared.file_check import read_adapter

M_MMAP_THRESHOLD = -3


def most_held() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def taken_by(read) -> int:
    """Bytes that the process held beyond those it began with."""
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_THRESHOLD, 2**20)  # glibc raises it by itself, and holds what is freed below it
    read()
    gc.collect()
    library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = most_held()
    read()
    return most_held() - before


if __name__ == "__main__":
    reader, files = {"patch": read_patch, "adapter": read_adapter}[sys.argv[1]], sys.argv[2:]
    print(taken_by(lambda: reader(*map(Path, files))), Path(files[-1]).stat().st_size)
