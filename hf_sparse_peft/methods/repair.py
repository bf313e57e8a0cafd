"""Methods that mend or use what pruning did to a base."""

from __future__ import annotations

from typing import Any, Literal

from ..rules import L1Norm
from ..sparsity import Constant, Linear, Staircase, Window
from ..tuners import MaskedLoraConfig
from ..tuners.masked_lora import DenseUpdate, HardMask, LowRankUpdate, MaskAtMerge, NoUpdate, ScaleUpdate
from .registry import Method, register

NORMS = ("norm", "LayerNorm", "ln_1", "ln_2", "ln_f", "layernorm_before", "layernorm_after")
"""What the norms of transformers' models end in: Llama's `input_layernorm` and OPT's `final_layer_norm` in `norm`,
ViT's in the last two."""
_KINDS = {
    "mask_lora": (LowRankUpdate, HardMask),
    "scale_lora": (ScaleUpdate, HardMask),
    "lora_prune": (LowRankUpdate, MaskAtMerge),
    "none": (NoUpdate, HardMask),
}


@register(
    "perp",
    paper="Zimmer et al., 2023",
    moves="nothing",
    use_when="a pruned base lost too much: biases, norms and a masked LoRA retrain it in minutes, and its zeros stay",
    cost="a bit a weight; two dense products a layer more than LoRA's",
)
def perp(
    kind: Literal["mask_lora", "scale_lora", "lora_prune", "none"] = "mask_lora",
    r: int = 16,
    lora_alpha: float = 32,
    biases: bool = True,
    norms: bool = True,
    mask: str = "zeros",
    **overrides: Any,
) -> Method:
    """Biases, norms (`modules_to_save`) and all linear layers, which are adapted by `kind`: MaskLoRA, ScaleLoRA
    (weights times `B A`), LoRA-Prune, which trains a dense LoRA and masks it when it is merged, so that the loss of
    training is not that of what is merged, or nothing. An output head that is named in `target_modules` beside the
    layers has no zeros, and gets an ordinary LoRA, as published. Train the whole model, or each block to the dense
    one's output (`hf_sparse_peft.pruning.reconstruct`); the authors use AdamW without weight decay, linear decay after
    10 % warm-up, rates of 5e-6 to 5e-4. Biases have no copies: an adapter that trains them is switched off whole by
    loading the base again."""
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {list(_KINDS)}.")
    update, masking = _KINDS[kind]
    options = {
        "r": r, "lora_alpha": lora_alpha, "mask": mask, "update": update(), "masking": masking(),
        "bias": "all" if biases else "none", "modules_to_save": list(NORMS) if norms else None,
        "target_modules": "all-linear",
    }  # fmt: skip
    return Method(MaskedLoraConfig(**{**options, **overrides}))


@register(
    "spdf",
    paper="Thangarasa et al., 2023",
    moves="nothing",
    use_when="a model is trained sparse, at a random mask that stays, and fine-tuned dense",
    cost="a dense fp32 delta of every adapted matrix, and its optimizer state",
)
def spdf(phase: Literal["dense", "sparse"] = "dense", norms: bool = True, **overrides: Any) -> Method:
    """SPDF on a base that `prune_model(model, method="random", sparsity=0.75)` cut, the same fraction of every layer:
    `phase="sparse"` trains what is left and keeps the mask; merged, `phase="dense"` trains all entries, those that
    were removed from exactly 0, with fresh optimizer state. Biases and norms train along; name embeddings and the
    output head in `modules_to_save` to train them too, as in pre-training."""
    if phase not in ("dense", "sparse"):
        raise ValueError(f"phase={phase!r} is unknown; choose 'sparse', then 'dense'.")
    options = {
        "update": DenseUpdate(), "mask": "all" if phase == "dense" else "zeros", "bias": "all",
        "modules_to_save": list(NORMS) if norms else None, "target_modules": "all-linear",
    }  # fmt: skip
    return Method(MaskedLoraConfig(**{**options, **overrides}))


@register(
    "unlearn-sparse",
    paper="Jia et al., 2023",
    moves="nothing",
    use_when="a model is to forget examples: with many of its weights at 0 fine-tuning on the others forgets more",
    cost="a dense fp32 delta of every adapted matrix, and its optimizer state; l1: the weights' signs at each step",
)
def unlearn_sparse(
    kind: Literal["prune_first", "l1"] = "prune_first",
    alpha: float = 5e-4,
    epochs: int = 10,
    penalty_free_epochs: int = 0,
    constant: bool = False,
    of: Literal["weights", "update"] = "weights",
    norms: bool = True,
    **overrides: Any,
) -> Method:
    r"""`kind="prune_first"`: on a base that was pruned with little regard to what is to be forgotten,
    `prune_globally(model, 0.95)`, all that it keeps trains under its mask. Which unlearning that is, the data and the
    loss say: fine-tuning on what is retained, or gradient ascent on what is to be forgotten. `kind="l1"`: fine-tuning
    on what is retained, of all weights, biases and norms, with :math:`\gamma_e \|\theta\|_1`,
    :math:`\gamma_e = \alpha (1 - e / (E - E_0))` in epoch e of `epochs`, 0 in the last `penalty_free_epochs`
    :math:`E_0` (`alpha` for models of the size of a ResNet-18: choose it by yours). Where both are as many, the
    released code takes :math:`\alpha` throughout on CIFAR and 0 on ImageNet; say `constant=True` for the first.
    `of="update"` pulls what the adapter changes instead, so that few weights move. The authors train with SGD, 10
    epochs at 0.01. `update="low_rank"` trains a LoRA's numbers."""
    if kind not in ("prune_first", "l1"):
        raise ValueError(f"kind={kind!r} is unknown; choose 'prune_first' or 'l1'.")
    options = {
        "update": DenseUpdate(), "mask": "zeros" if kind == "prune_first" else "all", "bias": "all",
        "modules_to_save": list(NORMS) if norms else None, "target_modules": "all-linear",
    }  # fmt: skip
    if kind == "l1":
        options["schedule"] = [L1Norm(_decaying(alpha, epochs, penalty_free_epochs, constant), of)]
    return Method(MaskedLoraConfig(**{**options, **overrides}))


def _decaying(alpha: float, epochs: int, free: int, constant: bool) -> Constant | Staircase:
    if constant:
        return Constant(alpha)
    if not 0 <= free < epochs:
        raise ValueError(
            f"penalty_free_epochs={free} leaves none of {epochs} epochs with a penalty. Lower it, or say constant=True "
            "for the same alpha in all of them."
        )
    decay = Linear(alpha, 0.0)
    return Staircase(Window(decay, 0.0, (epochs - free) / epochs) if free else decay, epochs)
