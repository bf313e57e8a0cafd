"""`MaskRegrowthCallback`: supports that move, SpIEL-AG."""

from __future__ import annotations

from typing import Any

import torch

from ..sparsity import make_schedule, top_units
from ..tuners.sparse_lora import RegrowthConfig, SparseLoraConfig
from .base import AdaptedLayer, ScheduleCallback, unit_sums
from .candidates import CandidateCollector
from .support_moves import replace_units


def is_collecting(config: RegrowthConfig, update: int) -> bool:
    """Whether the `update`-th optimizer step (from 1) collects gradients: the `collect_steps` up to a move."""
    return (config.collect_steps - update) % config.interval < config.collect_steps


def moves_after(config: RegrowthConfig, update: int) -> bool:
    """Whether the support moves after the `update`-th optimizer step: after `collect_steps` and every `interval` on."""
    return update >= config.collect_steps and (update - config.collect_steps) % config.interval == 0


def replaced_fraction(config: RegrowthConfig, update: int, total_steps: int) -> float:
    r"""Share of a layer's units that the move after `update` replaces: :math:`p(t) = p_0 (1 - t/T)` (linear),
    :math:`p_0 (1 + \cos(\pi t/T))/2` (cosine), :math:`p_0`; 1 at the very first move with `replace_all_first`."""
    if config.replace_all_first and update == config.collect_steps:
        return 1.0
    end = config.fraction if config.schedule == "constant" else 0.0
    return make_schedule(config.schedule, config.fraction, end)(min(update / total_steps, 1.0))


class MaskRegrowthCallback(ScheduleCallback):
    """Moves the supports of adapters that set `regrowth` (SpIEL-AG; Ansell et al., 2024).

    In the `collect_steps` before a move every layer's dense gradient is read inside its backward pass and reduced to
    `k` candidates. At the move each layer drops its units with the smallest sum of |value| and grows the candidates
    with the largest |summed gradient|. A unit that is dropped and grown at once keeps value and moments; grown ones
    start at value 0, with moments and age seeded from their candidate gradients.

    Two departures from the official code, both its faults: squares are those of whole optimizer steps, not of
    micro-batches, and every phase collects `collect_steps` updates (the code: one more in all but the first).
    """

    option = "regrowth"

    def __init__(self) -> None:
        super().__init__()
        self.collectors: list[CandidateCollector] = []
        self.replaced: list[dict[str, Any]] = []
        """One record a move: step, units replaced, units alive."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Find the layers; forget what a run that was broken off left behind."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.collectors = []
        for part in self.parts:
            part.layer.sparse_lora_sink.pop(part.adapter, None)

    def check_length(self, config: SparseLoraConfig) -> None:
        """At least one move, and an update after it, must fit into the run."""
        if config.regrowth.collect_steps >= self.total_steps:
            raise ValueError(
                f"regrowth.collect_steps={config.regrowth.collect_steps} is not less than the run's {self.total_steps} "
                "steps: the support would never move. Train longer, lower it, or set regrowth=None."
            )

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Listen to dense gradients where the coming step collects."""
        update = state.global_step + 1
        for part in self.parts:
            if is_collecting(part.config.regrowth, update):
                # Phases start right after a multiple of the interval, so a resumed run knows where it stands.
                starts = (update - 1) % part.config.regrowth.interval == 0
                collector = CandidateCollector(part, starts)
                part.layer.sparse_lora_sink[part.adapter] = collector
                self.collectors.append(collector)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Close the step's accumulation."""
        scaler = getattr(optimizer, "scaler", None)
        loss_scale = float(scaler.get_scale()) if scaler is not None else 1.0
        for collector in self.collectors:
            collector.finish_step(loss_scale)
            del collector.part.layer.sparse_lora_sink[collector.part.adapter]
        self.collectors = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Move the supports that are due; not after the last update, where units would enter untrained."""
        if state.global_step >= self.total_steps:
            return
        due = [part for part in self.parts if moves_after(part.config.regrowth, state.global_step)]
        moved = sum(self._move(part, state.global_step, optimizer) for part in due)
        if due:
            alive = sum(part.units.numel() for part in due)
            self.replaced.append({"step": state.global_step, "replaced": moved, "alive": alive})

    def _move(self, part: AdaptedLayer, update: int, optimizer: Any) -> int:
        config = part.config.regrowth
        collector = CandidateCollector(part)
        candidates, (gradients, squares) = collector.units, collector.sums
        if not candidates.numel():
            return 0
        count = int(replaced_fraction(config, update, self.total_steps) * part.units.numel())
        new_units = choose_units(part.units, unit_sums(part.values[: part.units.numel()]), candidates, gradients, count)
        seeds = None
        if config.seed_moments:
            age = config.collect_steps
            seeds = {"units": candidates, "grad_mean": gradients / age, "grad_sq_mean": squares / age, "age": age}
        return replace_units(part, new_units, optimizer, seeds)


def choose_units(
    units: torch.Tensor, importance: torch.Tensor, candidates: torch.Tensor, gradients: torch.Tensor, count: int
) -> torch.Tensor:
    """The support after `count` units with the smallest `importance` made room for the best candidates.

    A candidate competes unless it is still active after the drop. Where fewer candidates than `count` compete, the most
    important of the dropped units stay, so that the number of units never changes. Ties go to the lowest unit.

    Shapes: `units` `[a]` sorted, `importance` `[a]`; `candidates` `[c]` sorted, `gradients` `[c, ...]`. Returns `[a]`
    sorted.
    """
    if count == 0:
        return units
    dropped = top_units(importance, count, largest=False).long()
    survives = torch.ones_like(units, dtype=torch.bool)
    survives[dropped] = False
    survivors = units[survives]
    competes = ~torch.isin(candidates, survivors)
    rivals, strength = candidates[competes], unit_sums(gradients[competes])
    if not rivals.numel():
        return units
    grown = rivals[top_units(strength, min(count, rivals.numel())).long()]
    missing = count - grown.numel()
    if missing:
        back = units[dropped][~torch.isin(units[dropped], grown)]
        worth = importance[dropped][~torch.isin(units[dropped], grown)]
        grown = torch.cat([grown, back[top_units(worth, min(missing, back.numel())).long()]])
    return torch.cat([survivors, grown.to(units.dtype)]).sort().values
