r"""The blocks on the diagonal of a weight: block i is rows `i h` to `(i+1) h` x columns `i w` to `(i+1) w`.

A weight `[rows, cols]` that is cut into N blocks has :math:`h = \lceil rows/N \rceil`,
:math:`w = \lceil cols/N \rceil` and :math:`\max(\lceil rows/h \rceil, \lceil cols/w \rceil)` blocks, at most N (DiaBlo;
arXiv:2506.03230). What the last block has beyond the weight is padding: it is read as zero and never written.
:math:`X S^\top` is one batched product of the N slices of the input with the N blocks.

Values of k blocks are `[k, h, w]`, laid out as the weight is.
"""

from __future__ import annotations

import torch


def diagonal_shape(rows: int, cols: int, blocks: int) -> tuple[int, int, int]:
    """Number of blocks, and rows and columns of each, of a `[rows, cols]` weight cut into `blocks`."""
    height, width = -(-rows // blocks), -(-cols // blocks)
    return max(-(-rows // height), -(-cols // width)), height, width


def _views(weight: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The blocks that need no padding, `[., h, w]`, and what the weight has of the last one where that does; both share
    the weight's memory, whatever its strides."""
    number, height, width = diagonal_shape(*weight.shape, blocks)
    padded = tuple(weight.shape) != (number * height, number * width)
    whole = number - padded
    rows, cols = whole * height, whole * width
    cut = weight[:rows, :cols].unflatten(0, (whole, height)).unflatten(2, (whole, width))
    return cut.diagonal(dim1=0, dim2=2).movedim(-1, 0), weight[rows:, cols:] if padded else None


def read_diagonal(weight: torch.Tensor, units: torch.Tensor, blocks: int) -> torch.Tensor:
    """The blocks `units` of `weight`, `[k, h, w]`, in its dtype; 0 at the padding."""
    whole, last = _views(weight, blocks)
    if last is None:
        return whole.index_select(0, units)
    everything = weight.new_zeros(whole.shape[0] + 1, *whole.shape[1:])
    everything[:-1] = whole
    everything[-1, : last.shape[0], : last.shape[1]] = last
    return everything.index_select(0, units)


def write_diagonal_(weight: torch.Tensor, units: torch.Tensor, values: torch.Tensor, blocks: int) -> None:
    """Overwrite the distinct blocks `units` of `weight` with `values`, in place."""
    whole, last = _views(weight, blocks)
    if last is None:
        whole.index_copy_(0, units.long(), values)
        return
    number = whole.shape[0] + 1
    everything = read_diagonal(weight, torch.arange(number, device=weight.device), blocks)
    everything.index_copy_(0, units.long(), values)
    whole.copy_(everything[:-1])
    last.copy_(everything[-1, : last.shape[0], : last.shape[1]])


def _slices(x: torch.Tensor, number: int, width: int) -> torch.Tensor:
    """The first slices of `x` `[tokens, cols]`, of `width` columns each, as `[number, tokens, width]`: a view."""
    return x[:, : number * width].unflatten(1, (number, width)).transpose(0, 1)


def _padded(x: torch.Tensor, number: int, width: int, units: torch.Tensor) -> torch.Tensor:
    """A copy of the slices `units` of `x`, `[k, tokens, width]`, with zeros for padding."""
    missing = number * width - x.shape[1]
    return _slices(torch.nn.functional.pad(x, (0, missing)) if missing else x, number, width).index_select(0, units)


def add_diagonal_product_(
    y: torch.Tensor, x: torch.Tensor, units: torch.Tensor, values: torch.Tensor, number: int
) -> None:
    r""":math:`Y_i \mathrel{+}= X_i V_i` for the slices i in `units` of `number`: `y` `[tokens, n]`, `x` `[tokens, m]`
    and `values` `[k, w, h]` of one dtype, where slices of `x` have `w` columns and those of `y` have `h`."""
    width, height = values.shape[1:]
    if units.numel() < number:
        update = y.new_zeros(y.shape[0], number, height)
        update.transpose(0, 1).index_copy_(0, units.long(), torch.bmm(_padded(x, number, width, units), values))
        y.add_(update.flatten(1)[:, : y.shape[1]])
        return
    padded = (x.shape[1], y.shape[1]) != (number * width, number * height)
    whole = number - padded
    _slices(y, whole, height).baddbmm_(_slices(x, whole, width), values[:whole])
    if padded:
        last_x, last_y = x[:, whole * width :], y[:, whole * height :]
        last_y.addmm_(last_x, values[-1, : last_x.shape[1], : last_y.shape[1]])


def diagonal_gradient(grad_output: torch.Tensor, x: torch.Tensor, units: torch.Tensor, blocks: int) -> torch.Tensor:
    r""":math:`dY_i^\top X_i` for the blocks i in `units`, `[k, h, w]`, in the dtype of both; 0 at the padding."""
    number, height, width = diagonal_shape(grad_output.shape[1], x.shape[1], blocks)
    if units.numel() < number:
        dy, x = _padded(grad_output, number, height, units), _padded(x, number, width, units)
        return torch.bmm(dy.transpose(1, 2), x)
    padded = (grad_output.shape[1], x.shape[1]) != (number * height, number * width)
    whole = number - padded
    dy = _slices(grad_output, whole, height)
    if dy.device.type == "cpu" and dy.element_size() < 4:
        # 16-bit products of two strided factors copy both, a number at a time: 3.5 ms against 1.1 ms at 1024 tokens
        # of a 1024 x 1024 weight in 32 blocks, on one core.
        dy = dy.contiguous()
    gradient = torch.bmm(dy.transpose(1, 2), _slices(x, whole, width))
    if not padded:
        return gradient
    last_dy, last_x = grad_output[:, whole * height :], x[:, whole * width :]
    missing = (0, width - last_x.shape[1], 0, height - last_dy.shape[1])
    return torch.cat([gradient, torch.nn.functional.pad(last_dy.t() @ last_x, missing)[None]])
