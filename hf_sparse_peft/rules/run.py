"""`Run`: one rule's view of the training run that it takes part in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import innermost
from ..sparsity import stream_seed
from .choosing_readers import ChoosingReader
from .collectives import world_size
from .dense_means import DenseMeans
from .entering import EnteringRate, Schedule, rate_factors, start_units
from .evidence import MissingEvidence
from .gradient_readers import finish_steps
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
    dense_means: DenseMeans = field(default_factory=DenseMeans)
    """Averages over ranks what readers of dense gradients choose by."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    learning_rate: float = 0.0
    """The run's base learning rate."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to that; 0 where the loop does not say."""
    clips: bool = False
    """Whether gradients are clipped (and, under fp16, unscaled) before `gradients`."""
    fp16: bool = False
    """Whether a gradient scaler may skip steps."""
    scaler: Any = None
    """That scaler, where the optimizer does not hold it (accelerate's does)."""
    loss_scale: float = 1.0
    """What the scaler multiplies the loss of the current step by; it may have changed it before the step is counted."""
    step_skipped: bool = False
    """Whether the scaler has left the current step's update out."""
    dataloader: Iterable | None = None
    """The training data, where the loop hands it out."""
    evaluate: Callable[[nn.Module], float] | None = None
    """The loss that the loop evaluates, of the model as it is; None where it has none."""
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
    readers: dict[UnitSpace, Any] = field(default_factory=dict)
    """Readers of the current step's dense gradients (`read_gradient`); closed when `Rule.gradients` is called."""
    _step: ExitStack = field(default_factory=ExitStack)
    _missing: MissingEvidence | None = None
    _trained: Callable[[UnitSpace, nn.Parameter], Tensor] | None = None

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
        return self.training.loss_scale

    @property
    def gradient_scale(self) -> float:
        """What gradients are multiplied by in `gradients`: the loss scale, unless clipping has unscaled them."""
        return 1.0 if self.training.clips else self.loss_scale

    @property
    def step_skipped(self) -> bool:
        """In `after_update`: whether a gradient scaler has left the update out."""
        return self.training.step_skipped

    def lr(self, parameter: Tensor) -> float:
        """The learning rate of `parameter` at this step; raises as `group`."""
        return float(self.group(parameter)["lr"])

    def group(self, parameter: Tensor) -> dict[str, Any]:
        """The optimizer's group of `parameter`.

        Raises:
            ValueError: the optimizer does not hold it.
        """
        for group in innermost(self.optimizer).param_groups:
            if any(one is parameter for one in group["params"]):
                return group
        raise ValueError(f"The optimizer holds no parameter of shape {tuple(parameter.shape)} that a rule asks about.")

    def spaces(self, kind: str | None = None, training: bool = True) -> list[UnitSpace]:
        """The spaces of this rule, of one kind or all; `training` leaves out those that are held still at this step."""
        found = [space for space in self.all_spaces if kind is None or space.kind == kind]
        return [space for space in found if space.trains] if training else found

    def state(self, space: UnitSpace) -> dict[str, Tensor]:
        """The state that rules keep for `space`, by the names of their specs."""
        return space.state()

    # What a rule asks for

    def read_gradient(self, space: UnitSpace, reader: Any) -> None:
        """Show `reader` (`rules.gradient_readers.MicroBatchReader`) the dense gradient of the space's weight
        `[out, in]` at every use of the layer in this step. Its micro-batches and the step are closed before
        `Rule.gradients`, and it ends with the step, however that ends; `readers` has it until `Rule.after_step` is
        done. Lent: a reader keeps and changes copies only."""
        space.layer.add_gradient_reader(space.adapter, reader)
        self.readers[space] = reader
        if world_size() > 1 and isinstance(reader, ChoosingReader):
            self.training.dense_means.join(reader)

    def for_this_step(self, contexts: Iterable[AbstractContextManager[Any]]) -> None:
        """Enter `contexts` until the update is done: they exit after the last rule's `after_update`, or where a step is
        broken off and the run ends. What evaluation and files see is the state outside of them."""
        for context in contexts:
            self._step.enter_context(context)

    def hold_units(
        self,
        held: Callable[[UnitSpace, nn.Parameter], Tensor | None],
        keep_state: bool = True,
        keep_value: bool = True,
    ) -> None:
        """Exclude units from the update, from now on: those where `held(space, parameter)`, bool `[size]`, is True at
        a step. See `UpdateMask.hold_part`."""
        self.updates.hold_part(self, self._along_units(held), keep_state, keep_value)

    def scale_updates(self, factor: Callable[[UnitSpace, nn.Parameter], Tensor | None]) -> None:
        """Multiply the updates of units by `factor(space, parameter)`, `[size]`, from now on. See
        `UpdateMask.scale_part`."""
        if self.optimizer is not None:
            self.updates.attach(self.optimizer)  # which is done for rules that write "trains" alone
        self.updates.scale_part(self, self._along_units(factor))

    def train_units(self, trained: Callable[[UnitSpace, nn.Parameter], Tensor], rate: EnteringRate) -> None:
        """Update units only where `trained(space, parameter)`, bool `[size]`, is True, from now on. One that begins in
        the middle of the run starts with fresh optimizer state, and with the learning rate that `rate` says."""
        self._trained = trained
        self.hold_units(lambda space, parameter: ~trained(space, parameter))
        self.scale_updates(lambda space, parameter: rate_factors(space, parameter, rate, self._schedule(parameter)))

    def _schedule(self, parameter: Tensor) -> Schedule:
        group = self.group(parameter)
        lr, warmup = float(group["lr"]), self.training.warmup_steps
        return Schedule(self.step, self.total_steps, warmup, float(group.get("initial_lr", lr)), lr)

    def _along_units(self, of: Callable) -> list[tuple[nn.Parameter, Callable[[], Tensor | None]]]:
        def spread(space: UnitSpace, parameter: nn.Parameter, axis: int) -> Tensor | None:
            found = of(space, parameter)
            if found is None or axis == 0:
                return found
            return found.view([-1 if at == axis else 1 for at in range(parameter.dim())]).expand_as(parameter)

        spaces = self.spaces(training=False)
        return [(p, partial(spread, space, p, axis)) for space in spaces for p, axis in space.parameter_axes()]

    def with_evidence(
        self, spaces: list[UnitSpace], has_evidence: Callable[[UnitSpace], bool], action: str
    ) -> list[UnitSpace]:
        """Those of `spaces` whose scores say anything. The others are to keep their units; a warning names each once a
        run, and `action`, what did not happen there: "the rank did not grow"."""
        judged = [space for space in spaces if has_evidence(space)]
        self.report_missing([space for space in spaces if space not in judged], len(judged), action)
        return judged

    def report_missing(self, without: list[UnitSpace], judged: int, action: str) -> None:
        """As `with_evidence`, where the rule has found the spaces `without` evidence itself; `judged` had some."""
        if self._missing is None:
            self._missing = MissingEvidence(action, self.resumed)
        self._missing.record(self.step, [space.name for space in without], judged)

    def interval(self, option: str, steps: int | None) -> int:
        """`steps`, or those of an epoch.

        Raises:
            ValueError: None, and nobody knows an epoch's; names `option`.
        """
        found = steps or self.training.steps_per_epoch
        if found is None:
            raise ValueError(f"{option}=None is an epoch, and the training data has no length. Set {option}.")
        return found

    def draw(self, what: str, weights: Tensor) -> int:
        """An index, drawn for this step by ``weights``; the same on every rank and in a resumed run."""
        generator = torch.Generator().manual_seed(stream_seed(self.seed, what, self.step))
        return int(torch.multinomial(weights, 1, generator=generator))

    def record(self, **event: Any) -> None:
        """Note what happened at this step."""
        self.events.append({"step": self.step, **event})

    def record_change(self, **event: Any) -> None:
        """Note what is the case from this step on; nothing where it was before."""
        if not self.events or {**self.events[-1], **event} != self.events[-1]:
            self.record(**event)

    # What the loop does for every rule (`training.executor`)

    def begin(self) -> None:
        """Training begins."""
        if self.rule.undecayed and self.optimizer is not None:
            groups = [group for group in innermost(self.optimizer).param_groups if group.get("weight_decay")]
            decayed = {id(parameter) for group in groups for parameter in group["params"]}
            held = [pair for space in self.spaces() for pair in space.scored_parameters().items()]
            named = {name for name, (parameter, _) in held if id(parameter) in decayed}
            names = sorted(self.rule.undecayed & named)
            if names:
                warnings.warn(
                    f"{type(self.rule).__name__}: weight decay shrinks what is to have none ({', '.join(names)}). Take "
                    "the config's optimizer, which leaves it out (optimizer=AdamWSpec() and Trainer(model=model, "
                    "**trainer_options(model, args))), or set weight_decay=0.",
                    stacklevel=2,
                )
        self.rule.begin(self)

    def before_step(self) -> None:
        """Before the first micro-batch."""
        for space in self.spaces(training=False) if self._trained is not None else ():
            for parameter, axis in space.parameter_axes():
                start_units(space, parameter, axis, self._trained(space, parameter), self.step, self.optimizer)
        self.rule.before_step(self)

    def close_micro_batch(self) -> None:
        """What comes next is another micro-batch's gradient."""
        for reader in self.readers.values():
            reader.finish_micro_batch()

    def close_readers(self) -> None:
        """The step's gradients are complete."""
        finish_steps(self.readers.values(), self.loss_scale)
        for space, reader in self.readers.items():
            space.layer.remove_gradient_reader(space.adapter, reader)

    def leave_step(self) -> None:
        """Exit what was entered for this step."""
        self._step.close()

    def finish(self) -> None:
        """The last step is done."""
        self.rule.finish(self)
        if self._missing is not None:
            self._missing.finish()

    def release(self) -> None:
        """The run is over, however it ended: take everything off the model."""
        for space, reader in self.readers.items():
            space.layer.remove_gradient_reader(space.adapter, reader)
        self.readers.clear()
        self.training.dense_means.leave()
        self.leave_step()
        self.rule.release(self)


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
    if getattr(args, "fsdp", None):
        return
    if getattr(args, "world_size", 1) > 1 and getattr(args, "ddp_find_unused_parameters", None) is False:
        raise ValueError(
            f"{rule} freezes parameters in turns, and ddp_find_unused_parameters=False makes DDP wait for their "
            "gradients. Set it to True, or leave it out."
        )
