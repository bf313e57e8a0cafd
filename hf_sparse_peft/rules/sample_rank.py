"""`SampleRank`: every step trains a drawn number of leading components (DyLoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..sparsity import stream_seed
from ..utils.parts import register_part, require
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("sample_rank")
@dataclass(frozen=True)
class SampleRank(Rule):
    r"""Nested ranks, :math:`\Delta W_b = \frac{\alpha}{b} B_{:,:b} A_{:b}` with one `b` a step for the whole model
    (DyLoRA; Valipour et al., 2023), so that the adapter works at every rank up to `r`.

    The gate, which does not train, is :math:`r/b` on the first `b` components and 0 on the others; a module of lower
    rank takes part with all of its own. Between steps, in evaluation and in files it stands for all components, at the
    end for `final_rank`.
    """

    distribution: Literal["uniform", "geometric"] = "uniform"
    """Of `b` over 1 to r: all ranks alike, or each half as likely as the one before."""
    freeze_lower: bool = True
    """Whether only component `b` learns (released script), or all of the first `b`."""
    strict: bool = False
    """Whether what does not learn is bitwise still; else momentum and weight decay act on it, as released."""
    final_rank: int | None = None
    """Components that live after the last step; None: all."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "values", "trains"})
    needs: ClassVar[frozenset[str]] = frozenset({"gate"})
    gate: ClassVar[str] = "ones"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.distribution in ("uniform", "geometric"), self, "distribution", "'uniform' or 'geometric'")
        require(self.final_rank is None or self.final_rank >= 1, self, "final_rank", "an integer >= 1, or None")

    def drawn(self, run: Run, step: int) -> int:
        """The rank `b` of step `step`, from 0; the same on every rank and in a resumed run."""
        largest = max(space.size for space in run.spaces(training=False))
        weights = torch.ones(largest) if self.distribution == "uniform" else 0.5 ** torch.arange(largest)
        generator = torch.Generator().manual_seed(stream_seed(run.seed, "sampled rank", step))
        return 1 + int(torch.multinomial(weights, 1, generator=generator))

    def begin(self, run: Run) -> None:
        """Hold the gates still, and what does not learn."""
        run.hold_units(lambda *of: self._still(run, *of), keep_state=self.strict, keep_value=self.strict)
        run.updates.hold(run, [space.gate for space in run.spaces(training=False)])

    def _still(self, run: Run, space: UnitSpace, parameter: nn.Parameter) -> Tensor:
        rank, number = min(run.memory.rank, space.size), torch.arange(1, space.size + 1, device=parameter.device)
        return number != rank if self.freeze_lower else number > rank

    def before_step(self, run: Run) -> None:
        """Draw a rank."""
        run.memory.rank = self.drawn(run, run.step)
        for space in run.spaces(training=False):
            run.for_this_step(space.leading(min(run.memory.rank, space.size)))

    def finish(self, run: Run) -> None:
        """Let the components of `final_rank` live."""
        for space in run.spaces(training=False):
            rank = min(self.final_rank or space.size, space.size)
            space.gate.data.mul_(space.size / rank)
            space.write(torch.arange(rank, device=space.gate.device))
