"""`SwitchLayers`: a few transformer layers are updated for some steps, then others (LISA, OwLore, BAdam)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..optim import innermost
from ..utils.option_types import PositiveInt
from ..utils.parts import register_part
from .drawn_layers import DrawnLayers
from .layer_choices import LayerChoice, Uniform
from .run import Run


@register_part("switch_layers")
@dataclass(frozen=True)
class SwitchLayers(DrawnLayers):
    r"""Every `every` steps `layers` of the L transformer layers are drawn uniformly without replacement; their adapters
    train until the next draw, the other layers' rest (LISA; Pan et al., 2024). What belongs to no layer trains always.

    The importance is fixed: 1 outside of the layers, `layers / L` inside. Draws are made before the steps 0, `every`,
    2 `every`, ... and follow from the seed and the step, the same on all ranks and in a resumed run. For adapters of
    this package and upstream's, and for models whose own weights train (`RuleRunner(SwitchLayers())`), with an
    optimizer over all layers: a layer that rests keeps every bit, under momentum and weight decay too.

    Other choices of the layers make it OwLore (`choice=Outliers()`, with `ProjectedAdamWSpec`) and block coordinate
    descent, with Adam BAdam (`choice=Cyclic()`, `LargestGradient()`, `moments="drop"`).
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
    choice: LayerChoice = field(default_factory=Uniform)
    """How the layers are chosen."""

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
        self.choice.begin(self, run)

    def before_step(self, run: Run) -> None:
        """Draw where it is due; in a resumed run, draw again what trains at this step."""
        start = run.step // self.every * self.every
        due = run.step == start
        if not due and run.memory.trained:
            return
        drawn = self.choice.choose(self, run, start)
        self.train_only(run, drawn, self.always_on)
        if due:
            self._restart(run)
            names = list(run.memory.layers)
            run.record(trains=[names[number] for number in drawn])

    def drawn(self, run: Run, weights: Tensor, start: int) -> list[int]:
        """`layers` of every stack, drawn in proportion to ``weights``."""
        return self.draw(run, weights, lambda there: min(self.layers, there), start, "switched")

    def _restart(self, run: Run) -> None:
        if self.moments == "keep" or not run.step:
            return
        state = innermost(run.optimizer).state
        if self.moments == "reset":
            state.clear()
            return
        for parameter in self.parameters_at_rest(run, run.memory.trained, self.always_on):
            state.pop(parameter, None)
