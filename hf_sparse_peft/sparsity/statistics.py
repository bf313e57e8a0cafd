"""Importance scores that are estimated from data: what is kept of dense gradients, and how units are ranked by it.

A criterion is a score with options; what it has seen of one weight is a dict of fp32 tensors that `start`
makes, `update` feeds with a dense gradient and `scores` reads in slabs. Larger is better unless `largest` is False.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..utils.option_types import Decay, NonNegativeFloat, PositiveFloat, PositiveInt, Range
from ..utils.parts import register_part
from .scores import Chunks, Score, chunks_of
from .selection import chunk_size
from .support import UnitGrid
from .weight_statistics import State, Statistic


@dataclass(frozen=True)
class DataCriterion(Score, Statistic):
    """What all criteria share that need data. As a data-free score it only says where the data comes from."""

    largest: bool = True
    """False chooses the units that rank lowest."""

    needs_data: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """What files and messages call it."""
        return self.part_type

    def __call__(self, weight: Tensor | None, grid: UnitGrid, generator: torch.Generator | None = None) -> Chunks:
        raise ValueError(
            f"criterion='{self.part_type}' ranks units by data and got none. Estimate it with "
            "hf_sparse_peft.initialize_support(model, dataloader), or pass callbacks_for(model) to the Trainer."
        )

    def entry_scores(self, state: State, weight: Tensor | None, begin: int, end: int) -> Tensor:
        """fp32 scores `[end - begin, cols]` of some rows."""
        raise NotImplementedError

    def scores(self, state: State, grid: UnitGrid, weight: Tensor | None = None) -> Chunks:
        """Score chunks of all units of `grid`, as `top_units` reads them: the sum over each unit's entries."""
        device = next(iter(state.values())).device
        chunks = chunks_of(lambda begin, end: self.entry_scores(state, weight, begin, end), grid, chunk_size(device))
        return chunks if self.largest else lambda: (-chunk for chunk in chunks())

    def check_grid(self, grid: UnitGrid, name: str) -> None:
        """Raises `ValueError` where the criterion has no score for units of that kind; names the module `name`."""


@register_part("gradient")
@dataclass(frozen=True)
class Gradient(DataCriterion):
    r""":math:`|\sum_i g_i|`: where the loss of all examples together is steepest (RigL's growth; Evci et al., 2020)."""

    def entry_scores(self, state: State, weight: Tensor | None, begin: int, end: int) -> Tensor:
        """fp32 scores `[end - begin, cols]` of some rows."""
        return state["sum"][begin:end].abs()


@register_part("fisher")
@dataclass(frozen=True)
class Fisher(DataCriterion):
    r"""Empirical Fisher information :math:`\sum_i g_i^2` with one example's gradient :math:`g_i` at a time (FISH; Sung
    et al., 2021). Squares of a batch's mean gradient would be another statistic; the loader's batch size changes
    nothing here."""

    examples: PositiveInt = 1024
    """Examples that the statistic is estimated from (FISH: 1024 for GLUE, 256 for CIFAR)."""
    mode: Literal["square", "absolute", "expect"] = "square"
    r"""`absolute` sums :math:`|g_i|` instead. `expect` is the true Fisher information of a classifier,
    :math:`\sum_i \sum_y p(y|x_i)\,(\nabla -\log p(y|x_i))^2`: it needs no labels, and one backward pass for each label
    of each example."""
    max_labels: Annotated[int, Range(least=2)] = 32
    """Labels that `expect` sums over at most; a model with more is refused."""

    per_example: ClassVar[bool] = True

    @property
    def over_labels(self) -> bool:
        """Whether `update` wants the gradients of all labels, each with the weight of its probability."""
        return self.mode == "expect"

    def update(self, state: State, gradient: Tensor, weight: Tensor | None = None) -> None:
        """Add a square or magnitude: one example's, or with `expect` one label's."""
        state["sum"].add_(gradient.abs_() if self.mode == "absolute" else gradient.square_())

    def entry_scores(self, state: State, weight: Tensor | None, begin: int, end: int) -> Tensor:
        """fp32 scores `[end - begin, cols]` of some rows."""
        return state["sum"][begin:end]


