"""`AlternateModules`: block-coordinate training, a fraction of the modules at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch

from ..optim import innermost
from ..sparsity import random_units, stream_seed
from ..utils.module_names import block_of, ends_with
from ..utils.option_types import PositiveInt, Range
from ..utils.parts import register_part, require
from .no_effect import report_idle
from .rule import Rule
from .run import Run, refuse_fixed_ddp
from .space import ModuleSpace


def _llama_categories() -> dict[str, list[str]]:
    return {
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "ffn": ["gate_proj", "up_proj", "down_proj"],
    }


@register_part("alternate_modules")
@dataclass(frozen=True)
class AlternateModules(Rule):
    r"""Block-coordinate training: a fraction of the adapted modules is updated per period, the others are frozen (HFT;
    Hui et al., 2024).

    In period `k` (from 0) a random `fraction` of the modules of each category of each block (`level`) trains. Where
    that is no whole number, a random part of these groups rounds up and the others down, so that the sum is right.
    Frozen modules keep what they have learned: it stays in the output, in files and in merges. They have no gradient,
    so that no optimizer touches them, weight decay included, and at a period's start the optimizer state of the whole
    adapter is dropped. The learning rate's schedule goes on. Which modules train follows from the adapter's seed and
    the step, the same on every rank and after a resume.

    It works on every tuner of this package, and on upstream peft's layers where it is given to a callback:
    `RuleRunner(AlternateModules())`. Under DDP `ddp_find_unused_parameters` must not be False.
    """

    period_steps: PositiveInt | None = None
    """Optimizer steps of a period; None: an epoch."""
    fraction: Annotated[float, Range(above=0, below=1)] = 0.5
    """Fraction of the modules that trains (the paper finds 0.5 best)."""
    level: Literal["category", "block", "model"] = "category"
    """Among which modules the fraction is drawn: those of one category in one block; all of one block; all of the
    model."""
    categories: dict[str, list[str]] = field(default_factory=_llama_categories)
    """Category -> endings of module names. Every adapted module belongs to one."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"module"})
    writes: ClassVar[frozenset[str]] = frozenset({"trains"})

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = bool(self.categories) and all(self.categories.values())
        require(ok, self, "categories", "a dict of category -> list of module name endings")

    def choose(self, names: Sequence[str], period: int, seed: int) -> set[str]:
        """The modules of `names` that train in `period` (from 0), drawn from `seed` alone.

        Raises:
            ValueError: a module belongs to no category.
        """
        chosen: set[str] = set()
        for (category, size), groups in self._pools(names).items():
            generator = torch.Generator().manual_seed(stream_seed(seed, "rounds", period, category, size))
            low, ups = self._count(size, len(groups), period)
            up = set(random_units(len(groups), min(ups, len(groups)), generator).tolist())
            for at, members in enumerate(groups):
                chosen |= {members[i] for i in random_units(size, min(size, low + (at in up)), generator).tolist()}
        return chosen

    def _pools(self, names: Sequence[str]) -> dict[tuple[str, int], list[list[str]]]:
        """Groups of one category and one number of modules."""
        pools: dict[tuple[str, int], list[list[str]]] = {}
        for (category, _), members in self._groups(names).items():
            pools.setdefault((category, len(members)), []).append(members)
        return pools

    def _groups(self, names: Sequence[str]) -> dict[tuple[str, str], list[str]]:
        groups: dict[tuple[str, str], list[str]] = {}
        for name in names:
            found = [c for c, endings in self.categories.items() if any(ends_with(name, e) for e in endings)]
            if not found:
                raise ValueError(
                    f"AlternateModules.categories has no category for '{name}': it lists {self.categories}. Add the "
                    "module's ending to one, or leave it out of target_modules."
                )
            category = found[0] if self.level == "category" else self.level
            block = "" if self.level == "model" else block_of(name)
            groups.setdefault((category, block), []).append(name)
        return groups

    def _count(self, size: int, groups: int, period: int) -> tuple[int, int]:
        """How many of `size` modules train in each group, and in how many of the groups one more."""
        low = math.floor(self.fraction * size + 1e-9)
        # Where the sum itself is no whole number, periods take turns in rounding it down and up.
        return low, math.floor((self.fraction * size - low) * groups + 0.5 * (period % 2) + 1e-9)

    def _never_chosen(self, names: Sequence[str]) -> list[str]:
        """Modules of groups where no period trains one."""
        never = []
        for (_, size), groups in self._pools(names).items():
            counts = [self._count(size, len(groups), period) for period in (0, 1)]
            if not any(low or ups for low, ups in counts):
                never += [name for members in groups for name in members]
        return never

    # In training

    def begin(self, run: Run) -> None:
        """Every module has a category and trains, and the run holds a whole period."""
        refuse_fixed_ddp(run, "AlternateModules")
        for space in run.spaces(training=False):
            if not all(parameter.requires_grad for parameter in space.parameters()):
                raise ValueError(
                    f"'{space.name}' is frozen at the start, so the optimizer was built without it. Call "
                    f"model.set_adapter('{space.adapter}') before training."
                )
        if self.period_steps is not None and self.period_steps > run.total_steps:
            raise ValueError(
                f"AlternateModules.period_steps={self.period_steps} is more than the run's {run.total_steps} steps. "
                "Shorten the periods, train longer, or set period_steps=None for an epoch."
            )
        if self._length(run) is None:
            raise ValueError(
                "AlternateModules.period_steps=None makes an epoch a period, and this data has no length. Set "
                "period_steps."
            )
        run.memory.period = None
        self.choose(_names(run), 0, run.seed)  # finds modules without a category now
        if not run.resumed:  # a resumed run said it at its start
            self._check_effect(run)

    def _length(self, run: Run) -> int | None:
        return self.period_steps or run.training.steps_per_epoch

    def _check_effect(self, run: Run) -> None:
        """Name the modules that never train; refuse a period that trains none at all."""
        names = _names(run)
        for period in range(min(2, math.ceil(run.total_steps / self._length(run)))):  # counts alternate between two
            if not self.choose(names, period, run.seed):
                raise ValueError(
                    f"AlternateModules.fraction={self.fraction} of the modules rounds to 0 in period {period}: nothing "
                    f"would train. Raise fraction, set level='model', or adapt more than {len(names)} modules."
                )
        report_idle(
            self._never_chosen(names),
            len(names),
            f"AlternateModules.fraction={self.fraction} of the modules of one {self.level} rounds to 0 in every "
            "period: they never train",
            "Raise fraction, or set level='block' or 'model'.",
        )

    def before_step(self, run: Run) -> None:
        """Begin the period that the coming step belongs to, if it has not begun."""
        period, offset = divmod(run.step, self._length(run))
        if run.memory.period == period:
            return
        run.memory.period = period
        spaces = run.spaces(training=False)
        chosen = self.choose(_names(run), period, run.seed)
        if offset == 0:
            _drop_state(run.optimizer, spaces)
        run.updates.hold(run, [p for space in spaces if space.name not in chosen for p in space.parameters()])
        sizes = {space.name: space.unit_numel for space in spaces}
        fraction = sum(size for name, size in sizes.items() if name in chosen) / sum(sizes.values())
        run.record(period=period, trains=sorted(chosen), fraction=fraction)

    def release(self, run: Run) -> None:
        """Let everything train again, for the next run's optimizer."""
        run.updates.hold(run, [])


def _names(run: Run) -> list[str]:
    return [space.name for space in run.spaces(training=False)]


def _drop_state(optimizer: Any, spaces: Sequence[ModuleSpace]) -> None:
    state = innermost(optimizer).state if optimizer is not None else {}
    for space in spaces:
        for parameter in space.parameters():
            state.pop(parameter, None)
