"""Floor 1: differentiable kernels. Plain tensors in and out, torch only."""

from .autocast import autocast_dtype, autocast_off
from .compiled import register_owner, sparse_linear_node
from .core import Plan
from .costs import Costs, write_costs
from .diagonal import diagonal_shape
from .entries import (
    CHUNK,
    EntryIndex,
    chunk_count,
    entry_lines,
    live_lines,
    pack_entries,
    pack_units,
    unpack_entries,
    unpack_units,
)
from .linear import sparse_linear
from .sources import DenseSource, DequantizedSource, Source, Support, shifted
from .subgrid import add_subgrid_, put_columns_, read_subgrid, subgrid_gradient, take_columns, write_subgrid_
from .units import add_units_, read_units, unit_gradient, write_units_
from .unread import are_read, gradients_unread

__all__ = [
    "CHUNK",
    "Costs",
    "DenseSource",
    "DequantizedSource",
    "EntryIndex",
    "Plan",
    "Source",
    "Support",
    "add_subgrid_",
    "add_units_",
    "are_read",
    "autocast_dtype",
    "autocast_off",
    "chunk_count",
    "diagonal_shape",
    "entry_lines",
    "gradients_unread",
    "live_lines",
    "pack_entries",
    "pack_units",
    "put_columns_",
    "read_subgrid",
    "read_units",
    "register_owner",
    "shifted",
    "sparse_linear",
    "sparse_linear_node",
    "subgrid_gradient",
    "take_columns",
    "unit_gradient",
    "unpack_entries",
    "unpack_units",
    "write_costs",
    "write_subgrid_",
    "write_units_",
]
