"""Methods that replace a base's weights by low-rank forms, and train these."""

from __future__ import annotations

from typing import Any

from ..rules import DistilFeatures, LargestError, TrainedRankPruning
from ..tuners import FactoredConfig
from ..tuners.factored import (
    LargestRankFraction,
    LowRank,
    OutputFeatures,
    ParameterRatio,
    SingularValueThreshold,
    Whole,
)
from .registry import Method, register


def _factored(overrides: dict[str, Any], **options: Any) -> Method:
    return Method(FactoredConfig(**{"target_modules": "all-linear", **options, **overrides}))


@register(
    "welore",
    paper="Jaiswal et al., 2024",
    moves="nothing",
    use_when="a base is to be compressed and tuned at once, with ranks that follow each weight's spectrum",
    cost="two SVDs of each target at the start; files hold the factors",
    claim="LLaMA-2 7B at half its rank, its low-rank components tuned alone, beats its full fine-tuning at about 3 "
    "times the throughput (abstract)",
)
def welore(reduction: float = 0.5, min_ratio: float = 0.5, **overrides: Any) -> Method:
    """WeLore: singular values below one threshold for all weights are cut, so that the effective rank falls by
    `reduction`; a weight that loses more than `min_ratio` of its side (official fine-tuning scripts: 0.4999) is a
    low-rank component, two factors that train; the others stay dense, frozen, in the base's dtype or in 4 bits.

    The authors train with 5e-5, 10,000 steps of 4 after 500 of warm-up (continued training) or 1e-4, 1,000 steps of 8
    (tasks). Their script trains the norms too: `modules_to_save=["input_layernorm", ...]`.
    """
    rank = SingularValueThreshold(reduction=reduction, min_ratio=min_ratio)
    return _factored(overrides, form=LowRank(), rank=rank)


@register(
    "lord",
    paper="Kaushal et al., 2023",
    moves="nothing",
    use_when="a base is to be compressed in one shot, by what its layers give on data",
    cost="a forward pass over the examples and a matrix of inputs x inputs a layer; files hold the factors",
    claim="ranks of code models fall by 39.58 % with less than 1 % more perplexity (abstract)",
)
def lord(ratio: float = 0.75, center: bool = True, examples: int = 128, **overrides: Any) -> Method:
    """LoRD: outputs are projected on the leading eigenvectors of their covariance on data, of as many as `ratio` of the
    weight's numbers allow. `center=False` leaves out the bias that keeps the mean output, which dense files of a Llama
    have no place for."""
    return _factored(overrides, form=OutputFeatures(center=center, examples=examples), rank=ParameterRatio(ratio))


@register(
    "pela",
    paper="Guo et al., 2024",
    moves="nothing",
    use_when="a low-rank base is trained on the data of its pre-training, or of many tasks, before it is tuned",
    cost="one forward pass of the dense base a step, which is kept, and the hidden states of both",
    claim="a third to two thirds of the numbers less, for about 0.6 points of the tasks",
)
def pela(
    compression: int = 3, features: float = 1.0, logits: float = 0.0, error: float = 1.0, **overrides: Any
) -> Method:
    r"""PELA's intermediate training: factors of rank :math:`\lfloor mn / (c (m + n)) \rfloor`, the loss with
    `features` times the distance of the hidden states from the dense base's, and `error` times the square of each
    matrix's largest error minus 1e-3 (0 leaves the term out, the code's default for DeiT).

    Published for vision; c is 3 for ALBEF and 2 for DeiT, `features` 0.1 for ALBEF. There everything trains; here the
    factors. Afterwards drop the rules and tune on: `config.schedule = []`.
    """
    schedule = [DistilFeatures(features, logits)] if features or logits else []
    schedule += [LargestError(error)] if error else []
    rank = ParameterRatio(1 / compression)
    return _factored(overrides, form=LowRank(), rank=rank, keep_base=True, schedule=schedule)


@register(
    "low-rank-transformer",
    paper="Cahyawijaya, 2021 (Greenformers)",
    moves="nothing",
    use_when="the plainest low-rank base is wanted, or a baseline",
    cost="an SVD of each target at the start; files hold the factors",
)
def low_rank_transformer(fraction: float = 0.5, **overrides: Any) -> Method:
    """Low-rank transformer: each linear layer becomes two, by the SVD, of `fraction` of the largest rank that saves
    anything, all singular values in the first. The released code takes a randomised SVD, reads 1.0 as a rank of 1, and
    loses biases with its random start; here the SVD is exact."""
    return _factored(overrides, form=LowRank(split="A"), rank=LargestRankFraction(fraction))


@register(
    "trp",
    paper="Xu et al., 2020",
    moves="the rank of each weight, cut every few steps",
    use_when="weights that train whole are to end at low rank",
    cost="all of the targets' weights train, in fp32; an SVD of each every few steps",
)
def trp(every: int = 20, energy: float = 0.9, nuclear_norm: float = 3e-4, **overrides: Any) -> Method:
    """Trained rank pruning: weights train whole and are cut to `energy` of their spectrum every `every` steps, with the
    sub-gradient of the nuclear norm at these steps. When training is over, factor what is left, without more training:
    `get_peft_model(model.merge_and_unload(), FactoredConfig(rank=EnergyFraction(0.85)))`.

    Published for convolutional networks. Steps are optimizer steps, and are not counted anew in each epoch, as the code
    does (`TrainedRankPruning(each_epoch=True)`)."""
    rule = TrainedRankPruning(every=every, energy=energy, nuclear_norm=nuclear_norm)
    return _factored(overrides, form=Whole(), schedule=[rule])
