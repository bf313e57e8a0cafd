r"""State of one adapted layer: :math:`\Delta W = s\,B\,\mathrm{diag}(g)\,A + S`, allocated once, never reshaped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from ...rules import UnitSpace
from ...sparsity import UnitGrid
from ..shared.pieces import Entries, LowRank, Piece
from .config import SparseLoraConfig
from .factors import allocate_factors, merged_factors
from .spaces import spaces_of
from .support_state import SupportState, undecided_message


class SparseLoraLayer(SupportState):
    """What every adapted layer holds per adapter, keyed by adapter name.

    Parameters (trained): `values` (see `UnitGrid.values_shape`), `A` `[r, in]`, `B` `[out, r]`, `gate` `[r]` (only with
    `rank_allocation`), fp32 masters. Buffers (saved): `support` uint8, the gap-coded units; `rank_mask` uint8 `[r]`,
    the living components; with `factor_masks` the maps of A and B (`factors.py`); and, while a schedule runs, what its
    callback must find again after a resume.
    """

    prefix: str = "sparse_lora_"
    adapter_layer_names: tuple[str, ...] = ("sparse_lora_values", "sparse_lora_A", "sparse_lora_B", "sparse_lora_gate")
    training_state_names: tuple[str, ...] = (
        "sparse_lora_sensitivity",
        "sparse_lora_uncertainty",
        "sparse_lora_candidates",
        "sparse_lora_candidate_sums",
        "sparse_lora_candidate_steps",
        "sparse_lora_frozen",
        "sparse_lora_entered",
        "sparse_lora_fired",
    )
    unit_state_names: tuple[str, ...] = ("sparse_lora_frozen", "sparse_lora_entered")
    """Training state with one number a unit, in the order of the values: it moves with them."""
    factor_map_names: tuple[str, ...] = ("sparse_lora_A_map", "sparse_lora_B_map", "sparse_lora_A_start")
    copied_state_names: tuple[str, ...] = (
        "sparse_lora_support",
        "sparse_lora_rank_mask",
        *factor_map_names,
        "sparse_lora_grid",
        "sparse_lora_start",
        "sparse_lora_r",
        "sparse_lora_scaling",
        "sparse_lora_support_scaling",
    )
    kept_together = (
        (("sparse_lora_values",), ("sparse_lora_support",)),
        (("sparse_lora_A", "sparse_lora_B", "sparse_lora_gate"), ("sparse_lora_rank_mask", *factor_map_names)),
    )
    saved_names: tuple[str, ...] = (
        *adapter_layer_names,
        "sparse_lora_support",
        "sparse_lora_rank_mask",
        *factor_map_names,
    )
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

    def allocate_training_state(self, adapter_name: str) -> None:
        """Allocate, at fixed shapes, what the schedules of this adapter keep between steps and across a resume."""
        super().allocate_training_state(adapter_name)
        config = self.sparse_lora_config[adapter_name]
        if config.rank_allocation and adapter_name in self.sparse_lora_gate:
            size = self.sparse_lora_r[adapter_name] * (self.in_features + self.out_features + 1)
            self._add_state("sparse_lora_sensitivity", adapter_name, torch.zeros(size))
            self._add_state("sparse_lora_uncertainty", adapter_name, torch.zeros(size))
        if adapter_name in self.sparse_lora_values:
            self._allocate_unit_state(adapter_name, config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter from this layer, decoded units included."""
        self._units.pop(adapter_name, None)
        self.sparse_lora_dense_delta.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def forget_decoded(self, adapter_name: str) -> None:
        """Forget the decoded units of this adapter, whose buffer has been replaced."""
        self._units.pop(adapter_name, None)

    def unit_spaces(self, adapter_name: str) -> list[UnitSpace]:
        """The support, the components of the low-rank half, and the module itself."""
        return [*spaces_of(self, adapter_name), *super().unit_spaces(adapter_name)]

    def add_gradient_reader(self, adapter_name: str, reader: Callable[[torch.Tensor], None]) -> None:
        """Show `reader` the weight's dense gradient `[out, in]` in every backward pass until it is removed."""
        self.sparse_lora_sink[adapter_name] = reader

    def remove_gradient_reader(self, adapter_name: str, reader: Callable[[torch.Tensor], None]) -> None:
        """Show it no more."""
        if self.sparse_lora_sink.get(adapter_name) is reader:
            del self.sparse_lora_sink[adapter_name]

    # What is held

    @property
    def adapter_configs(self) -> dict[str, SparseLoraConfig]:
        """Config of each adapter of this layer, one object for all of its layers."""
        return self.sparse_lora_config

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has a part of that adapter."""
        return adapter_name in self.sparse_lora_values or adapter_name in self.sparse_lora_A

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
    def pieces(self, adapter_name: str) -> list[Piece]:
        r"""The low-rank half :math:`s\,B\,\mathrm{diag}(g)\,A`, merged factors, then the support, as far as the layer
        has them."""
        found: list[Piece] = []
        if adapter_name in self.sparse_lora_A:
            A, B = merged_factors(self, adapter_name)
            found.append(LowRank(B, A, self.sparse_lora_gate.get(adapter_name), self.sparse_lora_scaling[adapter_name]))
        if adapter_name in self.sparse_lora_values:
            units, values = self.units(adapter_name), self.living_values(adapter_name)
            found.append(Entries(units, values, self.sparse_lora_grid[adapter_name]))
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
