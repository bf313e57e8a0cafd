"""Floor 7: methods by name.

from hf_sparse_peft import methods
m = methods.get("spiel-ag", density=0.01)
model = get_peft_model(base, m.config)
m.trainer_class(model=model, args=args, callbacks=m.callbacks(model), optimizers=(m.optimizer(model, args), None))
"""

from ..pruning.reading.one_shot import one_shot_pruned
from ..pruning.removal.sparsity_curve import EssentialSparsity, essential_sparsity
from . import (
    blocks,
    compressed_bases,
    default,
    kernel,
    low_rank,
    low_rank_bases,
    masks,
    modules,
    pruned_bases,
    repair,
    rotations,
    sparse_fixed,
    sparse_low_rank,
    sparse_moving,
    sparsifying,
    structured,
    structured_forms,
    tiny_core,
    trained_masks,
    upstream,
    whole_weights,
    zeroth_order,
)
from .functions import FUNCTIONS, FunctionInfo, functions_markdown, functions_table
from .registry import (
    Method,
    MethodInfo,
    claims_table,
    describe,
    get,
    markdown_table,
    names,
    register,
)
from .whole_weights import WholeMethod, WholeMethodInfo, whole, whole_names, whole_table

__all__ = [
    "FUNCTIONS",
    "EssentialSparsity",
    "FunctionInfo",
    "Method",
    "MethodInfo",
    "WholeMethod",
    "WholeMethodInfo",
    "blocks",
    "claims_table",
    "compressed_bases",
    "default",
    "describe",
    "essential_sparsity",
    "functions_markdown",
    "functions_table",
    "get",
    "kernel",
    "low_rank",
    "low_rank_bases",
    "markdown_table",
    "masks",
    "modules",
    "names",
    "one_shot_pruned",
    "pruned_bases",
    "register",
    "repair",
    "rotations",
    "sparse_fixed",
    "sparse_low_rank",
    "sparse_moving",
    "sparsifying",
    "structured",
    "structured_forms",
    "tiny_core",
    "trained_masks",
    "upstream",
    "whole",
    "whole_names",
    "whole_table",
    "whole_weights",
    "zeroth_order",
]
