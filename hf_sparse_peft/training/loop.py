"""`Controller`: the rules of `config.schedule` in a training loop of one's own, plain PyTorch or accelerate."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..optim import innermost
from ..rules import Rule, Training
from ..utils.option_types import NonNegativeInt, check_value
from .calibration import waits_for_data
from .executor import RuleExecutor, has_schedule
from .optimizers import warn_of_other_optimizer
from .replicated import average_replicated
from .trainer_checks import refuse_sharded
from .upstream_runs import asks_for_rules
from .upstream_start import start_in_loop


class Controller:
    """Runs the rules that the adapters of `model` ask for in a loop without a Trainer, exactly as a Trainer runs them.

        model = get_peft_model(base, SparseLoraConfig(schedule=[Prune()]))
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        with Controller(model, optimizer, total_steps=len(batches)) as rules:
            for batch in batches:
                rules.before_step()
                model(**batch).loss.backward()
                optimizer.step()
                rules.after_step()
                optimizer.zero_grad()

    With several micro-batches a step, `after_micro_batch()` follows the backward pass of all but the last;
    `before_step()` may be called before each of them and acts before the first only. Under accelerate's `accumulate`:

        with accelerator.accumulate(model):
            rules.before_step()
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            rules.after_step() if accelerator.sync_gradients else rules.after_micro_batch()
            optimizer.zero_grad()

    What happens around the update hangs on the optimizer's own step hooks: clip gradients before `optimizer.step()`, as
    usual. A step that a gradient scaler skips counts as a step, as it does in a Trainer. After the last step the rules'
    tensors are dropped; leaving the block earlier, by an exception too, takes everything off the model and keeps them
    for a run that goes on. Without `with`, call `close()`; a controller that nobody holds any more closes itself.

    Under FSDP2 adapters must be whole on every rank: `leave_adapters_whole(model)` before accelerate's `prepare`, or
    `fully_shard(..., ignored_params=adapter_parameters(model))`. The controller averages their gradients over ranks.

    A support or bases that wait for data are chosen from `dataloader` first, and upstream's EVA and LoRA-GA get their
    start from it; a run that goes on has them. A model none
    of whose adapters asks for a rule or for data is left alone, so that one loop serves every config.

    Args:
        model: holds the adapters; as accelerate has prepared it, where it does.
        optimizer: steps them; as accelerate has prepared it, where it does.
        total_steps: optimizer steps of the whole run.
        rule: run this rule on all trained adapters instead of those that their configs name.
        accumulation: micro-batches of an optimizer step.
        scaler: the `torch.amp.GradScaler` of an fp16 loop; accelerate's is found by itself.
        dataloader: the training data, for rules that look at it before the first step and for adapters that start from
            data (`calibrate`).
        evaluate: gives the loss of the model on data kept back, for rules that prune by it (`PlateauThreshold`).
        state: `state_dict()` of the run that goes on, whose model and optimizer have been loaded.
        show_progress: whether rules may draw progress bars.

    Raises:
        TypeError: an optimizer without step hooks, which nothing of torch is.
        ValueError: what trains is sharded, an optimizer of other parameters, a number out of range, a state that
            `state_dict` did not make, a rule that is unknown here or does not fit into the run, an adapter that asks
            for rules and does not train, or one that waits for data and no dataloader.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        total_steps: int,
        *,
        rule: Rule | dict[str, Any] | None = None,
        accumulation: int = 1,
        scaler: Any = None,
        dataloader: Iterable | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        state: dict[str, Any] | None = None,
        show_progress: bool = False,
    ) -> None:
        for name, number in (("total_steps", total_steps), ("accumulation", accumulation)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"Controller({name}={number!r}) takes an integer >= 1.")
        refuse_sharded(None, "schedule", model)
        inner = innermost(optimizer)
        if not hasattr(inner, "register_step_pre_hook"):
            raise TypeError(f"{type(inner).__name__} has no step hooks. Derive it from torch.optim.Optimizer.")
        if state is not None:
            _check_state(state)
        scaler = scaler if scaler is not None else getattr(optimizer, "scaler", None)
        group = inner.param_groups[0]
        training = Training(
            model=model,
            total_steps=total_steps,
            step=0 if state is None else state["step"],
            optimizer=optimizer,
            accumulation=accumulation,
            learning_rate=float(group.get("initial_lr", group["lr"])),
            clips=True,  # a scaler has unscaled gradients when the optimizer's hooks run
            fp16=scaler is not None,
            scaler=scaler,
            dataloader=dataloader,
            evaluate=evaluate,
            show_progress=show_progress,
            resumed=state is not None and state["step"] > 0,
        )
        self._steps = _Steps(training, RuleExecutor(rule, "Controller"), inner)
        # A weak handle: neither model nor optimizer keeps a controller that nobody holds.
        self._closer = weakref.finalize(self, self._steps.close)
        self._closer.atexit = False
        start_in_loop(model, optimizer, dataloader, training.resumed, show_progress)
        warn_of_other_optimizer(model, optimizer, "build it with hf_sparse_peft.make_optimizer(model, lr=...)")
        asked = rule is not None or has_schedule(model) or waits_for_data(model) or asks_for_rules(model)
        waits = waits_for_data(model) or asks_for_rules(model)
        average_replicated(model, self._steps.rules.asked_rules(model), waits)
        try:
            self._steps.begin({} if state is None else state["saved"], asked)
        except BaseException:
            self.close()
            raise

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._steps.training.step

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the rules did: dicts with `step`, `rule`, `adapter` and what the rule says of it, in order."""
        return self._steps.rules.events

    def before_step(self) -> None:
        """Call it before the forward pass.

        Raises:
            ValueError: the last step was counted, or the optimizer stepped and `after_step()` was not called; rules
                run, and a rank may run out of batches before the others (`Join`).
        """
        self._steps.before_step()

    def after_micro_batch(self) -> None:
        """Call it after the backward pass of a micro-batch that is not the step's last.

        Raises:
            ValueError: `before_step()` was not called, the optimizer has stepped, or the step has more micro-batches
                than `accumulation`.
        """
        self._steps.after_micro_batch()

    def after_step(self) -> None:
        """Call it after `optimizer.step()`.

        Raises:
            ValueError: `before_step()` was not called, or the optimizer did not step.
        """
        self._steps.after_step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside model and optimizer: JSON, for `Controller(..., state=...)`."""
        return {"step": self.step, "saved": self._steps.rules.saved}

    def close(self) -> None:
        """Take everything off model and optimizer; nothing to do a second time."""
        self._closer()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _check_state(state: Any) -> None:
    keys = {"step": NonNegativeInt, "saved": dict[str, dict[str, Any]]}
    if not isinstance(state, dict) or set(state) != set(keys):
        raise ValueError(
            f"Controller(state={state!r}) takes what state_dict() of another Controller returned, a dict with "
            f"{' and '.join(keys)}."
        )
    for key, accepted in keys.items():
        check_value(state[key], accepted, f"Controller(state): {key}")


