"""`SampleRank`: every step trains a drawn number of leading components (DyLoRA)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

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
        spaces = run.spaces(training=False)
        run.memory.rank = max(space.size for space in spaces)
        run.updates.hold(run, [space.gate for space in spaces])
        parts = [(space.A, partial(self._still, run, space, 0)) for space in spaces]
        parts += [(space.B, partial(self._still, run, space, 1)) for space in spaces]
        run.updates.hold_part(run, parts, keep_state=self.strict, keep_value=self.strict)

    def _still(self, run: Run, space: UnitSpace, axis: int) -> Tensor:
        rank, held = min(run.memory.rank, space.size), torch.arange(space.size, device=space.gate.device)
        held = (held >= rank) | (held < rank - 1) if self.freeze_lower else held >= rank
        return held[:, None].expand_as(space.A) if axis == 0 else held.expand_as(space.B)

    def before_step(self, run: Run) -> None:
        """Draw a rank."""
        run.memory.rank = self.drawn(run, run.step)
        self._write(run, lambda space: run.memory.rank)
        run.record(rank=run.memory.rank)

    def after_step(self, run: Run) -> None:
        """All components again, for evaluation and files."""
        self._write(run, lambda space: space.size)

    def finish(self, run: Run) -> None:
        """Let the components of `final_rank` live."""
        self._write(run, lambda space: self.final_rank or space.size)
        for space in run.spaces(training=False):
            space.write(torch.arange(min(self.final_rank or space.size, space.size), device=space.gate.device))

    @torch.no_grad()
    def _write(self, run: Run, rank_of: Callable[[UnitSpace], int]) -> None:
        for space in run.spaces(training=False):
            rank = min(rank_of(space), space.size)
            space.gate.data[:rank], space.gate.data[rank:] = space.size / rank, 0.0
