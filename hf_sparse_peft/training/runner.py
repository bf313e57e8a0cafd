"""`RuleRunner`: the rules of `config.schedule` in a `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..rules import Rule, Training
from ..tuners import restore_fp32
from ..tuners.shared.live_run import current_trainer
from .calibration import waits_for_data
from .evaluation import evaluation_of
from .executor import RuleExecutor, has_schedule, trained_adapters
from .loss_watch import LossWatch, watch_losses
from .replicated import average_replicated, leave_adapters_whole
from .trainer_checks import check_run, refuse_sharded
from .upstream_runs import asks_for_rules, prepare_upstream


class RuleRunner(RuleExecutor, TrainerCallback, ExportableState):
    """The callback that runs the rules in a `transformers.Trainer`; `callbacks_for(model)` gives it.

    It also lets the training data decide what adapters wait for (supports by a criterion that reads gradients, bases),
    at `on_train_begin` and through copies of the dataloader's sampler and of the random states, so that training sees
    the batches that it would have seen. A resumed run finds that in the checkpoint. Under DDP every rank reads its
    share and all decide the same.
    """

    restored: ClassVar[dict[str, dict[str, Any]]] = {}
    """Set by Trainer where it makes callbacks anew from a checkpoint; `on_train_begin` reads the checkpoint itself."""

    evaluate: Callable[[nn.Module], float] | None = None
    """Gives the loss that rules prune by (`PlateauThreshold`); None: the Trainer's own, on its `eval_dataset`."""

    _watch: LossWatch | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries (`trainer_state.json`)."""
        rule = None if self.rule is None else self.rule.to_dict()
        return {"args": {"rule": rule}, "attributes": {"restored": self.saved}}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse a sharded run before any process wraps the model, and undo the casts of the trainer's constructor.

        Raises:
            ValueError: DeepSpeed or FSDP is switched on, by whatever means.
        """
        self._refuse_sharded(args, model)
        if model is not None:
            restore_fp32(model)
            leave_adapters_whole(model)
            for layer, adapter in trained_adapters(model) if self.rule is not None else ():
                layer.allocate_rule_state(adapter, [self.rule])  # before a checkpoint is loaded into it
            prepare_upstream(model, self.pick)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Let the training data decide what adapters wait for, find the spaces of every rule, prepare their state, and
        let the rules check themselves against the run.

        Raises:
            ValueError: no trained adapter asks for a rule, a rule is unknown here or does not fit into the run, the run
                is sharded in a way that hides gradients and optimizer state, or an adapter waits for data that the run
                cannot give it.
        """
        self._refuse_sharded(args, model)
        check_run(args, state, model, kwargs.get("optimizer"))
        training = Training(
            model=model,
            total_steps=state.max_steps,
            step=state.global_step,
            optimizer=kwargs.get("optimizer"),
            accumulation=args.gradient_accumulation_steps,
            learning_rate=args.learning_rate,
            warmup_steps=args.get_warmup_steps(state.max_steps),
            clips=bool(args.max_grad_norm),
            fp16=bool(args.fp16),
            dataloader=kwargs.get("train_dataloader"),
            evaluate=self.evaluate or evaluation_of(current_trainer()),
            arguments=args,
            show_progress=not args.disable_tqdm and state.is_world_process_zero,
            resumed=bool(state.global_step),
            provides=getattr(current_trainer(), "provides", frozenset()),
        )
        found = (state.stateful_callbacks or {}).get(type(self).__name__, []) if state.global_step else []
        saved = {}
        for one in found if isinstance(found, list) else [found]:  # several runners that carry a rule each
            saved |= one.get("attributes", {}).get("restored", {})
        average_replicated(model, self.asked_rules(model), waits_for_data(model) or asks_for_rules(model))
        self.begin(training, saved, loop=state)
        self._watch = watch_losses(self._live, model, args)

    def _refuse_sharded(self, args: TrainingArguments, model: nn.Module | None) -> None:
        carries_rule = self.rule is not None or self.rule_class is not Rule
        if carries_rule or model is None or has_schedule(model) or asks_for_rules(model):
            refuse_sharded(args, "schedule", model)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Before the first micro-batch."""
        self.training.step, self.training.optimizer = state.global_step, optimizer or self.training.optimizer
        self.before_step()

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        """Between micro-batches.

        Raises:
            ValueError: the loss is not finite, nor are trained values (`LossWatch`).
        """
        if self._watch is not None:
            self._watch.close_micro_batch(state.global_step + 1)
        self.after_micro_batch()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Before the update; raises as `on_substep_end`."""
        if self._watch is not None:
            self._watch.close_micro_batch(state.global_step + 1)
        self.training.optimizer = optimizer or self.training.optimizer
        self.gradients()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """After the update."""
        self.after_update(skipped=bool(getattr(self.training.optimizer, "step_was_skipped", False)))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """After the step is counted.

        Raises:
            ValueError: a loss was not finite, and the update has spoiled trained values (`LossWatch`).
        """
        if self._watch is not None:
            self._watch.close_step()
        self.training.step = state.global_step
        self.after_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The run is over."""
        self.training.step = state.global_step
        self.end()