@register_part("sensitivity")
@dataclass(frozen=True)
class Sensitivity(DataCriterion):
    r""":math:`\bar I\,\bar U` with :math:`I = |w \odot g|`,
    :math:`\bar I \leftarrow \beta_1 \bar I + (1-\beta_1) I`, :math:`\bar U \leftarrow \beta_2 \bar U +
    (1-\beta_2)|I - \bar I|`, one update a step (AdaLoRA, Zhang et al., 2023; SNELLA)."""

    beta1: Decay = 0.85
    """Smoothing of the sensitivity."""
    beta2: Decay = 0.85
    """Smoothing of the uncertainty."""
    uncertainty: bool = True
    r"""False scores :math:`\bar I` alone."""

    per_step: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True

    def state_numel(self, rows: int, cols: int) -> int:
        """Two moving averages an entry."""
        return 2 * rows * cols

    def start(self, rows: int, cols: int, device: torch.device | str = "cpu") -> State:
        """Both averages at zero."""
        return {name: torch.zeros(rows, cols, device=device) for name in ("sensitivity", "uncertainty")}

    def update(self, state: State, gradient: Tensor, weight: Tensor | None = None) -> None:
        """Take one step's gradient."""
        current = gradient.mul_(weight).abs_()
        state["sensitivity"].lerp_(current, 1 - self.beta1)
        state["uncertainty"].lerp_(current.sub_(state["sensitivity"]).abs_(), 1 - self.beta2)

    def entry_scores(self, state: State, weight: Tensor | None, begin: int, end: int) -> Tensor:
        """fp32 scores `[end - begin, cols]` of some rows."""
        mean = state["sensitivity"][begin:end]
        return mean * state["uncertainty"][begin:end] if self.uncertainty else mean


@register_part("movement")
@dataclass(frozen=True)
class Movement(DataCriterion):
    r""":math:`-\sum_t w_t \odot g_t`: entries that training moves away from zero (Sanh et al., 2020)."""

    reads_weight: ClassVar[bool] = True

    def update(self, state: State, gradient: Tensor, weight: Tensor | None = None) -> None:
        """Subtract `w g`."""
        state["sum"].sub_(gradient.mul_(weight))

    def entry_scores(self, state: State, weight: Tensor | None, begin: int, end: int) -> Tensor:
        """fp32 scores `[end - begin, cols]` of some rows."""
        return state["sum"][begin:end]


@register_part("snip")
@dataclass(frozen=True)
class Snip(DataCriterion):
    r""":math:`|w \odot \sum_i g_i|`: what zeroing the entry would change in the loss (SNIP; Lee et al., 2019)."""

    def entry_scores(self, state: State, weight: Tensor | None, begin: int, end: int) -> Tensor:
        """fp32 scores `[end - begin, cols]` of some rows."""
        return (state["sum"][begin:end] * weight[begin:end]).abs_()


@register_part("momentum")
@dataclass(frozen=True)
class Momentum(DataCriterion):
    r""":math:`|m|`, with :math:`m \leftarrow \beta m + (1-\beta) g` once a step (Dettmers and Zettlemoyer, 2019)."""

    beta: Decay = 0.9
    """Smoothing of the gradient."""

    per_step: ClassVar[bool] = True

    def update(self, state: State, gradient: Tensor, weight: Tensor | None = None) -> None:
        """Take one step's gradient."""
        state["sum"].lerp_(gradient, 1 - self.beta)

    def entry_scores(self, state: State, weight: Tensor | None, begin: int, end: int) -> Tensor:
        """fp32 scores `[end - begin, cols]` of some rows."""
        return state["sum"][begin:end].abs()


