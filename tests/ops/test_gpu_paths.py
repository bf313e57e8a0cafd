"""What a GPU would be asked, on the meta device, which takes every branch that a CPU does not: nothing that makes the
host wait for numbers.

There are no numbers, so `.item()`, `.tolist()`, `nonzero` and `unique` raise; on a GPU each of these stops the host
until all that was enqueued has run.
"""

import contextlib
import functools
import sys
import types
from inspect import signature

import pytest
import torch

from hf_sparse_peft.ops import DenseSource, Plan, chunk_count, entry_lines, triton_kernels
from hf_sparse_peft.ops.linear import _SparseLinear
from hf_sparse_peft.ops.units import _gathered_by_all

ROWS, COLS, TOKENS = 4096, 14336, 8192
"""The down projection of an 8B at 8k tokens: its dense gradient is larger than a tile."""
UNITS = {
    "entry": lambda k: (k,),
    "block": lambda k: (k, 32, 32),
    "row": lambda k: (k, COLS),
    "column": lambda k: (k, ROWS),
    "diagonal": lambda k: (k, 4, 14),
    "subnet": lambda k: (40, 50),
}
CUT = {"block": 32, "diagonal": 1024}
"""Side of a block, number of blocks on the diagonal."""


class Launches:
    """A kernel that only notes with which grid it was started."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        return lambda *tensors, **options: self.grids.append(grid)


@pytest.fixture(params=["triton", "torch"])
def kernels(request, monkeypatch):
    """Stand-ins for the kernels by name, and whether they are there."""
    names = ("sampled_product_kernel", "block_product_kernel", "add_blocks_kernel")
    found = {name: Launches() for name in names}
    module = types.ModuleType("hf_sparse_peft.ops._triton_impl")
    vars(module).update(found)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    there = request.param == "triton"
    # What is asked here beside the device is asked in test_triton_kernels.
    monkeypatch.setattr(triton_kernels, "serves", lambda *given: there and given[2] in ("entry", "block"))
    monkeypatch.setattr(triton_kernels, "serves_blocks", lambda x, size: there)
    return found if there else {}


class Context:
    """Autograd's, which has no device guard for a GPU that is not there."""

    def __init__(self, inputs):
        self.needs_input_grad = [torch.is_tensor(tensor) and tensor.is_floating_point() for tensor in inputs]

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def run_layer(granularity, count, dtype, packed=False, rank=0, corner=False):
    """The gradients of the input and of the values after a forward and a backward pass on a GPU that is not there."""
    with torch.no_grad():
        on_gpu = functools.partial(torch.empty, device="meta")
        operands = dict.fromkeys(signature(_SparseLinear.forward).parameters)
        operands.pop("ctx")
        operands["x"] = on_gpu(2, TOKENS // 2, COLS, dtype=dtype)
        operands["values"] = on_gpu(*UNITS[granularity](count))
        operands["bias"] = on_gpu(ROWS, dtype=dtype)
        if granularity == "subnet":
            operands |= {"live_rows": on_gpu(40, dtype=torch.int32), "live_columns": on_gpu(50, dtype=torch.int32)}
        else:
            operands["units"] = on_gpu(count, dtype=torch.int32)
        if packed:
            chunks = chunk_count(*entry_lines(ROWS, COLS))
            operands["units"], operands["counts"] = (on_gpu(n, dtype=torch.uint8) for n in (count, chunks))
        if corner:
            operands |= {name: on_gpu(900, dtype=torch.int16) for name in ("live_rows", "live_columns")}
        if rank:
            operands |= {"A": on_gpu(rank, COLS), "B": on_gpu(ROWS, rank), "gate": on_gpu(rank)}
        source = DenseSource(on_gpu(ROWS, COLS, dtype=dtype))
        operands["plan"] = Plan(ROWS, COLS, dtype, source, granularity, CUT.get(granularity, 0))
        context = Context(operands.values())
        y = _SparseLinear.forward(context, *operands.values())
        assert y.shape == (2, TOKENS // 2, ROWS)
        gradients = dict(zip(operands, _SparseLinear.backward(context, torch.empty_like(y)), strict=True))
    for name, gradient in gradients.items():
        assert (gradient is None) != context.needs_input_grad[list(operands).index(name)], name
        if gradient is not None:
            assert (gradient.shape, gradient.dtype) == (operands[name].shape, operands[name].dtype), name
            assert gradient.is_meta


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("granularity", UNITS)
def test_no_layer_waits_for_the_gpu(granularity, dtype, rank, kernels):
    run_layer(granularity, 900, dtype, rank=rank)
    used = {name for name, kernel in kernels.items() if kernel.grids}
    expected = {"entry": {"sampled_product_kernel"}, "block": {"block_product_kernel", "add_blocks_kernel"}}
    assert used <= expected.get(granularity, set())
    assert bool(used) == (bool(kernels) and granularity in expected)


@pytest.mark.parametrize("count", [50_000, 3_000_000])
def test_no_packed_entry_waits_for_the_gpu(count, kernels):
    """At 0.1 % and at 5 %: sampled, and the dense gradient in tiles."""
    run_layer("entry", count, torch.bfloat16, packed=True)
    sampled = bool(kernels and kernels["sampled_product_kernel"].grids)
    assert sampled == (bool(kernels) and count < 1_000_000)


def test_no_compacted_entry_waits_for_the_gpu(kernels):
    run_layer("entry", 400_000, torch.bfloat16, packed=True, corner=True)
    assert not any(kernel.grids for kernel in kernels.values())


def test_a_look_at_the_numbers_is_noticed():
    units = torch.empty(5, device="meta", dtype=torch.int32)
    for look in (units.tolist, units.unique, units.nonzero, lambda: bool(units.any()), lambda: units[0].item()):
        with pytest.raises((NotImplementedError, RuntimeError)):
            look()


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_grids_of_the_largest_layers_are_within_what_cuda_launches(size, kernels):
    """A head of 128,256 rows over 14,336 columns: x up to 2^31 - 1 programs, y and z up to 65,535."""
    rows, cols = 128256 // size * size, 14336
    count = rows // size * cols // size // 20
    if not kernels:
        return
    dy, x = (torch.empty(TOKENS, n, device="meta", dtype=torch.bfloat16) for n in (rows, cols))
    units = torch.empty(count, device="meta", dtype=torch.int32)
    blocks = torch.empty(count, size, size, device="meta", dtype=torch.bfloat16)
    assert triton_kernels.block_gradient(dy, x, units, size).shape == blocks.shape
    triton_kernels.add_blocks_(dy, x, units, units, blocks)
    triton_kernels.entry_gradient(dy, x, torch.empty(cols * 1000, device="meta", dtype=torch.int32))
    assert all(kernel.grids for kernel in kernels.values())
    for kernel in kernels.values():
        for x_programs, *others in kernel.grids:
            assert 0 < x_programs < 2**31
            assert all(0 < programs < 2**16 for programs in others)


@pytest.mark.parametrize("tile", [1, 3, 7, 50])
def test_tiles_that_all_entries_read_give_the_dense_gradient(tile):
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(20, n, generator=generator, dtype=torch.float64) for n in (7, 5))
    units = torch.randperm(35, generator=generator)[:12].sort().values
    got = _gathered_by_all(dy, x, units, tile)
    assert torch.allclose(got, torch.einsum("tr,tc->rc", dy, x).reshape(-1)[units], atol=1e-12, rtol=0)
    assert _gathered_by_all(dy, x, units[:0], tile).shape == (0,)
