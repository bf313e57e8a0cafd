"""The flagship tuner: a support of entries, blocks, rows or columns, beside a low-rank half whose ranks can move."""

from ..shared.registration import add_peft_type, check_peft, count_living_parameters, register_tuner, train_task_heads

check_peft()
add_peft_type("SPARSE_LORA")  # the config class names the member

from .config import SparseLoraConfig  # noqa: E402
from .layer import SparseLoraLayer  # noqa: E402
from .linear import SparseLoraLinear  # noqa: E402
from .model import SparseLoraModel  # noqa: E402
from .structure_config import FactorMaskConfig, StructureConfig  # noqa: E402

register_tuner(SparseLoraConfig, SparseLoraModel)
count_living_parameters()
train_task_heads()

__all__ = [
    "FactorMaskConfig",
    "SparseLoraConfig",
    "SparseLoraLayer",
    "SparseLoraLinear",
    "SparseLoraModel",
    "StructureConfig",
]
