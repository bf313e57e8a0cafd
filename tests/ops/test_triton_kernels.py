"""The Triton kernels against a float64 product, under Triton's interpreter on CPU, and on the GPU where there is one.

Triton decides at import whether it interprets, for the whole process: the checks run in a process of their own, once a
device, and each reports here under its own name. The interpreter does not compile, so a test beside them does.
"""

import functools
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import traceback
import types
from pathlib import Path

import processes
import pytest
import torch

if __name__ == "__main__":  # `ops` by itself: the package's own __init__ takes 5 s for transformers and peft
    package = sys.modules["hf_sparse_peft"] = types.ModuleType("hf_sparse_peft")
    package.__path__ = [str(Path(__file__).parents[2] / "hf_sparse_peft")]

from hf_sparse_peft.ops import EntryIndex, pack_entries, take_columns, triton_kernels, unit_gradient
from hf_sparse_peft.ops.units import narrowed_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["interpreter", "cuda"] if torch.cuda.is_available() else ["interpreter"]


def draw(seed, tokens, rows, cols, dtype, device):
    gen = torch.Generator().manual_seed(seed)
    dy, x = (torch.randn(tokens, n, generator=gen, dtype=torch.float64).to(dtype) for n in (rows, cols))
    return dy.to(device), x.to(device), gen


def some_units(total, count, gen, device, dtype=torch.int32):
    return torch.randperm(total, generator=gen)[:count].sort().values.to(dtype).to(device)


