r"""Gradients at the support on a GPU: the sampled product for entries, small tensor-core products for blocks.

Each is :math:`(dY^\top X)` read at `units`, as `units.unit_gradient` computes it in torch, with fp32 sums and no
intermediate rounding (torch's own path rounds a bf16 gradient to bf16). No atomics: same inputs, same bits.

*Entries.* `dy` and `x` are row-major by token, so one entry would read a column of each: 2 useful bytes of every 32
fetched. The wrapper copies both to token-contiguous `[rows, tokens]` and `[cols, tokens]` first, which costs one read
and one write of each; an entry is then two contiguous runs. Sorted units share the run of `dy` (L1), and `x`'s runs
come from L2. The copies are made for as many tokens at a time as `COPY_BYTES` holds, which bounds the memory and keeps
what is read again and again within L2.

*Blocks.* A program reads its two strips of `dy` and `x` where they lie, `2 * block_size` bytes a token at 16 bits, and
multiplies them on the tensor cores. Few blocks are split over tokens as well, so that they fill the GPU. Products with
blocks themselves have a program for some tokens and a block's width of the output, which adds all blocks of its line.

Triton (extra `gpu`) is imported at the first call. `HF_SPARSE_PEFT_TRITON=0` turns all of this off.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

# Block sizes that the block kernels take, with the warps of a program.
BLOCK_WARPS = {16: 1, 32: 2, 64: 4, 128: 8, 256: 8}

# Bytes of token-contiguous copies of dy and x that may exist at once; as `units.DENSE_TILE_BYTES`.
COPY_BYTES = 1 << 25

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_ENTRIES, _ENTRY_TOKENS, _ENTRY_WARPS = 32, 128, 4
_BLOCK_TOKENS = 64
# Sides of the squares that larger blocks are cut into, so that accumulators fit into registers, and tiles (fewer tokens
# where they are large) into the 99 KiB of shared memory of the smaller GPUs.
_SIDE, _ADDED_SIDE = 128, 64
# Programs that fill a large GPU (132 multiprocessors, several each), and the fewest tokens that a split pays for.
_FILLING_PROGRAMS, _FEWEST_SPLIT_TOKENS = 1024, 512


def available(tensor: torch.Tensor) -> bool:
    """Whether the kernels can run on `tensor`'s device.

    That is: Triton is installed and not switched off, and either it interprets (`TRITON_INTERPRET=1`, any device) or
    the tensor is on a GPU of compute capability 8.0 or later on which a first, tiny launch succeeded.
    """
    if os.environ.get("HF_SPARSE_PEFT_TRITON", "1") == "0" or not _installed():
        return False
    return _interpreted() or (tensor.is_cuda and _launches(tensor.device.index))


def serves(grad_output: torch.Tensor, x: torch.Tensor, granularity: str, block_size: int = 0) -> bool:
    """Whether a kernel takes this case; whether it is the cheapest way to entries, `costs.entry_gradient_way` says."""
    if not x.is_cuda or x.dtype not in DTYPES or grad_output.dtype != x.dtype:
        return False
    if granularity == "entry":
        return available(x)
    return granularity == "block" and serves_blocks(x, block_size)


def serves_blocks(x: torch.Tensor, block_size: int) -> bool:
    """Whether `add_blocks_` takes this case, and `block_gradient` too if the gradient has the dtype of `x`."""
    return x.is_cuda and x.dtype in DTYPES and block_size in BLOCK_WARPS and available(x)


def entry_gradient(grad_output: torch.Tensor, x: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    r""":math:`g_k = \sum_t dy_{t, row_k}\, x_{t, col_k}` with :math:`u_k = row_k \cdot cols + col_k`, fp32 `[k]`.

    Shapes: `grad_output` `[tokens, rows]`, `x` `[tokens, cols]`, both fp32, bf16 or fp16; `units` int32 or int64 `[k]`
    (right in any order, fast when sorted).

    Raises:
        ValueError: shapes or dtypes other than these.
    """
    _check(grad_output, x, units)
    (tokens, rows), cols, count = grad_output.shape, x.shape[1], units.numel()
    out = torch.zeros(count, dtype=torch.float32, device=x.device)
    if count == 0 or tokens == 0:
        return out
    from ._triton_impl import sampled_product_kernel

    room = COPY_BYTES // ((rows + cols) * x.element_size())
    step = max(_ENTRY_TOKENS, room // _ENTRY_TOKENS * _ENTRY_TOKENS)
    units = units.contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on its arguments'
        for start in range(0, tokens, step):
            dyT = token_contiguous(grad_output[start : start + step])
            xT = token_contiguous(x[start : start + step])
            sampled_product_kernel[(_ceil_div(count, _ENTRIES),)](
                dyT, xT, units, out,
                count, cols, dyT.shape[1], dyT.stride(0), xT.stride(0),
                ENTRIES=_ENTRIES, TOKENS=_ENTRY_TOKENS, num_warps=_ENTRY_WARPS,
            )  # fmt: skip
            del dyT, xT  # before the next copies are made
    return out


def block_gradient(grad_output: torch.Tensor, x: torch.Tensor, units: torch.Tensor, block_size: int) -> torch.Tensor:
    r""":math:`G_k = dY_{:, R_k}^\top X_{:, C_k}` for the rows and columns of block `units[k]`, fp32 `[k, b, b]`.

    Shapes: `grad_output` `[tokens, rows]`, `x` `[tokens, cols]`, both fp32, bf16 or fp16; `units` int32 or int64 `[k]`,
    row-major over the grid of blocks.

    Raises:
        ValueError: shapes or dtypes other than these, or a `block_size` without a kernel or that does not divide.
    """
    _check(grad_output, x, units)
    (tokens, rows), cols, count = grad_output.shape, x.shape[1], units.numel()
    if block_size not in BLOCK_WARPS:
        raise ValueError(
            f"block_size={block_size} has no kernel; use one of {sorted(BLOCK_WARPS)} or ops.unit_gradient."
        )
    if rows % block_size or cols % block_size:
        raise ValueError(f"block_size={block_size} does not divide a weight of shape {rows}x{cols}.")
    if count == 0 or tokens == 0:
        return torch.zeros(count, block_size, block_size, dtype=torch.float32, device=x.device)
    from ._triton_impl import block_product_kernel

    units = units.contiguous()
    grad_output, x = (t if t.stride(1) == 1 else t.contiguous() for t in (grad_output, x))
    splits = max(1, min(_FILLING_PROGRAMS // count, tokens // _FEWEST_SPLIT_TOKENS))
    per_split = _ceil_div(_ceil_div(tokens, splits), _BLOCK_TOKENS) * _BLOCK_TOKENS
    splits = _ceil_div(tokens, per_split)
    out = torch.empty(splits, count, block_size, block_size, dtype=torch.float32, device=x.device)
    side = min(block_size, _SIDE)
    tile = _BLOCK_TOKENS // 2 if side * x.element_size() > 256 else _BLOCK_TOKENS
    with torch.cuda.device_of(x):
        block_product_kernel[(count, splits, (block_size // side) ** 2)](
            grad_output, x, units, out,
            count, cols // block_size, tokens, per_split, grad_output.stride(0), x.stride(0),
            BLOCK=block_size, SIDE=side, TOKENS=tile, WIDEN=_interpreted() and x.dtype == torch.bfloat16,
            num_warps=BLOCK_WARPS[block_size],
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)


def add_blocks_(y: torch.Tensor, x: torch.Tensor, to: torch.Tensor, of: torch.Tensor, blocks: torch.Tensor) -> None:
    r""":math:`Y_{:, to_k} \mathrel{+}= \sum_k X_{:, of_k} D_k` in place, summed in fp32 and rounded once.

    Shapes: `y` `[tokens, n]`, `x` `[tokens, m]` of one dtype, fp32, bf16 or fp16, with contiguous rows; `blocks`
    `[k, b, b]` of that dtype (any strides), `to` and `of` int32 or int64 `[k]`, in steps of `b` columns.
    """
    count, size = blocks.shape[:2]
    tokens, lines = y.shape[0], y.shape[1] // size
    if count == 0 or tokens == 0:
        return
    from ._triton_impl import add_blocks_kernel

    # Blocks by the line that they are added to, each in its place in `blocks`; nothing here waits for the GPU.
    sorted_to, order = to.sort(stable=True)
    starts = torch.searchsorted(sorted_to, torch.arange(lines + 1, device=to.device, dtype=to.dtype))
    x = x if x.stride(1) == 1 else x.contiguous()
    side = min(size, _ADDED_SIDE)
    with torch.cuda.device_of(x):
        add_blocks_kernel[(_ceil_div(tokens, _BLOCK_TOKENS), lines * (size // side))](
            y, x, blocks, order, starts, of,
            tokens, y.stride(0), x.stride(0), *blocks.stride(),
            BLOCK=size, SIDE=side, TOKENS=_BLOCK_TOKENS, WIDEN=_interpreted() and x.dtype == torch.bfloat16,
            num_warps=BLOCK_WARPS[side],
        )  # fmt: skip


def token_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix.t()` as a new contiguous tensor, zeros after the last token up to whole tiles of the kernel.

    So the kernel needs no mask over tokens, and every run starts at a multiple of 16 bytes.
    """
    tokens, features = matrix.shape
    padded = _ceil_div(tokens, _ENTRY_TOKENS) * _ENTRY_TOKENS
    copy = matrix.new_empty(features, padded)
    copy[:, :tokens].copy_(matrix.t())
    copy[:, tokens:].zero_()
    return copy


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _check(grad_output: torch.Tensor, x: torch.Tensor, units: torch.Tensor) -> None:
    if grad_output.dim() != 2 or x.dim() != 2 or grad_output.shape[0] != x.shape[0]:
        raise ValueError(
            f"grad_output {tuple(grad_output.shape)} and x {tuple(x.shape)} must be [tokens, rows] and [tokens, cols]."
        )
    if x.dtype not in DTYPES or grad_output.dtype != x.dtype:
        raise ValueError(
            f"grad_output is {grad_output.dtype} and x {x.dtype}; the kernels take one dtype for both, "
            f"of {', '.join(map(str, DTYPES))}. Use ops.unit_gradient for others."
        )
    if units.dim() != 1 or units.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"units is {units.dtype} {tuple(units.shape)}; it must be int32 or int64 and one-dimensional.")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _launches(device: int) -> bool:
    """Whether a kernel can be built and started: Triton also needs a C compiler, which slim images lack."""
    if torch.cuda.get_device_capability(device) < (8, 0):  # no bf16 arithmetic before
        return False
    ones = torch.ones(1, 1, device=torch.device("cuda", device))
    try:
        entry_gradient(ones, ones, torch.zeros(1, dtype=torch.int32, device=ones.device))
    except Exception as error:
        warnings.warn(
            f"Triton is installed but cannot start a kernel ({type(error).__name__}: {error}). Gradients at the "
            "support take the slower torch path. Install a C compiler, or set HF_SPARSE_PEFT_TRITON=0 to silence this.",
            stacklevel=2,
        )
        return False
    return True
