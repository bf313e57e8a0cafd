"""`SparseLoraModel`: injects, saves, checks and combines sparse + low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import nn
from tqdm.auto import tqdm

from ..adapter_model import AdapterModel
from .adapter_file import for_file, from_file
from .budget import plan_supports, unit_capacities
from .combination import add_weighted_adapter
from .compaction import compact
from .config import SparseLoraConfig
from .layer import SparseLoraLayer
from .linear import SparseLoraLinear
from .support_state import undecided_message


class SparseLoraModel(AdapterModel):
    r"""Sparse + low-rank adapters, :math:`\Delta W = s\,B\,\mathrm{diag}(g)\,A + S`, on dense and quantised linears.

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    prefix: str = "sparse_lora_"
    tuner_layer_cls = SparseLoraLayer
    linear_cls = SparseLoraLinear
    _selection_bar: tqdm | None = None
    _unit_counts: dict[str, int]
    _chosen_units: dict[str, torch.Tensor]
    _capacities: dict[str, int]

    def _prepare_model(self, peft_config: SparseLoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        self._unit_counts, self._chosen_units = plan_supports(peft_config, model, self._is_target)
        self._capacities = unit_capacities(peft_config, self._unit_counts, model, self._is_target)
        slow = peft_config.criterion in ("low_rank_magnitude", "decomposition_residual")
        slow = self._unit_counts and slow and not self._chosen_units and not peft_config.inference_mode
        total = len(self._unit_counts)
        self._selection_bar = tqdm(total=total, desc="Selecting supports", delay=3) if slow else None

    def layer_options(self, peft_config: SparseLoraConfig, module_name: str) -> dict[str, Any]:
        """What `update_layer` takes for that module."""
        rank_key = get_pattern_key(peft_config.rank_pattern.keys(), module_name)
        alpha_key = get_pattern_key(peft_config.alpha_pattern.keys(), module_name)
        return {
            "config": peft_config,
            "r": peft_config.rank_pattern.get(rank_key, peft_config.r),
            "lora_alpha": peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha),
            "num_units": self._unit_counts.get(module_name, 0),
            "capacity": self._capacities.get(module_name, 0),
            "units": self._chosen_units.get(module_name),
            "inference_mode": peft_config.inference_mode,
        }

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        super()._create_and_replace(*args, **kwargs)
        if getattr(self, "_selection_bar", None) is not None:
            self._selection_bar.update()
            if self._selection_bar.n == self._selection_bar.total:
                self._selection_bar.close()
                self._selection_bar = None

    # Files

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        for layer in sparse_layers(model):
            if adapter_name in layer.sparse_lora_support:
                if layer.is_undecided(adapter_name):
                    raise ValueError(f"Nothing to save: {undecided_message(adapter_name, config)}")
                layer.units(adapter_name)  # a support that is still to be chosen is chosen now, not saved blank
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return for_file(selected, config)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return from_file(remapped, model, config, adapter_name)

    # Adapters together, and at the end

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="svd", **options) -> None:
        """Add an adapter that combines others; see `combination.add_weighted_adapter`."""
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, **options)

    def compact(
        self, adapter_name: str | None = None, values_dtype: str | None = None, drop_within: float | None = None
    ) -> None:
        """Drop dead units and components, and on demand tiny changes, for good; see `compaction.compact`."""
        for name in [adapter_name] if adapter_name else self.active_adapters:
            compact(self.model, self.peft_config[name], name, values_dtype, drop_within)

    def dead_parameters(self) -> int:
        """Trainable numbers that belong to no living unit or component."""
        return sum(
            layer.dead_parameters(name)
            for layer in sparse_layers(self.model)
            for name in layer.sparse_lora_config
            if _is_trainable(layer, name)
        )

    def frozen_parameters(self) -> int:
        """Numbers of living units that are frozen, in adapters that train."""
        return sum(
            layer.frozen_parameters(name)
            for layer in sparse_layers(self.model)
            for name in layer.sparse_lora_config
            if _is_trainable(layer, name)
        )


def sparse_layers(model: nn.Module) -> list[SparseLoraLayer]:
    """All adapted layers of `model`, in model order."""
    return [module for module in model.modules() if isinstance(module, SparseLoraLayer)]


def _is_trainable(layer: SparseLoraLayer, adapter_name: str) -> bool:
    held = [getattr(layer, name) for name in layer.adapter_layer_names]
    return any(adapter_name in tensors and tensors[adapter_name].requires_grad for tensors in held)
