"""Kernel adapters: an update of high rank from two small point sets, thinned by competition (SNELL, SNELLA)."""

from ..shared.registration import add_peft_type, check_peft, register_tuner

check_peft()
add_peft_type("KERNEL_LORA")  # the config class names the member

from .config import BudgetCompetitionConfig, KernelLoraConfig  # noqa: E402
from .layer import KernelLoraLayer, KernelLoraLinear  # noqa: E402
from .model import KernelLoraModel, kernel_layers  # noqa: E402

register_tuner("kernel_lora", KernelLoraConfig, KernelLoraModel)

__all__ = [
    "BudgetCompetitionConfig",
    "KernelLoraConfig",
    "KernelLoraLayer",
    "KernelLoraLinear",
    "KernelLoraModel",
    "kernel_layers",
]
