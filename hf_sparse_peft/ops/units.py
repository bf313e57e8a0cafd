"""Reading, writing and differentiating a weight at the units of a support.

A weight is `[rows, cols]` (out_features, in_features). A unit is an entry, a square block, a row or a column of it, and
is named by one number (row-major over the grid of units). Values are laid out per unit:

    granularity   unit number u                     values
    entry         u = row * cols + col              [k]
    block         u = block_row * (cols/b) + block_col   [k, b, b]
    row           u = row                           [k, cols]
    column        u = col                           [k, rows]
    diagonal      u = block on the diagonal         [k, h, w] (`ops.diagonal`)

Of blocks `block_size` is their side, of a diagonal the number of blocks that it is cut into. Entries may come as an
`EntryIndex`, too. Every function takes strided weights (`weight.t()` of a layer that stores its weight transposed) and
plain tensors only.
"""

from __future__ import annotations

import warnings

import torch

from . import triton_kernels
from .costs import costs_of, entry_gradient_way
from .diagonal import diagonal_gradient, read_diagonal, write_diagonal_
from .entries import EntryIndex
from .subgrid import subgrid_gradient, take_columns

# Bytes of dense gradient that may exist at once while an entry gradient is gathered from it.
DENSE_TILE_BYTES = 1 << 25
# Bytes of activations that are gathered at once for products with blocks. Larger buffers cost page faults.
_GATHERED_BYTES = 1 << 20


def _has_flat_view(weight: torch.Tensor) -> bool:
    return weight.is_contiguous() or weight.t().is_contiguous()


