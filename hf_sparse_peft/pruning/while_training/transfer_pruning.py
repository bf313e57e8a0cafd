"""Transfer pruning: heads, channels and whole parts of blocks leave by trained gates (CoFi), with a second data set."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...rules import Rule, Run
from ...rules.collectives import all_reduce_mean
from ...rules.evidence import is_evidence
from ...sparsity import Linear, Window
from ...training import RuleRunner
from ...tuners.upstream import configs_of
from ...utils.option_types import NonNegativeFloat, NonNegativeInt, PositiveFloat, Range
from ...utils.parts import register_part, require
from ..units.structure import CHANNELS, HEADS
from ..units.unit_masks import UnitMasks, mask_units, masked_spaces, unit_masks_of
from ..units.unit_scores import entries_of_unit
from .gate_checkpoint import Progress, gates_from_json, gates_to_json
from .hard_concrete import GAMMA, ZETA
from .learned_masks import LearnedMasks, learned_masks
from .transfer_loss import TransferBatches, TransferLoss
from .unit_hard_concrete import UnitGates, expected_sparsity


@register_part("transfer_pruning")
@dataclass(frozen=True)
class LearnUnitMasks(Rule):
    r"""CoFi's masks (Xia et al., 2022) on heads, channels, and each block's whole attention and feed-forward part, that
    train beside the adapter on two data sets (transfer pruning; Dery et al., 2023). Run it by
    `TransferPruningCallback`; it acts on the base's units, which no adapter has.

    .. math:: L_{task} + \lambda_{tr} L_{transfer} + \lambda_1 (\bar s - t) + \lambda_2 (\bar s - t)^2

    Each factor is drawn from a hard concrete distribution (Louizos et al., 2018) whose :math:`\log\alpha` descends by
    Adam, once a step for all micro-batches and ranks; :math:`\lambda_1, \lambda_2` ascend from 0.
    :math:`\bar s` is the expected sparsity (`expected_sparsity`), `t` rises linearly from 0 at `start` to `sparsity` at
    `full`. Gradients of gates are those of the unclipped loss, unscaled; in a step that the gradient scaler leaves out
    nothing moves, and the gates of a part without a finite gradient that is not 0 everywhere do not.

    Between steps, in evaluation and from `end` on, factors are 0 or 1, the likely ones (`UnitGates.likely`), so that
    what is sliced is what was evaluated. CoFi multiplies kept units by :math:`\sigma(0.8 \log\alpha / \beta)` for good,
    draws for each micro-batch, and gates hidden dimensions too, whose norms a smaller width would change.
    """

    sparsity: Annotated[float, Range(above=0, below=1)] = 0.5
    """Fraction of the weights of all heads and channels that goes, t at `full`."""
    transfer_weight: NonNegativeFloat = 1.0
    r""":math:`\lambda_{tr}`; 0 is CoFi. (The paper's values could not be read.)"""
    start: Annotated[float, Range(least=0, below=1)] = 0.03
    """Fraction of the run's steps at which gates begin to train; all is open before (CoFi on small tasks: 4 of 120
    epochs)."""
    full: Annotated[float, Range(above=0, most=1)] = 0.2
    """And at which the target is `sparsity` (CoFi: 20 epochs later)."""
    end: Annotated[float, Range(above=0, most=1)] = 0.83
    """And at which masks become hard, and the adapter trains on alone (CoFi: 20 epochs)."""
    gate_rate: PositiveFloat = 0.01
    r"""Adam's learning rate of :math:`\log\alpha`, the same at all steps."""
    multiplier_rate: PositiveFloat = 0.01
    r"""And of :math:`\lambda_1, \lambda_2`."""
    temperature: Annotated[float, Range(above=0, most=1)] = 2 / 3
    r""":math:`\beta`."""
    drop_rate: Annotated[float, Range(above=0, below=1)] = 0.5
    r"""Where channels start, :math:`\log\alpha = \log((1-d)/d)`; heads and parts start open."""
    seed: NonNegativeInt = 0
    """Of the noise, of ties, and of the order in which transfer batches are read."""

    acts_on: ClassVar[frozenset[str]] = frozenset({HEADS, CHANNELS})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "forward"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.start < self.full, self, "start", f"a fraction of the run below full={self.full}")
        require(self.full <= self.end, self, "full", f"a fraction of the run up to end={self.end}")

    def target(self, step: int, total_steps: int) -> float:
        """t at the optimizer's step `step` (from 0)."""
        return Window(Linear(0.0, self.sparsity), self.start, self.full)(step / total_steps)

    def open_steps(self, total_steps: int) -> range:
        """The steps at which gates train."""
        first, last = (math.ceil(share * total_steps - 1e-9) for share in (self.start, self.end))
        return range(first, last)

    def begin(self, run: Run) -> None:
        """Make the gates, or find those of a run that goes on.

        Raises:
            ValueError: masks that train, or that remove as much as `sparsity` asks for already; a checkpoint without
                gates.
            TypeError: a second data set that can be read once only.
        """
        data, masks = run.memory.transfer_data, unit_masks_of(run.model)
        if any(isinstance(space.layer.factors, nn.Parameter) for space in run.all_spaces):
            raise ValueError(
                "The model has unit masks whose factors are parameters (mask_units(trained=True)), and gates make the "
                "factors here. Call unmask_units(model) first."
            )
        base = run.model.get_base_model() if hasattr(run.model, "get_base_model") else run.model
        gates = [
            UnitGates.fresh(
                space, entries_of_unit(base, masks.structures[space.name], space.kind), self.drop_rate, self.seed
            )
            for space in run.all_spaces
        ]
        multipliers = torch.zeros(2, device=gates[0].units.device, requires_grad=True)
        self._check_masked(gates, run)
        optimizer = torch.optim.Adam([
            {"params": [leaf for one in gates for leaf in one.leaves], "lr": self.gate_rate},
            {"params": [multipliers], "lr": self.multiplier_rate, "maximize": True},
        ])  # fmt: skip
        progress = Progress()
        if run.resumed:
            progress = gates_from_json(run.saved.get("gates"), gates, multipliers, optimizer)
        transfer = None
        if self.transfer_weight:
            device = next(run.model.parameters()).device
            batches = TransferBatches(data, device, self.seed, progress.read)
            transfer = TransferLoss(run, self.transfer_weight, batches)
        run.memory = SimpleNamespace(
            gates=gates, multipliers=multipliers, optimizer=optimizer, transfer=transfer, noise={},
            expected=progress.expected,
        )  # fmt: skip
        if run.resumed:
            self._write_likely(run.memory, run.step > self.open_steps(run.total_steps).start)

    def check_run(self, total_steps: int, data: Any, resumed: bool = False) -> None:
        """Refuse what a run lacks, before anything is put on its model.

        Raises:
            ValueError: no second data set, or no steps for the gates.

        Warns:
            UserWarning: so few that no channel would close.
        """
        steps = self.open_steps(total_steps)
        if self.transfer_weight and data is None:
            raise ValueError(
                f"transfer_weight={self.transfer_weight} weighs the loss of a second data set, and there is none. Pass "
                "its batches (TransferPruningCallback(rule, transfer_data=DataLoader(...))), or set transfer_weight=0."
            )
        if not steps:
            raise ValueError(
                f"start={self.start} and end={self.end} leave none of {total_steps} steps to train gates in. Train "
                "longer, or set them farther apart."
            )
        reach = self.gate_rate * len(steps)
        needed = math.log(1 - self.drop_rate) - math.log(self.drop_rate) - self.temperature * math.log(-GAMMA / ZETA)
        if not resumed and reach < needed:
            warnings.warn(
                f"gate_rate={self.gate_rate} moves gates by about {reach:.2g} in {len(steps)} steps, and no channel "
                f"closes before {needed:.2g}: sparsity={self.sparsity} will hardly be reached. Raise it, or train "
                "longer.",
                stacklevel=2,
            )

    def _check_masked(self, gates: list[UnitGates], run: Run) -> None:
        total = sum(one.entries * one.space.size for one in gates)
        gone = sum(one.entries * (one.space.size - int(one.alive.sum())) for one in gates) / total
        if not run.resumed and gone >= self.sparsity:
            raise ValueError(
                f"The model's masks remove {gone:.1%} of the weights of heads and channels already, and sparsity="
                f"{self.sparsity} asks for no more. Raise it; train on without the callback, masks stay; or call "
                "unmask_units(model) to begin anew."
            )

    # In training

    def before_step(self, run: Run) -> None:
        """Draw the factors of the step."""
        steps, memory = self.open_steps(run.total_steps), run.memory
        if memory.transfer is not None:
            run.for_this_step([memory.transfer.added()])
        if run.step >= steps.stop:
            self._harden(run)
        elif run.step >= steps.start:
            memory.noise = {one.key: one.noise(self.seed, run.step) for one in memory.gates}
            run.for_this_step([self._drawn(memory)])

    @contextmanager
    def _drawn(self, memory: SimpleNamespace) -> Iterator[None]:
        """Inside, factors are drawn ones whose gradients are kept."""
        try:
            for one in memory.gates:
                factors = one.space.layer.factors
                with torch.no_grad():
                    factors.copy_(one.factors(memory.noise[one.key], self.temperature))
                factors.requires_grad_()
            yield
        finally:
            for one in memory.gates:
                one.space.layer.factors.requires_grad_(False)
                one.space.layer.factors.grad = None
            memory.noise = {}
            self._write_likely(memory)

    def _write_likely(self, memory: SimpleNamespace, drawn: bool = True) -> None:
        for one in memory.gates:
            one.space.layer.factors.copy_(one.likely(self.temperature, self.seed) if drawn else one.alive)

    def after_update(self, run: Run) -> None:
        """Move gates and multipliers."""
        memory = run.memory
        if not memory.noise or run.step_skipped:
            return
        gradients = {}
        for one in memory.gates:
            found = one.space.layer.factors.grad
            found = torch.zeros_like(one.units) if found is None else found / run.loss_scale
            gradients[one.space] = all_reduce_mean(found)
        judged = run.with_evidence(
            list(gradients), lambda space: is_evidence(gradients[space]), "its gates did not move"
        )
        if judged:
            self._move(memory, {space: gradients[space] for space in judged}, self.target(run.step, run.total_steps))

    @torch.enable_grad()
    def _move(self, memory: SimpleNamespace, gradients: dict[Any, Tensor], target: float) -> None:
        distance = expected_sparsity(memory.gates, self.temperature) - target
        (memory.multipliers[0] * distance + memory.multipliers[1] * distance**2).backward()
        for one in memory.gates:
            if one.space in gradients:
                one.factors(memory.noise[one.key], self.temperature).backward(gradients[one.space])
            else:
                one.units.grad = one.part.grad = None
        memory.optimizer.step()
        memory.optimizer.zero_grad()
        for one in memory.gates:
            one.bound()

    def _harden(self, run: Run) -> None:
        memory = run.memory
        if memory.expected is not None:
            return
        with torch.no_grad():
            memory.expected = float(expected_sparsity(memory.gates, self.temperature))
        self._write_likely(memory)
        found = self.masked(run)
        run.record(sparsity=found.sparsity, expected=memory.expected, closed=len(found.closed))

    def finish(self, run: Run) -> None:
        """Masks are hard.

        Warns:
            UserWarning: they are more than 5 points away from `sparsity`.
        """
        self._harden(run)
        found = self.masked(run).sparsity
        if abs(found - self.sparsity) > 0.05:
            warnings.warn(
                f"Masks remove {found:.1%} of the weights of heads and channels, and sparsity={self.sparsity}: the "
                f"gates had {len(self.open_steps(run.total_steps))} steps. Train longer, or raise gate_rate and "
                "multiplier_rate.",
                stacklevel=2,
            )

    def masked(self, run: Run) -> LearnedMasks:
        """What the masks remove as they are between steps."""
        expected = run.memory.expected
        if expected is None:
            expected = expected_sparsity(run.memory.gates, self.temperature).item()
        return learned_masks(unit_masks_of(run.model), run.memory.gates, expected)

    def save(self, run: Run) -> None:
        """Write what a resumed run must find again into `run.saved`."""
        memory = run.memory
        read = 0 if memory.transfer is None else memory.transfer.batches.read
        progress = Progress(memory.expected, read)
        run.saved["gates"] = gates_to_json(memory.gates, memory.multipliers, memory.optimizer, progress)


