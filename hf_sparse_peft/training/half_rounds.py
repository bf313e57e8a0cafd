"""`HalfRoundsCallback`: half of the matrices train in a round, the other half waits with what it has learned (HFT)."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainingArguments

from ..optim import innermost
from ..rules.no_effect import report_idle
from ..sparsity import random_units, stream_seed
from ..tuners.shared.layer import AdapterLayer
from ..tuners.sparse_lora import HalfRoundsConfig, SparseLoraConfig
from ..tuners.sparse_lora.structure_config import ends_with
from ..tuners.sparse_lora.structures import block_of
from .base import ScheduleCallback


def choose_half(config: HalfRoundsConfig, names: list[str], number: int, seed: int) -> set[str]:
    """The modules of `names` that train in round `number` (from 0), drawn from `seed` alone.

    In each category (or block, or the model: `config.level`) `fraction` of the matrices; where that is no whole number,
    a random half of the places (a share of them that keeps the sum) rounds up and the others down.

    Raises:
        ValueError: a module belongs to no category.
    """
    chosen: set[str] = set()
    for (category, size), places in _pools(config, names).items():
        generator = torch.Generator().manual_seed(stream_seed(seed, "rounds", number, category, size))
        low, ups = _share(config, size, len(places), number)
        up = set(random_units(len(places), min(ups, len(places)), generator).tolist())
        for at, members in enumerate(places):
            chosen |= {members[i] for i in random_units(size, min(size, low + (at in up)), generator).tolist()}
    return chosen


def _pools(config: HalfRoundsConfig, names: list[str]) -> dict[tuple[str, int], list[list[str]]]:
    """Places of one category and one number of matrices."""
    pools: dict[tuple[str, int], list[list[str]]] = {}
    for (category, _), members in _places(config, names).items():
        pools.setdefault((category, len(members)), []).append(members)
    return pools


def _share(config: HalfRoundsConfig, size: int, places: int, number: int) -> tuple[int, int]:
    """How many of `size` matrices train in each place, and in how many of the places one more."""
    low = math.floor(config.fraction * size + 1e-9)
    # Where the sum itself is no whole number, rounds take turns in rounding it down and up.
    return low, math.floor((config.fraction * size - low) * places + 0.5 * (number % 2) + 1e-9)


def _never_trained(config: HalfRoundsConfig, names: list[str]) -> list[str]:
    """Modules of places where no round trains a matrix."""
    never = []
    for (_, size), places in _pools(config, names).items():
        shares = [_share(config, size, len(places), number) for number in (0, 1)]
        if not any(low or ups for low, ups in shares):
            never += [name for one in places for name in one]
    return never


def _places(config: HalfRoundsConfig, names: list[str]) -> dict[tuple[str, str], list[str]]:
    places: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found = [c for c, endings in config.categories.items() if any(ends_with(name, e) for e in endings)]
        if not found:
            raise ValueError(
                f"rounds.categories has no category for '{name}': it lists {config.categories}. Add the module's "
                "ending to one, or leave it out of target_modules."
            )
        category = found[0] if config.level == "category" else config.level
        block = "" if config.level == "model" else block_of(name)
        places.setdefault((category, block), []).append(name)
    return places


class HalfRoundsCallback(ScheduleCallback):
    """Freezes half of the matrices of adapters that set `rounds`, another half every round (HFT; Hui et al., 2024).

    Frozen matrices keep what they have learned: it stays in the output, in files and in merges. They have no gradient,
    so that no optimizer touches them, weight decay included, and at a round's start the optimizer's state of the whole
    adapter is dropped. The learning rate's schedule goes on. Which half trains follows from the config's seed and the
    step, the same on every rank and after a resume.

    Under DDP gradients of frozen matrices do not arrive: `ddp_find_unused_parameters` must not be False.
    """

    option = "rounds"

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []
        """One record a round: `round`, `step`, `trains` (module names), `share` of the adapted weights that trains."""
        self._steps_per_epoch: int | None = None
        self._current: dict[int, int] = {}
        self._resting: dict[int, list[torch.nn.Parameter]] = {}

    def wants(self, layer: AdapterLayer, adapter: str) -> bool:
        """Every layer of an adapter that is not for inference; frozen ones belong to it too."""
        return layer.holds(adapter) and not layer.adapter_configs[adapter].inference_mode

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs) -> None:
        """Find the layers and the length of a round.

        Raises:
            ValueError: as every schedule's; a parameter that is frozen already (the optimizer has left it out), rounds
                of an epoch without a known length, or DDP that waits for every gradient.
        """
        self._steps_per_epoch = _steps_per_epoch(train_dataloader, args)
        self._current, self._resting, self.records = {}, {}, []
        super().on_train_begin(args, state, control, model=model, **kwargs)
        refuse_fixed_ddp(args, "rounds")
        for part in self.parts:
            if not all(p.requires_grad for p in part.tensors):
                raise ValueError(
                    f"'{part.name}' is frozen at the start, so the optimizer was built without it. Call "
                    f"model.set_adapter('{part.adapter}') before training."
                )

    def check_length(self, config: SparseLoraConfig) -> None:
        """A round must end before the run does, and an epoch must have a length."""
        if config.rounds.round_steps is not None and config.rounds.round_steps > self.total_steps:
            raise ValueError(
                f"rounds.round_steps={config.rounds.round_steps} is more than the run's {self.total_steps} steps. "
                "Shorten the rounds, train longer, or set round_steps=None for an epoch."
            )
        if config.rounds.round_steps is None and self._steps_per_epoch is None:
            raise ValueError(
                "rounds.round_steps=None makes an epoch a round, and this data has no length. Set rounds.round_steps."
            )
        choose_half(config.rounds, self._names(config), 0, config.seed)  # finds modules without a category now

    def check_effect(self, config: SparseLoraConfig) -> None:
        """Name the matrices that never train.

        Raises:
            ValueError: a round of the run trains no matrix at all.
        """
        names, rounds = self._names(config), config.rounds
        length = rounds.round_steps or self._steps_per_epoch
        for number in range(min(2, math.ceil(self.total_steps / length))):  # shares alternate between two rounds
            if not choose_half(rounds, names, number, config.seed):
                raise ValueError(
                    f"rounds.fraction={rounds.fraction} of the matrices rounds to 0 in round {number}: nothing would "
                    f"train. Raise fraction, set level='model', or adapt more than {len(names)} matrices."
                )
        report_idle(
            _never_trained(rounds, names),
            len(names),
            f"rounds.fraction={rounds.fraction} of the matrices of one {rounds.level} rounds to 0 in every round: they "
            "never train",
            "Raise fraction, or set level='block' or 'model'.",
        )

    def _names(self, config: SparseLoraConfig) -> list[str]:
        return [part.name for part in self.parts if part.config is config]

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Start the round that the coming step belongs to, if it is not on yet."""
        for config in self.configs():
            number, offset = divmod(state.global_step, config.rounds.round_steps or self._steps_per_epoch)
            if self._current.get(id(config)) != number:
                self._current[id(config)] = number
                self._start(config, number, state.global_step, optimizer if offset == 0 else None)

    def _start(self, config: SparseLoraConfig, number: int, step: int, optimizer: Any) -> None:
        chosen = choose_half(config.rounds, self._names(config), number, config.seed)
        kept = innermost(optimizer).state if optimizer is not None else {}
        for part in self.parts:
            if part.config is not config:
                continue
            for tensor in part.tensors:
                kept.pop(tensor, None)
        self._resting[id(config)] = [t for p in self.parts_of(config) if p.name not in chosen for t in p.tensors]
        self.run.mask.hold(self, [tensor for tensors in self._resting.values() for tensor in tensors])
        sizes = {p.name: p.layer.in_features * p.layer.out_features for p in self.parts if p.config is config}
        share = sum(size for name, size in sizes.items() if name in chosen) / sum(sizes.values())
        self.records.append({"round": number, "step": step, "trains": sorted(chosen), "share": share})

    def release(self) -> None:
        """Let everything train again, for the next run's optimizer."""
        self._resting = {}
        if self.run is not None:
            self.run.mask.hold(self, [])


def refuse_fixed_ddp(args: TrainingArguments, option: str) -> None:
    """Raises `ValueError` where DDP would wait for gradients of frozen parameters."""
    if args.world_size > 1 and getattr(args, "ddp_find_unused_parameters", None) is False:
        raise ValueError(
            f"{option} freezes parameters in turns, and ddp_find_unused_parameters=False makes DDP wait for their "
            "gradients. Set it to True, or leave it out."
        )


def _steps_per_epoch(train_dataloader: Any, args: TrainingArguments) -> int | None:
    try:
        batches = len(train_dataloader)
    except TypeError:
        return None
    return max(1, -(-batches // args.gradient_accumulation_steps))
