"""Methods that replace a base's weights by other forms than two factors: rows and columns, codes, sparse parts."""

from __future__ import annotations

from typing import Any

from ..rules import Allocate, BitPenalty, SampleVectors, Windowed
from ..sparsity import Fraction
from ..sparsity.cur import Greedy
from ..tuners import FactoredConfig
from ..tuners.factored import CUR, ChannelBits, Codebooks, DenseSparse, LowRankSparse, ParameterRatio, Spectral
from .registry import Method, register


def _formed(overrides: dict[str, Any], **options: Any) -> Method:
    return Method(FactoredConfig(**{"target_modules": "all-linear", **options, **overrides}))


@register(
    "curing",
    paper="Park and Moon, 2025 (CURing)",
    moves="nothing",
    use_when="a base is to be compressed within minutes, by its own rows and columns, and healed by few numbers",
    cost="a forward pass over the examples and an SVD a layer; files hold rows and columns",
    claim="Llama-3.1 8B loses 9 % of its numbers in 129 seconds (abstract)",
)
def curing(max_rank: int = 256, greedy: Greedy = "deim", examples: int = 128, **overrides: Any) -> Method:
    """CURing: query, key and gate projections become C (U + dU) R with columns and rows chosen as Wanda weighs them,
    and dU trains. `CUR(greedy="one_row", trained="core")` is the released code.

    The authors compress 10 blocks, never the first or the last: those whose output, at the last token, has the smallest
    angle to their input (`pruning.block_angles`). They heal by distillation from the dense base, which is kept for it:
    `schedule=[DistilFeatures(1.0)], keep_base=True`.
    """
    form = CUR(max_rank=max_rank, greedy=greedy, examples=examples)
    return _formed(overrides, form=form, target_modules=["q_proj", "k_proj", "gate_proj"])


@register(
    "dsformer",
    paper="Chand et al., 2023 (DSFormer)",
    moves="which coefficients of a row are used, at every step",
    use_when="a base is to be compressed further than low rank goes, and all of it is tuned",
    cost="matching pursuits at the start, minutes a layer; while it trains all coefficients are there",
    claim="BERT at a 2.8th of its size within a point; up to 40 % better than low rank (abstract)",
)
def dsformer(ratio: float = 0.36, nonzeros: float = 0.25, blocks: int = 1, **overrides: Any) -> Method:
    """DSFormer: weights become a dense dictionary times sparse coefficients, `nonzeros` of which each row uses, with
    the straight-through factorizer. There is no public code: see `DenseSparse` for what is our reading. 2.8 times fewer
    numbers than the weight (2 and 3.57 are the paper's other points)."""
    return _formed(overrides, form=DenseSparse(nonzeros=nonzeros, blocks=blocks), rank=ParameterRatio(ratio))


@register(
    "losparse",
    paper="Li et al., 2023 (LoSparse)",
    moves="rows of the sparse part leave, and may return until the end",
    use_when="a base is tuned whole and is to end as low rank + a few rows",
    cost="all of the targets' weights train, in fp32, with two more averages of their size",
    claim="DeBERTaV3-base at 20 % of its numbers: 84.5/83.8 on MNLI (90.5/90.6 whole)",
)
def losparse(
    low_rank: float = 0.05,
    sparse: float = 0.15,
    window: int = 10,
    initial_warmup: float = 0.055,
    final_warmup: float = 0.275,
    **overrides: Any,
) -> Method:
    """LoSparse: W = B A + S, exact at the start; rows of S leave by their importance over all weights, on a cubic
    curve, until `sparse` of them are left, beside `low_rank` of the weight's numbers in A and B. `window` is the steps
    of an average of importance and between two comparisons; the warm-ups are those of the MNLI script, as fractions.

    The authors train biases and everything else of the model too (`bias="factored_only"`, `modules_to_save`), at 9e-5
    for MNLI. In the code, every step of the final phase compares anew; here every `window`-th, as scores change only
    then.
    """
    rule = Allocate(
        spaces=("row",), budget=Fraction(sparse), score=Windowed(steps=window), unit_score="mean", every=window,
        initial_warmup=initial_warmup, final_warmup=final_warmup, fixed_at_end=False, count_from=0,
    )  # fmt: skip
    return _formed(overrides, form=LowRankSparse(low_rank), schedule=[rule])


@register(
    "self-compression",
    paper="Csefalvay and Imber, 2023 (Self-Compressing Neural Networks)",
    moves="the bits of each output channel, a real number that trains; at 0 bits the channel is gone",
    use_when="a base is tuned whole and is to end as integers of as few bits as its channels need, some of none",
    cost="the targets' weights train, in fp32, with two more averages of their size, and are rounded in each pass",
    claim="the accuracy of floating point with 3 % of the bits and 18 % of the weights (abstract)",
)
def self_compression(bits: int = 8, weight: float = 0.015, rate: float = 100.0, **overrides: Any) -> Method:
    """Self-compression: weights train through a quantiser whose bit depth and exponent of each output channel train
    too, under a price of `weight` on the mean bit depth. `model.base_model.pack_channels()` then packs the integers.

    The paper trains from scratch; here channels of a trained base start at `bits` and their largest weight, and bit
    depths and exponents train at `rate` times the learning rate, which for a trained base is too low to move them (1 is
    the paper's). Removed channels keep their bias and their place: nothing is sliced."""
    return _formed(overrides, form=ChannelBits(bits=bits), schedule=[BitPenalty(weight, rate)])


@register(
    "sketchtune",
    paper="Zhang et al., 2025 (SketchTune)",
    moves="nothing",
    use_when="a base is to take 4 bits a weight and be tuned without a second path through each layer",
    cost="a forward pass over the examples and k-means of each row at the start; a dense gradient a layer",
    claim="Llama-3 8B: 86.6 on commonsense (LoRA 82.5) over a base of 5.92 GB instead of 16.06",
)
def sketchtune(groups: int = 4, bits: int = 4, examples: int = 128, **overrides: Any) -> Method:
    """SketchTune: each row is cut into `groups`, each of which has 2^`bits` values that its weights are codes into;
    values train. It takes the place of NF4. The authors publish sketched models; here the sketch is k-means weighted by
    the inputs' mean squares, for models of any kind. They train with AdamW without decay, 3e-5 (Llama 3) to 8e-5,
    linear with 100 warm-up steps."""
    return _formed(overrides, form=Codebooks(groups=groups, bits=bits, examples=examples))


@register(
    "sst",
    paper="Zhao et al., 2024 (Sparse Spectral Training)",
    moves="which singular vectors train, every few hundred steps",
    use_when="all directions of a weight are to be trained, with the optimizer state of a few",
    cost="twice the weight in fp32, and an SVD of each at every round",
    claim="LLaMA-1.3B: 97.4 % of the gap between other low-rank methods and full rank closed at 18.7 % of the numbers",
)
def sst(r: int = 64, every: int = 200, floor: float = 0.5, **overrides: Any) -> Method:
    """Sparse Spectral Training: weights are held as their SVD; all singular values train, and r vectors that are drawn
    anew every `every` steps, with the enhanced gradient. Published for pre-training. Merge at the end."""
    return _formed(overrides, form=Spectral(r, floor), schedule=[SampleVectors(every=every)])
