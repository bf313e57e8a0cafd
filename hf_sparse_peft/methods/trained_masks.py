"""Methods whose masks are learned, or kept in shape, while weights train."""

from __future__ import annotations

from typing import Any

from ..rules import Cast, Distil, LearnMask, OutputGroups, PermutedOutputGroups, TrainNM
from ..sparsity import GradientFlow, MaskDecay, StructureDecay
from ..training import AdamSSpec, AdamWSpec
from ..tuners import MaskedLoraConfig
from ..tuners.masked_lora import DenseUpdate, NoUpdate, ScaledDenseUpdate, ScoredMask
from .registry import Method, register

_FULL = "trains full weights: 16 bytes an entry with Adam; update=LowRankUpdate() trains a LoRA under the mask instead"


def _masked(overrides: dict[str, Any], **options: Any) -> Method:
    return Method(MaskedLoraConfig(**{"mask": "all", "target_modules": "all-linear", **options, **overrides}))


@register(
    "sr-ste",
    paper="Zhou et al., 2021",
    moves="the N:M mask, by every update",
    use_when="a dense model is to end as 2:4 (or another N:M), and there is data to train on",
    cost=f"{_FULL}; a sort of the weights a step",
)
def sr_ste(keep: int = 2, of: int = 4, decay: float = 2e-4, **overrides: Any) -> Method:
    """SR-STE: passes use the N:M mask of the weights as they are, gradients go straight through, and what is off the
    mask is pulled to 0. The authors train with SGD; Adam rescales the pull."""
    return _masked(overrides, update=DenseUpdate(), schedule=[TrainNM(keep, of, decay)])


@register(
    "gradient-flow",
    paper="Bambhaniya et al., 2024",
    moves="the N:M mask, by every update, and how sparse or how binary it is",
    use_when="as sr-ste, for more than 80 % zeros",
    cost=f"{_FULL}; a sort of the weights a step",
)
def gradient_flow(
    keep: int = 2,
    of: int = 4,
    structure: bool = False,
    rate: float | None = None,
    removed_gradient: str = "scaled",
    dense: float = 0.1,
    final: float = 0.2,
    **overrides: Any,
) -> Method:
    """Progressive gradient flow. MdGF: weights off the mask are multiplied by a factor that falls from 1 to 0; its rate
    follows from the run's length (the official example, 350 epochs, has 1e-4 a step). SdGF (`structure=True`): ever
    sparser patterns, M-1:M, M/2:M, ..., N:M. `removed_gradient="ste"` is the official code's backward pass."""
    flow: GradientFlow = StructureDecay() if structure else MaskDecay(rate=rate)
    rule = TrainNM(keep, of, 0.0, removed_gradient, flow, dense, final)
    return _masked(overrides, update=DenseUpdate(), schedule=[rule])


@register(
    "bdwp",
    paper="Fang et al., 2023",
    moves="two N:M masks, by every update",
    use_when="training itself is to run on N:M hardware, backward too; here it is simulated",
    cost=f"{_FULL}; two sorts of the weights a step, no time is saved",
)
def bdwp(keep: int = 2, of: int = 8, decay: float = 2e-4, **overrides: Any) -> Method:
    """BDWP: N:M along the inputs in the forward pass, along the outputs for the gradient of the input; that of the
    weight is dense, with SR-STE's pull."""
    return _masked(overrides, update=DenseUpdate(), schedule=[TrainNM(keep, of, decay, input_mask=OutputGroups())])


@register(
    "bi-mask",
    paper="Zhang et al., 2023",
    moves="two N:M masks, by every update, and an order of the outputs",
    use_when="as bdwp, with a backward mask inside of the forward's",
    cost=f"{_FULL}; two sorts of the weights a step, no time is saved",
)
def bi_mask(
    keep: int = 2, of: int = 4, decay: float = 2e-4, draws: int = 10, every: int = 100, **overrides: Any
) -> Method:
    """Bi-Mask: the gradient of the input goes through the masked weight, N:M once more along its outputs, in the order
    of these (of `draws` random ones, every `every` steps) with which most survives."""
    rule = TrainNM(keep, of, decay, input_mask=PermutedOutputGroups(draws, every))
    return _masked(overrides, update=DenseUpdate(), schedule=[rule])


@register(
    "movement",
    paper="Sanh et al., 2020",
    moves="the mask, by trained scores",
    use_when="a model is fine-tuned to few of its weights: those that move away from 0",
    cost=f"{_FULL}; scores as large again until training ends",
)
def movement(
    final_density: float = 0.1,
    soft: bool = False,
    start: float = 0.1,
    end: float = 0.8,
    scores_ratio: float = 1e-2 / 3e-5,
    **overrides: Any,
) -> Method:
    """Movement pruning: scores add up -w times the gradient of w, and a cubic curve says how many of the best are kept.
    Learning rates of the paper: 3e-5, and 1e-2 for scores. `soft=True`: those with a sigmoid of the score above 0.1 are
    kept, under a penalty of 400 on its mean, which decides how many that are."""
    rule = LearnMask(final_density, start, end)
    if soft:
        rule = LearnMask(threshold=0.1, penalty=400.0)
    options = {"update": DenseUpdate(), "masking": ScoredMask(), "optimizer": AdamWSpec(scores_ratio=scores_ratio)}
    return _masked(overrides, **options, schedule=[rule])


@register(
    "smp",
    paper="Jiang et al., 2023",
    moves="the mask, by trained scores",
    use_when="a task is to cost a bit a weight: the model itself is not tuned, only pruned",
    cost="scores: with Adam 16 bytes an entry while it trains, far less with rank=...; then a bit a weight",
)
def smp(
    final_density: float = 0.1,
    competition: str = "layer",
    temperature: float = 1.0,
    penalty: float = 400.0,
    rank: int | None = None,
    **overrides: Any,
) -> Method:
    """SMP: nothing trains but scores of a mask; what is shipped is the mask. SMP-L: every matrix keeps as many;
    `competition="type"` is SMP-S, where matrices of one kind share their entries. The authors' learning rate is 2e-2,
    without weight decay, and the frozen head of the language model reads label words. `rank` makes scores low-rank, for
    large or 4-bit bases."""
    rule = LearnMask(final_density, competition=competition, temperature=temperature, penalty=penalty)
    options = {"update": NoUpdate(), "masking": ScoredMask(rank), "optimizer": AdamWSpec()}
    return _masked(overrides, **options, schedule=[rule])


@register(
    "cast",
    paper="Huang et al., 2025",
    moves="nothing until the end; then the N:M mask",
    use_when="as sr-ste, with a longer run: passes are dense, and the optimizer drives weights off the mask to 0",
    cost="trains full weights: 16 bytes an entry; one more forward pass of the base",
)
def cast(
    keep: int = 2, of: int = 4, decay: float = 4e-7, groups: int = 2, distil: float = 1 / 3, **overrides: Any
) -> Method:
    """CAST: AdamS, scales of column blocks, and distillation from the base as it was (`distil=0`: none). The paper's
    recipe for LLaMA-2-7B: a learning rate of 2e-5 that falls to a tenth, 7,500 steps of 256 x 4096 tokens. Warm up: the
    first steps are ten times Adam's."""
    schedule = [Cast(), *([Distil(distil)] if distil else [])]
    options = {"update": ScaledDenseUpdate(groups), "optimizer": AdamSSpec(decay, keep, of)}
    return _masked(overrides, **options, schedule=schedule)
