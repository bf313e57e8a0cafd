"""Floor 5: tuners, one package each; importing this package registers all of them with peft."""

from .factored import FactoredConfig, FactoredLayer, FactoredModel
from .kernel_lora import KernelLoraConfig, KernelLoraLayer, KernelLoraModel
from .masked_lora import MaskedLoraConfig, MaskedLoraLayer, MaskedLoraModel, save_masks, set_masks
from .shared.layer import AdapterLayer, adapter_layers, restore_fp32
from .shared.live_run import end_runs_with_train
from .shared.loading import guard_loading
from .shared.mixed import serve_mixed_models
from .shared.sparsity_report import SparsityReport, sparsity_report
from .sparse_lora import (
    FactorMaskConfig,
    GradientProjection,
    GradientSplit,
    SparseLoraConfig,
    SparseLoraLayer,
    SparseLoraModel,
    Start,
    StructureConfig,
)
from .spectral_lora import SpectralLoraConfig, SpectralLoraLayer, SpectralLoraModel
from .structured import StructuredConfig, StructuredLayer, StructuredModel

guard_loading()
serve_mixed_models()
end_runs_with_train()

__all__ = [
    "AdapterLayer",
    "FactorMaskConfig",
    "FactoredConfig",
    "FactoredLayer",
    "FactoredModel",
    "GradientProjection",
    "GradientSplit",
    "KernelLoraConfig",
    "KernelLoraLayer",
    "KernelLoraModel",
    "MaskedLoraConfig",
    "MaskedLoraLayer",
    "MaskedLoraModel",
    "SparseLoraConfig",
    "SparseLoraLayer",
    "SparseLoraModel",
    "SparsityReport",
    "SpectralLoraConfig",
    "SpectralLoraLayer",
    "SpectralLoraModel",
    "Start",
    "StructureConfig",
    "StructuredConfig",
    "StructuredLayer",
    "StructuredModel",
    "adapter_layers",
    "restore_fp32",
    "save_masks",
    "set_masks",
    "sparsity_report",
]
