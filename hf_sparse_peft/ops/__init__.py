"""Floor 1: differentiable kernels. Plain tensors in and out, torch only."""

from .linear import Plan, sparse_linear
from .sources import DenseSource, DequantizedSource, Source, Support, may_borrow
from .units import add_units_, read_units, unit_gradient, write_units_

__all__ = [
    "DenseSource",
    "DequantizedSource",
    "Plan",
    "Source",
    "Support",
    "add_units_",
    "may_borrow",
    "read_units",
    "sparse_linear",
    "unit_gradient",
    "write_units_",
]
