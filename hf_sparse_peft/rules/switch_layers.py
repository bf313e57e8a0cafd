"""`SwitchLayers`: a few transformer layers, drawn alike, are updated for some steps, then others (LISA)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from ..optim import innermost
from ..utils.option_types import PositiveInt
from ..utils.parts import register_part
from .drawn_layers import DrawnLayers
from .run import Run


@register_part("switch_layers")
@dataclass(frozen=True)
class SwitchLayers(DrawnLayers):
    r"""Every `every` steps `layers` of the L transformer layers are drawn uniformly without replacement; their adapters
    train until the next draw, the other layers' rest (LISA; Pan et al., 2024). What belongs to no layer trains always.

    The importance is fixed: 1 outside of the layers, `layers / L` inside. Draws are made before the steps 0, `every`,
    2 `every`, ... and follow from the seed and the step, the same on all ranks and in a resumed run. Published for full
    weights; here for adapters, of this package and upstream's, which an optimizer over all layers holds: a layer that
    rests keeps every bit, under momentum and weight decay too.
    """

    layers: PositiveInt = 2
    """Layers that train at a time, in every stack of layers (paper: 2; LMFlow's README: 1)."""
    every: PositiveInt = 20
    """Optimizer steps between two draws."""
    moments: Literal["reset", "keep", "drop"] = "reset"
    """What a draw does to the optimizer's state. "reset": all of it starts anew, outside of the layers too (as in the
    authors' experiments, each interval of which was a run of its own); "drop": that of layers that rest is freed;
    "keep": nothing, so that moments of layers that rested go on as they were (axolotl's port)."""
    always_on: bool = True
    """Whether adapters outside of the layers train too."""
    layers_pattern: str | None = None
    """Name of the module list that holds the layers, if it is not in the common places; several with `|` between."""
    seed: int | None = None
    """Seed of the draws, mixed with the step; None: the adapter's."""

    def begin(self, run: Run) -> None:
        """Find the layers."""
        self.find(run)
        fewest = min(len(stack) for stack in self.stacks(run))
        if self.layers >= fewest and not run.resumed:
            warnings.warn(
                f"SwitchLayers.layers={self.layers} of {fewest} layers trains all of them at every step. Lower it, "
                "adapt more layers, or leave the rule out.",
                stacklevel=2,
            )

    def before_step(self, run: Run) -> None:
        """Draw where it is due; in a resumed run, draw again what trains at this step."""
        start = run.step // self.every * self.every
        due = run.step == start
        if not due and run.memory.trained:
            return
        count = len(run.memory.layers)
        drawn = self.draw(run, torch.ones(count), lambda there: min(self.layers, there), start, "switched")
        self.train_only(run, drawn, self.always_on)
        if due:
            self._restart(run)
            names = list(run.memory.layers)
            run.record(trains=[names[number] for number in drawn])

    def _restart(self, run: Run) -> None:
        if self.moments == "keep" or not run.step:
            return
        state = innermost(run.optimizer).state
        if self.moments == "reset":
            state.clear()
            return
        for parameter in self.parameters_at_rest(run, run.memory.trained, self.always_on):
            state.pop(parameter, None)
