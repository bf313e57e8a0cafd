"""The sparse half of an adapted layer: which units it has, how they are kept, chosen, written and read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from ...ops import live_lines, unpack_entries
from ...sparsity import (
    Budget,
    ByModule,
    DataCriterion,
    Given,
    Pattern,
    Random,
    Targets,
    UnitGrid,
    coded_grid,
    coded_header,
    coded_parts,
    codes_length,
    decode_support,
    encode_support,
    select_units,
    stream_seed,
)
from ...utils.parts import UnknownPart
from ...utils.tensors import TensorSpec, whole
from ..shared.file_check import CONFIG_FILE, tensor_key
from ..shared.layer import AdapterLayer
from ..shared.tensor_checks import side
from .config import SparseLoraConfig
from .plan import ModuleSizes, find_pattern


def support_specs(config: SparseLoraConfig, module_name: str, sizes: ModuleSizes) -> list[TensorSpec]:
    """`values` and `support` of a module that has units."""
    if not sizes.capacity:
        return []
    grid, capacity = sizes.grid, sizes.capacity
    shape = grid.values_shape(capacity)

    def check_codes(codes: torch.Tensor, key: str) -> None:
        units = decode_support(codes, grid, capacity, key)
        if config.known_pattern is not None:
            config.known_pattern.check_units(units, grid, key)

    return [
        TensorSpec(
            "sparse_lora_values",
            shape,
            space="support",
            start=lambda generator: first_values(
                config, module_name, grid.values_shape(capacity), grid.cols, sizes.units
            ),
        ),
        TensorSpec(
            "sparse_lora_support",
            (codes_length(grid, capacity),),
            torch.uint8,
            "saved",
            space="support",
            axis=None,
            check=check_codes,
        ),
    ]


def first_values(
    config: SparseLoraConfig, module_name: str, shape: tuple[int, ...], cols: int, units: int | None = None
) -> torch.Tensor:
    """Values `shape` that the sparse half of a module starts with, of whose first axis `units` are in use (None: all);
    `cols` are the columns of its weight."""
    if config.support_init == "uniform":
        generator = torch.Generator().manual_seed(stream_seed(config.seed, module_name, "values"))
        drawn = torch.rand(shape, generator=generator, device="cpu").mul_(2).sub_(1).div_(math.sqrt(cols))
        if units is not None:
            drawn[units:] = 0
        return drawn.to(torch.empty(0).device)
    # Values of a support that is still to be chosen are zero, whatever init_weights says.
    at_zero = config.init_weights or config.needs_calibration
    return (torch.zeros if at_zero else torch.randn)(shape, dtype=torch.float32)


def read_support(
    config: SparseLoraConfig, module_name: str, held: Mapping[str, torch.Tensor], shape: tuple[int, int]
) -> tuple[UnitGrid, int] | None:
    """How a module's weight is cut and how many units its support has room for, by the tensors `held` of a file; None
    where the module has no support. `shape` is the weight's by its factors, 0 where they do not say.

    Raises:
        ValueError: a tensor of the support is missing, its header is damaged, is not the config's or names a weight of
            another shape, or there are more or fewer units than the config says; names the tensor.
    """
    kinds = ("sparse_lora_values", "sparse_lora_support")
    if not (_has_units(config, module_name) or any(kind in held for kind in kinds)):
        return None
    for kind in kinds:
        if kind not in held:
            raise ValueError(f"'{tensor_key(module_name, kind)}' is missing: the config has a sparse half.")
    values_key, codes_key = (tensor_key(module_name, kind) for kind in kinds)
    grid = coded_grid(held[kinds[1]], codes_key)
    if all(shape) and shape != (grid.rows, grid.cols):
        factors = " and ".join(f"'{tensor_key(module_name, f'sparse_lora_{factor}')}'" for factor in "AB")
        raise ValueError(
            f"{factors} belong to a weight of {shape[0]}x{shape[1]}, '{codes_key}' beside them to one of "
            f"{grid.rows}x{grid.cols}."
        )
    granularity = config.granularity_of(module_name)
    if grid.granularity != granularity or grid.cut_size not in (0, config.cut_size_of(granularity)):
        option = "diagonal_blocks" if "diagonal" in (granularity, grid.granularity) else "block_size"
        raise ValueError(
            f"'{codes_key}' has granularity '{grid.granularity}' ({option}={grid.cut_size}), and {CONFIG_FILE} "
            f"says '{granularity}' ({option}={config.cut_size_of(granularity)}). Use the config saved with the file."
        )
    grid = replace(grid, block_size=config.cut_size_of(granularity))  # headers have one where it is read only
    capacity = side(held, kinds[0], 0, len(grid.values_shape(1)), values_key)
    if capacity > grid.num_units:
        raise ValueError(f"'{values_key}' has {capacity} units where {grid} has {grid.num_units}.")
    expected = _capacity_by_config(config, module_name, grid)
    if expected not in (None, capacity):
        raise ValueError(
            f"'{values_key}' has room for {capacity} units, and {CONFIG_FILE} makes it {expected}. Use the config "
            "saved with the file."
        )
    return grid, capacity


def _has_units(config: SparseLoraConfig, module_name: str) -> bool:
    if module_name in config.sizes:
        return config.has_support and bool(config.sizes[module_name][1])
    if config.calibrates_sizes and getattr(config.budget, "may_leave_none", False):
        return False  # data decided, and may have left the module without
    if isinstance(config.budget, ByModule):
        return config.budget.density_of(module_name, find_pattern) > 0
    return config.has_support


def _capacity_by_config(config: SparseLoraConfig, module_name: str, grid: UnitGrid) -> int | None:
    """Units that there is room for; None where only the file knows."""
    if config.sizes:
        return config.sizes[module_name][1] if module_name in config.sizes else None
    budget = config.support_budget
    if config.structures or not isinstance(budget, Budget) or not budget.follows_from_module:
        return None
    return budget.counts(Targets({module_name: grid}, find=find_pattern)).get(module_name, 0)


class PackedUnits(NamedTuple):
    """Living units as `ops.sparse_linear` takes them."""

    units: torch.Tensor
    """Sorted and distinct; of entries their places, with `counts` (`ops.pack_entries`)."""
    counts: torch.Tensor | None = None
    live_rows: torch.Tensor | None = None
    """Entries that lie in a small part of rows and columns have these (int16 where that is enough)."""
    live_columns: torch.Tensor | None = None
    """Blocks that do not move have theirs too, in steps of a block."""


class KnownSupport(NamedTuple):
    """What was found in a saved buffer, to be valid while the buffer is the same, in the same place and version."""

    codes: torch.Tensor
    pointer: int
    version: int
    header: bytes
    packed: PackedUnits


# Entries are remembered as those of a sub-grid where that is at most this share of the weight.
_MOST_COMPACTED = 0.5


def _subgrid(units: torch.Tensor, grid: UnitGrid) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    lines = live_lines(units, grid.rows, grid.cols)
    if not units.numel() or lines[0].numel() * lines[1].numel() > _MOST_COMPACTED * grid.rows * grid.cols:
        return None, None
    rows, columns = (
        line.to(torch.int16 if side <= 2**15 else torch.int32)
        for line, side in zip(lines, (grid.rows, grid.cols), strict=True)
    )
    return rows, columns


class SupportState(AdapterLayer):
    """What `SparseLoraLayer` does with its supports; the tensors are allocated there."""

    # Where supports begin

    def _begin(self, adapter_name: str, first: torch.Tensor | None) -> None:
        """Write the first support: `first`, the units that were chosen together with other modules', or those that the
        criterion chooses without data."""
        if adapter_name not in self.sparse_lora_values:
            return
        config, values = self.adapter_configs[adapter_name], self.sparse_lora_values[adapter_name]
        # A file is about to fill the support of an adapter that is loaded: choosing one first would be wasted work.
        if values.is_meta or self.get_base_layer_device() == torch.device("meta"):
            return
        if first is not None:
            self.write_support(adapter_name, first.to(values.device))
            return
        waits = config.needs_calibration or (config.inference_mode and config.init_weights)
        waits = waits or isinstance(config.criterion, UnknownPart) or isinstance(config.pattern, UnknownPart)
        if not waits and config.structure_of(self.module_name) is None:
            self.select_support(adapter_name)

    def select_support(self, adapter_name: str) -> None:
        """Choose the adapter's first support by its config's criterion and write it.

        Raises:
            ValueError: the module selects together with others, which happens at injection only.
        """
        config = self.adapter_configs[adapter_name]
        if config.structure_of(self.module_name) is not None:
            raise ValueError(
                f"The support of '{self.module_name}' is chosen with other modules' (structures), over the whole model "
                "at injection, and that was not possible: the base had no weights yet, or sizes has other "
                "counts than structures give. Load the base before the adapter, or set sizes={}."
            )
        self.write_support(adapter_name, self._first_units(adapter_name))

    def _first_units(self, adapter_name: str) -> torch.Tensor:
        """The units that the config's criterion chooses without data: for `random`, always the same draw."""
        config = self.adapter_configs[adapter_name]
        seed = stream_seed(config.seed, self.module_name)
        if isinstance(config.criterion, UnknownPart) or isinstance(config.pattern, UnknownPart):
            config.check_runnable()
        weight = None if isinstance(config.criterion, Random) else self.dense_base_weight()
        return select_units(
            config.criterion,
            weight,
            self.sparse_lora_grid[adapter_name],
            self.sizes[adapter_name].units,
            generator=torch.Generator(device="cpu" if weight is None else weight.device).manual_seed(seed),
            name=self.module_name,
            pattern=self.pattern_on_weight(adapter_name),
        )

    def pattern_on_weight(self, adapter_name: str) -> Pattern | None:
        """The config's pattern on this layer's base weight."""
        pattern = self.adapter_configs[adapter_name].known_pattern
        return None if pattern is None else pattern.on(self.dense_base_weight)

    def is_random_start(self, adapter_name: str) -> bool:
        """Whether the support is the random draw that injection made, not one that was chosen, loaded or moved."""
        config = self.adapter_configs[adapter_name]
        searched = any(rule.part_type == "search_support" for rule in config.rules)
        if not isinstance(config.criterion, Random) or searched:
            return False
        if config.structure_of(self.module_name) is not None:
            return True  # drawn together with other modules, over the whole model
        units = self.units(adapter_name)
        drawn = self._first_units(adapter_name).to(units.device, units.dtype)
        return torch.equal(units, drawn)

    def has_first_values(self, adapter_name: str) -> bool:
        """Whether the support's values are those of injection: 0, or the draw of `support_init`."""
        config, values = self.adapter_configs[adapter_name], whole(self.sparse_lora_values[adapter_name].detach())
        if config.support_init == "zeros":
            return not bool(values.any())
        sizes, shape = self.sizes[adapter_name], tuple(values.shape)
        first = first_values(config, self.module_name, shape, self.in_features, sizes.units)
        return torch.equal(values, first.to(values.device, values.dtype))

    # What supports are

    def units(self, adapter_name: str) -> torch.Tensor:
        """The adapter's living units, sorted and distinct, int32 or int64 `[a]`; `values[:a]` belong to them. Empty
        where the adapter has no support in this layer: structures may be drawn over all layers, and none fall here.

        Raises:
            ValueError: the buffer is damaged or belongs to another weight; the message names it.
            KeyError: no such adapter.
        """
        if adapter_name not in self.sparse_lora_support and adapter_name in self.adapter_configs:
            return torch.empty(0, dtype=torch.int32, device=self.get_base_layer().weight.device)
        packed = self.packed_units(adapter_name)
        if packed.counts is None:
            return packed.units
        grid = self.sparse_lora_grid[adapter_name]
        return unpack_entries(packed.units, packed.counts, grid.rows, grid.cols).to(grid.index_dtype)

    def packed_units(self, adapter_name: str, loading: bool = False) -> PackedUnits:
        """The living units as the engine takes them: entries where they lie in the saved buffer, others decoded.

        The buffer is checked once, and again whenever it was replaced or rewritten; a rewriting that was neither
        `write_support` nor `loading` is told once.

        Raises:
            ValueError: the buffer is damaged or belongs to another weight; the message names it.
        """
        if torch.compiler.is_compiling() and adapter_name in self._units:
            return self._units[adapter_name].packed  # write_support and loading keep it fresh; a graph cannot look
        codes = self.sparse_lora_support[adapter_name]
        version = 0 if codes.is_inference() else codes._version
        cached = self._units.get(adapter_name)
        # The buffer itself is kept for comparison: a freed one's address may come back with the same version.
        if cached is not None and cached.codes is codes and cached[1:3] == (codes.data_ptr(), version):
            return cached.packed
        # Values that are not zero belong to units that only the file knows: decoding refuses them.
        if not codes.is_meta and not codes[:4].any() and not self.sparse_lora_values[adapter_name].any():
            if self.adapter_configs[adapter_name].needs_calibration:  # empty until data decides
                index_dtype = self.sparse_lora_grid[adapter_name].index_dtype
                return self._remember(adapter_name, torch.empty(0, dtype=index_dtype, device=codes.device)).packed
            self.select_support(adapter_name)
            return self.packed_units(adapter_name)
        name = f"{self.module_name}.sparse_lora_support"
        capacity = self.sparse_lora_values[adapter_name].shape[0]
        units = decode_support(codes, self.sparse_lora_grid[adapter_name], capacity, name)
        found = self._remember(adapter_name, units)
        if cached is not None and not loading and cached.header != found.header:
            self._notice_overwritten_support(adapter_name)
        return found.packed

    def units_version(self, adapter_names: Iterable[str]) -> tuple[bytes, ...]:
        """Headers of the adapters' buffers as they were last looked at: others once a support has moved."""
        return tuple(self._units[name].header for name in adapter_names if name in self._units)

    def _notice_overwritten_support(self, adapter_name: str) -> None:
        config = self.adapter_configs[adapter_name]
        if getattr(config, "_overwriting_told", False):
            return
        config._overwriting_told = True
        warnings.warn(
            f"The support of adapter '{adapter_name}' in '{self.module_name}' was overwritten from outside, as by "
            "torch.optim.swa_utils.AveragedModel, which copies buffers and averages parameters. Averages of values on "
            "different supports belong to no weight: average after the last move, or combine adapters with "
            "model.add_weighted_adapter(...).",
            stacklevel=2,
        )

    def _remember(self, adapter_name: str, units: torch.Tensor) -> KnownSupport:
        codes, grid = self.sparse_lora_support[adapter_name], self.sparse_lora_grid[adapter_name]
        version = 0 if codes.is_inference() else codes._version
        packed = PackedUnits(units)
        if grid.granularity == "entry":
            # `data` has no version of autograd's: a backward pass is not to refuse a buffer that a process group has
            # written again with the same bytes in between. Moves are noticed by `units_version`.
            packed = PackedUnits(*coded_parts(codes.data, grid, units.numel()), *_subgrid(units, grid))
        elif grid.granularity == "block" and not self._may_move(adapter_name):
            columns = torch.unique(units % (grid.cols // grid.block_size)).int()
            packed = PackedUnits(units, live_columns=columns)
        known = KnownSupport(codes, codes.data_ptr(), version, coded_header(codes), packed)
        self._units[adapter_name] = known
        return known

    def _may_move(self, adapter_name: str) -> bool:
        """Whether a rule moves units: a compiled graph would be made anew for every number of columns."""
        config = self.adapter_configs[adapter_name]
        return config.has_schedule and any("units" in rule.writes for rule in config.rules)

    def refresh_units(self) -> None:
        """Decode again what was loaded: a compiled graph reads the decoded units without looking at the buffer.

        Raises:
            ValueError: a buffer is damaged.
        """
        for adapter_name, codes in self.sparse_lora_support.items():
            if not codes.is_meta and codes[:4].any():
                self.packed_units(adapter_name, loading=True)

    @torch.no_grad()
    def write_support(self, adapter_name: str, units: torch.Tensor) -> None:
        """Make `units` (sorted, distinct, at most the capacity) the adapter's support, in place."""
        grid = self.sparse_lora_grid[adapter_name]
        codes = self.sparse_lora_support[adapter_name]
        capacity = self.sparse_lora_values[adapter_name].shape[0]
        codes.copy_(encode_support(units, grid, capacity))
        self._remember(adapter_name, units.to(codes.device, grid.index_dtype))

    def living_values(self, adapter_name: str) -> torch.Tensor:
        """Values of the living units as they act in the update: scaled where the config scales the support."""
        values = self.sparse_lora_values[adapter_name]
        count = self.packed_units(adapter_name).units.numel()
        values = values if count == values.shape[0] else values[:count]
        scale = self.sparse_lora_support_scaling[adapter_name]
        return values if scale == 1.0 else values * scale

    def awaits_calibration(self, adapter_name: str) -> bool:
        """Whether the adapter's support waits for data: the layer computes as its base then, and refuses to train."""
        if adapter_name not in self.sparse_lora_values or not self.adapter_configs[adapter_name].needs_calibration:
            return False
        codes, known = self.sparse_lora_support[adapter_name], self._units.get(adapter_name)
        if torch.compiler.is_compiling() and known is not None:
            return not known.packed.units.numel()
        version = 0 if codes.is_inference() else codes._version
        if known is not None and known.codes is codes and known[1:3] == (codes.data_ptr(), version):
            return not known.packed.units.numel()  # without a look at the device's memory; a decided support has a unit
        return not codes.is_meta and not codes[:4].any()

    def resize_support(self, adapter_name: str, count: int) -> None:
        """Make room for `count` units, all zero and to be chosen, in the same parameter; 0 removes the support.

        For sizes that only data or a file know, before an optimizer holds state of the values.

        Raises:
            ValueError: `count` is more than the weight has units.
        """
        grid = self.sparse_lora_grid[adapter_name]
        if count > grid.num_units:
            raise ValueError(
                f"'{self.module_name}' has {grid.num_units} units of granularity '{grid.granularity}', not {count}."
            )
        self.resize(adapter_name, replace(self.sizes[adapter_name], units=count, capacity=count))

    def calibration_statistic(self, adapter_name: str) -> DataCriterion:
        """The config's criterion.

        Raises:
            ValueError: the units come from outside, not from data.
        """
        criterion = self.adapter_configs[adapter_name].criterion
        if not isinstance(criterion, DataCriterion):
            raise ValueError(self.calibration_message(adapter_name))
        return criterion

    def calibration_message(self, adapter_name: str) -> str:
        """What to tell a user whose support waits for data."""
        criterion = self.adapter_configs[adapter_name].criterion
        start = f"Adapter '{adapter_name}' has criterion='{criterion.part_type}', and its support has not been chosen "
        if isinstance(criterion, Given):
            return (
                f"{start}yet. Call hf_sparse_peft.load_support(model, path) or "
                "hf_sparse_peft.support_from_checkpoints(model, before, after) first."
            )
        return (
            f"{start}yet. Either call hf_sparse_peft.initialize_support(model, dataloader) first, or let the Trainer "
            "do it: Trainer(..., callbacks=hf_sparse_peft.callbacks_for(model)); in a loop of your own, "
            "Controller(..., dataloader=...). Criteria without data: 'random', 'magnitude'."
        )