def flat_index(weight: torch.Tensor, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A 1-D view of `weight`'s memory and the positions of the entry `units` in it (int64).

    Raises:
        ValueError: `weight` is neither contiguous nor the transpose of a contiguous matrix, so no flat view exists.
    """
    units = units.long()
    if weight.is_contiguous():
        return weight.view(-1), units
    if weight.t().is_contiguous():
        rows, cols = weight.shape
        row = torch.div(units, cols, rounding_mode="floor")
        return weight.t().view(-1), (units - row * cols) * rows + row
    raise ValueError(
        f"weight of shape {tuple(weight.shape)} and strides {weight.stride()} has no flat view; make it contiguous."
    )


def block_view(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """`weight` as `[rows/b, cols/b, b, b]`, sharing memory."""
    rows, cols = weight.shape
    if rows % block_size or cols % block_size:
        raise ValueError(f"block_size={block_size} does not divide a weight of shape {rows}x{cols}.")
    return (
        weight.unflatten(1, (cols // block_size, block_size))
        .unflatten(0, (rows // block_size, block_size))
        .transpose(1, 2)
    )


def block_position(units: torch.Tensor, per_row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block row and block column (int64) of block `units`, of which a row of the weight crosses `per_row`."""
    units = units.long()
    block_row = torch.div(units, per_row, rounding_mode="floor")
    return block_row, units - block_row * per_row


def narrowed_blocks(units: torch.Tensor, live_columns: torch.Tensor, per_row: int) -> torch.Tensor:
    """The numbers of block `units`, int64, once only `live_columns` (`[L]`, sorted) are left of `per_row` columns of
    blocks; all of `units` lie in them."""
    row, column = block_position(units, per_row)
    return row * live_columns.numel() + torch.searchsorted(live_columns.long(), column)


def read_units(
    weight: torch.Tensor, units: torch.Tensor | EntryIndex, granularity: str, block_size: int = 0
) -> torch.Tensor:
    """Values of `weight` at `units`, in the weight's dtype (see the module's table for shapes)."""
    if granularity == "entry":
        units = units.flat if isinstance(units, EntryIndex) else units
        if not _has_flat_view(weight):
            units = units.long()
            return weight[units // weight.shape[1], units % weight.shape[1]]
        flat, index = flat_index(weight, units)
        return flat.index_select(0, index)
    if granularity == "row":
        return weight.index_select(0, units)
    if granularity == "column":
        return weight.index_select(1, units).t()
    if granularity == "diagonal":
        return read_diagonal(weight, units, block_size)
    return block_view(weight, block_size)[block_position(units, weight.shape[1] // block_size)]


def write_units_(
    weight: torch.Tensor, units: torch.Tensor | EntryIndex, values: torch.Tensor, granularity: str, block_size: int = 0
) -> torch.Tensor:
    """Overwrite `weight` at the distinct `units` with `values` of the weight's dtype, in place; returns `weight`."""
    units = units.flat if isinstance(units, EntryIndex) else units
    if granularity == "entry" and not _has_flat_view(weight):
        units = units.long()
        weight[units // weight.shape[1], units % weight.shape[1]] = values
    elif granularity == "entry":
        flat, index = flat_index(weight, units)
        flat.index_copy_(0, index, values)
    elif granularity == "row":
        weight.index_copy_(0, units.long(), values)
    elif granularity == "column":
        weight.index_copy_(1, units.long(), values.t())
    elif granularity == "diagonal":
        write_diagonal_(weight, units, values, block_size)
    else:
        block_view(weight, block_size)[block_position(units, weight.shape[1] // block_size)] = values
    return weight


def add_units_(
    weight: torch.Tensor, units: torch.Tensor, values: torch.Tensor, granularity: str, block_size: int = 0
) -> torch.Tensor:
    """`weight[units] += values` in place: added in fp32 (fp64 for fp64 weights), rounded once to the weight's dtype.

    Returns the overwritten values, in the weight's dtype, so that writing them back restores every bit.
    """
    before = read_units(weight, units, granularity, block_size)
    # Mixed-dtype addition promotes to the wider dtype, so bf16 + fp32 is one fp32 addition and one rounding.
    write_units_(weight, units, (before + values).to(weight.dtype), granularity, block_size)
    return before


def unit_gradient(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    units: torch.Tensor | EntryIndex,
    granularity: str,
    block_size: int = 0,
) -> torch.Tensor:
    r"""Gradient of the loss at the units: :math:`(dY^\top X)` read at `units`, never whole.

    Shapes: `grad_output` `[tokens, rows]`, `x` `[tokens, cols]` of one dtype; returns fp32 values (fp64 for fp64). At
    most `DENSE_TILE_BYTES` of a dense gradient exist at once.
    """
    out_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if granularity == "entry":
        if not isinstance(units, EntryIndex):
            units = EntryIndex(units, None, grad_output.shape[1], x.shape[1])
        return _entry_gradient(grad_output, x, units).to(out_dtype)
    if triton_kernels.serves(grad_output, x, granularity, block_size):
        return triton_kernels.block_gradient(grad_output, x, units, block_size)
    if granularity == "row":
        return (take_columns(grad_output, units).t() @ x).to(out_dtype)
    if granularity == "column":
        return column_gradient(grad_output, take_columns(x, units))
    if granularity == "diagonal":
        return diagonal_gradient(grad_output, x, units, block_size).to(out_dtype)
    return _block_gradient(grad_output, x, units, block_size).to(out_dtype)


def column_gradient(grad_output: torch.Tensor, x_columns: torch.Tensor) -> torch.Tensor:
    """Gradient of whole columns, `[k, rows]`, from the `[tokens, k]` slice of the input that belongs to them."""
    out_dtype = torch.float64 if x_columns.dtype == torch.float64 else torch.float32
    return (x_columns.t() @ grad_output).to(out_dtype)


# Tokens of one transpose, by product (bf16) or by copies, and bytes of transposed activations that may exist at once.
_EYE_TOKENS, _COPIED_TOKENS = 64, 256
_TRANSPOSED_BYTES = 1 << 24


def _entry_gradient(grad_output: torch.Tensor, x: torch.Tensor, index: EntryIndex) -> torch.Tensor:
    if not index.numel():
        return x.new_zeros(0)
    rows, cols = grad_output.shape[1], x.shape[1]
    kernel = triton_kernels.serves(grad_output, x, "entry")
    may_sample = kernel or x.device.type == "cpu"
    way = entry_gradient_way(costs_of(x.device.type, x.dtype), rows, cols, index.numel(), index.subgrid, may_sample)
    if way == "compacted":
        x_columns = take_columns(x, index.live_columns)
        return compacted_gradient(take_columns(grad_output, index.live_rows), x_columns, index)
    if way == "sampled":
        if kernel:
            return triton_kernels.entry_gradient(grad_output, x, index.flat)
        return sampled_gradient(grad_output, x, index)
    units = index.flat
    tile = max(1, DENSE_TILE_BYTES // (cols * x.element_size()))
    if tile >= rows:
        return (grad_output.t() @ x).view(-1).index_select(0, units)
    if x.device.type != "cpu":
        return _gathered_by_all(grad_output, x, units, tile)
    # Sorted units let each tile of rows own one slice of them.
    starts = torch.arange(0, rows, tile, device=units.device)
    bounds = [*torch.searchsorted(units, starts * cols).tolist(), units.numel()]
    parts = []
    for number, start in enumerate(range(0, rows, tile)):
        inside = units[bounds[number] : bounds[number + 1]]
        if inside.numel():
            dense = grad_output[:, start : start + tile].t() @ x
            parts.append(dense.view(-1).index_select(0, inside - start * cols))
    return torch.cat(parts)


def _gathered_by_all(grad_output: torch.Tensor, x: torch.Tensor, units: torch.Tensor, tile: int) -> torch.Tensor:
    """The gradient at entries from dense tiles, each read at all of them: where one's own begin only a GPU knows, and
    asking it would stop the host in every layer."""
    found, cols = x.new_zeros(units.numel()), x.shape[1]
    for start in range(0, grad_output.shape[1], tile):
        dense = (grad_output[:, start : start + tile].t() @ x).view(-1)
        at = units - start * cols
        inside = (at >= 0) & (at < dense.numel())
        found = torch.where(inside, dense.index_select(0, at.clamp_(0, dense.numel() - 1)), found)
    return found


def compacted_gradient(dy_rows: torch.Tensor, x_columns: torch.Tensor, index: EntryIndex) -> torch.Tensor:
    """Gradient at entries from the slices of `dy` and `x` at the sub-grid that they lie in, fp32 (or float64) `[k]`."""
    return subgrid_gradient(dy_rows, x_columns).view(-1).index_select(0, index.inside)


def sampled_gradient(grad_output: torch.Tensor, x: torch.Tensor, index: EntryIndex) -> torch.Tensor:
    """Each entry one dot product over the tokens, in fp32, some tokens at a time (CPU)."""
    rows, cols = grad_output.shape[1], x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    starts, columns = index.compressed_rows
    values = torch.zeros(columns.numel(), dtype=wide)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        sampled = torch.sparse_csr_tensor(starts, columns, values, (rows, cols), check_invariants=False)
    step = max(_EYE_TOKENS, _TRANSPOSED_BYTES // ((rows + cols) * x.element_size()) // _EYE_TOKENS * _EYE_TOKENS)
    for at in range(0, x.shape[0], step):
        pieces = (transposed_pieces(side[at : at + step]) for side in (grad_output, x))
        for left, right in zip(*pieces, strict=True):
            # Widened just before it is read: what both cores have just written is in their caches.
            torch.sparse.sampled_addmm(sampled, left.to(wide), right.to(wide).t(), out=sampled)
    return sampled.values()


def transposed_pieces(a: torch.Tensor) -> list[torch.Tensor]:
    """`a` `[tokens, lines]` as contiguous `[lines, some tokens]` pieces, in the order of the tokens."""
    tokens, lines = a.shape
    whole = tokens // _EYE_TOKENS * _EYE_TOKENS if a.dtype == torch.bfloat16 else 0
    pieces: list[torch.Tensor] = []
    if whole:
        # torch transposes by strided copies on one thread. A product with the identity is exact, too, and runs on the
        # bf16 units of all cores: 0.2 ms for 1024 x 1024 on two, against 0.7 to 1.2 ms.
        eye = torch.eye(_EYE_TOKENS, dtype=a.dtype).expand(whole // _EYE_TOKENS, -1, -1)
        pieces += torch.bmm(a[:whole].view(-1, _EYE_TOKENS, lines).transpose(1, 2), eye)
    if whole < tokens:
        step = _EYE_TOKENS if whole else _COPIED_TOKENS
        pieces += [part.t().contiguous() for part in a[whole:].split(step)]
    return pieces


def blocks_at_once(x: torch.Tensor, block_size: int) -> int:
    """How many `[tokens, b]` slices of `x` to gather for one product: as many as a CPU's cache holds, or as a dense
    tile has bytes."""
    most = _GATHERED_BYTES if x.device.type == "cpu" else DENSE_TILE_BYTES // 2
    return max(1, most // max(1, x.shape[0] * block_size * x.element_size()))


def _block_gradient(grad_output: torch.Tensor, x: torch.Tensor, units: torch.Tensor, block_size: int) -> torch.Tensor:
    rows, cols = grad_output.shape[1], x.shape[1]
    block_row, block_col = block_position(units, cols // block_size)
    dy_blocks = grad_output.unflatten(1, (rows // block_size, block_size)).transpose(0, 1)
    x_blocks = x.unflatten(1, (cols // block_size, block_size)).transpose(0, 1)
    chunk = blocks_at_once(x, block_size)
    parts = [
        torch.bmm(
            dy_blocks.index_select(0, block_row[at : at + chunk]).transpose(1, 2),
            x_blocks.index_select(0, block_col[at : at + chunk]),
        )
        for at in range(0, units.numel(), chunk)
    ]
    return torch.cat(parts) if parts else x.new_zeros(0, block_size, block_size)
