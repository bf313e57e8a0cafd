"""Adapters of a structure other than a plain low rank: products of structured matrices, maps, modules behind layers."""

from __future__ import annotations

from typing import Any

from ..tuners import StructuredConfig
from ..tuners.structured import Bottleneck, DenseMatrix, Form, Kronecker, ScaleShift
from .registry import Method, register
from .repair import NORMS

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SUB_LAYERS = ("o_proj", "down_proj")
"""The last linears of attention and FFN, as Llama names them; BERT: "attention.output.dense", "output.dense", T5: "o",
"wo", GPT-2: "c_proj"."""


def _row(overrides: dict[str, Any], form: Form, targets: Any, norms: bool = False) -> Method:
    options = {"form": form, "target_modules": targets if isinstance(targets, str) else list(targets)}
    if norms:
        options["modules_to_save"] = list(NORMS)
    return Method(StructuredConfig(**{**options, **overrides}))


@register(
    "diffusekrona",
    paper="Marjit et al., 2025",
    moves="nothing",
    use_when="a product of high rank of few numbers, in attention",
    cost="two small products a layer",
)
def diffusekrona(rows: int = 64, cols: int = 8, layout: str = "kron", **overrides: Any) -> Method:
    """DiffuseKronA: the Kronecker product of A `[rows, cols]` and B, which starts at 0, on the attention's matrices.
    The released layer has its outputs in another order, `layout="released"`. The authors train SDXL's attention at lr
    1e-3 (1280 -> 1280: 3,712 numbers)."""
    return _row(overrides, Kronecker(rows, cols, layout=layout), ATTENTION)


@register(
    "ssf",
    paper="Lian et al., 2022",
    moves="nothing",
    use_when="two numbers an output of each layer, that vanish into weights and biases",
    cost="a product and a sum an output",
)
def ssf(std: float = 0.02, shift: bool = True, **overrides: Any) -> Method:
    r"""SSF: a scale, drawn from N(1, std^2), and a shift, from N(0, std^2), of every output of all linears. The paper
    has them behind norms and convolutions too, which trained norms (`modules_to_save`) come to. Weights of the merged
    model have biases; where the architecture has none, `shift=False` keeps them away. The authors train ViT-B with
    AdamW at 1e-3 and decay 0.05, which a Trainer keeps off scales and shifts, and evaluate an average of the weights.
    """
    return _row(overrides, ScaleShift(std, shift), "all-linear")


@register(
    "houlsby",
    paper="Houlsby et al., 2019",
    moves="nothing",
    use_when="adapters as modules behind layers, for what they are known for or to compare with",
    cost="two small products behind two layers of each block; cannot be merged",
)
def houlsby(size: int = 64, activation: str = "gelu", norms: bool = True, **overrides: Any) -> Method:
    """Bottleneck adapters behind the last linears of attention and FFN, as Llama names them (`target_modules` for
    others), both matrices drawn from N(0, 1e-6) cut at two standard deviations; norms train along. The authors sweep
    sizes 8, 64, 256 and rates 3e-5 to 3e-3 on BERT."""
    form = Bottleneck(size, activation=activation, matrix=DenseMatrix("truncated", 1e-3))
    return _row(overrides, form, SUB_LAYERS, norms)