class TransferPruningCallback(RuleRunner):
    """Runs `LearnUnitMasks` in a `Trainer`, on the units of the base below any adapter. Masks go onto the model when
    training begins, and stay when it has ended: `slice_model(model)` cuts what they mask. A checkpoint keeps gates,
    moments and the place in the second data set, so that a resumed run goes on with the same bits.

    Args:
        rule: the rule; None: its defaults.
        transfer_data: batches of the second data set, with labels for the same head, as keyword arguments of the model:
            a `DataLoader`, or a list. It is read over and over, a batch beside every micro-batch, in an order of its
            own. Under DDP every rank reads what it is given: let `accelerator.prepare` share it out.
    """

    def __init__(
        self,
        rule: LearnUnitMasks | dict | None = None,
        transfer_data: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(LearnUnitMasks() if rule is None else rule)
        self.transfer_data = transfer_data

    @property
    def saved(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint carries, written when it is asked for: gates are many."""
        for run in self.runs:
            if hasattr(run.memory, "gates"):  # not one that was refused
                run.rule.save(run)
        return super().saved

    @property
    def masks(self) -> LearnedMasks:
        """What is masked so far; when the run is done, for good.

        Raises:
            ValueError: no run has begun.
        """
        if not any(hasattr(run.memory, "gates") for run in self.runs):
            raise ValueError("No run of this callback has begun, so that nothing is masked yet. Train first.")
        return self.rule.masked(self.runs[0])

    def _make_runs(self) -> Iterator[Run]:
        model = self.training.model
        adapter, configs = _active_adapter(model), configs_of(model)
        if adapter is None or adapter not in configs:
            return
        self.rule.check_run(self.training.total_steps, self.transfer_data, self.training.resumed)
        masks: UnitMasks = unit_masks_of(model) or mask_units(model)
        spaces = masked_spaces(model, masks, with_factors=False)
        self._take_charge(self.rule, configs[adapter])
        run = Run(self.training, self.rule, adapter, None, spaces)
        run.memory.transfer_data = self.transfer_data
        yield run


def _active_adapter(model: nn.Module) -> str | None:
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return next((name for layer in layers for name in layer.active_adapters), None)
