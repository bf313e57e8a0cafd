"""`FreezeGradually`: the units of a basis stop training one after the other (LaMDA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..utils.option_types import PositiveFraction
from ..utils.parts import register_part
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("freeze_gradually")
@dataclass(frozen=True)
class FreezeGradually(Rule):
    r"""Of a trained basis the first :math:`f(t) = \min(r, \lfloor r\,t / (\eta T) \rfloor)` of r columns are frozen at
    step t of T (from 0), those of the largest singular values first, until only the core trains (LaMDA; Azizi et al.,
    2024).

    Frozen columns are bitwise still, whatever momentum and weight decay would do. The released code leaves out the
    factor r, so that it freezes nothing in the first 30 % of a run and 3 columns by its end; this is the paper's form.
    """

    until: PositiveFraction = 0.3
    r"""When the last column freezes, :math:`\eta`, as a fraction of the run."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"basis"})
    writes: ClassVar[frozenset[str]] = frozenset({"trains"})

    def frozen(self, size: int, step: int, total_steps: int) -> int:
        """Columns of `size` that are frozen in step `step`."""
        return min(size, int(size * step / (self.until * total_steps) + 1e-9))

    def begin(self, run: Run) -> None:
        """Hold what is frozen, from now on."""

        def frozen_columns(space: UnitSpace, parameter: nn.Parameter) -> Tensor:
            return torch.arange(space.size, device=parameter.device) < self.frozen(
                space.size, run.step, run.total_steps
            )

        run.hold_units(frozen_columns, keep_state=False)

    def before_step(self, run: Run) -> None:
        """Note how many are frozen."""
        run.record_change(frozen=sum(self.frozen(space.size, run.step, run.total_steps) for space in run.all_spaces))
