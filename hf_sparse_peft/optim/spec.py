"""`OptimizerSpec`: the optimizer that a config asks for, as a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..utils.parts import Part


@dataclass(frozen=True)
class OptimizerSettings:
    """What a run says about its optimizer, whichever one that is: the arguments of a Trainer, or a loop's own."""

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    seed: int = 0


@dataclass(frozen=True)
class OptimizerSpec(Part):
    """Base of the parts that `config.optimizer` takes: a registered frozen dataclass whose fields are its options.

    What belongs to a run (learning rate, weight decay, betas) is no option; it comes as `OptimizerSettings`.
    """

    part_kind: ClassVar[str] = "optimizer"
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it asks of the loop: `loss_differences` (two forward passes in the place of forward and backward)."""
    builds: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Optimizer
    """Class of what `build` returns."""

    def build(self, model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
        """The optimizer of what trains in `model`.

        Raises:
            ValueError: nothing trains, or nothing that the optimizer is for.
        """
        raise NotImplementedError
