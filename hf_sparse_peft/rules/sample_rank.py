"""`SampleRank`: every step trains a drawn number of leading components (DyLoRA, Maestro)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..utils.option_types import PositiveInt
from ..utils.parts import register_part
from .rule import RankRule
from .run import Run
from .space import UnitSpace


@register_part("sample_rank")
@dataclass(frozen=True)
class SampleRank(RankRule):
    r"""Nested ranks, :math:`\Delta W_b = \frac{\alpha}{b} B_{:,:b} A_{:b}` with one `b` a step for the whole model
    (DyLoRA; Valipour et al., 2023), so that the adapter works at every rank up to `r`.

    A module of lower rank takes part with all of its own. The gate that does it is not trained; between steps, in
    evaluation and in files it stands for all components, at the end for `final_rank`.

    With `modules="one"` a step draws one of all pairs of a module and a `b` up to its current rank, and every other
    module has its full rank (Maestro; Horváth et al., 2024), without any scaling by `b` if `rescaled=False`.
    """

    distribution: Literal["uniform", "geometric"] = "uniform"
    """Of `b` over 1 to r: all ranks alike, or each half as likely as the one before."""
    modules: Literal["all", "one"] = "all"
    """Whether a step's `b` is that of all modules, or of one that is drawn with it."""
    rescaled: bool = True
    r"""Whether the update is scaled by :math:`\alpha / b`, or by :math:`\alpha / r` at every `b`."""
    freeze_lower: bool = True
    """Whether only component `b` learns (released script), or all of the first `b`."""
    strict: bool = False
    """Whether what does not learn is bitwise still; else momentum and weight decay act on it, as released."""
    final_rank: PositiveInt | None = None
    """Components that live after the last step; None: all."""

    writes: ClassVar[frozenset[str]] = frozenset({"units", "values", "trains"})
    gate: ClassVar[str] = "ones"

    def begin(self, run: Run) -> None:
        """Hold the gates still, and what does not learn.

        Raises:
            ValueError: no module has `final_rank` components.
        """
        largest = max(space.size for space in run.all_spaces)
        if self.final_rank is not None and self.final_rank > largest:
            raise ValueError(
                f"SampleRank.final_rank={self.final_rank} is above the largest rank of a module, {largest}, and would "
                "leave all components. Lower it, or set None."
            )
        run.hold_units(lambda *of: self._still(run, *of), keep_state=self.strict, keep_value=self.strict)
        run.updates.hold(run, [space.gate for space in run.all_spaces])

    def _still(self, run: Run, space: UnitSpace, parameter: nn.Parameter) -> Tensor:
        rank, number = run.memory.ranks[space], torch.arange(1, space.size + 1, device=parameter.device)
        return number != rank if self.freeze_lower else number > rank

    def before_step(self, run: Run) -> None:
        """Draw a rank."""
        run.memory.ranks = self._draw(run, {space: space.count for space in run.all_spaces})
        run.for_this_step(space.leading(rank, self.rescaled) for space, rank in run.memory.ranks.items() if rank)

    def _draw(self, run: Run, ranks: dict[UnitSpace, int]) -> dict[UnitSpace, int]:
        """The rank of each module at this step, at most what lives of it."""
        if not any(ranks.values()):
            return ranks
        ratio = 1.0 if self.distribution == "uniform" else 0.5
        if self.modules == "all":
            drawn = 1 + run.draw("sampled rank", ratio ** torch.arange(max(space.size for space in ranks)))
            return {space: min(drawn, rank) for space, rank in ranks.items()}
        pairs = [(space, b) for space, rank in ranks.items() for b in range(rank)]
        space, b = pairs[run.draw("sampled module and rank", ratio ** torch.tensor([float(b) for _, b in pairs]))]
        return {**ranks, space: b + 1}

    def finish(self, run: Run) -> None:
        """Let the components of `final_rank` live."""
        for space in run.all_spaces:
            space.truncate(self.final_rank or space.size, self.rescaled)
