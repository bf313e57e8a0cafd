r"""Subnets: the crossings of some rows and some columns of a weight, trained as one dense matrix `V` `[R, C]`.

:math:`S_{ij} = V_{ab}` where i is row a and j is column b of the subnet, 0 elsewhere. Backward passes keep
:math:`X_{:, C}` only. Rows and columns are coded by `sparsity.codec`, each in a buffer of its own.

With `config.accumulator` what was learned at rows and columns that the subnet has left is kept in a dense fp32 matrix
:math:`K` `[out, in]` beside the base weight, which every product reads as :math:`W + K`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...ops import add_subgrid_
from ...sparsity import (
    DataCriterion,
    Random,
    UnitGrid,
    best_subgrid,
    coded_grid,
    codes_length,
    decode_support,
    encode_support,
    random_units,
    stream_seed,
)
from ...utils.parts import UnknownPart
from ...utils.tensors import TensorSpec
from ..shared.file_check import CONFIG_FILE, tensor_key
from ..shared.layer import AdapterLayer
from ..shared.pieces import Entries, Piece
from ..shared.tensor_checks import side
from .config import SparseLoraConfig
from .plan import ModuleSizes
from .support import first_values

VALUES, ROWS, COLUMNS = "sparse_lora_subnet", "sparse_lora_subnet_rows", "sparse_lora_subnet_columns"
ACCUMULATOR = "sparse_lora_accumulator"
_SIDES = {ROWS: "row", COLUMNS: "column"}


def subnet_specs(
    config: SparseLoraConfig, module_name: str, rows: int, cols: int, sizes: ModuleSizes
) -> list[TensorSpec]:
    """The values and both sets of a module that has a subnet."""
    if sizes.subnet is None:
        return []
    found = [
        TensorSpec(
            VALUES,
            sizes.subnet,
            space="subnet_row",
            start=lambda generator: first_values(config, module_name, sizes.subnet, cols),
        )
    ]
    for (name, granularity), count in zip(_SIDES.items(), sizes.subnet, strict=True):
        grid = UnitGrid(rows, cols, granularity)

        def check(codes: torch.Tensor, key: str, grid: UnitGrid = grid, count: int = count) -> None:
            if decode_support(codes, grid, count, key).numel() != count:
                raise ValueError(f"'{key}' has fewer {grid.granularity}s than the {count} of the subnet's values.")

        shape = (codes_length(grid, count),)
        found.append(TensorSpec(name, shape, torch.uint8, "saved", space="subnet_row", axis=None, check=check))
    if config.accumulator:
        found.append(TensorSpec(ACCUMULATOR, (rows, cols), role="saved", space="subnet_row", axis=None))
    return found


def read_subnet(
    config: SparseLoraConfig, module_name: str, held: Mapping[str, torch.Tensor], shape: tuple[int, int]
) -> tuple[int, int, tuple[int, int]] | None:
    """Rows and columns of a module's weight and the sides of its subnet, by the tensors `held` of a file; None where
    the module has none. `shape` is the weight's by its factors, 0 where they do not say.

    Raises:
        ValueError: a tensor is missing or damaged, or names a weight of another shape; names the tensor.
    """
    expected = config.sizes.get(module_name)
    if (
        not any(name in held for name in (VALUES, *_SIDES))
        and (expected is None or not expected[0])
        and not (expected is None and config.has_support)
    ):
        return None
    for name in (VALUES, *_SIDES):
        if name not in held:
            raise ValueError(f"'{tensor_key(module_name, name)}' is missing: the config has a subnet there.")
    key = tensor_key(module_name, VALUES)
    sides = side(held, VALUES, 0, 2, key), side(held, VALUES, 1, 2, key)
    if expected is not None and tuple(expected[:2]) != sides:
        raise ValueError(f"'{key}' is {sides[0]}x{sides[1]}, and {CONFIG_FILE} makes it {expected[0]}x{expected[1]}.")
    weights = {(grid.rows, grid.cols) for grid in (coded_grid(held[n], tensor_key(module_name, n)) for n in _SIDES)}
    weights |= {shape} if all(shape) else set()
    if len(weights) > 1:
        raise ValueError(f"The tensors of '{module_name}' belong to weights of different shapes: {sorted(weights)}.")
    rows, cols = weights.pop()
    if sides[0] > rows or sides[1] > cols:
        raise ValueError(f"'{key}' is {sides[0]}x{sides[1]}, more than the {rows}x{cols} weight has.")
    return rows, cols, sides


class SubnetState(AdapterLayer):
    """What `SparseLoraLayer` does with its subnets; the tensors are allocated there."""

    def begin_subnet(self, adapter_name: str) -> None:
        """Choose the first rows and columns, where the criterion needs no data and no file is about to say them."""
        config, values = self.adapter_configs[adapter_name], self.sparse_lora_subnet[adapter_name]
        if values.is_meta or self.get_base_layer_device() == torch.device("meta"):
            return
        waits = config.needs_calibration or (config.inference_mode and config.init_weights)
        if not waits and not isinstance(config.criterion, UnknownPart):
            self.select_subnet(adapter_name)

    @torch.no_grad()
    def select_subnet(self, adapter_name: str, state: dict[str, torch.Tensor] | None = None) -> None:
        """Choose rows and columns by the config's criterion, with `state` by what it has seen of the data: the
        sub-grid that holds the most of its scores (`best_subgrid`); random ones are drawn side by side."""
        config, (R, C) = self.adapter_configs[adapter_name], self.sparse_lora_subnet[adapter_name].shape
        criterion, seed = config.criterion, stream_seed(config.seed, self.module_name)
        if isinstance(criterion, UnknownPart):
            config.check_runnable()
        if isinstance(criterion, Random) or (isinstance(criterion, DataCriterion) and state is None):
            drawn = (
                random_units(number, count, torch.Generator().manual_seed(stream_seed(seed, kind)))
                for number, count, kind in ((self.out_features, R, "rows"), (self.in_features, C, "columns"))
            )
            self.write_subnet(adapter_name, *drawn)
            return
        weight, grid = self.dense_base_weight(), UnitGrid(self.out_features, self.in_features, "entry")
        if state is not None:
            chunks = criterion.scores(state, grid, weight)
        else:
            chunks = criterion(weight, grid, torch.Generator(device=weight.device).manual_seed(seed))
        scores = torch.cat([chunk.reshape(-1) for chunk in chunks()]).view(grid.rows, grid.cols)
        self.write_subnet(adapter_name, *best_subgrid(scores, R, C, seed=seed))

    @torch.no_grad()
    def write_subnet(
        self, adapter_name: str, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> None:
        """Make `rows` and `columns` (sorted, distinct, as many as the values have) the subnet's, in place; None keeps
        a side.

        Raises:
            ValueError: another number of rows or columns, or ones that the weight does not have.
        """
        codes = {}
        for name, units, axis in ((ROWS, rows, 0), (COLUMNS, columns, 1)):
            count = self.sparse_lora_subnet[adapter_name].shape[axis]
            if units is None:
                continue
            if units.numel() != count:
                raise ValueError(
                    f"The subnet of '{self.module_name}' has {count} {_SIDES[name]}s, and is given {units.numel()}."
                )
            codes[name] = encode_support(units, UnitGrid(self.out_features, self.in_features, _SIDES[name]), count)
        for name, new in codes.items():
            getattr(self, name)[adapter_name].copy_(new)
        self.subnet(adapter_name)  # a compiled graph reads what was decoded without looking at the buffers

    def subnet(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The subnet's rows `[R]` and columns `[C]`, sorted and distinct, int32 or int64; chosen first where that is
        still to be done. Decoded again whenever a buffer was replaced or rewritten.

        Raises:
            ValueError: a buffer is damaged or belongs to another weight; the message names it.
        """
        known = self._subnets.get(adapter_name)
        if torch.compiler.is_compiling() and known is not None:
            return known[1]
        buffers = [getattr(self, name)[adapter_name] for name in _SIDES]
        mark = [(codes, codes.data_ptr(), 0 if codes.is_inference() else codes._version) for codes in buffers]
        if known is not None and all(
            old[0] is new[0] and old[1:] == new[1:] for old, new in zip(known[0], mark, strict=True)
        ):
            return known[1]
        if self._is_blank(adapter_name) and not self.sparse_lora_subnet[adapter_name].any():
            self.select_subnet(adapter_name)
            return self.subnet(adapter_name)
        sides = self.sparse_lora_subnet[adapter_name].shape
        rows, columns = (
            decode_support(
                codes, UnitGrid(self.out_features, self.in_features, kind), count, f"{self.module_name}.{name}"
            )
            for codes, (name, kind), count in zip(buffers, _SIDES.items(), sides, strict=True)
        )
        self._subnets[adapter_name] = (mark, (rows, columns))
        return rows, columns

    def subnet_values(self, adapter_name: str) -> torch.Tensor:
        """`[R, C]`, the values as they act in the update: scaled where the config scales the support."""
        scale = self.sparse_lora_support_scaling[adapter_name]
        values = self.sparse_lora_subnet[adapter_name]
        return values if scale == 1.0 else values * scale

    def subnet_entries(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Sorted flat positions (int64) and values of the subnet's entries, `[R * C]`; differentiable in the values."""
        rows, columns = self.subnet(adapter_name)
        positions = rows.long()[:, None] * self.in_features + columns.long()
        return positions.reshape(-1), self.subnet_values(adapter_name).reshape(-1)

    @torch.no_grad()
    def accumulate_subnet(self, adapter_name: str) -> None:
        """Move the values' part of the update into the accumulator: the update stays, the values are 0."""
        rows, columns = self.subnet(adapter_name)
        add_subgrid_(self.sparse_lora_accumulator[adapter_name], rows, columns, self.subnet_values(adapter_name))
        self.sparse_lora_subnet[adapter_name].zero_()

    def accumulated(self, adapter_name: str) -> torch.Tensor | None:
        """The accumulator `[out, in]`; None where there is none, or it is all zeros. Looked at again when it was
        written to; a compiled graph takes it as it is."""
        held = self.sparse_lora_accumulator
        if adapter_name not in held or held[adapter_name].is_meta:
            return None
        tensor = held[adapter_name]
        if torch.compiler.is_compiling():
            return tensor
        version = 0 if tensor.is_inference() else tensor._version
        known = self._accumulates.get(adapter_name)
        if known is None or known[0] is not tensor or known[1] != version:
            known = self._accumulates[adapter_name] = (tensor, version, bool(tensor.any()))
        return tensor if known[2] else None

    @torch.no_grad()
    def with_accumulated(self, adapter_name: str, subnet: Piece) -> Entries:
        """The subnet, and what it has left behind, as entries: those that are not zero."""
        total = self.sparse_lora_accumulator[adapter_name].clone()
        subnet.add_(total)
        positions = total.view(-1).nonzero().squeeze(1)
        return Entries(positions, total.view(-1)[positions], UnitGrid(self.out_features, self.in_features, "entry"))

    def _is_blank(self, adapter_name: str) -> bool:
        codes = [getattr(self, name)[adapter_name] for name in _SIDES]
        return not any(one.is_meta or one[:4].any() for one in codes)

    def subnet_awaits_calibration(self, adapter_name: str) -> bool:
        """Whether rows and columns wait for data."""
        if not self.adapter_configs[adapter_name].needs_calibration or adapter_name in self._subnets:
            return False
        return self._is_blank(adapter_name)

    def take_calibration(self, adapter_name: str, state: dict[str, torch.Tensor] | None) -> None:
        """Choose rows and columns by the data; None: at random."""
        self.select_subnet(adapter_name, state)

    def refresh_subnets(self) -> None:
        """Decode again what was loaded."""
        self._subnets.clear()
        for adapter_name in self.sparse_lora_subnet:
            if not self._is_blank(adapter_name) and not self.sparse_lora_subnet_rows[adapter_name].is_meta:
                self.subnet(adapter_name)

    @torch.no_grad()
    def compact_subnet(self, adapter_name: str, tolerance: float | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Places of the rows and of the columns that have a value beyond `tolerance`; None where all have."""
        if tolerance is None:
            return None
        # What is not a number stays, to be seen.
        kept = ~(self.sparse_lora_subnet[adapter_name].abs() <= tolerance)
        if self.accumulated(adapter_name) is not None and not kept.any():
            kept[0, 0] = True  # the accumulator would go with the last of them
        places = tuple(kept.any(axis).nonzero().squeeze(1) for axis in (1, 0))
        return None if (places[0].numel(), places[1].numel()) == tuple(kept.shape) else places
