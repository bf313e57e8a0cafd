"""`KernelLoraModel`: injects and checks kernel adapters."""

from __future__ import annotations

from torch import nn

from ..shared.file_check import AdapterFile
from ..shared.model import AdapterModel
from ..shared.state_dict import SOURCE, check_layer
from .file_check import check_kernel_module, check_survivors
from .layer import KernelLoraLayer, KernelLoraLinear


class KernelLoraModel(AdapterModel):
    r"""Kernel adapters, :math:`\Delta W = \mathrm{compete}(K(P, Q))`, on dense and quantised linears (Shen et al., 2024
    and 2025).

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    tuner_layer_cls = KernelLoraLayer
    linear_cls = KernelLoraLinear

    @classmethod
    def check_file(cls, file: AdapterFile) -> None:
        """Check the tensors of every module of a file against its config.

        Raises:
            ValueError: names the tensor.
        """
        for name, held in sorted(file.modules.items()):
            check_kernel_module(name, held, file.config, file.path)

    @classmethod
    def check_loaded_layer(cls, state_dict, prefix, layer, config, adapter_name) -> None:
        """Check the file's tensors of one layer against it."""
        found = check_layer(state_dict, prefix, layer, adapter_name)
        if "kernel_lora_survivors" in found:
            key = f"{prefix}kernel_lora_survivors.{adapter_name}"
            check_survivors(found["kernel_lora_survivors"], layer.numel, key, SOURCE)

    def compact(self, adapter_name: str | None = None) -> None:
        """Free what only training needs and note in the config that it is over. Parameters keep their shapes."""
        for name in [adapter_name] if adapter_name else self.active_adapters:
            for layer in self.adapted_layers():
                layer.drop_training_state(name)
            self.peft_config[name].training_finished = True


def kernel_layers(model: nn.Module) -> list[KernelLoraLayer]:
    """All layers of `model` with a kernel adapter, in model order."""
    return [module for module in model.modules() if isinstance(module, KernelLoraLayer)]
