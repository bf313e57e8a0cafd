"""Reading allocates at most four times the file, also where one module has all of it. Pages of the file that are mapped
while it is read count as held, once more."""

from pathlib import Path

import processes
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
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system does not say what a process has held at most"
)


def check_memory(reader: str, *files: Path) -> None:
    ended = processes.python(Path(__file__).with_name("memory_of_reading.py"), reader, *files, check=True)
    taken, size = map(int, ended.stdout.split()[-2:])
    assert taken < 5 * size + NOISE


def positions(kind):
    rows, cols = torch.arange(0, SIDE, 4), torch.arange(SIDE)
    if kind == "single":
        found = torch.rand(SIDE * SIDE, generator=torch.Generator().manual_seed(0)) < 0.25
        return found.nonzero().view(-1)
    if kind == "rows":
        return (rows[:, None] * SIDE + cols).view(-1)
    return (cols[:, None] * SIDE + rows).view(-1)


@pytest.mark.parametrize("kind", ["single", "rows", "columns"])
def test_patch_of_one_tensor(tmp_path, kind):
    at, file = positions(kind), tmp_path / "patch.safetensors"
    values = torch.randn(at.numel()).bfloat16()
    write_patch(Patch((weight_patch("w", (SIDE, SIDE), values, at),), {}, 0), file)
    (read,) = read_patch(file).weights
    assert read.indices.equal(at.int())
    assert read.values.equal(values)
    check_memory("patch", file)


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
    check_memory("adapter", *files)
