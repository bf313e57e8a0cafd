"""`MaskRegrowthCallback`: supports that move."""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_callback import ExportableState

from ..optim import SparseSM3, innermost
from ..rules.evidence import MissingEvidence
from ..rules.no_effect import report_idle
from ..sparsity import make_curve
from ..tuners.sparse_lora import RegrowthConfig, SparseLoraConfig
from .base import AdaptedLayer, ScheduleCallback
from .candidates import CandidateCollector
from .drops import can_drop, importance, step_sensitivity
from .first_move import replaces_start, restored_start
from .frozen_units import FrozenUnits, Settled, settle
from .growth import GROWTH_RULES, Move, choose_units, mark_fired
from .step_gradients import StepGradient
from .support_moves import leave_update_out, refuse_unskippable


def is_collecting(config: RegrowthConfig, update: int) -> bool:
    """Whether the `update`-th optimizer step (from 1) collects gradients: the `collect_steps` up to a move."""
    return config.collects and (config.first - update) % config.interval < config.collect_steps


def moves_after(config: RegrowthConfig, update: int, total_steps: int | None = None) -> bool:
    """`config.moves_after`."""
    return config.moves_after(update, total_steps)


def replaced_fraction(
    config: RegrowthConfig, update: int, total_steps: int, replaces_start: bool | None = None
) -> float:
    r"""Share of a layer's units that the move after `update` replaces: with :math:`T_e` the `stop_at` share of the
    steps, :math:`p_e + (p_0 - p_e)(1 - t/T_e)` (linear), :math:`p_e + (p_0 - p_e)(1 + \cos(\pi t/T_e))/2` (cosine),
    :math:`p_0 (p_e/p_0)^{t/T_e}` (exponential), :math:`p_0`; 1 at the very first move with `replaces_start`, that of a
    random start unless it is given."""
    if update == config.first and (config.replaces_random_start if replaces_start is None else replaces_start):
        return 1.0
    schedule = make_curve(config.schedule, config.fraction, config.final_fraction)
    return schedule(min(update / (config.stop_at * total_steps), 1.0))


def check_moves(parts: list[AdaptedLayer], total_steps: int, replaces_start: bool) -> None:
    """Name the layers of one adapter that no move of a run changes."""
    config = parts[0].config.regrowth
    parts = [part for part in parts if part.units.numel()]  # the others wait for data
    full = [part for part in parts if part.units.numel() == part.layer.sparse_lora_grid[part.adapter].num_units]
    report_idle(
        [part.name for part in full],
        len(parts),
        "regrowth never moves a unit, because the support holds every unit of the weight,",
        "Lower density, or set regrowth=None or density_pattern for these layers.",
    )
    if config.retired_share:
        cramped = [part.name for part in parts if part.values.shape[0] == part.units.numel()]
        cause = f"regrowth.retired_share={config.retired_share} leaves room for 0 units: none ever retires"
        report_idle(cramped, len(parts), cause, "Raise retired_share, or set it to 0.")
    if config.drop == "none":
        return
    due = range(config.first, total_steps, config.interval)
    shares = [
        replaced_fraction(config, update, total_steps, replaces_start)
        for update in due
        if moves_after(config, update, total_steps)
    ]
    once = replaces_start and len(shares) > 1
    largest = max(shares[1:] if once else shares)
    idle = [part for part in parts if int(largest * int(part.trained.sum())) == 0 and part not in full]
    sizes = sorted({int(part.trained.sum()) for part in idle})
    report_idle(
        [part.name for part in idle],
        len(parts),
        f"regrowth.fraction={config.fraction} of {' or '.join(map(str, sizes[:3]))} units rounds to 0 units at every "
        f"move{' after the first' if once else ': no unit ever moves'}",
        "Raise fraction or density, choose a finer granularity, or set regrowth=None.",
    )


