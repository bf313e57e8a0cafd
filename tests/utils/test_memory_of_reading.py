"""Reading allocates at most four times the file, also where one module has all of it. Pages of the file that are mapped
while it is read count as held, once more."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.hub import Patch, read_patch, write_patch
from hf_sparse_peft.hub.patches.weight_patch import weight_patch
from hf_sparse_peft.sparsity.codec import encode_support
from hf_sparse_peft.sparsity.support import UnitGrid
from hf_sparse_peft.tuners.shared.file_check import read_adapter
from hf_sparse_peft.utils.checksums import save_checked

SIDE, NOISE = 2048, 2**20
M_MMAP_THRESHOLD = -3
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(not CLEAR.exists(), reason="the system does not say what a process has held at most")


def most_held():
    return 1024 * int(STATUS.read_text().partition("VmHWM:")[2].split()[0])


def taken_by(read):
    """Bytes that the process held beyond those it began with: the least of three times, since what freed memory the
    allocator keeps, and where, is left over from other tests."""
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_THRESHOLD, 2**20)  # glibc raises it by itself, and holds what is freed below it
    read()
    taken = []
    for _ in range(3):
        gc.collect()
        library.malloc_trim(0)
        CLEAR.write_text("5")
        before = most_held()
        read()
        taken.append(most_held() - before)
    return min(taken)


def positions(kind):
    rows, cols = torch.arange(0, SIDE, 4), torch.arange(SIDE)
    if kind == "single":
        found = torch.rand(SIDE * SIDE, generator=torch.Generator().manual_seed(0)) < 0.25
        return found.nonzero().view(-1)
    if kind == "rows":
        return (rows[:, None] * SIDE + cols).view(-1)
    return (cols[:, None] * SIDE + rows).view(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["single", "rows", "columns"])
def test_patch_of_one_tensor(tmp_path, kind, dtype):
    at, file = positions(kind), tmp_path / "patch.safetensors"
    values = torch.randn(at.numel()).to(dtype)
    write_patch(Patch((weight_patch("w", (SIDE, SIDE), values, at),), {}, 0), file)
    (read,) = read_patch(file).weights
    assert read.indices.equal(at.int())
    assert read.values.equal(values)
    assert taken_by(lambda: read_patch(file)) < 5 * file.stat().st_size + NOISE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_of_one_module(tmp_path, dtype):
    config = SparseLoraConfig(r=0, density=0.25, target_modules=["w"])
    grid, at = UnitGrid(SIDE, SIDE, "entry"), positions("single")[: SIDE * SIDE // 4]
    name = "base_model.model.w.sparse_lora_"
    tensors = {f"{name}support": encode_support(at, grid, SIDE * SIDE // 4)}
    tensors[f"{name}values"] = torch.zeros(SIDE * SIDE // 4, dtype=dtype)
    config.save_pretrained(tmp_path)
    save_checked(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    files = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    assert read_adapter(*files).sizes["w"][:2] == (SIDE, SIDE)
    assert taken_by(lambda: read_adapter(*files)) < 5 * files[1].stat().st_size + NOISE