def expect_entries(dy, x, units):
    rows, cols = dy.shape[1], x.shape[1]
    position = units.cpu().tolist()
    dy64, x64 = dy.cpu().double(), x.cpu().double()
    expected = torch.tensor([(dy64[:, u // cols] * x64[:, u % cols]).sum() for u in position], dtype=torch.float64)
    got = triton_kernels.entry_gradient(dy, x, units)
    assert got.shape == units.shape, f"{got.shape} for a support of {units.shape} on {rows}x{cols}"
    close(got, expected, dy.shape[0])


def expect_blocks(dy, x, units, size):
    per_row = x.shape[1] // size
    dy64, x64 = dy.cpu().double(), x.cpu().double()
    expected = torch.zeros(units.numel(), size, size, dtype=torch.float64)
    for k, u in enumerate(units.tolist()):
        row, col = u // per_row * size, u % per_row * size
        expected[k] = dy64[:, row : row + size].T @ x64[:, col : col + size]
    close(triton_kernels.block_gradient(dy, x, units, size), expected, dy.shape[0])


def close(got, expected, tokens):
    """fp32 sums of exact products: a few units in the last place of a sum of `tokens` terms of size 1."""
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=2e-6 * max(1, tokens) ** 0.5)


def check_entries_of_odd_shapes(device, seed):
    rng = random.Random(seed)
    for number in range(12):
        tokens, rows, cols = rng.randint(1, 300), rng.randint(1, 90), rng.randint(1, 90)
        dy, x, gen = draw(seed + number, tokens, rows, cols, DTYPES[number % 3], device)
        units = some_units(rows * cols, rng.randint(1, min(150, rows * cols)), gen, device)
        print(f"case {number}: {tokens} tokens, {rows}x{cols}, {units.numel()} entries, {x.dtype}")
        expect_entries(dy, x, units)


def check_entries_none_one_all(device, seed):
    for dtype in DTYPES:
        dy, x, gen = draw(seed, 37, 19, 13, dtype, device)
        for count in (0, 1, 19 * 13):
            expect_entries(dy, x, some_units(19 * 13, count, gen, device))
    dy, x, _ = draw(seed, 5, 1, 33, torch.bfloat16, device)
    expect_entries(dy, x, torch.arange(33, device=device))  # int64, one row
    empty = triton_kernels.entry_gradient(dy[:0], x[:0], torch.arange(33, device=device))
    assert empty.shape == (33,)
    assert not empty.any()


def check_entries_in_several_copies_of_tokens(device, seed):
    """What COPY_BYTES cuts is summed again, tail included."""
    dy, x, gen = draw(seed, 700, 20, 30, torch.bfloat16, device)
    units = some_units(600, 70, gen, device)
    before = triton_kernels.COPY_BYTES
    try:
        for bound in (1, 2 * 50 * 300):  # the least step, and one of 256 tokens
            triton_kernels.COPY_BYTES = bound
            expect_entries(dy, x, units)
    finally:
        triton_kernels.COPY_BYTES = before


def check_strided_inputs(device, seed):
    dy, x, gen = draw(seed, 160, 64, 96, torch.float16, device)
    wide_dy, narrow_x = dy.t().contiguous().t(), torch.cat([x, x], dim=1)[:, 48:144]
    assert not wide_dy.is_contiguous()
    assert not narrow_x.is_contiguous()
    expect_entries(wide_dy, narrow_x, some_units(64 * 96, 80, gen, device))
    expect_blocks(wide_dy, narrow_x, some_units(4 * 6, 9, gen, device), 16)
    expect_blocks(dy[:1].expand(70, 64), x[:70], some_units(4 * 6, 9, gen, device), 16)


def check_blocks_of_few_columns(device, seed):
    """As a backward pass has them that kept no other columns of its input."""
    for dtype in DTYPES:
        dy, x, _ = draw(seed, 90, 64, 160, dtype, device)
        units = torch.tensor([1, 8, 14, 28, 38, 39], dtype=torch.int32, device=device)
        live = torch.tensor([1, 4, 8, 9], dtype=torch.int32, device=device)
        narrow = take_columns(x, live, 16)
        assert narrow.shape == (90, 64)
        numbers = narrowed_blocks(units, live, 10)
        expect_blocks(dy, narrow, numbers, 16)
        whole = triton_kernels.block_gradient(dy, x, units, 16)
        assert torch.equal(triton_kernels.block_gradient(dy, narrow, numbers, 16), whole)


def check_blocks(device, seed):
    rng = random.Random(seed)
    for number, size in enumerate((16, 32, 64, 128, 256) * 3):
        most = 4 if size <= 64 else 2
        down, across = rng.randint(1, most), rng.randint(1, most)
        dtype = DTYPES[number // 5]
        dy, x, gen = draw(seed + number, rng.randint(1, 200), down * size, across * size, dtype, device)
        count = down * across if number % 2 else rng.randint(1, down * across)
        print(f"case {number}: {dy.shape[0]} tokens, {down}x{across} blocks of {size}, {count} of them, {dtype}")
        expect_blocks(dy, x, some_units(down * across, count, gen, device), size)


def check_blocks_split_over_tokens(device, seed):
    for tokens in (512, 1025, 1600):
        dy, x, gen = draw(seed, tokens, 32, 64, torch.bfloat16, device)
        for dtype in (torch.int32, torch.int64):
            expect_blocks(dy, x, some_units(2, 1, gen, device, dtype), 32)
    assert triton_kernels.block_gradient(dy, x, torch.zeros(0, dtype=torch.int32, device=device), 32).shape == (
        0,
        32,
        32,
    )
    assert not triton_kernels.block_gradient(dy[:0], x[:0], torch.arange(2, device=device), 32).any()


def check_products_with_blocks(device, seed):
    """`Y += X D` for blocks that meet in a line, alone in one, or miss it; from either layout of a block."""
    rng = random.Random(seed)
    for number, size in enumerate((16, 32, 64, 128, 256) * 3):
        dtype, tokens = DTYPES[number // 5], rng.choice((1, 63, 130))
        lines, sources = rng.randint(1, 3), rng.randint(1, 3)
        y, x, gen = draw(seed + number, tokens, lines * size, sources * size, dtype, device)
        count = rng.randint(0, lines * sources) if number else 0
        units = some_units(lines * sources, count, gen, device, (torch.int32, torch.int64)[number % 2])
        values = torch.randn(count, size, size, generator=gen, dtype=torch.float64).to(dtype).to(device)
        dense = torch.zeros(lines * size, sources * size, dtype=torch.float64)
        for k, u in enumerate(units.tolist()):
            row, col = u // sources * size, u % sources * size
            dense[row : row + size, col : col + size] = values[k].cpu().double()
        row, col = units // sources, units % sources
        print(f"case {number}: {tokens} tokens, {lines}x{sources} blocks of {size}, {count} of them, {dtype}")
        expect_sum(y, x, dense.T, row, col, values.transpose(1, 2))
        expect_sum(x, y, dense, col, row, values)


def expect_sum(y, x, matrix, *blocks):
    expected = y.cpu().double() + x.cpu().double() @ matrix
    got = y.clone()
    triton_kernels.add_blocks_(got, x, *blocks)
    if y.dtype == torch.float32:
        torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-4)
    else:  # one rounding of an fp32 sum; the interpreter cuts bf16 off
        spacing = torch.finfo(y.dtype).eps * expected.abs()
        share = 1 if y.dtype == torch.bfloat16 and not y.is_cuda else 0.5
        assert ((got.cpu().double() - expected).abs() <= 1.02 * share * spacing + 1e-4).all()


def check_offsets_beyond_32_bits(device, seed):
    """Rows of activations that lie 2^30 numbers apart, as 8k tokens of a vocabulary of 2^17 and more do."""
    apart = 2**30 + 8
    memory = torch.empty(2 * apart + 64, dtype=torch.float16, device=device)  # of which a few pages are touched
    far = memory.as_strided((3, 64), (apart, 1))
    dy, x, gen = draw(seed, 3, 64, 32, torch.float16, device)
    units = some_units(2, 1, gen, device)
    far.copy_(dy)
    expect_blocks(far, x, units, 32)
    far[:, :32].copy_(x)
    expect_blocks(dy, far[:, :32], units, 32)
    blocks = torch.ones(1, 32, 32, dtype=torch.float16, device=device)
    at = torch.zeros(1, dtype=torch.int32, device=device)
    for y, source in ((torch.zeros_like(dy), far[:, :32]), (far, x)):
        y.zero_()
        triton_kernels.add_blocks_(y, source, at, at, blocks)
        expected = source.double().sum(1, keepdim=True).expand(-1, 32)
        torch.testing.assert_close(y[:, :32].double(), expected, rtol=1e-2, atol=1e-2)
        assert not y[:, 32:].any()
    expect_entries(far, x, some_units(64 * 32, 20, gen, device))


def check_same_bits_twice(device, seed):
    dy, x, gen = draw(seed, 1030, 64, 64, torch.bfloat16, device)
    entries, blocks = some_units(64 * 64, 100, gen, device), some_units(16, 3, gen, device)
    for product in (
        lambda: triton_kernels.entry_gradient(dy, x, entries),
        lambda: triton_kernels.block_gradient(dy, x, blocks, 16),
    ):
        assert torch.equal(product(), product())


def check_dispatch_takes_the_kernels_on_a_gpu(device, seed):
    if device != "cuda":
        return
    dy, x, gen = draw(seed, 256, 256, 512, torch.bfloat16, device)
    entries, blocks = some_units(256 * 512, 900, gen, device), some_units(128, 5, gen, device)
    assert triton_kernels.available(x), "no kernel could be started"
    assert torch.equal(unit_gradient(dy, x, entries, "entry"), triton_kernels.entry_gradient(dy, x, entries))
    assert torch.equal(unit_gradient(dy, x, blocks, "block", 32), triton_kernels.block_gradient(dy, x, blocks, 32))


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


def compiled(capability, element):
    """PTX of every kernel and its bytes of shared memory, by name; Triton compiles for GPUs that are not there."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_sparse_peft.ops import _triton_impl

    cases = [(_triton_impl.sampled_product_kernel, {"ENTRIES": 32, "TOKENS": 128}, 4)]
    for size, warps in triton_kernels.BLOCK_WARPS.items():
        side, added = min(size, 128), min(size, 64)
        constants = {"BLOCK": size, "TOKENS": 64, "WIDEN": False}
        fewer = {"TOKENS": 32} if side == 128 and element == "fp32" else {}
        cases.append((_triton_impl.block_product_kernel, constants | fewer | {"SIDE": side}, warps))
        cases.append((_triton_impl.add_blocks_kernel, constants | {"SIDE": added}, triton_kernels.BLOCK_WARPS[added]))
    built_kernels = {}
    for kernel, constants, warps in cases:
        numbers = ("dy", "x", "dyT", "xT", "y", "blocks")
        pointers = dict.fromkeys(numbers, f"*{element}") | dict.fromkeys(("order", "starts", "of"), "*i64")
        pointers |= {"units": "*i32", "out": "*fp32"}
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
        positions = {name: (position,) for position, name in enumerate(kernel.arg_names)}
        aligned = [name for name in signature if name in pointers or name.endswith("_stride")]
        source = ASTSource(
            kernel,
            signature,
            {positions[name]: value for name, value in constants.items()},
            {positions[name]: [["tt.divisibility", 16]] for name in aligned},
        )
        built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        name = f"{kernel.__name__} {constants.get('BLOCK', '')} {element}"
        built_kernels[name] = built.asm["ptx"], built.metadata.shared
    return built_kernels


def in_own_process(*arguments, **environment):
    """The last line that this file prints when it runs with `arguments`, as JSON, and the lines before."""
    paths = {"PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
    command = [sys.executable, __file__, *map(str, arguments)]
    run = subprocess.run(command, env=os.environ | paths | environment, capture_output=True, text=True, timeout=300)
    lines = run.stdout.splitlines()
    if run.returncode or not lines:
        pytest.fail(f"{' '.join(command)} ended with {run.returncode}:\n{run.stdout}\n{run.stderr}")
    return json.loads(lines[-1]), "\n".join(lines[:-1])


@functools.cache
def run_checks(device):
    """Every check's report, by name: None or a traceback. One process, so that Triton is imported once."""
    seed = random.SystemRandom().randrange(2**31)
    interpret = "1" if device == "interpreter" else "0"
    reports, output = in_own_process("check", device, seed, TRITON_INTERPRET=interpret, HF_SPARSE_PEFT_TRITON="1")
    return seed, reports, output


# This file also runs as a script of its own, which must not import transformers (as `tiny` does).
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton>=3.4; installed: none"
)


@needs_triton
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("device", DEVICES)
def test_kernel(device, name):
    seed, reports, output = run_checks(device)
    assert reports[name] is None, f"seed {seed} on {device}\n{output}\n{reports[name]}"


@needs_triton
@pytest.mark.parametrize(
    ("capability", "element"),
    [
        (90, "bf16"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((90, "fp32"), (80, "bf16"), (80, "fp32"))),
    ],
)
@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here(capability, element, tmp_path):
    ptx, _ = in_own_process("compile", capability, element, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(ptx) == 1 + 2 * 5
    for name, found in ptx.items():
        assert found["shared"] <= 99 << 10, f"{name} takes {found['shared']} bytes of shared memory"
        if not name.startswith("sampled") and "bf16" in name:
            assert found["tensor cores"], f"{name} does not multiply on the tensor cores"
        if name.startswith("sampled"):
            assert found["16-byte loads"], f"{name} does not load 16 bytes a thread"


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("one dtype", lambda: triton_kernels.entry_gradient(torch.ones(2, 4), torch.ones(2, 4).bfloat16(), UNITS)),
        ("float64", lambda: triton_kernels.entry_gradient(torch.ones(2, 4).double(), torch.ones(2, 4).double(), UNITS)),
        (r"\[tokens, rows\]", lambda: triton_kernels.entry_gradient(torch.ones(2, 4), torch.ones(3, 4), UNITS)),
        ("int32 or int64", lambda: triton_kernels.entry_gradient(torch.ones(2, 4), torch.ones(2, 4), UNITS.short())),
        ("16, 32, 64, 128, 256", lambda: triton_kernels.block_gradient(torch.ones(2, 8), torch.ones(2, 8), UNITS, 8)),
        ("does not divide", lambda: triton_kernels.block_gradient(torch.ones(2, 40), torch.ones(2, 32), UNITS, 16)),
    ],
)
def test_wrong_arguments_are_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()


UNITS = torch.zeros(1, dtype=torch.int32)


def test_cpu_tensors_stay_with_torch(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not triton_kernels.available(UNITS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not triton_kernels.serves(torch.ones(2, 32), torch.ones(2, 32), "block", 16)


def test_switch_turns_the_kernels_off(monkeypatch):
    monkeypatch.setattr(triton_kernels, "_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("HF_SPARSE_PEFT_TRITON", raising=False)
    assert triton_kernels.available(UNITS)
    monkeypatch.setenv("HF_SPARSE_PEFT_TRITON", "0")
    assert not triton_kernels.available(UNITS)


def test_kernels_serve_sparse_entries_and_their_block_sizes_on_a_gpu(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(triton_kernels, "available", lambda tensor: True)
    with FakeTensorMode():  # tensors that say they are on a GPU, on any machine
        dy, x = (torch.empty(4, n, device="cuda", dtype=torch.bfloat16) for n in (64, 128))
        assert triton_kernels.serves(dy, x, "entry")
        assert not triton_kernels.serves(dy.double(), x.double(), "entry")
        assert not triton_kernels.serves(dy.float(), x, "entry")
        assert [size for size in (8, 16, 32, 64, 128, 256, 512) if triton_kernels.serves(dy, x, "block", size)] == [
            16,
            32,
            64,
            128,
            256,
        ]
        assert not any(triton_kernels.serves(dy, x, kind) for kind in ("row", "column"))


@pytest.mark.parametrize("packed", [False, True])
def test_dispatch_hands_on_flat_units(monkeypatch, packed):
    """Packed entries are places and counts; the kernels take flat units."""
    dy, x = torch.ones(2, 3), torch.ones(2, 8)
    units = torch.tensor([1, 7, 17, 22], dtype=torch.int32)
    index = EntryIndex(*pack_entries(units, 3, 8), 3, 8)
    monkeypatch.setattr(triton_kernels, "serves", lambda *_: True)
    monkeypatch.setattr("hf_sparse_peft.ops.units.entry_gradient_way", lambda *_: "sampled")
    monkeypatch.setattr(triton_kernels, "entry_gradient", lambda dy, x, units: units)
    monkeypatch.setattr(triton_kernels, "block_gradient", lambda dy, x, units, size: (units, size))
    assert unit_gradient(dy, x, index if packed else units, "entry").tolist() == units.tolist()
    assert unit_gradient(dy, x, units, "block", 16) == (units, 16)


def test_package_and_wrappers_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import hf_sparse_peft.ops.triton_kernels as t; import torch; "
    code += "assert not any(name.endswith('_triton_impl') for name in sys.modules)"
    processes.python("-c", code, check=True)


def main(task, *arguments):
    if task == "compile":
        built = compiled(int(arguments[0]), arguments[1])
        marks = {"tensor cores": r"mma\.", "16-byte loads": r"ld\.global\S*\.v4\.b32"}
        found = {n: {key: bool(re.search(m, ptx)) for key, m in marks.items()} for n, (ptx, _) in built.items()}
        print(json.dumps({name: {**found[name], "shared": shared} for name, (_, shared) in built.items()}))
        return
    device, seed = arguments
    reports = {}
    for name, check in CHECKS.items():
        try:
            print(name)
            check("cpu" if device == "interpreter" else device, int(seed))
            reports[name] = None
        except Exception:
            reports[name] = traceback.format_exc()
    print(json.dumps(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
