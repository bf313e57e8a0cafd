"""`SparseLoraModel`: injects, saves, checks and combines sparse + low-rank adapters."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn

from ...sparsity import Random
from ..shared.file_check import CONFIG_FILE, AdapterFile, file_being_loaded, tensor_key
from ..shared.layer import adapter_layers
from ..shared.model import AdapterModel, AdapterPlan
from ..shared.pieces import Entries, LowRank, Piece
from ..shared.state_dict import SelectedTensors
from .config import SparseLoraConfig, exact_pattern
from .layer import SparseLoraLayer
from .linear import SparseLoraLinear
from .parameter import SparseLoraParameter
from .plan import note_sizes, plan_adapter, sizes_for_config
from .subnet import ACCUMULATOR


class SparseLoraModel(AdapterModel):
    r"""Sparse + low-rank adapters, :math:`\Delta W = s\,B\,\mathrm{diag}(g)\,A + S`, on dense and quantised linears.

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    tuner_layer_cls = SparseLoraLayer
    linear_cls = SparseLoraLinear
    parameter_cls = SparseLoraParameter

    def plan(self, peft_config: SparseLoraConfig, model: nn.Module, targets: dict[str, Any]) -> AdapterPlan:
        """Sizes of both halves in every module, and the units of supports that are chosen over the model; what a file
        of the adapter has to say of them is written to the config's `sizes`."""
        plan = plan_adapter(peft_config, model, targets)
        if peft_config.start is not None and peft_config.sizes and file_being_loaded() is None:
            self._tell_start_is_over(peft_config)
        peft_config.sizes = sizes_for_config(peft_config, plan.sizes)
        return plan

    def _tell_start_is_over(self, config: SparseLoraConfig) -> None:
        others = (one for one in self.peft_config.values() if one is not config)
        if config.inference_mode or any(getattr(one, "sizes", None) == config.sizes for one in others):
            return  # a copy of an adapter starts as that one is
        warnings.warn(
            f"start={config.start} has been taken already: the config has the sizes that it led to, and the adapter "
            "starts with those, B = 0 and no data. Set sizes={} to read the data anew.",
            stacklevel=2,
        )

    # Files

    @classmethod
    def check_file(cls, file: AdapterFile) -> None:
        """Check that the file has all modules that its config gives units.

        Raises:
            ValueError: names the tensor.
        """
        pattern = {name: units for name, (units, _, _) in file.config.sizes.items()}
        absent = sorted(name for name, count in pattern.items() if count and name not in file.modules)
        if absent:
            raise ValueError(
                f"'{tensor_key(absent[0], 'sparse_lora_values')}' is missing from '{file.path}': sizes in "
                f"{CONFIG_FILE} gives '{absent[0]}' {pattern[absent[0]]} units. The file is incomplete."
            )

    @classmethod
    def note_sizes(cls, config, model, adapter_name) -> None:
        """Write the sizes of both halves into `sizes` and `alpha_pattern`."""
        note_sizes(
            config,
            {
                layer.module_name: layer.sizes[adapter_name]
                for layer in adapter_layers(model, SparseLoraLayer)
                if adapter_name in layer.sizes
            },
        )

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.values_dtype != "float32":
            dtype, trained = getattr(torch, config.values_dtype), cls.tuner_layer_cls.adapter_layer_names
            trained = tuple(f".{name}." for name in (*trained, ACCUMULATOR))
            selected = {key: t.to(dtype) if any(mark in key for mark in trained) else t for key, t in selected.items()}
        return SelectedTensors(selected, config)

    # Adapters together, and at the end

    def config_of_pieces(self, like: SparseLoraConfig, pieces: dict[str, list[Piece]]) -> SparseLoraConfig:
        """Config of an adapter whose update is `pieces`, by module name."""
        return config_of_pieces(like, pieces)

    def compact(
        self, adapter_name: str | None = None, values_dtype: str | None = None, compact_tolerance: float | None = None
    ) -> None:
        """Drop dead units and components for good; see `ModelUnits.compact`.

        Units whose numbers all lie within `compact_tolerance` (None: what the config says) of zero leave too. With
        `values_dtype="bfloat16"` values are rounded to bf16, as the file holds them.

        Raises:
            ValueError: `values_dtype` is not one that a file can hold, the adapter is merged, or its units wait for
                data.
        """
        if values_dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"values_dtype={values_dtype!r} is unknown; choose 'float32' or 'bfloat16'.")
        super().compact(adapter_name, compact_tolerance=compact_tolerance)
        for name in [adapter_name] if adapter_name else self.active_adapters:
            config = self.peft_config[name]
            if config.factor_masks is not None and config.factor_masks.splits:  # the layers have folded the experts
                config.factor_masks = None
                config.schedule = [rule for rule in config.schedule if "experts" not in getattr(rule, "needs", ())]
            if values_dtype is None:
                continue
            config.values_dtype = values_dtype
            for layer in adapter_layers(self.model, SparseLoraLayer):
                for parameter in layer.trained_parameters(name):
                    parameter.data = parameter.data.to(getattr(torch, values_dtype)).to(parameter.dtype)
                if name in layer.sparse_lora_accumulator:
                    kept = layer.sparse_lora_accumulator[name]
                    kept.copy_(kept.to(getattr(torch, values_dtype)))


def config_of_pieces(like: SparseLoraConfig, pieces: dict[str, list[Piece]]) -> SparseLoraConfig:
    """`like` without schedules and with the sizes of `pieces`, at most one `LowRank` and one `Entries` a module."""
    low_rank = {name: next((p for p in found if isinstance(p, LowRank)), None) for name, found in pieces.items()}
    entries = {name: next((p for p in found if isinstance(p, Entries)), None) for name, found in pieces.items()}
    config = copy.deepcopy(like)
    config.schedule, config.factor_masks, config.gate = [], None, None  # masks and gates are folded, like the scaling
    config.subnet_shares, config.accumulator, config.start = None, False, None
    config.structures, config.scale_support, config.support_init = [], False, "zeros"
    config.pattern = None  # supports of several adapters together keep to none
    config.use_rslora = False  # scaling is folded into the factors: alpha = r makes it 1
    config.criterion = Random()
    grids = {name: piece.grid for name, piece in entries.items() if piece is not None}
    kinds = Counter(grid.granularity for grid in grids.values())
    config.granularity = kinds.most_common(1)[0][0] if kinds else "entry"
    config.granularity_pattern = exact_pattern(
        {name: grid.granularity for name, grid in grids.items() if grid.granularity != config.granularity}
    )
    for granularity, option in (("block", "block_size"), ("diagonal", "diagonal_blocks")):
        sizes = {grid.block_size for grid in grids.values() if grid.granularity == granularity}
        setattr(config, option, sizes.pop() if sizes else getattr(config, option))
    ranks = {name: 0 if piece is None else piece.A.shape[0] for name, piece in low_rank.items()}
    units = {name: 0 if piece is None else piece.units.numel() for name, piece in entries.items()}
    config.sizes = {name: [units[name], units[name], ranks[name]] for name in pieces}
    if not any(units.values()):
        config.density, config.budget = 0.0, None
    config.rank_pattern = {}
    config.alpha_pattern = exact_pattern({name: float(max(rank, 1)) for name, rank in ranks.items()})
    config.r = max(ranks.values())
    return config
