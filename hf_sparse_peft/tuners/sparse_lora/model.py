"""`SparseLoraModel`: injects, saves, checks and combines sparse + low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..shared.file_check import CONFIG_FILE, AdapterFile, tensor_key
from ..shared.model import AdapterModel
from ..shared.pieces import Piece
from ..shared.state_dict import SelectedTensors
from .adapter_file import for_file, support_sizes
from .budget import plan_supports, unit_capacities
from .compaction import compact
from .config import SparseLoraConfig
from .from_pieces import config_of_pieces
from .layer import SparseLoraLayer
from .linear import SparseLoraLinear
from .plan import module_sizes
from .support_state import undecided_message


class SparseLoraModel(AdapterModel):
    r"""Sparse + low-rank adapters, :math:`\Delta W = s\,B\,\mathrm{diag}(g)\,A + S`, on dense and quantised linears.

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

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
        slow = getattr(peft_config.criterion, "is_slow", False)
        slow = self._unit_counts and slow and not self._chosen_units and not peft_config.inference_mode
        total = len(self._unit_counts)
        self._selection_bar = tqdm(total=total, desc="Selecting supports", delay=3) if slow else None

    def planned(self, peft_config: SparseLoraConfig, module_name: str, rows: int, cols: int) -> tuple[Any, Any]:
        """Sizes of the module, and the units that its support starts with where they are chosen already."""
        units, capacity = self._unit_counts.get(module_name, 0), self._capacities.get(module_name, 0)
        sizes = module_sizes(peft_config, module_name, rows, cols, units, capacity)
        return sizes, self._chosen_units.get(module_name)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        super()._create_and_replace(*args, **kwargs)
        if getattr(self, "_selection_bar", None) is not None:
            self._selection_bar.update()
            if self._selection_bar.n == self._selection_bar.total:
                self._selection_bar.close()
                self._selection_bar = None

    # Files

    @classmethod
    def check_file(cls, file: AdapterFile) -> None:
        """Check that the file has all modules that its config gives units.

        Raises:
            ValueError: names the tensor.
        """
        pattern = file.config.support_pattern
        absent = sorted(name for name, count in pattern.items() if count and name not in file.modules)
        if absent:
            raise ValueError(
                f"'{tensor_key(absent[0], 'sparse_lora_values')}' is missing from '{file.path}': support_pattern in "
                f"{CONFIG_FILE} gives '{absent[0]}' {pattern[absent[0]]} units. The file is incomplete."
            )

    @classmethod
    def note_sizes(cls, config, model, adapter_name) -> None:
        """Write the sizes of supports that only a file knew."""
        if config.sizes_from_data:
            config.support_pattern = support_sizes(model, adapter_name)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        for layer in sparse_layers(model):
            if adapter_name in layer.sparse_lora_support:
                if layer.is_undecided(adapter_name):
                    raise ValueError(f"Nothing to save: {undecided_message(adapter_name, config)}")
                layer.units(adapter_name)  # a support that is still to be chosen is chosen now, not saved blank
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return SelectedTensors(for_file(selected, config), config)

    # Adapters together, and at the end

    def config_of_pieces(self, like: SparseLoraConfig, pieces: dict[str, list[Piece]]) -> SparseLoraConfig:
        """Config of an adapter whose update is `pieces`, by module name."""
        return config_of_pieces(like, pieces)

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
