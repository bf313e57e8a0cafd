"""What a tuner model does with the units of its adapters: counts those that train, drops those that died."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .config import AdapterConfig
from .counts import layer_counts
from .tensors import AdapterTensors


class ModelUnits:
    """The part of `AdapterModel` that counts living units and compacts; beside `BaseTuner`, before it."""

    def compact(self, adapter_name: str | None = None, **options: Any) -> None:
        """Shrink adapters (default: the active ones) to their living units, in place, and write their sizes and the end
        of training into their configs.

        Values and outputs stay what they were. `options` go to the layers (`AdapterTensors.compact`). Optimizer state
        no longer fits the parameters: call this when training is over.

        Raises:
            ValueError: the adapter is merged, or its units are still to be chosen from data.
        """
        for name in [adapter_name] if adapter_name else self.active_adapters:
            config = self.peft_config[name]
            layers = [layer for layer in self.adapted_layers() if name in layer.adapter_configs]
            merged = [layer.module_name for layer in layers if name in layer.merged_adapters]
            if merged:
                raise ValueError(f"Adapter '{name}' is merged (e.g. into '{merged[0]}'); call unmerge_adapter() first.")
            for layer in layers:
                layer.choose_units(name, "compact")
            for layer in layers:
                layer.compact(name, **options)
            config.training_finished = True
            self.note_sizes(config, self.model, name)

    @classmethod
    def note_sizes(cls, config: AdapterConfig, model: nn.Module, adapter_name: str) -> None:
        """Write the sizes of the adapter's layers into its config: compaction or a file has changed them."""

    def dead_parameters(self) -> int:
        """Numbers of parameters that train and belong to no living unit."""
        counts = [layer_counts(layer, name) for layer, name in self._training()]
        return sum(count.allocated - count.living for count in counts)

    def frozen_parameters(self) -> int:
        """Numbers of living units that are frozen, in adapters that train."""
        return sum(layer_counts(layer, name).frozen for layer, name in self._training())

    def _training(self) -> Iterator[tuple[AdapterTensors, str]]:
        """Layers and adapters that train. On the meta device and before data decides, nothing has died."""
        for layer in self.adapted_layers():
            for name in layer.adapter_configs:
                parameters = layer.trained_parameters(name)
                away = any(tensor.is_meta for tensor in layer.tensors(name).values())
                if any(p.requires_grad for p in parameters) and not away and not layer.awaits_calibration(name):
                    yield layer, name
