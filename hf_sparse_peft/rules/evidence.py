"""Whether a layer's scores say anything, and who is told where they do not."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .space import UnitSpace


def is_evidence(scores: Tensor | None) -> bool:
    """Whether `scores` can rank: there are some, all are finite, and not all are 0."""
    return scores is not None and bool(torch.isfinite(scores).all()) and bool(scores.any())


def with_gradient(spaces: list[UnitSpace]) -> list[UnitSpace]:
    """Those of `spaces` whose parameters, but for a gate, have gradients, not all of them 0."""
    found = []
    for space in spaces:
        gradients = [pair[0].grad for name, pair in space.scored_parameters().items() if name != "gate"]
        if all(one is not None for one in gradients) and any(bool(one.any()) for one in gradients):
            found.append(space)
    return found


class MissingEvidence:
    """Layers that kept their units at a move because nothing said which units matter: each is named once a run.

    Args:
        action: what did not happen, e.g. "the support was not moved".
        resumed: whether the run goes on from a checkpoint, before which units may have moved.
    """

    def __init__(self, action: str, resumed: bool = False) -> None:
        self.action = action
        self._named: set[str] = set()
        self._looked, self._moved = False, resumed

    def record(self, step: int, without: list[str], judged: int) -> None:
        """Take one move: the layers `without` evidence, and how many had some."""
        self._looked = self._looked or bool(without) or judged > 0
        self._moved = self._moved or judged > 0
        new = sorted(set(without) - self._named)
        if not new:
            return
        self._named |= set(new)
        shown = ", ".join(new[:20]) + (", ..." if len(new) > 20 else "")
        who = f"in {len(new)} layers" if judged else f"in any of the {len(without)} layers"
        warnings.warn(
            f"Step {step}: {self.action} {who} ({shown}), because their scores are all 0 or not finite; the units stay "
            "as they are. Did these layers receive gradients? Labels that are all masked (-100), a part of the model "
            "that the batches never reach, or an fp16 overflow leave none.",
            stacklevel=2,
        )

    def finish(self) -> None:
        """At the end of a run: say so if no layer ever had evidence."""
        if self._looked and not self._moved:
            warnings.warn(
                f"In the whole run {self.action}: no layer ever had finite scores other than 0. Check that labels are "
                "not all masked (-100), that the loss is finite, and that the adapted layers take part in it.",
                stacklevel=2,
            )
