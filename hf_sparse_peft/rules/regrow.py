"""`Regrow`: supports that move; units leave by a drop criterion, as many enter by a growth criterion."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from ..sparsity import Constant, Curve, Linear
from ..utils.option_types import NonNegativeFloat, PositiveFraction, PositiveInt
from ..utils.parts import register_part, require
from ..utils.tensors import TensorSpec
from .drop import Drop, Magnitude
from .first_move import replaces_start, restored_start
from .frozen import Moved, frozen_state, hold_frozen, move_trained_units
from .growth import AccumulatedGradient, Growth, Move
from .no_effect import report_idle
from .rule import Rule, check_entries, check_kind
from .run import Run, leave_update_out, refuse_unskippable
from .space import UnitSpace, unit_sums


@register_part("regrow")
@dataclass(frozen=True)
class Regrow(Rule):
    """Moves supports or masks: every `every` optimizer steps a fraction of each layer's trained units is dropped and as
    many are grown, so that their number never changes. The defaults are SpIEL-AG (Ansell et al., 2024).

    A unit that is dropped and grown at once keeps value and optimizer state; grown ones start at value 0 with zero
    state, or with the one that the growth estimates. With `retired` units that leave keep their learned change.

    Where nothing says which units matter (gradients or values that are all 0 or not finite: masked labels, a layer that
    the batches did not reach, an overflow) a layer keeps its units and is named in a warning, once a run.

    With `space="mask"` entries of the weight itself leave and return: the smallest |W + D| leave, and by the dense
    gradient, or at random, as many of those that were removed enter, with the weight that they have in W + D.

    Two departures from SpIEL's official code, both its faults: squares are those of whole optimizer steps, not of
    micro-batches, and every phase sums `steps` updates (the code: one more in all but the first).
    """

    every: PositiveInt = 20
    """Optimizer steps between two moves (SpIEL: 20, RigL: 100)."""
    drop: Drop | None = Magnitude()
    """Which units leave (`rules.drop`). None: the growth chooses the whole support anew and all others leave
    (LIFT)."""
    grow: Growth = AccumulatedGradient()
    """Which units enter (`rules.growth`)."""
    fraction: Curve | float = Linear(0.2, 0.0)
    """Fraction of a layer's trained units that a move replaces, over progress from the run's start to `stop_at`; a
    number for a constant one. SpIEL: `Linear(0.2, 0)`, RigL: `Cosine(0.3, 0)`, SET: 0.3."""
    first: PositiveInt | None = None
    """Step after which the first move comes; None: the growth's own choice, `every` for most."""
    stop_at: PositiveFraction = 1.0
    """Fraction of the run after which nothing moves and at which `fraction` has reached its end (RigL: 0.75)."""
    replace_all_first: bool | None = None
    """Whether the very first move replaces every unit. None: as SpIEL publishes it, with its two growths and a `Linear`
    fraction (its cosine policy has no such move), and only where the support is still the random draw of injection: a
    support that was chosen (by a criterion, from data, from a file) or trained before is kept, with a warning. True
    replaces any start, False none."""
    in_place_of_update: bool = False
    """Whether a move takes the place of its step's update, as RigL publishes it."""
    retired: NonNegativeFloat = 0.0
    """Room for retired units, as a fraction of the trained ones. A unit that leaves with a learned change then keeps
    it: it is frozen, goes on adding to the weight, merges and saves like any other, and may be trained again later. 0:
    its change is lost. Costs as much memory a unit as a trained one (about 16 bytes an entry with Adam) and one byte
    for the mark. When the room is full, the retired units with the smallest sum of |value| lose their change, which is
    counted (`lost` in the runner's events) and warned of once."""

    space: Literal["support", "mask"] = "support"
    """What moves: the support of a sparse adapter, or the mask of a masked one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        reads = self.grow.reads_for
        if reads > self.every:
            raise ValueError(
                f"Regrow.grow={self.grow} reads gradients for {reads} steps before a move, and every={self.every} is "
                "less. Raise every, or lower these steps."
            )
        require(self.first is None or self.first >= reads, self, "first", f"None or a step >= {reads}")
        start, end = self.curve(0.0), self.curve(1.0)
        ok = 0 < start <= 1 and 0 <= end <= start
        require(ok, self, "fraction", "a number in (0, 1], or a curve from there down to 0 or above")
        accepted = f"a criterion for who leaves with grow={self.grow}"
        require(self.drop is not None or self.grow.chooses_all, self, "drop", accepted)

    # What others ask

    @property
    def acts_on(self) -> frozenset[str]:
        """The kind of `space`."""
        return frozenset({self.space})

    @property
    def writes(self) -> frozenset[str]:
        """Which units live; of a support also which are updated."""
        return frozenset({"units", "trains"} if self.space == "support" else {"units"})

    @property
    def needs(self) -> frozenset[str]:
        """`gradient` where the growth reads dense gradients."""
        return frozenset({"gradient"} if self.grow.reads_for else ())

    @property
    def freezes_units(self) -> bool:
        """Whether units retire."""
        return self.retired > 0

    @property
    def extra_capacity(self) -> float:
        """Room for retired units."""
        return self.retired

    @property
    def curve(self) -> Curve:
        """`fraction` as a curve."""
        return self.fraction if isinstance(self.fraction, Curve) else Constant(self.fraction)

    @property
    def first_step(self) -> int:
        """Step after which the first move comes."""
        return self.first if self.first is not None else self.grow.first_move(self.every)

    @property
    def replaces_random_start(self) -> bool:
        """Whether the first move replaces every unit of a support that is a random draw without trained values."""
        if self.replace_all_first is None:
            return self.grow.replaces_random_start and isinstance(self.fraction, Linear)
        return self.replace_all_first

    def moves_after(self, update: int, total_steps: int | None = None) -> bool:
        """Whether the support moves after the `update`-th optimizer step: after `first_step` and every `every` on, as
        long as `update` is less than `stop_at` of `total_steps`. Never after the last update, where units would enter
        untrained."""
        if update < self.first_step or (update - self.first_step) % self.every:
            return False
        return total_steps is None or update < self.stop_at * total_steps

    def reads_at(self, update: int) -> bool:
        """Whether dense gradients are read at the `update`-th optimizer step, if a move comes at the end of these."""
        return (self.first_step - update) % self.every < self.grow.reads_for

    def replaced_fraction(self, update: int, total_steps: int, replaces_start: bool | None = None) -> float:
        """Fraction of a layer's trained units that the move after `update` replaces; 1 at the very first move with
        `replaces_start`, that of a random start unless it is given."""
        if update == self.first_step and (self.replaces_random_start if replaces_start is None else replaces_start):
            return 1.0
        return self.curve(min(update / (self.stop_at * total_steps), 1.0))

    @property
    def takes_shards(self) -> bool:
        """Where supports move and none retires, by drop and growth that take them."""
        parts = self.drop is not None and self.drop.takes_shards and self.grow.takes_shards
        return self.space == "support" and not self.retired and parts

    def check(self, config: Any) -> None:
        """Refuse an adapter without a support, units that the growth cannot rank, and room without a size."""
        super().check(config)
        check_kind(self, config)
        if self.space == "mask":
            self._check_mask()
            return
        if not config.has_support:
            raise ValueError("Regrow moves the support, and density=0 leaves it out. Set density > 0.")
        if "entries" in self.grow.needs:
            check_entries(f"Regrow.grow={self.grow}", config)
        if self.retired and config.calibrates_sizes:
            raise ValueError(
                "Regrow.retired allocates room by each support's size, and budget=Global(...) and structures of "
                f"scope='model' leave the sizes to criterion='{config.criterion.part_type}'. Set a density or "
                "ErdosRenyi, and scope='block'."
            )

    def _check_mask(self) -> None:
        """Entries of a mask have no numbers, ages or optimizer state of their own to rank them by."""
        for name, accepted in (("drop", ("magnitude", "signed_magnitude")), ("grow", ("gradient", "random"))):
            part = getattr(self, name)
            if part is None or part.part_type not in accepted:
                raise ValueError(
                    f"Regrow.{name}={part} ranks units by numbers of their own, which entries of a mask do not have. "
                    f"Set {name} to one of {accepted}."
                )
        require(not self.retired, self, "retired", "0 with space='mask', where no unit has a change to keep")

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """What drop and growth keep, and the mark of retired units."""
        found = super().state(space)
        return [*found, frozen_state(space)] if self.retired else found

    # In training

    def begin(self, run: Run) -> None:
        """At least one move, and an update after it, must fit into the run."""
        run.memory.measured = {}
        if not self.moves_after(self.first_step, run.total_steps):
            timing = f"Regrow.first={self.first}" if self.first is not None else f"Regrow.every={self.every}"
            if self.first is None and self.first_step == self.grow.reads_for:
                timing = f"{type(self.grow).__name__}.steps={self.first_step}"
            raise ValueError(
                f"{timing} is not less than stop_at={self.stop_at} of the run's {run.total_steps} steps: the support "
                "would never move. Train longer, lower it, or leave the rule out."
            )
        if not run.resumed:
            run.saved["replaces_start"] = replaces_start(run)
            self._check_effect(run)
        elif "replaces_start" not in run.saved:
            run.saved["replaces_start"] = restored_start(run)
        self.grow.begin(run)
        if self.in_place_of_update:
            refuse_unskippable(run, "Regrow.in_place_of_update")
        if self.retired:
            hold_frozen(run)

    def _check_effect(self, run: Run) -> None:
        """Name the layers that no move changes."""
        spaces = [space for space in run.spaces(training=False) if space.count]  # the others wait for data
        full = [space for space in spaces if space.count == space.size]
        report_idle(
            [space.name for space in full],
            len(spaces),
            "Regrow never moves a unit, because the support holds every unit of the weight,",
            "Lower density, or leave these layers out (ByModule) or the rule.",
        )
        if self.retired:
            cramped = [space.name for space in spaces if space.capacity == space.count]
            cause = f"Regrow.retired={self.retired} leaves room for 0 units: none ever retires"
            report_idle(cramped, len(spaces), cause, "Raise retired, or set it to 0.")
        if self.drop is None:
            return
        replaces = run.saved["replaces_start"]
        due = range(self.first_step, run.total_steps, self.every)
        due = [update for update in due if self.moves_after(update, run.total_steps)]
        fractions = [self.replaced_fraction(update, run.total_steps, replaces) for update in due]
        once = replaces and len(fractions) > 1
        largest = max(fractions[1:] if once else fractions)
        trained = {space: int(space.trained().sum()) for space in spaces}
        idle = [space for space in spaces if int(largest * trained[space]) == 0 and space not in full]
        sizes = sorted({trained[space] for space in idle})
        report_idle(
            [space.name for space in idle],
            len(spaces),
            f"Regrow.fraction={self.fraction} of {' or '.join(map(str, sizes[:3]))} units rounds to 0 units at every "
            f"move{' after the first' if once else ': no unit ever moves'}",
            "Raise fraction or density, choose a finer granularity, or leave the rule out.",
        )

    def before_step(self, run: Run) -> None:
        """Read dense gradients where the coming step needs them."""
        update = run.step + 1
        ahead = (self.first_step - update) % self.every
        if not self.reads_at(update) or not self.moves_after(update + ahead, run.total_steps):
            return
        for space in run.spaces(training=False):
            # The phase's place follows from the step number, so a resumed run knows where it stands.
            starts = ahead == self.grow.reads_for - 1
            reader = self.grow.reader(run, space, starts, partial(self._ahead, run, space, update + ahead))
            if space.trains:
                run.read_gradient(space, reader)

    def gradients(self, run: Run) -> None:
        """Leave the step's update out where a move takes its place."""
        due = self._due(run, run.step + 1)
        if self.drop is not None:
            run.memory.measured = {space: self.drop.measure(space) for space in due}
        if self.in_place_of_update:
            leave_update_out(due)

    def after_step(self, run: Run) -> None:
        """Move the supports that are due."""
        due, without, moved = self._due(run, run.step), [], []
        for space in due:
            one = self._move(run, space)
            if one is None:
                without.append(space)
                one = Moved(0, space.count - space.trained_units().numel(), 0)
            moved.append(one)
        if due:
            event = {"replaced": sum(one.entered for one in moved)}
            event["alive"] = sum(space.trained_units().numel() for space in due)
            if self.retired:
                event["retired"], event["lost"] = sum(one.retired for one in moved), sum(one.lost for one in moved)
            run.record(**event)
            run.report_missing(without, len(due) - len(without), f"the {self.space} was not moved")
        run.memory.measured = {}

    def _due(self, run: Run, update: int) -> list[UnitSpace]:
        """The spaces that move after `update`: what is held still at that step stays as it is."""
        moves = update < run.total_steps and self.moves_after(update, run.total_steps)
        return run.spaces() if moves else []

    def _count(self, run: Run, space: UnitSpace, update: int) -> int:
        fraction = self.replaced_fraction(update, run.total_steps, run.saved["replaces_start"])
        return int(fraction * int(space.trained().sum()))

    @torch.no_grad()
    def _ahead(self, run: Run, space: UnitSpace, update: int) -> Move:
        """The move after `update` as it would be now; where the drop needs what is not there yet, by magnitude."""
        units, count = space.trained_units(), self._count(run, space, update)
        importance = None
        if space.pattern is not None and self.drop is not None:
            importance = self.drop.importance(space, None)
            if not self.drop.can_rank(importance, count):
                importance = unit_sums(space.living_values())[space.trained()].nan_to_num()
        return Move(space, update, units, count, importance)

    @torch.no_grad()
    def _move(self, run: Run, space: UnitSpace) -> Moved | None:
        """Move one layer's support; None where nothing says which units matter, and they stay."""
        units, count, importance = space.trained_units(), self._count(run, space, run.step), None
        if self.drop is not None:
            if count == 0:
                return Moved(0, space.count - units.numel(), 0)
            importance = self.drop.importance(space, run.memory.measured.get(space))
            if not self.drop.can_rank(importance, count):
                return None
        move = Move(space, run.step, units, count, importance, run.optimizer, run.readers.get(space))
        grown = self.grow.grow(move)
        if grown is None:
            return None
        if space.pattern is not None:
            space.pattern.check_units(grown, space.grid, f"{space.name} after {self.grow}")
        moved = move_trained_units(run, space, grown, self.grow.seeds(move))
        if self.drop is not None:
            self.drop.moved(space, units, run.step)
        return moved
