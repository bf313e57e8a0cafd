"""Adapters of a structure other than a plain low rank: products of structured matrices, maps, modules behind layers."""

from __future__ import annotations

from typing import Any, Literal

from ..rules import BalanceLoss
from ..tuners import StructuredConfig
from ..tuners.structured import (
    PHM,
    Bottleneck,
    Circulant,
    DenseMatrix,
    FactorPair,
    Form,
    Hypernetwork,
    Kronecker,
    LowDisplacement,
    LowRankExperts,
    MatrixProductExperts,
    Quantised,
    ScaleExperts,
    ScaleShift,
    TensorTrain,
    Toeplitz,
    Tucker,
)
from .registry import Method, register
from .repair import NORMS

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SUB_LAYERS = ("o_proj", "down_proj")
"""The last linears of attention and FFN, as Llama names them; BERT: "attention.output.dense", "output.dense", T5: "o",
"wo", GPT-2: "c_proj"."""


def _row(overrides: dict[str, Any], form: Form, targets: Any = None, norms: bool = False) -> Method:
    options = {"form": form, "target_modules": list(targets) if isinstance(targets, tuple) else targets}
    if norms:
        options["modules_to_save"] = list(NORMS)
    return Method(StructuredConfig(**{**options, **overrides}))


@register(
    "diffusekrona",
    paper="Marjit et al., 2025",
    moves="nothing",
    use_when="a product of high rank of few numbers, in attention",
    cost="two small products a layer",
    keeps_places=True,
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
def ssf(std: float = 0.02, shift: bool = True, norms: bool = True, **overrides: Any) -> Method:
    r"""SSF: a scale, drawn from N(1, std^2), and a shift, from N(0, std^2), of every output of all linears. The paper
    has them behind norms too, where they come to trained norms (`norms`, as `modules_to_save`), and behind
    convolutions, which are not adapted here (ViT-B: 204,288 numbers of 205,824). Weights of the merged model have
    biases; where the architecture has none, `shift=False` keeps them away. The authors train ViT-B with AdamW at 1e-3
    and decay 0.05, which a Trainer keeps off scales and shifts, and evaluate an average of the weights.
    """
    return _row(overrides, ScaleShift(std, shift), "all-linear", norms)


@register(
    "houlsby",
    paper="Houlsby et al., 2019",
    moves="nothing",
    use_when="adapters as modules behind layers, for what they are known for or to compare with",
    cost="two small products behind two layers of each block; cannot be merged",
    keeps_places=True,
)
def houlsby(size: int = 64, activation: str = "gelu", norms: bool = True, **overrides: Any) -> Method:
    """Bottleneck adapters behind the last linears of attention and FFN, as Llama names them (`target_modules` for
    others), both matrices drawn from N(0, 1e-6) cut at two standard deviations; norms train along. The authors sweep
    sizes 8, 64, 256 and rates 3e-5 to 3e-3 on BERT."""
    form = Bottleneck(size, activation=activation, matrix=DenseMatrix("truncated", 1e-3))
    return _row(overrides, form, SUB_LAYERS, norms)


@register(
    "compacter",
    paper="Karimi Mahabadi et al., 2021",
    moves="nothing",
    use_when="adapters behind layers at a few hundred numbers each",
    cost="as houlsby's, over three small products instead of one; cannot be merged",
    keeps_places=True,
)
def compacter(n: int = 4, reduction: int = 32, rank: int = 1, norms: bool = True, **overrides: Any) -> Method:
    """Compacter: bottlenecks of width out / `reduction` behind the last linears of attention and FFN (Llama's names;
    `target_modules` for others), whose matrices are sums of n Kronecker products of small matrices that all of them
    share and low ranks of their own; norms train along, as in the published counts. The authors train T5-base at 3e-3.
    `n` divides all widths."""
    form = Bottleneck(None, reduction, "gelu_new", PHM(n, rank))
    return _row(overrides, form, SUB_LAYERS, norms)


@register(
    "compacter++",
    paper="Karimi Mahabadi et al., 2021",
    moves="nothing",
    use_when="Compacter behind FFNs alone, with half of its numbers",
    cost="half of Compacter's",
    keeps_places=True,
)
def compacter_plus_plus(**options: Any) -> Method:
    """Compacter++: Compacter behind the FFN's last linear only (Llama's `down_proj`)."""
    return compacter(**{"target_modules": ["down_proj"], **options})


@register(
    "loretta-adp",
    paper="Yang et al., 2024",
    moves="nothing",
    use_when="adapters behind layers at a thousand numbers each",
    cost="each pass contracts the chains to whole matrices, beside houlsby's products; cannot be merged",
    keeps_places=True,
)
def loretta_adp(size: int = 64, rank: int = 5, norms: bool = True, **overrides: Any) -> Method:
    """LoRETTA's adapters: bottlenecks with a ReLU whose matrices are tensor trains, behind the last linears of
    attention and FFN (Llama's names; `target_modules` for others); norms train along. The paper's classifier, a tensor
    train as well, is the model's own here."""
    return _row(overrides, Bottleneck(size, activation="relu", matrix=TensorTrain(rank)), SUB_LAYERS, norms)


@register(
    "loretta-rep",
    paper="Yang et al., 2024",
    moves="nothing",
    use_when="a LoRA of about a tenth of its numbers, that leaves as a LoRA",
    cost="each pass contracts the chains to LoRA's factors",
    keeps_places=True,
)
def loretta_rep(
    r: int = 8, lora_alpha: float = 16, rank: int = 5, zero_last: bool = False, norms: bool = True, **overrides: Any
) -> Method:
    """LoRETTA's reparametrisation: a LoRA whose A and B are tensor trains of rank `rank`. Neither starts at 0, as
    published, so that the model is not the base's at the start; `zero_last` deviates from that. Norms train along."""
    return _row(overrides, FactorPair(r, lora_alpha, TensorTrain(rank, zero_last=zero_last)), norms=norms)


@register(
    "flora",
    paper="Si et al., 2024",
    moves="nothing",
    use_when="a core whose two sides have ranks of their own",
    cost="a LoRA's, and a small product",
)
def flora(r_in: int = 8, r_out: int = 8, scale: float = 1.0, dropout: float = 0.0, **overrides: Any) -> Method:
    """FLoRA: a Tucker decomposition of the update, for linears a core `[r_in, r_out]` that starts at 0 between two
    trained bases. `scale` is no alpha: no rank divides it. The paper's convolutions are not adapted here."""
    return _row(overrides, Tucker(r_in, r_out, scale, dropout), "all-linear")


@register(
    "surm",
    paper="Sehanobish et al., 2024",
    moves="nothing",
    use_when="updates of full rank at two numbers a row",
    cost="fast Fourier transforms of each input, in fp32",
    keeps_places=True,
)
def surm(structure: str = "circulant", r: int = 8, scale: float = 1.0, **overrides: Any) -> Method:
    """SURM: updates that are a circulant of a product of two vectors, a product of two symmetric Toeplitz matrices, a
    Kronecker product with an `r`-row factor (`scale` is alpha / r), or a sum of `r` products of circulants and
    skew-circulants ("displacement"). The published ones are square; other weights get a part of the square. A trained
    scale, which the code offers and which starts at 0 beside a zero factor, would never train."""
    forms = {
        "circulant": lambda: Circulant(scale=scale),
        "toeplitz": lambda: Toeplitz(scale=scale),
        "kronecker": lambda: Kronecker(r, r, "second", zero="first", init="kaiming", scale=scale),
        "displacement": lambda: LowDisplacement(r, scale=scale),
    }
    if structure not in forms:
        raise ValueError(f"structure={structure!r} is unknown; choose one of {list(forms)}.")
    return _row(overrides, forms[structure]())


@register(
    "1-bit-adapters",
    paper="Jie et al., 2023",
    moves="nothing",
    use_when="files of a bit a number: hundreds of adapters of one base",
    cost="trains fp32 numbers, rounded in every pass; model.base_model.pack() makes the small adapter",
    keeps_places=True,
)
def one_bit_adapters(
    r: int = 32,
    bits: int = 1,
    scale: float = 1.0,
    kind: Literal["lora", "adapter"] = "lora",
    dropout: float = 0.1,
    **overrides: Any,
) -> Method:
    """1-bit adapters: a LoRA on query and value (Bi-LoRA) whose matrices have 2^`bits` values each; or, with
    `kind="adapter"`, bottlenecks of width `r` behind the last linears of attention and FFN (Llama's names), where the
    paper's (Bi-AdaptFormer) read the FFN's input and stand beside it. No matrix starts at 0, which has no deviation.
    The authors train ViT-B with `r` 32 or 1, a `scale` for each task, AdamW at 1e-3 with decay 1e-4 and dropout 0.1."""
    if kind not in ("lora", "adapter"):
        raise ValueError(f"kind={kind!r} is unknown; choose 'lora' or 'adapter'.")
    matrix = Quantised(bits)
    if kind == "lora":
        return _row(overrides, FactorPair(r, scale * r, matrix, inner_dropout=dropout))
    form = Bottleneck(r, activation="relu", matrix=matrix, biases=False, scale=scale, dropout=dropout)
    return _row(overrides, form, SUB_LAYERS)


def _hyperformer(overrides: dict[str, Any], tasks: Any, reduction: int, generators: str, norms: bool) -> Method:
    return _row(overrides, Hypernetwork(tuple(tasks), reduction, generators), SUB_LAYERS, norms)


@register(
    "hyperformer",
    paper="Karimi Mahabadi et al., 2021",
    moves="nothing",
    use_when="many tasks that are to learn from each other; a generator of adapters for attention, one for the FFN",
    cost="as houlsby, and two products of all generated numbers with 64 a module and pass",
    keeps_places=True,
)
def hyperformer(tasks: Any = ("default",), reduction: int = 32, norms: bool = True, **overrides: Any) -> Method:
    """HyperFormer: bottleneck adapters that a shared network makes of embeddings of task and layer, with a generator
    for each position. Batches are of one task each, `TaskMixture`, and the model is told which, `task=`; norms train
    along. The authors train T5 on GLUE at 3e-4, batch 32, 2^16 steps, temperature 10."""
    return _hyperformer(overrides, tasks, reduction, "position", norms)


@register(
    "hyperformer++",
    paper="Karimi Mahabadi et al., 2021",
    moves="nothing",
    use_when="as hyperformer, with half of its numbers",
    cost="as hyperformer",
    keeps_places=True,
)
def hyperformer_plus_plus(
    tasks: Any = ("default",), reduction: int = 32, norms: bool = True, **overrides: Any
) -> Method:
    """HyperFormer++: one generator for attention and FFN, which is told the position by an embedding."""
    return _hyperformer(overrides, tasks, reduction, "shared", norms)


@register(
    "mpoe",
    paper="Gao et al., 2022",
    moves="nothing",
    use_when="feed-forward networks are to become mixtures of experts at a part of a network's numbers each",
    cost="every expert's network is computed for all tokens; a copy of each matrix in fp32, in memory and in the file",
    keeps_places=True,
)
def mpoe(
    experts: int = 4,
    central: Literal["frozen", "trained"] = "frozen",
    central_update_prob: float = 1.0,
    bond: int | None = None,
    **overrides: Any,
) -> Method:
    """MPOE: each feed-forward network becomes a mixture of `experts` copies of itself, whose matrices are products of
    five tensors, the central one in common. The paper trains everything and masks the central tensor's gradient in a
    part of the steps (`central="trained"`, `central_update_prob`, drawn in each pass here); by default the experts'
    own tensors and routers train. Its balance loss is `BalanceLoss(of="first")`. Targets are whole networks, as Llama
    names them (`target_modules` and the form's `last` for others). The number of experts was not confirmed."""
    form = MatrixProductExperts(experts, central=central, central_update_prob=central_update_prob, bond=bond)
    return _row(overrides, form, ("gate_proj", "up_proj", "down_proj"))


@register(
    "molora",
    paper="Zadouri et al., 2024",
    moves="nothing",
    use_when="many tasks in one adapter, each token with its own mixture of LoRAs",
    cost="all experts at every token: a LoRA of experts x r, and a router; cannot be merged",
)
def molora(r: int = 4, experts: int = 10, top_k: int | None = None, **overrides: Any) -> Method:
    """MoLoRA: LoRAs whose outputs are merged softly by a router that reads the layer's input, in attention and MLP. The
    released code's alpha is 16; it trains T5 by Adafactor at a constant 3e-4. `top_k` keeps the largest gates as they
    are."""
    return _row(overrides, LowRankExperts(experts, top_k, r=r), "all-linear")


@register(
    "mov",
    paper="Zadouri et al., 2024",
    moves="nothing",
    use_when="many tasks in one adapter at the numbers of (IA)^3",
    cost="a router and one product of vectors a layer; cannot be merged",
    keeps_places=True,
)
def mov(experts: int = 30, head_size: int | None = None, top_k: int | None = None, **overrides: Any) -> Method:
    """MoV: vectors, merged softly by a router that reads what they scale: the outputs of key and value and the hidden
    activation of the MLP (the input of Llama's `down_proj`, T5's `wo`; `form` for other names). In the released code
    one router is shared by all heads of a layer, which `head_size`, the model's size of a head, comes to. Adafactor at
    a constant 3e-4."""
    return _row(overrides, ScaleExperts(experts, top_k, head_size=head_size), ("k_proj", "v_proj", "down_proj"))


@register(
    "sira",
    paper="Zhu et al., 2023",
    moves="nothing",
    use_when="a sparse mixture: a few LoRAs of many at each token, none with too many tokens",
    cost="all experts are computed at every token: a LoRA of experts x r, and a router; cannot be merged",
)
def sira(
    r: int = 4,
    experts: int = 16,
    top_k: int = 4,
    capacity: float | None = 1.25,
    expert_dropout: float = 0.1,
    balance: float = 0.01,
    **overrides: Any,
) -> Method:
    """SiRA: the `top_k` LoRAs of the largest router probabilities, not renormalised, each with room for `capacity`
    times an even share of a forward pass's tokens; dropout of probabilities before the choice; Switch's balance loss.
    No code was released, and of the paper r, E and k are known here: capacity, dropout and the weight of the balance
    are usual values, the scale of updates is 1."""
    form = LowRankExperts(experts, top_k, capacity=capacity, expert_dropout=expert_dropout, r=r, lora_alpha=float(r))
    return _row({"schedule": [BalanceLoss(balance)] if balance else [], **overrides}, form, "all-linear")