class MaskRegrowthCallback(ScheduleCallback, ExportableState):
    """Moves the supports of adapters that set `regrowth`.

    At a move each layer drops the least important of its trained units (`callbacks.drops`) and grows as many
    (`callbacks.growth`). A unit that is dropped and grown at once keeps value and optimizer state; grown ones start at
    value 0 with zero state, SpIEL-AG's with moments and age seeded from their candidate gradients. With
    `retired_share` whoever leaves with a learned change keeps it (`callbacks.frozen_units`).

    Dense gradients are read inside each layer's backward pass and reduced there: SpIEL-AG's in the `collect_steps`
    before a move (`CandidateCollector`), RigL's at the step of the move (`StepGradient`).

    Where nothing says which units matter (gradients or values that are all 0 or not finite: masked labels, a layer that
    the batches did not reach, an overflow) a layer keeps its units and is named in a warning, once a run.

    Two departures from SpIEL's official code, both its faults: squares are those of whole optimizer steps, not of
    micro-batches, and every phase collects `collect_steps` updates (the code: one more in all but the first).
    """

    option = "regrowth"

    def __init__(self) -> None:
        super().__init__()
        self.collectors: list[CandidateCollector] = []
        self.readings: dict[AdaptedLayer, StepGradient] = {}
        self.sensitivities: dict[AdaptedLayer, torch.Tensor | None] = {}
        self.frozen = FrozenUnits()
        self.missing = MissingEvidence("the support was not moved")
        self.replaces_start: dict[str, bool] = {}
        """Adapter -> whether its first move replaces every unit; saved in `trainer_state.json`."""
        self.replaced: list[dict[str, Any]] = []
        """One record a move: step, units replaced, units alive, and with `retired_share` units retired and lost."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Find the layers; forget what a run that was broken off left behind.

        Raises:
            ValueError: the schedule is longer than the run, the optimizer is not the one that `grow` needs, or fp16
                without clipping cannot leave a step out.
        """
        self.replaces_start = {}
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)
        if state.global_step:
            for parts in self._adapters():
                self.replaces_start[parts[0].adapter] = restored_start(parts, state, type(self).__name__)
        self.collectors, self.readings, self.sensitivities = [], {}, {}
        self.missing.start(state.global_step)
        self.frozen.attach(self.parts)
        for config in self.configs():
            if config.regrowth.grow == "sm3":
                _require_sm3(optimizer)
            if config.regrowth.skip_step:
                refuse_unskippable(args, "regrowth", self.parts_of(config), optimizer)

    def check_length(self, config: SparseLoraConfig) -> None:
        """At least one move, and an update after it, must fit into the run."""
        regrowth = config.regrowth
        if not moves_after(regrowth, regrowth.first, self.total_steps):
            timing = "first_move" if regrowth.first_move is not None else "interval"
            if regrowth.first_move is None and regrowth.first == regrowth.collect_steps:
                timing = "collect_steps"
            raise ValueError(
                f"regrowth.{timing}={regrowth.first} is not less than stop_at={regrowth.stop_at} of the run's "
                f"{self.total_steps} steps: the support would never move. Train longer, lower it, or set regrowth=None."
            )

    def check_effect(self, config: SparseLoraConfig) -> None:
        """Decide what the first move does to the start, and name the layers that no move changes."""
        for parts in self._adapters():
            if parts[0].config is config:
                self.replaces_start[parts[0].adapter] = replaces_start(parts)
                check_moves(parts, self.total_steps, self.replaces_start[parts[0].adapter])

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries (`trainer_state.json`)."""
        return {"args": {}, "attributes": {"replaces_start": dict(self.replaces_start)}}

    def _adapters(self) -> list[list[AdaptedLayer]]:
        """The layers of each adapter."""
        names = dict.fromkeys(part.adapter for part in self.parts)
        return [[part for part in self.parts if part.adapter == name] for name in names]

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Listen to dense gradients where the coming step needs them."""
        update = state.global_step + 1
        for part in self.parts:
            config = part.config.regrowth
            due = update + (config.first - update) % config.interval
            if is_collecting(config, update) and moves_after(config, due, self.total_steps):
                # The phase's place follows from the step number, so a resumed run knows where it stands.
                starts = (config.first - update) % config.interval == config.collect_steps - 1
                collector = CandidateCollector(part, starts)
                if not part.trains:
                    continue
                part.layer.sparse_lora_sink[part.adapter] = collector
                self.collectors.append(collector)
            elif config.grow == "gradient" and part.trains and moves_after(config, update, self.total_steps):
                count = self._count(part, update)
                factor = config.grow_options.get("candidates")
                reading = StepGradient(part, count, args.gradient_accumulation_steps, factor)
                part.layer.sparse_lora_sink[part.adapter] = self.readings[part] = reading

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        """Close a micro-batch: what comes next is another one's gradient."""
        for reader in (*self.collectors, *self.readings.values()):
            reader.finish_micro_batch()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Close the step's accumulation, and leave the step's update out where a move takes its place."""
        scaler = getattr(optimizer, "scaler", None)
        loss_scale = float(scaler.get_scale()) if scaler is not None else 1.0
        for collector in self.collectors:
            collector.finish_step(loss_scale)
            del collector.part.layer.sparse_lora_sink[collector.part.adapter]
        self.collectors = []
        for part, reading in self.readings.items():
            reading.finish()
            del part.layer.sparse_lora_sink[part.adapter]
        due = self._due(state.global_step + 1)
        self.sensitivities = {
            part: step_sensitivity(part) for part in due if part.config.regrowth.drop == "sensitivity"
        }
        leave_update_out([part for part in due if part.config.regrowth.skip_step])
        self.frozen.save()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Put frozen values back."""
        self.frozen.restore()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Move the supports that are due."""
        due = self._due(state.global_step)
        record, without = {"step": state.global_step, "replaced": 0, "alive": 0}, []
        for part in due:
            settled = self._move(part, state.global_step, optimizer)
            if settled is None:
                without += [part.name] if part.values.requires_grad else []  # else another rule rests it
                settled = Settled(0, part.units.numel() - part.trained_units.numel(), 0)
            record["replaced"] += settled.entered
            record["alive"] += part.trained_units.numel()
            if part.config.freezes_units:
                record["retired"] = record.get("retired", 0) + settled.retired
                record["lost"] = record.get("lost", 0) + settled.lost
        if due:
            self.replaced.append(record)
            self.missing.record(state.global_step, without, len(due) - len(without))
        self.readings, self.sensitivities = {}, {}

    def release(self) -> None:
        """Stop reading gradients and holding units."""
        self.frozen.detach()
        for part in self.parts:
            part.layer.sparse_lora_sink.pop(part.adapter, None)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Say so if no move had evidence, and free the schedule's state once the last step is done."""
        self.missing.finish()
        super().on_train_end(args, state, control, **kwargs)

    def _due(self, update: int) -> list[AdaptedLayer]:
        """The layers that move after `update`: what rests at that step stays as it is."""
        if update >= self.total_steps:
            return []
        due = [part for part in self.parts if moves_after(part.config.regrowth, update, self.total_steps)]
        return [part for part in due if part.trains]

    def _count(self, part: AdaptedLayer, update: int) -> int:
        share = replaced_fraction(part.config.regrowth, update, self.total_steps, self.replaces_start.get(part.adapter))
        return int(share * int(part.trained.sum()))

    @torch.no_grad()
    def _move(self, part: AdaptedLayer, update: int, optimizer: Any) -> Settled | None:
        """Move one layer's support; None where nothing says which units matter, and they stay."""
        config, units = part.config.regrowth, part.trained_units
        count = self._count(part, update)
        if config.drop != "none" and count == 0:
            return Settled(0, part.units.numel() - units.numel(), 0)
        worth = importance(part, self.sensitivities.get(part))
        if not can_drop(part, worth, count):
            return None
        candidates, gradients, seeds = units[:0], part.values[:0].detach(), None
        if config.collects:
            collector = CandidateCollector(part)
            candidates, (gradients, squares), age = collector.units, collector.sums, collector.steps
            if config.seed_moments and age:
                seeds = {"units": candidates, "grad_mean": gradients / age, "grad_sq_mean": squares / age, "age": age}
        elif config.grow == "gradient":
            reading = self.readings.get(part)
            if reading is not None and reading.units is not None:
                candidates, gradients = reading.units, reading.gradients
        if part.adapter in part.layer.sparse_lora_fired:
            mark_fired(part, units)
        grown = GROWTH_RULES[config.grow](Move(part, update, units, count, worth, candidates, gradients, optimizer))
        if grown is None:
            return None
        settled = settle(part, grown, optimizer, seeds)
        if part.adapter in part.layer.sparse_lora_entered:
            fresh = torch.isin(part.units, units, invert=True)
            part.layer.sparse_lora_entered[part.adapter][: fresh.numel()][fresh] = update
        return settled


__all__ = ["MaskRegrowthCallback", "choose_units", "is_collecting", "moves_after", "replaced_fraction"]


def _require_sm3(optimizer: Any) -> None:
    found = innermost(optimizer) if optimizer is not None else None
    if not isinstance(found, SparseSM3):
        raise ValueError(
            f"regrowth.grow='sm3' ranks entries by SM3's accumulators, and the optimizer is {type(found).__name__}. "
            "Pass Trainer(optimizers=(methods.get('spiel-ma').optimizer(model, args), None)), or set "
            "grow='accumulated_gradient'."
        )
