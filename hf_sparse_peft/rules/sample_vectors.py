"""`SampleVectors`: singular vectors train in turns (Sparse Spectral Training)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..sparsity import stream_seed
from ..utils.option_types import PositiveInt, Range
from ..utils.parts import register_part
from .moves import restart_units
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("sample_vectors")
@dataclass(frozen=True)
class SampleVectors(Rule):
    r"""Sparse Spectral Training of weights held as :math:`U \mathrm{diag}(\sigma) V^\top` (Zhao et al., 2024): all
    :math:`\sigma` train at every step, r singular vectors of each weight at a time.

    After every optimizer step :math:`\sigma \leftarrow \max(\sigma, 0)` and the vectors that trained are made unit
    vectors. An iteration is `every` steps; after it r vectors are drawn, without replacement, with the form's
    probabilities, and their optimizer state is 0. A round is `iterations` of them; after it the SVD of the weight makes
    all vectors orthonormal again, and the optimizer forgets the values too. Draws follow from seed, module and step.
    """

    every: PositiveInt = 200
    """Optimizer steps of an iteration."""
    iterations: PositiveInt | None = None
    r"""Iterations of a round. None: :math:`\lceil k / r \rceil`, one visit a vector on average, in each layer."""
    warmup: Annotated[int, Range(least=0)] = 10
    """Steps over which the learning rate of vectors that were drawn in the run rises linearly to its own."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"vector"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "values"})

    def begin(self, run: Run) -> None:
        """The run must hold an iteration."""
        if self.every >= run.total_steps:
            raise ValueError(
                f"SampleVectors.every={self.every} is not below the run's {run.total_steps} steps: no other vectors "
                "would ever train. Lower it, or leave the rule out."
            )
        run.scale_updates(lambda space, parameter: self._factor(run, parameter))

    def _factor(self, run: Run, parameter: Tensor) -> Tensor | None:
        """What updates of vectors are multiplied by at the coming step."""
        since = run.step % self.every
        if run.step < self.every or since >= self.warmup:
            return None
        return torch.full((len(parameter),), (since + 1) / (self.warmup + 1), device=parameter.device)

    def after_update(self, run: Run) -> None:
        """Project what the optimizer moved."""
        run.memory.updated = [s for s in run.spaces() if any(p.grad is not None for p in s.parameters())]
        for space in run.memory.updated:
            space.normalise()

    def after_step(self, run: Run) -> None:
        """Draw the vectors of the next iteration."""
        if run.step % self.every or run.step >= run.total_steps:
            return
        rounds = 0
        for space in run.memory.updated:
            if (run.step // self.every) % (self.iterations or math.ceil(space.size / space.capacity)) == 0:
                space.decompose()
                values = space.values
                restart_units(values, torch.ones(values.numel(), dtype=torch.bool), run.optimizer)
                rounds += 1
            self._draw(run, space)
        run.record(iteration=run.step // self.every, decomposed=rounds)

    @staticmethod
    def _draw(run: Run, space: UnitSpace) -> None:
        generator = torch.Generator().manual_seed(stream_seed(run.seed, "singular vectors", run.step, space.name))
        space.write(space.draw(generator))
        for parameter in space.vectors():
            restart_units(parameter, torch.ones(len(parameter), dtype=torch.bool), run.optimizer)