@register_part("sm3")
@dataclass(frozen=True)
class SM3(DataCriterion):
    r""":math:`R_i C_j` from SM3's accumulators, fed with dense gradients: :math:`\nu_{ij} = \min(R_i, C_j) + g_{ij}^2`,
    :math:`R_i \leftarrow \max(R_i, \max_j \nu_{ij})`, :math:`C_j \leftarrow \max(C_j, \max_i \nu_{ij})` (SpIEL-MA's
    growth score; Ansell et al., 2024). Keeps `rows + cols` numbers a weight."""

    combine: Literal["product", "min"] = "product"
    r"""`min` ranks by SM3's own estimate :math:`\min(R_i, C_j)`, which is another order."""

    per_step: ClassVar[bool] = True

    def state_numel(self, rows: int, cols: int) -> int:
        """One number a row and one a column."""
        return rows + cols

    def start(self, rows: int, cols: int, device: torch.device | str = "cpu") -> State:
        """Accumulators at zero."""
        return {"row": torch.zeros(rows, device=device), "column": torch.zeros(cols, device=device)}

    def update(self, state: State, gradient: Tensor, weight: Tensor | None = None) -> None:
        """Take one step's gradient."""
        nu = torch.minimum(state["row"][:, None], state["column"]).add_(gradient.square_())
        torch.maximum(state["row"], nu.amax(1), out=state["row"])
        torch.maximum(state["column"], nu.amax(0), out=state["column"])

    def entry_scores(self, state: State, weight: Tensor | None, begin: int, end: int) -> Tensor:
        """fp32 scores `[end - begin, cols]` of some rows."""
        row, column = state["row"][begin:end, None], state["column"]
        return row * column if self.combine == "product" else torch.minimum(row, column)


@register_part("delta_magnitude")
@dataclass(frozen=True)
class DeltaMagnitude(DataCriterion):
    r""":math:`|\theta_1 - \theta_0|` after a dense warm-up from :math:`\theta_0` (LT-SFT; Ansell et al., 2022).

    The warm-up trains fp32 deltas of the whole targeted weights, and everything else that is trainable, with an AdamW
    of its own whose learning rate falls linearly to 0; then all of it is put back. `examples` is not read: the
    warm-up takes `warmup_steps` steps.

    With `n_iterations` above 1, as in the released code: each warm-up selects `1/n` of the budget among the entries
    that are not chosen yet, everything goes back to where the iteration began, and the chosen entries (with everything
    else that is trainable) train `sparse_steps` steps with a fresh optimizer; the next warm-up begins there. The run
    itself is the last sparse phase, and starts from the values that the earlier ones reached.
    """

    warmup_steps: PositiveInt = 100
    """Optimizer steps of the dense warm-up. The paper trains whole epochs (up to 100 k steps for languages, 3 epochs
    for tasks)."""
    warmup_lr: PositiveFloat = 5e-5
    """Its first learning rate (paper: 5e-5)."""
    l1: NonNegativeFloat = 0.0
    r"""Weight :math:`\lambda` of :math:`\lambda \sum |p - p_0| / P` over the trained numbers, `P` all numbers of the
    model, added once an optimizer step (paper: 0.1 for languages, 0 for tasks)."""
    n_iterations: PositiveInt = 1
    """Warm-ups in a row, with a sparse phase between two; every one selects `1/n` of the budget."""
    sparse_steps: PositiveInt | None = None
    """Optimizer steps of a sparse phase between two warm-ups; None: `warmup_steps`."""
    sparse_lr: PositiveFloat | None = None
    """First learning rate of a sparse phase, which falls linearly to 0; None: `warmup_lr`, as in the released code."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    """AdamW's, in the warm-up."""
    collects_gradients: ClassVar[bool] = False
    """Whether units are ranked by what `update` adds up of the warm-up's gradients instead of by the deltas."""

    def entry_scores(self, state: State, weight: Tensor | None, begin: int, end: int) -> Tensor:
        """fp32 scores `[end - begin, cols]` of some rows."""
        return state["sum"][begin:end].abs()


@register_part("given")
@dataclass(frozen=True)
class Given(Score):
    """Units and their number come from outside: `load_support`, `support_from_checkpoints` or `write_supports`."""

    needs_data: ClassVar[bool] = True

    def __call__(self, weight: Tensor | None, grid: UnitGrid, generator: torch.Generator | None = None) -> Chunks:
        raise ValueError(
            "criterion='given' takes its units from outside. Call hf_sparse_peft.load_support(model, path) or "
            "hf_sparse_peft.support_from_checkpoints(model, before, after) before training."
        )
