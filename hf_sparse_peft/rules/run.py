"""`Run`: one rule's view of the training run that it takes part in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import innermost
from .collectives import world_size
from .space import UnitSpace
from .update_mask import UpdateMask


@dataclass
class Training:
    """What the rules of one training run share. The loop keeps it up to date (`training.runner`, `training.loop`)."""

    model: nn.Module
    total_steps: int
    step: int = 0
    """Optimizer steps done."""
    optimizer: Any = None
    updates: UpdateMask = field(default_factory=UpdateMask)
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    learning_rate: float = 0.0
    """The run's base learning rate."""
    clips: bool = False
    """Whether gradients are clipped (and, under fp16, unscaled) before `gradients`."""
    fp16: bool = False
    """Whether a gradient scaler may skip steps."""
    scaler: Any = None
    """That scaler, where the optimizer does not hold it (accelerate's does)."""
    dataloader: Iterable | None = None
    """The training data, where the loop hands it out."""
    arguments: Any = None
    """The Trainer's arguments; None in a plain loop."""
    show_progress: bool = False
    """Whether this process may draw progress bars."""
    resumed: bool = False
    """Whether the run goes on from a checkpoint."""
    provides: frozenset[str] = frozenset()
    """What the loop does for rules beyond one pass a batch (`Rule.needs`): "two_passes"."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch; None where the training data has no length."""
        try:
            batches = len(self.dataloader)
        except TypeError:
            return None
        return max(1, -(-batches // self.accumulation))


@dataclass(eq=False)
class Run:
    """One rule of one adapter in a training run."""

    training: Training
    rule: Any
    adapter: str
    config: Any
    """The adapter's config; None for a rule that was given to a callback and acts on any adapter."""
    all_spaces: list[UnitSpace]
    """The spaces of the kinds that the rule acts on, in model order."""
    memory: SimpleNamespace = field(default_factory=SimpleNamespace)
    """Objects of this run; nothing of it is saved."""
    saved: dict[str, Any] = field(default_factory=dict)
    """Saved in `trainer_state.json` and found again by a resumed run; what JSON can hold."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What the rule did, one dict an event with its `step`."""

    @property
    def model(self) -> nn.Module:
        """The model that trains."""
        return self.training.model

    @property
    def step(self) -> int:
        """Optimizer steps done; in `before_step`, `gradients` and `after_update` the current one is not among them."""
        return self.training.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.training.total_steps

    @property
    def optimizer(self) -> Any:
        """The optimizer, as the loop has it (maybe wrapped); None before there is one."""
        return self.training.optimizer

    @property
    def updates(self) -> UpdateMask:
        """Who is updated."""
        return self.training.updates

    @property
    def resumed(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self.training.resumed

    @property
    def seed(self) -> int:
        """Seed of the adapter's random draws."""
        return 0 if self.config is None else getattr(self.config, "seed", 0)

    @property
    def world(self) -> int:
        """Ranks that take part."""
        return world_size()

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied by while they are summed (fp16's loss scale, else 1)."""
        scaler = self.training.scaler or getattr(self.optimizer, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    @property
    def gradient_scale(self) -> float:
        """What gradients are multiplied by in `gradients`: the loss scale, unless clipping has unscaled them."""
        return 1.0 if self.training.clips else self.loss_scale

    @property
    def step_skipped(self) -> bool:
        """In `after_update`: whether a gradient scaler has left the update out."""
        return bool(getattr(self.optimizer, "step_was_skipped", False))

    def lr(self, parameter: Tensor) -> float:
        """The learning rate of `parameter` at this step.

        Raises:
            ValueError: the optimizer does not hold it.
        """
        for group in innermost(self.optimizer).param_groups:
            if any(one is parameter for one in group["params"]):
                return float(group["lr"])
        raise ValueError(f"The optimizer holds no parameter of shape {tuple(parameter.shape)} that a rule asks about.")

    def spaces(self, kind: str | None = None, training: bool = True) -> list[UnitSpace]:
        """The spaces of this rule, of one kind or all; `training` leaves out those that are held still at this step."""
        found = [space for space in self.all_spaces if kind is None or space.kind == kind]
        return [space for space in found if space.trains] if training else found

    def state(self, space: UnitSpace) -> dict[str, Tensor]:
        """The state that rules keep for `space`, by the names of their specs."""
        return space.state()

    def read_gradient(self, space: UnitSpace, reader: Callable[[Tensor], None]) -> None:
        """Show `reader` the dense gradient of the space's weight `[out, in]` at every use of the layer, until
        `stop_reading`. Lent: a reader keeps and changes copies only (`rules.gradient_readers`)."""
        space.layer.add_gradient_reader(space.adapter, reader)

    def stop_reading(self, space: UnitSpace, reader: Callable[[Tensor], None]) -> None:
        """End `read_gradient`; nothing where it was ended before."""
        space.layer.remove_gradient_reader(space.adapter, reader)

    def record(self, **event: Any) -> None:
        """Note what happened at this step."""
        self.events.append({"step": self.step, **event})


@torch.no_grad()
def leave_update_out(spaces: Iterable[UnitSpace]) -> None:
    """Let the coming `optimizer.step()` pass by these spaces: parameters without a gradient are not touched, by
    momentum and weight decay neither. Everything else takes its step."""
    for space in spaces:
        for parameter in space.parameters():
            parameter.grad = None


def refuse_unskippable(run: Run, option: str) -> None:
    """Raises `ValueError` where the update of the rule's spaces cannot be left out."""
    if not run.training.fp16 or run.training.clips:
        return
    left_out = {id(parameter) for space in run.spaces(training=False) for parameter in space.parameters()}
    groups = innermost(run.optimizer).param_groups if run.optimizer is not None else []
    if all(id(parameter) in left_out for group in groups for parameter in group["params"]):
        raise ValueError(
            f"{option} leaves out an update, which fp16's gradient scaler refuses without clipping where nothing else "
            f"trains. Set max_grad_norm above 0, train in bf16, or set {option}=False."
        )


def refuse_fixed_ddp(run: Run, rule: str) -> None:
    """Raises `ValueError` where DDP would wait for gradients of parameters that `rule` holds still."""
    args = run.training.arguments
    if getattr(args, "world_size", 1) > 1 and getattr(args, "ddp_find_unused_parameters", None) is False:
        raise ValueError(
            f"{rule} freezes parameters in turns, and ddp_find_unused_parameters=False makes DDP wait for their "
            "gradients. Set it to True, or leave it out."
        )
