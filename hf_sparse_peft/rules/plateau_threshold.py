"""`PlateauThreshold`: once an evaluated loss stops falling, all units below the largest threshold that it can bear
leave (LOBSTER, SeReNe)."""

from __future__ import annotations

import itertools
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..sparsity import largest_within
from ..utils.option_types import NonNegativeFloat, PositiveInt, Range
from ..utils.parts import register_part
from ..utils.tensors import TensorSpec
from .calibration_data import CalibrationData, items_in
from .collectives import all_reduce_mean
from .evidence import is_evidence
from .moves import move_units
from .no_effect import report_unfinished
from .probing import loss_of, modes_kept, random_state_kept
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("plateau_threshold")
@dataclass(frozen=True)
class PlateauThreshold(Rule):
    r"""Every `every` steps the loss is evaluated. Once `patience` evaluations in a row are not below
    :math:`(1 + s)` times the best one, the values of the best are restored, and the units whose largest |entry| in the
    update is below `T` leave for good: the largest `T` that bisection finds with
    :math:`L(T) \leq (1 + \epsilon)\,L(0)`, within the bound itself (LOBSTER and SeReNe; Tartaglione et al., 2021,
    2022; the released code of the former may return the middle of its last bracket, beyond the bound). Then the search
    for a plateau begins anew.

    The loss is the Trainer's on its `eval_dataset`, `RuleRunner.evaluate` or `Controller(evaluate=...)`, or that of
    the first examples of the training data. All layers lose their units or none does; a support keeps one at least.
    Layers that are held still, and those whose values are all 0 or not finite, keep theirs. Of a mask the units are the
    weight's entries, :math:`|W + D|`: there the base itself is pruned.
    """

    tolerance: NonNegativeFloat = 0.05
    r""":math:`\epsilon`, by how much of itself the loss may grow (LOBSTER on LeNet-5: 0.05)."""
    patience: PositiveInt = 20
    """Evaluations without a better loss that make a plateau (LOBSTER on LeNet-5: 20 epochs)."""
    every: PositiveInt | None = None
    """Optimizer steps between two evaluations; None: an epoch."""
    slack: Annotated[float, Range(above=-1)] = 0.01
    """s: a loss below (1 + s) times the best one is no plateau. With the authors' 0.01 a flat loss is none either; with
    0 or less it is."""
    data: Literal["evaluation", "training"] = "evaluation"
    """Where the loss is read: the evaluation of the loop, or the first `batches` batches of the training data,
    unshuffled."""
    batches: PositiveInt = 8
    """How many, with `data="training"`."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"support", "rank", "mask"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "values"})
    needs: ClassVar[frozenset[str]] = frozenset({"gate"})
    gate: ClassVar[str] = "ones"

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """The best values of each parameter, in its shape."""
        return [
            TensorSpec(f"best_{name}", tuple(p.shape), role="rule", space=space.kind if axis is not None else None,
                       axis=axis or 0)
            for name, (p, axis) in space.scored_parameters().items()
        ]  # fmt: skip

    def check(self, config: Any) -> None:
        """Refuse masks that are computed in every pass."""
        super().check(config)
        if getattr(getattr(config, "masking", None), "computes_mask", False):
            raise ValueError(
                f"PlateauThreshold takes entries out of a mask, and masking={config.masking} computes it in every "
                "pass. Take the default masking, or leave the rule out."
            )

    def begin(self, run: Run) -> None:
        """There must be something to evaluate, and evaluations enough for a plateau.

        Raises:
            ValueError: the loop gives no evaluation, or no training data.
        """
        training = run.training
        run.memory.every = run.interval("PlateauThreshold.every", self.every)
        if self.data == "evaluation" and training.evaluate is None:
            raise ValueError(
                "PlateauThreshold.data='evaluation' needs an evaluated loss, and this loop has none. Give the Trainer "
                "one eval_dataset, set `evaluate` of its RuleRunner, pass Controller(evaluate=...), or set "
                "data='training'."
            )
        if self.data == "training":
            if training.dataloader is None:
                raise ValueError(
                    "PlateauThreshold.data='training' reads training data, and this loop hands its rules none. Pass "
                    "Controller(dataloader=...), or an evaluation and data='evaluation'."
                )
            run.memory.batches = None
        report_unfinished(
            run, 0, run.memory.every, self.patience + 1,
            f"PlateauThreshold.patience={self.patience} evaluations, one in {run.memory.every} steps, make no plateau",
            "Lower patience or every, train longer, or leave the rule out.",
        )  # fmt: skip

    def after_update(self, run: Run) -> None:
        """Components that have left stay where they are."""
        for space in run.spaces():
            if space.count < space.capacity:
                space.apply_mask()

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Evaluate, and prune where that is a plateau."""
        if run.step % run.memory.every:
            return
        spaces, loss = run.spaces(), self._loss(run)
        best, bad = run.saved.get("best"), run.saved.get("bad", 0)
        better = best is None or loss < (1 + self.slack) * best
        bad = 0 if better else bad + 1
        if math.isfinite(loss) and (best is None or loss < best):
            best = loss
            for space in run.spaces(training=False):
                for name, (parameter, _) in space.scored_parameters().items():
                    space.state()[f"best_{name}"].copy_(parameter)
        if best is None or bad < self.patience:
            run.saved.update(best=best, bad=bad)
            return
        for space in spaces:
            for name, (parameter, _) in space.scored_parameters().items():
                parameter.copy_(space.state()[f"best_{name}"])
        run.saved.clear()
        spaces = [space for space in spaces if space.count]
        judged = run.with_evidence(spaces, lambda s: is_evidence(s.largest_entries()), "no threshold was applied")
        if judged:
            self._prune(run, judged)

    def _prune(self, run: Run, spaces: list[UnitSpace]) -> None:
        sizes = [space.largest_entries() for space in spaces]
        highest = max(float(one.max()) for one in sizes)
        nonzero = [one[one > 0] for one in sizes]
        lowest = min(float(one.min()) for one in nonzero)
        mean = sum(float(one.mean()) for one in nonzero) / len(nonzero)

        def loss_at(threshold: float) -> float:
            with ExitStack() as left_out:
                for space, gone in zip(spaces, fallen(spaces, sizes, threshold), strict=True):
                    left_out.enter_context(space.without(gone))
                return self._loss(run)

        before = self._loss(run)
        bound = before + abs(before) * self.tolerance
        found, after = largest_within(loss_at, bound, lowest, highest, mean, before)
        left = 0
        for space, gone in zip(spaces, fallen(spaces, sizes, found), strict=True):
            if gone.any():
                left += move_units(space, space.alive()[~gone.to(space.alive().device)], run.optimizer).left
        alive = sum(space.count for space in run.spaces(training=False))
        run.record(threshold=found, loss_before=before, loss_after=after, pruned=left, alive=alive)

    def _loss(self, run: Run) -> float:
        with random_state_kept(), modes_kept(run.model, training=False), torch.no_grad():
            device = next(run.model.parameters()).device
            if self.data == "evaluation":
                mean = torch.tensor(float(run.training.evaluate(run.model)), dtype=torch.float64, device=device)
                return float(all_reduce_mean(mean))
            if run.memory.batches is None:
                data = CalibrationData(in_order(run.training.dataloader), device)
                run.memory.batches = list(itertools.islice(data.batches(), self.batches))
            weights = [items_in(batch, run.model) for batch in run.memory.batches]
            losses = [loss_of(run.model, batch).double() for batch in run.memory.batches]
            mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
            return float(all_reduce_mean(mean.clone()))


def in_order(loader: Any) -> Any:
    """`loader` without its sampler: the same examples first whenever it is read, in a resumed run too."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    return DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn)


def fallen(spaces: list[UnitSpace], sizes: list[Tensor], threshold: float) -> list[Tensor]:
    """Bool `[a]` each: living units below the threshold; of packed ones all but the largest at most."""
    found = []
    for space, size in zip(spaces, sizes, strict=True):
        gone = size < threshold
        if space.packed and gone.all():
            gone[size.argmax()] = False
        found.append(gone)
    return found