def _may_run_out(model: nn.Module) -> bool:
    """Whether ranks may have batches of other numbers, in a context that says so."""
    return bool(getattr(getattr(model, "_join_config", None), "enable", False))


class _Steps:
    """The phases of a `Controller`'s steps, in order, with the two that the optimizer's hooks call."""

    def __init__(self, training: Training, rules: RuleExecutor, optimizer: Any) -> None:
        self.training, self.rules, self.optimizer = training, rules, optimizer
        self.closed = False
        self._hooks: list[Any] = []
        self._begun = self._stepped = False
        self._micro_batches = 0
        """Finished ones of the current step."""

    def begin(self, saved: dict[str, Any], asked: bool) -> None:
        """Hang on the optimizer's step and begin the rules, of which `asked` says whether there are any."""
        if self.training.step >= self.training.total_steps:
            raise ValueError(
                f"Controller(total_steps={self.training.total_steps}) has no step left: state says that "
                f"{self.training.step} are done."
            )
        if not asked:
            self.rules.training = self.training
            self._hooks.append(self.optimizer.register_step_post_hook(lambda *_: self._after_update()))
            return
        # Around what holds parts of parameters still in a step, which hangs on the same hooks.
        self._hooks.append(self.optimizer.register_step_pre_hook(lambda *_: self._gradients()))
        self.rules.begin(self.training, saved)
        self._check_optimizer()
        self._hooks.append(self.optimizer.register_step_post_hook(lambda *_: self._after_update()))

    def _check_optimizer(self) -> None:
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        trained = [p for run in self.rules.runs for space in run.all_spaces for p in space.parameters()]
        if trained and not any(id(parameter) in held for parameter in trained):
            raise ValueError(
                f"Controller(optimizer={type(self.optimizer).__name__}) has none of the parameters that the rules act "
                "on. Pass the optimizer that trains the adapter, built after get_peft_model."
            )

    def before_step(self) -> None:
        self._require_open()
        if self._stepped:
            raise ValueError("The optimizer has stepped: call Controller.after_step() before the next before_step().")
        if not self._begun:
            if self.rules.runs and _may_run_out(self.training.model):
                raise ValueError(
                    "Under torch's Join (accelerate's join_uneven_inputs) a rank that has run out of batches takes no "
                    "part in what rules sum over ranks, and the others would wait. Give every rank as many batches: "
                    "drop_last=True, or accelerate's even_batches=True (its default)."
                )
            self._begun = True
            self.rules.before_step()

    def after_micro_batch(self) -> None:
        self._require_begun("after_micro_batch()")
        if self._stepped:
            raise ValueError("The optimizer has stepped: call Controller.after_step(), not after_micro_batch().")
        self._micro_batches += 1
        if self._micro_batches >= self.training.accumulation:
            raise ValueError(
                f"Controller.after_micro_batch() for the {self._micro_batches}. time in a step, and accumulation="
                f"{self.training.accumulation}: it follows all micro-batches of a step but the last. Pass their number "
                "as Controller(accumulation=...)."
            )
        self.rules.after_micro_batch()

    def _gradients(self) -> None:
        self._require_begun("optimizer.step()")
        if self._stepped:
            raise ValueError("The optimizer steps twice: call Controller.after_step() after every optimizer.step().")
        self.rules.gradients()

    def _after_update(self) -> None:
        self._stepped = True
        self.rules.after_update()

    def after_step(self) -> None:
        """Count the step, one that the gradient scaler has skipped too, and end with the last."""
        self._require_begun("after_step()")
        if not self._stepped:
            if self.training.scaler is None:
                raise ValueError(
                    "Controller.after_step() without a step of the optimizer that it was given. Call it after "
                    "optimizer.step(), or pass the gradient scaler that may skip steps: Controller(scaler=...)."
                )
            self.rules.gradients()  # skipped by the scaler, and counted as a step
            self.rules.after_update(skipped=True)
        self._begun, self._stepped, self._micro_batches = False, False, 0
        self.training.step += 1
        self.rules.after_step()
        if self.training.step >= self.training.total_steps:
            self.rules.end()
            self.close()

    def close(self) -> None:
        self.closed = True
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.rules.leave()

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError(
                f"Controller is closed after {self.training.step} of {self.training.total_steps} steps; make a new one."
            )

    def _require_begun(self, what: str) -> None:
        self._require_open()
        if not self._begun:
            raise ValueError(f"{what} without Controller.before_step(): call it before the step's first forward pass.")
