"""`PruningCallback`: supports that thin out along a cubic curve."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..sparsity import make_schedule, stream_seed, top_units
from ..tuners.sparse_lora import SparseLoraConfig
from .base import AdaptedLayer, ScheduleCallback, budget_of_training, unit_sums
from .evidence import MissingEvidence, is_evidence
from .no_effect import report_idle
from .regrowth import moves_after
from .support_moves import replace_units


def living_share(config: SparseLoraConfig, update: int, total_steps: int) -> float:
    r"""Share of the injected units that live after `update` steps: 1 before `begin`, then
    :math:`f + (1-f)(1 - \frac{t-t_b}{t_e-t_b})^3`, and `f = final_fraction` from `end` on (Zhu and Gupta, 2017)."""
    begin, end = _window(config, total_steps)
    progress = (update - begin) / (end - begin)
    return make_schedule("cubic", 1.0, config.pruning.final_fraction)(min(max(progress, 0.0), 1.0))


def _window(config: SparseLoraConfig, total_steps: int) -> tuple[int, int]:
    # Whole steps, or the share at the step nearest to `end` would not be the final one.
    return round(config.pruning.begin * total_steps), round(config.pruning.end * total_steps)


class PruningCallback(ScheduleCallback):
    """Prunes the supports of adapters that set `pruning` (gradual magnitude pruning; Zhu and Gupta, 2017).

    Every `interval` steps of the window, and once at its end, units with the smallest sum of |value| leave until the
    curve's share is left; capacity stays allocated until `compact()`. Where supports regrow as well, units leave at the
    regrowth's moves instead, before new ones enter: a fresh unit is never judged while its value is still 0. Where no
    move comes after the window's end, the last pruning is at its end all the same. Every layer keeps at least one unit.
    A layer whose values are all 0 (it never had a gradient) or not finite keeps its units and is named in a warning.
    Layers at rest lose nothing; they follow every `interval` steps after the window, when they train again.
    """

    option = "pruning"

    def __init__(self) -> None:
        super().__init__()
        self.missing = MissingEvidence("the support was not pruned")

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Find the layers."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.missing.start(state.global_step)

    def check_length(self, config: SparseLoraConfig) -> None:
        """The window must hold at least one step."""
        begin, end = _window(config, self.total_steps)
        if end <= begin:
            raise ValueError(
                f"pruning.begin={config.pruning.begin} and pruning.end={config.pruning.end} leave no step in a run of "
                f"{self.total_steps}. Train longer, widen the window, or set pruning=None."
            )

    def check_effect(self, config: SparseLoraConfig) -> None:
        """Name the layers that lose no unit, and a curve of one step."""
        pruning, parts = config.pruning, self.parts_of(config)
        parts = [part for part in parts if part.units.numel()]  # the others wait for data
        alive = [part.units.numel() for part in parts]
        targets = [max(1, round(pruning.final_fraction * part.values.shape[0])) for part in parts]
        if pruning.scope == "global":
            idle = parts if sum(targets) >= sum(alive) else []
        else:
            idle = [part for part, now, then in zip(parts, alive, targets, strict=True) if then >= now]
        sizes = sorted({part.units.numel() for part in idle})
        report_idle(
            [part.name for part in idle],
            len(parts),
            f"pruning.final_fraction={pruning.final_fraction} keeps all of {' or '.join(map(str, sizes[:3]))} units: 0 "
            "units ever leave",
            "Lower final_fraction, raise density, or set pruning=None.",
        )
        begin, end = _window(config, self.total_steps)
        steps = sum(self._due(config, update) for update in range(begin, end + 1))
        if steps == 1 and end - begin > 1 and len(idle) < len(parts):
            warnings.warn(
                f"pruning.interval={pruning.interval} is not below the window's {end - begin} steps (begin="
                f"{pruning.begin}, end={pruning.end} of {self.total_steps}): all units leave at once, not along a "
                "curve. Lower interval (or regrowth.interval, where supports regrow), widen the window or train "
                "longer.",
                stacklevel=3,
            )

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Prune what is due."""
        for config in self.configs():
            if self._due(config, state.global_step):
                parts = self.parts_of(config)
                train = [part for part in parts if part.trains]
                judged = [part for part in train if is_evidence(part.values.detach()[: part.units.numel()])]
                without = [part.name for part in train if part not in judged and part.values.requires_grad]
                self.missing.record(state.global_step, without, len(judged))
                self.missed = self.missed or len(train) < len(parts)
                share = living_share(config, state.global_step, self.total_steps)
                if judged:
                    resting = [part for part in parts if not part.trains]
                    self._prune(judged, resting, share, optimizer, state.global_step)

    def _due(self, config: SparseLoraConfig, update: int) -> bool:
        begin, end = _window(config, self.total_steps)
        if config.regrowth is None:
            return update == end or (begin < update and (update - begin) % config.pruning.interval == 0)
        # Moves go on after the window; the share is constant there, so that pruning again does nothing.
        if begin < update < self.total_steps and moves_after(config.regrowth, update, self.total_steps):
            return True
        later = range(end, self.total_steps)
        return update == end and not any(moves_after(config.regrowth, step, self.total_steps) for step in later)

    def _prune(
        self, parts: list[AdaptedLayer], resting: list[AdaptedLayer], share: float, optimizer: Any, step: int
    ) -> None:
        targets = [_target(part, share) for part in parts]
        importance = [unit_sums(part.values[: part.units.numel()]) for part in parts]
        seed = parts[0].config.seed
        if parts[0].config.pruning.scope == "global":
            everybody = [*parts, *resting]
            sizes = [_target(part, share) for part in everybody]
            alive = [part.units.numel() for part in everybody]
            total = budget_of_training(sum(sizes), everybody, alive, sizes)
            targets = _global_targets(parts, importance, total, stream_seed(seed, "pruning", step))
        for part, target, worth in zip(parts, targets, importance, strict=True):
            if target < part.units.numel():
                best = top_units(worth, target, seed=stream_seed(seed, "pruning", step, part.name))
                replace_units(part, part.units[best.long()], optimizer)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Say if no layer could ever be judged, and which ones rested whenever they were due."""
        self.missing.finish()
        if self.missed and state.global_step >= state.max_steps:
            for config in self.configs():
                parts, share = self.parts_of(config), config.pruning.final_fraction
                over = [part.name for part in parts if part.units.numel() > _target(part, share)]
                if sum(part.units.numel() for part in parts) > sum(_target(part, share) for part in parts):
                    warnings.warn(
                        f"pruning.final_fraction={share} was not reached: {len(over)} layers, such as '{over[0]}', "
                        "rested whenever they were due. Shorten the rounds, or end the pruning earlier (pruning.end).",
                        stacklevel=2,
                    )
        super().on_train_end(args, state, control, **kwargs)


def _target(part: AdaptedLayer, share: float) -> int:
    return max(1, round(share * part.values.shape[0]))


def _global_targets(parts: list[AdaptedLayer], importance: list[torch.Tensor], total: int, seed: int) -> list[int]:
    """Units each layer keeps when its best one and the best of all others, by mean |value|, stay: `total` together."""
    means = [
        worth.cpu() / part.layer.sparse_lora_grid[part.adapter].unit_numel
        for part, worth in zip(parts, importance, strict=True)
    ]
    for mean in means:
        mean[mean.argmax()] = torch.inf  # which of equal ones is no matter: counts are read off
    sizes = torch.tensor([worth.numel() for worth in importance])
    kept = top_units(torch.cat(means), min(total, int(sizes.sum())), seed=seed)
    owner = torch.bucketize(kept.long(), sizes.cumsum(0), right=True)
    return torch.bincount(owner, minlength=len(parts)).tolist()
