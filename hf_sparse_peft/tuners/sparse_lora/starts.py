r"""Starts from data: what the gradient of the training data says of the ranks, factors and supports of all modules.

starts.py                 what all starts say of themselves
gradient_projection.py    ranks by importance, B by the gradient's projection on A (GoRA)
gradient_split.py         one budget for the best sparse + low-rank fit of the gradient
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...sparsity import Statistic
from ...utils.parts import Part


class StartSite(NamedTuple):
    """The module that a start is for, and what the config says of it."""

    name: str
    rows: int
    cols: int
    rank: int
    """Components that the config gives it."""
    units: int
    """Entries of the support that the config gives it."""
    seed: int
    """Seed of the adapter's draws."""
    device: torch.device
    draw_A: Callable[[int], Tensor]
    """rank -> A `[rank, cols]`, fp32 on `device`, from the adapter's seed; its first rows are those of a smaller
    rank."""
    weight: Callable[[], Tensor]
    """The base weight `[rows, cols]`, dequantised if need be."""

    @property
    def sides(self) -> int:
        """Numbers of a component."""
        return self.rows + self.cols


class Started(NamedTuple):
    """What the halves of one module start with."""

    A: Tensor
    """`[r, cols]`; r may be 0."""
    B: Tensor
    """`[rows, r]`, so that the low-rank half starts at :math:`B A`: the layer divides it by its scaling."""
    units: Tensor | None = None
    """Sorted entries of the support; None without one."""
    values: Tensor | None = None
    """What these start at in the weight; None: 0."""


@dataclass(frozen=True)
class Start(Part):
    """Base of the starts from data. Anybody may register one, with `register_part`.

    Two steps, so that sizes may follow from all modules together: `summary` is asked for one module after the other,
    while its gradient is there, and `decide` once for all of them. Nothing of the model has changed by then.
    """

    part_kind: ClassVar[str] = "start"

    def check(self, config: Any) -> None:
        """Refuse a config whose halves cannot start so.

        Raises:
            ValueError: names the option.
        """

    @property
    def statistic(self) -> Statistic:
        """What to read of every base weight."""
        raise NotImplementedError

    def summary(self, site: StartSite, state: dict[str, Tensor] | None) -> Any:
        """What `decide` has to know of a module; `state` is the statistic's, fp32 on the module's device, to be
        overwritten at will. None where the data says nothing about the module."""
        raise NotImplementedError

    def decide(self, sites: Mapping[str, StartSite], summaries: Mapping[str, Any]) -> dict[str, Started]:
        """What every module starts with, by its name."""
        raise NotImplementedError
