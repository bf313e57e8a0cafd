"""Floor 5: methods by name.

from hf_sparse_peft import methods
m = methods.get("spiel-ag", density=0.01)
model = get_peft_model(base, m.config)
m.trainer_class(model=model, args=args, callbacks=m.callbacks(model), optimizers=(m.optimizer(model, args), None))
"""

from . import (  # importing enters their methods
    chosen,
    house,
    kernel,
    low_rank,
    moving,
    search,
    sparse,
    stochastic,
    structured,
    zeroth_order,
)
from .one_shot import one_shot_pruned
from .pruning_curve import EssentialSparsity, essential_sparsity
from .registry import Method, MethodInfo, aged_adamw, describe, get, markdown_table, names, register

__all__ = [
    "EssentialSparsity",
    "Method",
    "MethodInfo",
    "aged_adamw",
    "chosen",
    "describe",
    "essential_sparsity",
    "get",
    "house",
    "kernel",
    "low_rank",
    "markdown_table",
    "moving",
    "names",
    "one_shot_pruned",
    "register",
    "search",
    "sparse",
    "stochastic",
    "structured",
    "zeroth_order",
]
