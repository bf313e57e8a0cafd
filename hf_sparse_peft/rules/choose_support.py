"""`ChooseSupport`: a support that is chosen once, in the run itself, by the gradients after a warm-up (RoSA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..optim import innermost
from ..sparsity import region_of, stream_seed, top_units
from ..sparsity.scores import chunks_of
from ..utils.option_types import NonNegativeInt, PositiveInt
from ..utils.parts import register_part
from ..utils.tensors import TensorSpec
from .collectives import all_reduce_mean, is_distributed
from .evidence import is_evidence
from .gradient_readers import MicroBatchReader
from .moves import move_units
from .rule import Rule
from .run import Run, leave_update_out, refuse_unskippable
from .space import UnitSpace

_CHUNK = 1 << 20


@register_part("choose_support")
@dataclass(frozen=True)
class ChooseSupport(Rule):
    r"""For `warmup` optimizer steps everything but the support trains; over the next `steps` steps, in which it
    still does, :math:`F = \sum_b \phi(g_b)` of the dense gradients at the current weight :math:`W + s B A` is summed;
    then each support becomes the units with the largest :math:`|F|`, as many as it had, with values 0, and trains
    (RoSA; Nikdan et al., 2024). Until then its units are the draw of injection, and add nothing.

    Without a low-rank half nothing trains before the choice but what is outside of the adapter. Where a layer's
    gradients are all 0 or not finite, its units stay, and the layer is named.

    The sums take an fp32 number an entry, during `steps` steps; with more than one step they are in checkpoints,
    and allocated from the start.
    """

    warmup: NonNegativeInt = 64
    """Steps before gradients are read (the scripts' `wl64`)."""
    steps: PositiveInt = 1
    """Steps whose gradients are summed (`spa_num_grads`)."""
    score: Literal["mean_squared", "mean"] = "mean_squared"
    r""":math:`\phi(g) = g^2`, or g."""
    reduction: Literal["micro_batch", "example", "step"] = "micro_batch"
    """Gradients of what: of each micro-batch, as in the official code; of each example, which needs micro-batches of
    one (the published runs: the mean of 32 squares of single examples); or of the whole step."""
    restart: bool = False
    """Whether factors go back to what they started with once the support is chosen, and the optimizer forgets what it
    knows of them: the published second run, without its second learning-rate schedule. Heads go on."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"support", "rank"})

    @property
    def writes(self) -> frozenset[str]:
        """Units, who trains, and with `restart` values."""
        return frozenset({"units", "trains"} | ({"values"} if self.restart else set()))

    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "all_modules"})

    @property
    def chosen_after(self) -> int:
        """The step at whose end the support is chosen."""
        return self.warmup + self.steps

    def check(self, config: Any) -> None:
        """Refuse an adapter without a support, or one whose support has values or a choice of its own."""
        super().check(config)
        if not config.has_support or config.support_init != "zeros" or config.needs_calibration:
            raise ValueError(
                f"ChooseSupport fills a support that has no values yet; got density={config.density}, support_init="
                f"{config.support_init!r}, criterion='{config.criterion.part_type}'. Set density > 0, "
                "support_init='zeros' and criterion='random'."
            )

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """The sums, where they are of several steps; with `restart` what the factors start with."""
        if space.kind == "rank":
            return [TensorSpec("start_A", tuple(space.A.shape), role="rule")] if self.restart else []
        return [TensorSpec("gradient_sums", space.weight_shape, role="rule")] if self.steps > 1 else []

    # In training

    def begin(self, run: Run) -> None:
        """The choice, and a step after it, must fit into the run."""
        if self.chosen_after >= run.total_steps:
            raise ValueError(
                f"ChooseSupport.warmup={self.warmup} and steps={self.steps} choose the support after step "
                f"{self.chosen_after}, and the run has {run.total_steps}. Lower them, or train longer."
            )
        self._check_micro_batches(run)
        refuse_unskippable(run, "ChooseSupport")
        run.memory.alone = not run.spaces("rank", training=False)
        if self.restart and not run.resumed:
            for space in run.spaces("rank", training=False):
                space.state()["start_A"].copy_(space.A.detach())
        if not run.resumed:
            for space in run.spaces("support", training=False):
                if space.values.detach().any():
                    raise ValueError(
                        f"'{space.name}' has values already, which a new support would throw away. Start from a fresh "
                        "adapter, or leave ChooseSupport out of schedule."
                    )

    def _check_micro_batches(self, run: Run) -> None:
        arguments, loader = run.training.arguments, run.training.dataloader
        size = getattr(arguments, "per_device_train_batch_size", None) or getattr(loader, "batch_size", None)
        if self.reduction == "example" and size != 1:
            raise ValueError(
                f"ChooseSupport.reduction='example' squares the gradient of one example at a time, and micro-batches "
                f"have {size or 'an unknown number of'} examples. Set per_device_train_batch_size=1 and raise "
                "gradient_accumulation_steps, or take reduction='micro_batch'."
            )

    def before_step(self, run: Run) -> None:
        """Hold the supports still during the warm-up, and read gradients where the coming step's count."""
        supports = run.spaces("support", training=False)
        # With no factors beside it a support held still would leave a loss without a parameter, and under dropout its
        # product is the one that shows gradients.
        held = run.step < self.warmup and not run.memory.alone
        run.updates.hold(run, [space.values for space in supports] if held else [])
        if not self.warmup <= run.step < self.chosen_after:
            return
        for space in supports:
            run.read_gradient(space, _SumReader(self, space))

    def after_update(self, run: Run) -> None:
        """Keep this step's sums; those of a step that was skipped are not used."""
        if not self.warmup <= run.step < self.chosen_after or run.step_skipped:
            return
        totals = {space: reader.total for space, reader in run.readers.items() if reader.total is not None}
        for space, total in totals.items():
            if self.steps > 1:
                space.state()["gradient_sums"].add_(total)
            else:
                run.memory.__dict__.setdefault("sums", {})[space] = total

    def gradients(self, run: Run) -> None:
        """Leave out the update of supports that are not chosen yet."""
        if run.step < self.chosen_after:
            leave_update_out(run.spaces("support"))

    def release(self, run: Run) -> None:
        """Let the supports train."""
        run.updates.hold(run, [])

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Choose the supports when their time has come."""
        if run.step != self.chosen_after:
            return
        sums = self._sums(run)
        run.memory.sums = {}
        judged = run.with_evidence(list(sums), lambda space: is_evidence(sums[space]), "the support was not chosen")
        for space in judged:
            scores = chunks_of(lambda begin, end, F=sums[space]: F[begin:end].abs(), space.grid, _CHUNK)
            seed = stream_seed(run.seed, "chosen support", space.name)
            scores = region_of(space.pattern, scores, space.grid, seed=seed).masked(scores)
            units = top_units(scores, space.count, seed=seed).to(space.values.device, space.alive().dtype)
            move_units(space, units, run.optimizer)
        if self.restart:
            self._restart(run)
        run.updates.hold(run, [])
        run.record(chosen=sum(space.count for space in judged))

    def _sums(self, run: Run) -> dict[UnitSpace, Tensor]:
        """F of each support, the same on every rank."""
        spaces = run.spaces("support", training=False)
        if self.steps > 1:
            return {space: all_reduce_mean(space.state()["gradient_sums"]) for space in spaces}
        kept = getattr(run.memory, "sums", {})
        found = {s: kept.get(s, torch.zeros(s.weight_shape, device=s.values.device)) for s in spaces}
        return {space: all_reduce_mean(total) for space, total in found.items()}

    @staticmethod
    def _restart(run: Run) -> None:
        state = innermost(run.optimizer).state
        for space in run.spaces("rank", training=False):
            space.A.data.copy_(space.state()["start_A"])
            space.B.data.zero_()
            for parameter in space.parameters():
                state.pop(parameter, None)


class _SumReader(MicroBatchReader):
    """`total`: the sum over a step of what the rule makes of each micro-batch's gradient, or of the step's."""

    def __init__(self, rule: ChooseSupport, space: UnitSpace) -> None:
        super().__init__()
        self.rule, self.space = rule, space
        self.total: Tensor | None = None
        self._step: Tensor | None = None

    def take_whole(self, dense: Tensor) -> None:
        """Square and add, in fp32."""
        if self.rule.reduction == "step":
            self._step = dense.to(torch.float32, copy=True) if self._step is None else self._step.add_(dense)
        else:
            self._add(dense.to(torch.float32, copy=True))

    def _add(self, gradient: Tensor) -> None:
        gradient = gradient.square_() if self.rule.score == "mean_squared" else gradient
        self.total = gradient if self.total is None else self.total.add_(gradient)

    @torch.no_grad()
    def finish_step(self, loss_scale: float = 1.0) -> None:
        """Close the step, and divide by what the loss was multiplied by."""
        self.finish_micro_batch()
        if self._step is None and self.rule.reduction == "step" and is_distributed():
            # This rank's batches did not reach the layer, another's may.
            self._step = torch.zeros(self.space.weight_shape, device=self.space.values.device)
        if self._step is not None:
            self._add(all_reduce_mean(self._step))
        if self.total is not None:
            self.total.div_(loss_scale**2 if self.rule.score == "mean_squared" else loss_scale)
