"""The Triton kernels behind `triton_kernels`; imported by its functions only, so that nothing else needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sampled_product_kernel(
    dyT, xT, units, out,
    count, cols, length, dy_stride, x_stride,
    ENTRIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`out[k] += sum_t dyT[row_k, t] * xT[col_k, t]` for `ENTRIES` units a program; `length` is a multiple of `TOKENS`.

    Products are summed elementwise over the tokens and reduced across lanes once, at the end: the loop holds loads and
    multiply-adds only.
    """
    k = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = k < count
    unit = tl.load(units + k, mask=inside, other=0)
    row = unit // cols
    col = unit - row * cols
    tokens = tl.arange(0, TOKENS)
    # int64: rows * tokens passes 2^31 at 2^16 tokens and a vocabulary of 2^15.
    dy_at = dyT + row.to(tl.int64)[:, None] * dy_stride + tokens[None, :]
    x_at = xT + col.to(tl.int64)[:, None] * x_stride + tokens[None, :]
    total = tl.zeros((ENTRIES, TOKENS), dtype=tl.float32)
    for start in range(0, length, TOKENS):
        # Entries past the end read entry 0, which exists; only the store is masked.
        total += tl.load(dy_at + start).to(tl.float32) * tl.load(x_at + start).to(tl.float32)
    before = tl.load(out + k, mask=inside, other=0.0)
    tl.store(out + k, before + tl.sum(total, axis=1), mask=inside)


@triton.jit
def block_product_kernel(
    dy, x, units, out,
    count, blocks_per_row, tokens, tokens_per_split, dy_stride, x_stride,
    BLOCK: tl.constexpr, SIDE: tl.constexpr, TOKENS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`out[split, k] = dy[tokens, block_row_k]^T x[tokens, block_col_k]` over the tokens of `split`.

    A program has one `SIDE x SIDE` square of a block. `tokens_per_split` is a multiple of `TOKENS`. `WIDEN` multiplies
    in fp32: Triton's interpreter keeps bf16 as bit patterns and `tl.dot` would multiply those
    (triton-lang/triton#11584).
    """
    k = tl.program_id(0)
    split = tl.program_id(1)
    square = tl.program_id(2)
    down = square // (BLOCK // SIDE) * SIDE + tl.arange(0, SIDE)
    across = square % (BLOCK // SIDE) * SIDE + tl.arange(0, SIDE)
    unit = tl.load(units + k)
    block_row = unit // blocks_per_row
    block_col = unit - block_row * blocks_per_row
    dy_at = dy + (block_row * BLOCK + down)[None, :]
    x_at = x + (block_col * BLOCK + across)[None, :]
    total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    first = split * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, tokens), TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        inside = token < tokens
        dy_tile = tl.load(dy_at + token * dy_stride, mask=inside, other=0.0)
        x_tile = tl.load(x_at + token * x_stride, mask=inside, other=0.0)
        if WIDEN:
            dy_tile = dy_tile.to(tl.float32)
            x_tile = x_tile.to(tl.float32)
        # "ieee": fp32 stays fp32, as torch's default matmul precision has it; 16-bit inputs take the tensor cores.
        total = tl.dot(tl.trans(dy_tile), x_tile, total, input_precision="ieee")
    # int64: [splits, k, b, b] passes 2^31 elements before one split of it fills a large GPU.
    at = (split * count + k).to(tl.int64) * (BLOCK * BLOCK)
    tl.store(out + at + down[:, None] * BLOCK + across[None, :], total)


@triton.jit
def add_blocks_kernel(
    y, x, blocks, order, starts, of,
    tokens, y_stride, x_stride, block_stride, in_stride, out_stride,
    BLOCK: tl.constexpr, SIDE: tl.constexpr, TOKENS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`y[tokens, line] += sum of x[tokens, of_k] @ blocks[k]` over the blocks `order[starts[line]:starts[line + 1]]`.

    A program has `TOKENS` tokens and `SIDE` of the line's `BLOCK` columns: one addition to each number of `y`, whose
    order is that of `order`, so no atomics. `WIDEN` as above.
    """
    first_token = tl.program_id(0) * TOKENS
    line = tl.program_id(1) // (BLOCK // SIDE)
    column = tl.program_id(1) % (BLOCK // SIDE) * SIDE + tl.arange(0, SIDE)
    token = (first_token + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    inside = token < tokens
    total = tl.zeros((TOKENS, SIDE), dtype=tl.float32)
    first = tl.load(starts + line)
    last = tl.load(starts + line + 1)
    # One loop over squares of blocks: two nested ones are pipelined together and outgrow the shared memory.
    for square in range(first * (BLOCK // SIDE), last * (BLOCK // SIDE)):
        k = tl.load(order + square // (BLOCK // SIDE))
        inner = square % (BLOCK // SIDE) * SIDE + tl.arange(0, SIDE)
        x_at = x + token * x_stride + (tl.load(of + k) * BLOCK + inner)[None, :]
        block_at = blocks + k.to(tl.int64) * block_stride
        x_tile = tl.load(x_at, mask=inside, other=0.0)
        block_tile = tl.load(block_at + inner[:, None] * in_stride + column[None, :] * out_stride)
        if WIDEN:
            x_tile = x_tile.to(tl.float32)
            block_tile = block_tile.to(tl.float32)
        total = tl.dot(x_tile, block_tile, total, input_precision="ieee")
    if last > first:
        y_at = y + token * y_stride + (line * BLOCK + column)[None, :]
        before = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_at, before + total, mask=inside)
