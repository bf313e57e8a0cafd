"""Floor 5: methods by name.

from hf_sparse_peft import methods
m = methods.get("spiel-ag", density=0.01)
model = get_peft_model(base, m.config)
m.trainer_class(model=model, args=args, callbacks=m.callbacks(model), optimizers=(m.optimizer(model, args), None))
"""

from . import chosen, kernel, low_rank, moving, sparse, structured, zeroth_order  # importing enters their methods
from .registry import Method, MethodInfo, aged_adamw, describe, get, markdown_table, names, register

__all__ = [
    "Method",
    "MethodInfo",
    "aged_adamw",
    "chosen",
    "describe",
    "get",
    "kernel",
    "low_rank",
    "markdown_table",
    "moving",
    "names",
    "register",
    "sparse",
    "structured",
    "zeroth_order",
]
