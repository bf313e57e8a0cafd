r"""State of one adapted layer: :math:`\Delta W = s\,B\,\mathrm{diag}(g)\,A + S`, allocated once, never reshaped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from ...ops import pack_entries, unpack_entries
from ...sparsity import UnitGrid, codes_length, decode_support, encode_support, select_units, stream_seed
from ..adapter_layer import AdapterLayer
from .config import SparseLoraConfig
from .factors import allocate_factors, merged_factors


class SparseLoraLayer(AdapterLayer):
    """What every adapted layer holds per adapter, keyed by adapter name.

    Parameters (trained): `values` (see `UnitGrid.values_shape`), `A` `[r, in]`, `B` `[out, r]`, `gate` `[r]` (only with
    `rank_allocation`), fp32 masters. Buffers (saved): `support` uint8, the gap-coded units; `rank_mask` uint8 `[r]`,
    the living components; with `factor_masks` the maps of A and B (`factors.py`); and, while a schedule runs, what its
    callback must find again after a resume.
    """

    adapter_layer_names: tuple[str, ...] = ("sparse_lora_values", "sparse_lora_A", "sparse_lora_B", "sparse_lora_gate")
    training_state_names: tuple[str, ...] = (
        "sparse_lora_sensitivity",
        "sparse_lora_uncertainty",
        "sparse_lora_candidates",
        "sparse_lora_candidate_sums",
        "sparse_lora_frozen",
        "sparse_lora_entered",
        "sparse_lora_fired",
    )
    unit_state_names: tuple[str, ...] = ("sparse_lora_frozen", "sparse_lora_entered")
    """Training state with one number a unit, in the order of the values: it moves with them."""
    factor_map_names: tuple[str, ...] = ("sparse_lora_A_map", "sparse_lora_B_map", "sparse_lora_A_start")
    other_param_names: tuple[str, ...] = (
        "sparse_lora_support",
        "sparse_lora_rank_mask",
        *factor_map_names,
        *training_state_names,
        "sparse_lora_grid",
        "sparse_lora_config",
        "sparse_lora_start",
        "sparse_lora_r",
        "sparse_lora_scaling",
        "sparse_lora_support_scaling",
        "sparse_lora_sink",
        "sparse_lora_dense_delta",
    )
    sparse_lora_observer: Callable[[torch.Tensor], None] | None = None
    """Shown the layer's dense gradient `[out, in]` in every eager backward pass, without any effect on training."""

    def __init__(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        self.place_over(base_layer, module_name, **kwargs)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        for name in (
            "sparse_lora_support",
            "sparse_lora_rank_mask",
            *self.factor_map_names,
            *self.training_state_names,
        ):
            setattr(self, name, BufferDict({}, persistent=True))
        self.sparse_lora_grid: dict[str, UnitGrid] = {}
        self.sparse_lora_config: dict[str, SparseLoraConfig] = {}
        # Units that the first support has; the capacity (of values and support) may leave room for retired ones.
        self.sparse_lora_start: dict[str, int] = {}
        self.sparse_lora_r: dict[str, int] = {}
        self.sparse_lora_scaling: dict[str, float] = {}
        self.sparse_lora_support_scaling: dict[str, float] = {}
        # Dense-gradient readers that a callback sets while it collects candidates.
        self.sparse_lora_sink: dict[str, Callable[[torch.Tensor], None]] = {}
        # Dense fp32 deltas `[out, in]` that stand for an undecided support while a warm-up trains them. Not registered:
        # neither an optimizer nor a file of the run sees them.
        self.sparse_lora_dense_delta: dict[str, torch.Tensor] = {}
        self._units: dict[str, tuple[torch.Tensor, int, int, torch.Tensor, torch.Tensor | None]] = {}

    def update_layer(
        self,
        adapter_name: str,
        config: SparseLoraConfig,
        *,
        r: int,
        lora_alpha: float,
        num_units: int,
        capacity: int = 0,
        units: torch.Tensor | None = None,
        inference_mode: bool = False,
    ) -> None:
        """Allocate an adapter: `num_units` units of the support and `r` components; either may be 0.

        `capacity` above `num_units` leaves room in values and support for units that retire. `units` are the support
        where it was chosen with other layers' (`config.structures`).

        Raises:
            ValueError: `num_units` or `r` does not fit the weight.
        """
        self.sparse_lora_config[adapter_name] = config
        scaling = lora_alpha / (math.sqrt(r) if config.use_rslora else r) if r else None
        if num_units:
            if config.scale_support and scaling is None:
                raise ValueError(
                    f"scale_support multiplies the support of '{self.module_name}' by lora_alpha / r, and rank_pattern "
                    "gives it rank 0. Give it a rank, or set scale_support=False."
                )
            self.sparse_lora_support_scaling[adapter_name] = scaling if config.scale_support else 1.0
            self._allocate_support(adapter_name, config, num_units, max(capacity, num_units), units)
        self.sparse_lora_r[adapter_name] = r
        if r:
            allocate_factors(self, adapter_name, config, r)
            self.sparse_lora_scaling[adapter_name] = scaling
        if config.has_schedule and not config.inference_mode:
            self.allocate_training_state(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _allocate_support(
        self,
        adapter_name: str,
        config: SparseLoraConfig,
        num_units: int,
        capacity: int,
        units: torch.Tensor | None,
    ) -> None:
        granularity = config.granularity_of(self.module_name)
        grid = UnitGrid(self.out_features, self.in_features, granularity, config.block_size)
        if num_units > grid.num_units:
            raise ValueError(
                f"The support of '{self.module_name}' wants {num_units} {granularity} units, and its "
                f"{grid.rows}x{grid.cols} weight has {grid.num_units}. Lower density or num_entries."
            )
        self.sparse_lora_grid[adapter_name] = grid
        self.sparse_lora_start[adapter_name] = num_units
        self.sparse_lora_values[adapter_name] = nn.Parameter(self._first_values(config, grid, num_units, capacity))
        self.sparse_lora_support[adapter_name] = torch.zeros(codes_length(grid, capacity), dtype=torch.uint8)
        # A file is about to fill the support of an adapter that is loaded: choosing one first would be wasted work.
        on_meta = self.sparse_lora_values[adapter_name].is_meta
        if on_meta or self.get_base_layer_device() == torch.device("meta"):
            return
        if units is not None:
            self.write_support(adapter_name, units.to(self.sparse_lora_values[adapter_name].device))
        elif not config.data_driven and not (config.inference_mode and config.init_weights):
            if config.structure_of(self.module_name) is not None:
                return
            self.select_support(adapter_name)

    def _first_values(self, config: SparseLoraConfig, grid: UnitGrid, num_units: int, capacity: int) -> torch.Tensor:
        shape = grid.values_shape(capacity)
        if config.support_init == "uniform":
            generator = torch.Generator().manual_seed(stream_seed(config.seed, self.module_name, "values"))
            drawn = torch.rand(shape, generator=generator, device="cpu").mul_(2).sub_(1).div_(math.sqrt(grid.cols))
            drawn[num_units:] = 0
            return drawn.to(torch.empty(0).device)
        # Values of a support that is still to be chosen are zero, whatever init_weights says.
        at_zero = config.init_weights or config.data_driven
        return (torch.zeros if at_zero else torch.randn)(shape, dtype=torch.float32)

    def select_support(self, adapter_name: str) -> None:
        """Choose the adapter's first support by its config's criterion and write it.

        Raises:
            ValueError: the module selects together with others, which happens at injection only.
        """
        config, grid = self.sparse_lora_config[adapter_name], self.sparse_lora_grid[adapter_name]
        if config.structure_of(self.module_name) is not None:
            raise ValueError(
                f"The support of '{self.module_name}' is chosen with other modules' (structures), over the whole model "
                "at injection, and that was not possible: the base had no weights yet, or support_pattern has other "
                "counts than structures give. Load the base before the adapter, or set support_pattern={}."
            )
        seed = stream_seed(config.seed, self.module_name)
        weight = None if config.criterion == "random" else self.dense_base_weight()
        units = select_units(
            config.criterion,
            weight,
            grid,
            self.sparse_lora_start[adapter_name],
            generator=torch.Generator(device="cpu" if weight is None else weight.device).manual_seed(seed),
            **config.criterion_options,
        )
        self.write_support(adapter_name, units)

    def allocate_training_state(self, adapter_name: str) -> None:
        """Allocate, at fixed shapes, what the schedules of this adapter keep between steps and across a resume."""
        config = self.sparse_lora_config[adapter_name]
        if config.rank_allocation and adapter_name in self.sparse_lora_gate:
            size = self.sparse_lora_r[adapter_name] * (self.in_features + self.out_features + 1)
            self._add_state("sparse_lora_sensitivity", adapter_name, torch.zeros(size))
            self._add_state("sparse_lora_uncertainty", adapter_name, torch.zeros(size))
        if adapter_name in self.sparse_lora_values:
            self._allocate_unit_state(adapter_name, config)

    def _allocate_unit_state(self, adapter_name: str, config: SparseLoraConfig) -> None:
        shape, grid = self.sparse_lora_values[adapter_name].shape, self.sparse_lora_grid[adapter_name]
        regrowth = config.regrowth
        if regrowth and regrowth.collects:
            self._add_state("sparse_lora_candidates", adapter_name, torch.zeros(shape[0], dtype=grid.index_dtype))
            self._add_state("sparse_lora_candidate_sums", adapter_name, torch.zeros(2, *shape))
        if regrowth and regrowth.drop == "age":
            self._add_state("sparse_lora_entered", adapter_name, torch.zeros(shape[0], dtype=torch.int32))
        if regrowth and regrowth.grow == "random_unfired":
            self._add_state("sparse_lora_fired", adapter_name, torch.zeros(-(-grid.num_units // 8), dtype=torch.uint8))
        if config.freezes_units:
            self._add_state("sparse_lora_frozen", adapter_name, torch.zeros(shape[0], dtype=torch.uint8))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter from this layer, decoded units included."""
        self._units.pop(adapter_name, None)
        self.sparse_lora_dense_delta.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    # Supports

    @property
    def adapter_configs(self) -> dict[str, SparseLoraConfig]:
        """Config of each adapter of this layer, one object for all of its layers."""
        return self.sparse_lora_config

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has a part of that adapter."""
        return adapter_name in self.sparse_lora_values or adapter_name in self.sparse_lora_A

    def units(self, adapter_name: str) -> torch.Tensor:
        """The adapter's living units, sorted and distinct, int32 or int64 `[a]`; `values[:a]` belong to them.

        Raises:
            ValueError: the buffer is damaged or belongs to another weight; the message names it.
        """
        units, row_ends = self.packed_units(adapter_name)
        if row_ends is None:
            return units
        return unpack_entries(units, row_ends, self.in_features).to(self.sparse_lora_grid[adapter_name].index_dtype)

    def packed_units(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The living units as the engine takes them: entries packed into rows (`ops.pack_entries`), others as they are.

        Decoded from the saved buffer once, and again whenever that buffer was replaced or rewritten.

        Raises:
            ValueError: the buffer is damaged or belongs to another weight; the message names it.
        """
        if torch.compiler.is_compiling() and adapter_name in self._units:
            return self._units[adapter_name][3:]  # write_support and loading keep it fresh; a graph cannot look
        codes = self.sparse_lora_support[adapter_name]
        version = 0 if codes.is_inference() else codes._version
        cached = self._units.get(adapter_name)
        # The buffer itself is kept for comparison: a freed one's address may come back with the same version.
        if cached is not None and cached[0] is codes and cached[1:3] == (codes.data_ptr(), version):
            return cached[3:]
        # Values that are not zero belong to units that only the file knows: decoding refuses them.
        if not codes.is_meta and not codes[:4].any() and not self.sparse_lora_values[adapter_name].any():
            if self.sparse_lora_config[adapter_name].data_driven:  # empty until data decides
                index_dtype = self.sparse_lora_grid[adapter_name].index_dtype
                return self._remember(adapter_name, torch.empty(0, dtype=index_dtype, device=codes.device))
            self.select_support(adapter_name)
            return self.packed_units(adapter_name)
        name = f"{self.module_name}.sparse_lora_support"
        capacity = self.sparse_lora_values[adapter_name].shape[0]
        return self._remember(adapter_name, decode_support(codes, self.sparse_lora_grid[adapter_name], capacity, name))

    def _remember(self, adapter_name: str, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        codes = self.sparse_lora_support[adapter_name]
        version = 0 if codes.is_inference() else codes._version
        row_ends = None
        if self.sparse_lora_grid[adapter_name].granularity == "entry":
            units, row_ends = pack_entries(units, self.out_features, self.in_features)
        self._units[adapter_name] = (codes, codes.data_ptr(), version, units, row_ends)
        return units, row_ends

    def refresh_units(self) -> None:
        """Decode again what was loaded: a compiled graph reads the decoded units without looking at the buffer.

        Raises:
            ValueError: a buffer is damaged.
        """
        for adapter_name, codes in self.sparse_lora_support.items():
            if not codes.is_meta and codes[:4].any():
                self.packed_units(adapter_name)

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
        count = self.packed_units(adapter_name)[0].numel()
        values = values if count == values.shape[0] else values[:count]
        scale = self.sparse_lora_support_scaling[adapter_name]
        return values if scale == 1.0 else values * scale

    def is_undecided(self, adapter_name: str) -> bool:
        """Whether the adapter's support waits for data: the layer computes as its base then, and refuses to train."""
        if adapter_name not in self.sparse_lora_values or not self.sparse_lora_config[adapter_name].data_driven:
            return False
        codes, known = self.sparse_lora_support[adapter_name], self._units.get(adapter_name)
        if torch.compiler.is_compiling() and known is not None:
            return not known[3].numel()
        version = 0 if codes.is_inference() else codes._version
        if known is not None and known[0] is codes and known[1:3] == (codes.data_ptr(), version):
            return not known[3].numel()  # without a look at the device's memory; a decided support has a unit
        return not codes.is_meta and not codes[:4].any()

    @torch.no_grad()
    def resize_support(self, adapter_name: str, count: int) -> None:
        """Make room for `count` units, all of value zero and undecided, in the same parameter; 0 removes the support.

        For sizes that only data or a file know, before an optimizer holds state of the values.

        Raises:
            ValueError: `count` is more than the weight has units.
        """
        grid, values = self.sparse_lora_grid[adapter_name], self.sparse_lora_values[adapter_name]
        if count > grid.num_units:
            raise ValueError(
                f"'{self.module_name}' has {grid.num_units} units of granularity '{grid.granularity}', not {count}."
            )
        self._units.pop(adapter_name, None)
        self.sparse_lora_start[adapter_name] = count
        had_state = any(adapter_name in getattr(self, name) for name in self.training_state_names)
        if had_state:
            self.drop_training_state(adapter_name)
        if count:
            values.data = values.data.new_zeros(grid.values_shape(count))
            values.grad = None
            device = self.sparse_lora_support[adapter_name].device
            codes = torch.zeros(codes_length(grid, count), dtype=torch.uint8, device=device)
            self.sparse_lora_support[adapter_name] = codes
        else:
            del self.sparse_lora_values[adapter_name], self.sparse_lora_support[adapter_name]
        if had_state:
            self.allocate_training_state(adapter_name)

    def _before_training(self, active: list[str]) -> None:
        waiting = [name for name in active if name not in self.sparse_lora_dense_delta]
        for name in waiting:
            if self.is_undecided(name):
                raise ValueError(undecided_message(name, self.sparse_lora_config[name]))
        super()._before_training(waiting)

    def alive_components(self, adapter_name: str) -> int:
        """Living components of the low-rank half."""
        if adapter_name in self.sparse_lora_rank_mask:
            return int(self.sparse_lora_rank_mask[adapter_name].sum())
        return self.sparse_lora_r.get(adapter_name, 0)

    def dead_parameters(self, adapter_name: str) -> int:
        """Numbers that are allocated in the adapter's parameters but belong to no living unit or component."""
        dead = 0
        # On the meta device nothing has been chosen yet, and nothing has died.
        decided = adapter_name in self.sparse_lora_values and not self.is_undecided(adapter_name)
        if decided and not self.sparse_lora_support[adapter_name].is_meta:
            missing = self.sparse_lora_values[adapter_name].shape[0] - self.units(adapter_name).numel()
            dead += missing * self.sparse_lora_grid[adapter_name].unit_numel
        missing = self.sparse_lora_r.get(adapter_name, 0) - self.alive_components(adapter_name)
        return dead + missing * (self.in_features + self.out_features + 1)

    def frozen_parameters(self, adapter_name: str) -> int:
        """Numbers of living units that are marked as frozen: they add to the weight and do not train."""
        if adapter_name not in self.sparse_lora_frozen or self.sparse_lora_frozen[adapter_name].is_meta:
            return 0
        return int(self.sparse_lora_frozen[adapter_name].sum()) * self.sparse_lora_grid[adapter_name].unit_numel

    @torch.no_grad()
    def _add_delta_(self, weight: torch.Tensor, adapter_name: str) -> None:
        if adapter_name in self.sparse_lora_A:
            A, B = merged_factors(self, adapter_name)
            B = B * self.sparse_lora_scaling[adapter_name]
            if adapter_name in self.sparse_lora_gate:
                B = B * self.sparse_lora_gate[adapter_name]
            weight.copy_((weight + B @ A).to(weight.dtype))
        if adapter_name in self.sparse_lora_values:
            units, values = self.units(adapter_name), self.living_values(adapter_name)
            self.sparse_lora_grid[adapter_name].scatter_add_(weight, units, values)


def undecided_message(adapter_name: str, config: SparseLoraConfig) -> str:
    """What to tell a user whose adapter cannot go on without the data that its support is chosen from."""
    start = f"Adapter '{adapter_name}' has criterion='{config.criterion}', and its support has not been chosen yet. "
    if config.criterion == "given":
        return (
            f"{start}Call hf_sparse_peft.load_support(model, path) or hf_sparse_peft.support_from_checkpoints(model, "
            "before, after) first."
        )
    return (
        f"{start}Either call hf_sparse_peft.initialize_support(model, dataloader) first, or let the Trainer do it: "
        "Trainer(..., callbacks=hf_sparse_peft.callbacks_for(model)). Criteria without data: 'random', 'magnitude'."
    )
