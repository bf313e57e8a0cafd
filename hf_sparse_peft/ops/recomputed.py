r"""Inputs that are elementwise products, as a gated feed-forward makes them: :math:`X = \sigma(G) \odot U`.

Autograd keeps both factors for the product's own backward pass, so that `X` itself need not be kept beside them: it is
multiplied again, to the same bits.
"""

from __future__ import annotations

import torch

from .subgrid import take_columns


class Factors:
    """The factors of one input, read where autograd keeps them, in the backward pass."""

    def __init__(self, node: torch.autograd.graph.Node) -> None:
        self._node = node

    def product(self, columns: torch.Tensor | None = None, width: int = 1) -> torch.Tensor:
        """The input as `[tokens, cols]`, or its columns `[tokens, C]`, which count in steps of `width`."""
        left, right = (side.reshape(-1, side.shape[-1]) for side in (self._node._saved_self, self._node._saved_other))
        if columns is None:
            return left * right
        return take_columns(left, columns, width).mul_(take_columns(right, columns, width))


def factors_of(x: torch.Tensor) -> Factors | None:
    """The factors of `x`, where autograd keeps both and they are of its shape and dtype."""
    node = x.grad_fn
    if node is None or node.name() != "MulBackward0" or x._version or x._is_view():
        return None
    # A factor is kept where the other one needs a gradient.
    inputs = [given[0] for given in node.next_functions]
    if len(inputs) != 2 or any(given is None for given in inputs):
        return None
    metadata = [given._input_metadata[number] for given, number in node.next_functions]
    alike = all(tuple(found.shape) == tuple(x.shape) and found.dtype == x.dtype for found in metadata)
    if not alike or _read_once_only(node._raw_saved_self) or _read_once_only(node._raw_saved_other):
        return None
    return Factors(node)


def _read_once_only(saved: object) -> bool:
    """Whether a saved tensor may not be read twice: within a checkpoint, which computes it again at the first time."""
    if not hasattr(saved, "unpack_hook"):  # a torch that does not say
        return True
    return "checkpoint" in getattr(saved.unpack_hook, "__module__", "")
