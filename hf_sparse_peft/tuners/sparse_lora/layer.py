r"""State of one adapted layer: :math:`\Delta W = s\,B\,\mathrm{diag}(g)\,A + S`, allocated once, never reshaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from ...rules import ExpertDraw, ModuleSpace, UnitSpace
from ...rules.gradient_readers import SharedReader
from ...sparsity import Given, UnitGrid
from ...utils.tensors import TensorSpec
from ..shared.calibration import CalibratedTensors
from ..shared.pieces import Entries, LowRank, Piece, Subgrid
from ..shared.tensor_checks import weight_sides
from .assumed_units import assume_units
from .config import SparseLoraConfig
from .factors import factor_specs, fold_experts, merged_factors
from .plan import ModuleSizes
from .spaces import spaces_of
from .start_state import StartState
from .subnet import SubnetState, read_subnet, subnet_specs
from .support import KnownSupport, SupportState, read_support, support_specs


class SparseLoraLayer(StartState, SubnetState, SupportState):
    """What every adapted layer holds per adapter, keyed by adapter name. Parameters are fp32 masters."""

    prefix: str = "sparse_lora_"
    sparse_lora_values: nn.ParameterDict
    """`UnitGrid.values_shape(capacity)`."""
    sparse_lora_A: nn.ParameterDict
    """`[r, in]`."""
    sparse_lora_B: nn.ParameterDict
    """`[out, r]`."""
    sparse_lora_gate: nn.ParameterDict
    """`[r]`, only with `config.gate`."""
    sparse_lora_subnet: nn.ParameterDict
    """`[R, C]`, with `granularity="subnet"` in place of values."""
    sparse_lora_support: BufferDict
    """uint8, the coded units (`sparsity.codec`)."""
    sparse_lora_subnet_rows: BufferDict
    """uint8, the coded rows of a subnet."""
    sparse_lora_subnet_columns: BufferDict
    """uint8, its coded columns."""
    sparse_lora_accumulator: BufferDict
    """fp32 `[out, in]`, with `config.accumulator`: what was learned where subnets were before."""
    sparse_lora_rank_mask: BufferDict
    """uint8 `[r]`, 1 for living components; only with the gate."""
    sparse_lora_A_map: BufferDict
    """uint8 `[r, in]`, with `factor_masks` (`factors.py`)."""
    sparse_lora_B_map: BufferDict
    """uint8 `[out, r]`."""
    sparse_lora_A_start: BufferDict
    """fp32 `[r, in]`, A's first content."""
    sparse_lora_grid: dict[str, UnitGrid]
    sparse_lora_scaling: dict[str, float]
    sparse_lora_support_scaling: dict[str, float]
    sparse_lora_gradient_readers: dict[str, list[Callable[[torch.Tensor], None]]]
    """Who reads the dense gradient at this step; an adapter without readers has no entry."""
    sparse_lora_dense_delta: dict[str, torch.Tensor]
    """Dense fp32 deltas `[out, in]` that stand for a support before calibration, while a warm-up trains them. Not
    registered: neither an optimizer nor a file of the run sees them."""

    def __init__(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        self.place_over(base_layer, module_name, **kwargs)
        self.expert_draws: dict[str, ExpertDraw] = {}
        self._subnets: dict[str, tuple[list[tuple], tuple[torch.Tensor, torch.Tensor]]] = {}
        self._accumulates: dict[str, tuple[torch.Tensor, int, bool]] = {}
        self._units: dict[str, KnownSupport] = {}

    @classmethod
    def tensor_specs(
        cls, config: SparseLoraConfig, module_name: str, rows: int, cols: int, sizes: ModuleSizes
    ) -> list[TensorSpec]:
        """Tensors of the factors, then of the support, as far as the module has them."""
        sparse = support_specs(config, module_name, sizes) or subnet_specs(config, module_name, rows, cols, sizes)
        return [*factor_specs(config, module_name, rows, cols, sizes.rank), *sparse]

    @classmethod
    def read_sizes(
        cls, config: SparseLoraConfig, module_name: str, held: Mapping[str, torch.Tensor]
    ) -> tuple[int, int, ModuleSizes]:
        """Rows and columns of a module's weight, and the sizes of both halves, by its tensors in a file."""
        rank = config.rank_of(module_name)
        rows, cols = weight_sides(lambda rows, cols: factor_specs(config, module_name, rows, cols, rank), held)
        if config.granularity_of(module_name) == "subnet":
            found = read_subnet(config, module_name, held, (rows, cols))
            sides = (rows, cols, None) if found is None else found
            return *sides[:2], ModuleSizes(None, 0, 0, rank, subnet=sides[2])
        support = read_support(config, module_name, held, (rows, cols))
        if support is None:
            return rows, cols, ModuleSizes(None, 0, 0, rank)
        grid, capacity = support
        return grid.rows, grid.cols, ModuleSizes(grid, capacity, capacity, rank)

    @classmethod
    def sizes_to_load(
        cls, config: SparseLoraConfig, module_name: str, sizes: ModuleSizes, held: Mapping[str, torch.Tensor]
    ) -> ModuleSizes:
        """As many units as the file has values, and components as A has rows, where the file's run chose them from
        data."""
        if config.awaits_start:
            return cls.read_start(config, module_name, held, sizes)
        if not config.calibrates_sizes or not sizes.capacity:
            return sizes
        values = held.get("sparse_lora_values")
        open_to_none = isinstance(config.criterion, Given) or getattr(config.budget, "may_leave_none", False)
        if values is None and (open_to_none or config.structure_of(module_name)):
            return replace(sizes, units=0, capacity=0)
        count = values.shape[0] if values is not None and values.ndim else 0
        return replace(sizes, units=count, capacity=count) if 0 < count <= sizes.grid.num_units else sizes

    def set_sizes(self, adapter_name: str, sizes: ModuleSizes) -> None:
        """Note what was decided for the adapter in this layer."""
        super().set_sizes(adapter_name, sizes)
        found = {"grid": sizes.grid, "scaling": sizes.scaling, "support_scaling": sizes.support_scaling}
        for name, value in found.items():
            held = getattr(self, f"sparse_lora_{name}")
            held.pop(adapter_name, None)
            if value is not None:
                held[adapter_name] = value

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter from this layer, decoded units included."""
        self._units.pop(adapter_name, None)
        self._subnets.pop(adapter_name, None)
        self._accumulates.pop(adapter_name, None)
        self.expert_draws.pop(adapter_name, None)
        self.sparse_lora_dense_delta.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def forget_decoded(self, adapter_name: str) -> None:
        """Forget the decoded units of this adapter, whose buffer has been replaced."""
        self._units.pop(adapter_name, None)
        self._subnets.pop(adapter_name, None)
        self._accumulates.pop(adapter_name, None)
        self.expert_draws.pop(adapter_name, None)

    def unit_spaces(self, adapter_name: str) -> list[UnitSpace]:
        """The support, the components of the low-rank half, and the module itself."""
        return [*spaces_of(self, adapter_name), ModuleSpace(self, adapter_name)]

    def add_gradient_reader(self, adapter_name: str, reader: Callable[[torch.Tensor], None]) -> None:
        """Show `reader` the weight's dense gradient `[out, in]` in every backward pass until it is removed."""
        readers = self.sparse_lora_gradient_readers.setdefault(adapter_name, [])
        if not any(known is reader for known in readers):
            readers.append(reader)

    def remove_gradient_reader(self, adapter_name: str, reader: Callable[[torch.Tensor], None]) -> None:
        """Show it no more."""
        left = [known for known in self.sparse_lora_gradient_readers.pop(adapter_name, []) if known is not reader]
        if left:
            self.sparse_lora_gradient_readers[adapter_name] = left

    def _shared_reader(self, names: list[str]) -> SharedReader | None:
        readers = [
            (reader, self.sparse_lora_grid.get(name))
            for name in names
            for reader in self.sparse_lora_gradient_readers.get(name, ())
        ]
        if not readers:
            return None
        # As `operands.combine` cuts the weight: supports of different kinds meet as entries.
        grids = [self.sparse_lora_grid[name] for name in names if name in self.sparse_lora_values]
        alike = all(grid == grids[0] for grid in grids)
        cut = (grids[0].granularity, grids[0].block_size) if grids and alike else ("entry", 0)
        cut = ("row", 0) if self.sparse_lora_dense_delta else cut
        return SharedReader(readers, *cut)

    # What is held

    def _before_training(self, active: list[str]) -> None:
        # A dense delta stands for a support that data is about to choose.
        super()._before_training([name for name in active if name not in self.sparse_lora_dense_delta])

    def choose_units(self, adapter_name: str, action: str) -> None:
        """Choose a support that is still to be chosen without data, so that it is not saved blank.

        Raises:
            ValueError: it waits for data.
        """
        if self.awaits_start(adapter_name):
            CalibratedTensors.choose_units(self, adapter_name, action)
        if adapter_name in self.sparse_lora_support:
            super().choose_units(adapter_name, action)
            self.units(adapter_name)
        elif adapter_name in self.sparse_lora_subnet:
            super().choose_units(adapter_name, action)
            self.subnet(adapter_name)

    def awaits_calibration(self, adapter_name: str) -> bool:
        """Whether the adapter's support or subnet, or both halves, wait for data: the layer computes as its base then,
        and refuses to train."""
        if self.awaits_start(adapter_name):
            return True
        if adapter_name in self.sparse_lora_subnet:
            return self.subnet_awaits_calibration(adapter_name)
        return super().awaits_calibration(adapter_name)

    def calibration_message(self, adapter_name: str) -> str:
        """What to tell a user whose support or subnet waits for data."""
        if adapter_name in self.sparse_lora_subnet or self.awaits_start(adapter_name):
            return CalibratedTensors.calibration_message(self, adapter_name)
        return super().calibration_message(adapter_name)

    def _begin(self, adapter_name: str, first: torch.Tensor | None) -> None:
        super()._begin(adapter_name, first)
        if adapter_name in self.sparse_lora_subnet:
            self.begin_subnet(adapter_name)

    def refresh_units(self) -> None:
        """Decode again what was loaded: a compiled graph reads the decoded units without looking at the buffer.

        Raises:
            ValueError: a buffer is damaged.
        """
        super().refresh_units()
        self.refresh_subnets()

    def assume_units(self, adapter_name: str) -> None:
        """On the meta device: see `AdapterLayer.assume_units`."""
        super().assume_units(adapter_name)
        assume_units(self, adapter_name)

    def has_sparse_half(self, adapter_name: str) -> bool:
        """Whether the adapter has a support or a subnet here."""
        return adapter_name in self.sparse_lora_values or adapter_name in self.sparse_lora_subnet

    def sparse_entries(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Sorted flat positions (int64) and values of all entries of the support or subnet; differentiable in the
        values."""
        if adapter_name in self.sparse_lora_subnet:
            return self.subnet_entries(adapter_name)
        return self.sparse_lora_grid[adapter_name].as_entries(
            self.units(adapter_name), self.living_values(adapter_name)
        )

    def has_experts(self, adapter_name: str) -> bool:
        """Whether the low-rank factors are split over experts."""
        masks = self.adapter_configs[adapter_name].factor_masks
        return masks is not None and masks.kind == "stochastic" and adapter_name in self.sparse_lora_A

    def alive_components(self, adapter_name: str) -> int:
        """Living components of the low-rank half."""
        if adapter_name in self.sparse_lora_rank_mask:
            return int(self.sparse_lora_rank_mask[adapter_name].sum())
        return self.sizes[adapter_name].rank if adapter_name in self.sizes else 0

    @torch.no_grad()
    def compact(self, adapter_name: str, compact_tolerance: float | None = None) -> None:
        """Shrink the adapter to its living units and components; experts are folded into plain factors.

        Units whose numbers all lie within `compact_tolerance` (None: what the config says) of zero leave too.
        """
        super().compact(adapter_name)
        config = self.adapter_configs[adapter_name]
        compact_tolerance = config.compact_tolerance if compact_tolerance is None else compact_tolerance
        if self.has_experts(adapter_name):
            fold_experts(self, adapter_name)
        sizes, kept, units = self.sizes[adapter_name], {}, None
        if adapter_name in self.sparse_lora_values:
            units = self.units(adapter_name)
            slots = torch.arange(units.numel(), device=units.device)
            if compact_tolerance is not None:
                largest = self.living_values(adapter_name).unsqueeze(1).flatten(1).abs().amax(1)
                slots = slots[~(largest <= compact_tolerance)]  # what is not a number stays, to be seen
            kept["support"], units = slots, units[slots]
            sizes = replace(sizes, units=units.numel(), capacity=units.numel())
        if adapter_name in self.sparse_lora_subnet:
            self._compact_subnet(adapter_name, compact_tolerance)
            sizes = self.sizes[adapter_name]
        if adapter_name in self.sparse_lora_rank_mask:
            kept["rank"] = self.sparse_lora_rank_mask[adapter_name].nonzero().squeeze(1)
            sizes = replace(sizes, rank=kept["rank"].numel())
        if (sizes.capacity, sizes.rank) != (self.sizes[adapter_name].capacity, self.sizes[adapter_name].rank):
            self.resize(adapter_name, sizes, kept)
            if units is not None and units.numel():
                self.write_support(adapter_name, units)

    def _compact_subnet(self, adapter_name: str, tolerance: float | None) -> None:
        places = self.compact_subnet(adapter_name, tolerance)
        if places is None:
            return
        rows, columns = (one[at] for one, at in zip(self.subnet(adapter_name), places, strict=True))
        values = self.sparse_lora_subnet[adapter_name].detach()[places[0]][:, places[1]]
        sides = (rows.numel(), columns.numel())
        self.resize(adapter_name, replace(self.sizes[adapter_name], subnet=sides if all(sides) else None))
        if all(sides):
            self.sparse_lora_subnet[adapter_name].data = values
            self.write_subnet(adapter_name, rows, columns)

    def frozen_parameters(self, adapter_name: str) -> int:
        """Numbers of living units that are marked as frozen: they add to the weight and do not train."""
        frozen = self.rule_state(adapter_name).get("frozen")
        if frozen is None or frozen.is_meta:
            return 0
        return int(frozen.sum()) * self.sparse_lora_grid[adapter_name].unit_numel

    @torch.no_grad()
    def pieces(self, adapter_name: str) -> list[Piece]:
        r"""The low-rank half :math:`s\,B\,\mathrm{diag}(g)\,A`, merged factors, then the support, as far as the layer
        has them. A subnet that has moved is all entries that it ever changed."""
        found = self._trained_pieces(adapter_name)
        if self.accumulated(adapter_name) is not None:
            found[-1] = self.with_accumulated(adapter_name, found[-1])
        return found

    def _add_delta_(self, weight: torch.Tensor, adapter_name: str) -> None:
        kept = self.accumulated(adapter_name)
        if kept is not None:
            weight += kept
        for piece in self._trained_pieces(adapter_name):
            piece.add_(weight)

    @torch.no_grad()
    def _trained_pieces(self, adapter_name: str) -> list[Piece]:
        found: list[Piece] = []
        if adapter_name in self.sparse_lora_A:
            A, B = merged_factors(self, adapter_name)
            found.append(LowRank(B, A, self.sparse_lora_gate.get(adapter_name), self.sparse_lora_scaling[adapter_name]))
        if adapter_name in self.sparse_lora_values:
            units, values = self.units(adapter_name), self.living_values(adapter_name)
            found.append(Entries(units, values, self.sparse_lora_grid[adapter_name]))
        if adapter_name in self.sparse_lora_subnet:
            shape = (self.out_features, self.in_features)
            found.append(Subgrid(*self.subnet(adapter_name), self.subnet_values(adapter_name), shape))
        return found

    @torch.no_grad()
    def write_pieces(self, adapter_name: str, pieces: list[Piece]) -> None:
        """Fill an adapter that was allocated for these pieces, at most one `LowRank` of scale 1 and one `Entries`."""
        for piece in pieces:
            if isinstance(piece, Entries):
                self.write_support(adapter_name, piece.units)
                self.sparse_lora_values[adapter_name].data.copy_(piece.values)
            else:
                self.sparse_lora_A[adapter_name].data.copy_(piece.A)
                self.sparse_lora_B[adapter_name].data.copy_(piece.B)
