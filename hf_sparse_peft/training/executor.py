"""`RuleExecutor`: carries out the rules of `config.schedule` in any training loop."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from ..optim import innermost
from ..rules import Rule, Run, Training, check_pairs, in_order
from ..rules.collectives import world_size
from ..tuners import AdapterLayer, adapter_layers
from ..tuners.shared.base_weight import keep_4bit_weight_stable
from ..tuners.shared.config import AdapterConfig
from ..tuners.shared.live_run import LiveRun, begin_run
from ..utils.parts import UnknownPart, load_part
from .calibration import calibrate_waiting
from .replicated import is_fully_sharded
from .trainer_checks import why_no_rule_runs
from .upstream_runs import finish_upstream, leave_upstream, make_upstream_runs

PASSING = "passing"
"""Key of what a checkpoint says of state that is there at some steps only."""
_LAST_RUN: weakref.WeakKeyDictionary[AdapterLayer, dict[str, weakref.ref[LiveRun]]] = weakref.WeakKeyDictionary()
"""Layer -> adapter -> the run that last kept rule state there."""


class RuleExecutor:
    """Runs every rule of `config.schedule`, on every trained adapter, in the order of the list; a subclass with a
    `rule_class` carries the rules of that class only. Who is updated at a step (rules that write `trains`) is decided
    before the others look. The loop that trains calls its phases (`RuleRunner`, `Controller`).

    Args:
        rule: run this rule on all trained adapters instead of those that their configs name, on those of upstream peft
            too: on whole modules of any tuner, on the components of LoRA. Without one, of upstream's configs
            `AdaLoraConfig` names rules (`tuners.upstream`).
        owner: what runs them, for messages; None: the class's name.

    Raises:
        ValueError: `rule` is not one, or not of the subclass's `rule_class`.
    """

    rule_class: ClassVar[type[Rule]] = Rule

    def __init__(self, rule: Rule | dict[str, Any] | None = None, owner: str | None = None) -> None:
        self.owner = owner or type(self).__name__
        if rule is not None:
            rule = load_part(Rule, rule, f"{self.owner}(rule)")
            if isinstance(rule, UnknownPart):
                raise ValueError(f"{self.owner}({rule.data}) cannot run here: {rule.reason}.")
            if not isinstance(rule, self.rule_class):
                raise ValueError(f"{self.owner} carries a {self.rule_class.__name__}, not {rule!r}.")
        self.rule = rule
        self.runs: list[Run] = []
        """One view of the current (or last) training run for each rule of each adapter."""
        self.training: Training | None = None
        self._live: LiveRun | None = None
        self._forward_hook: Any = None

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the rules did: dicts with `step`, `rule`, `adapter` and what the rule says of it, in order."""
        found = [
            {"rule": run.rule.part_type, "adapter": run.adapter, **event} for run in self.runs for event in run.events
        ]
        return sorted(found, key=lambda event: event["step"])

    @property
    def saved(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint carries beside the tensors."""
        found = {f"{run.adapter}/{run.rule.part_type}": run.saved for run in self.runs if run.saved}
        passing = self._passing()
        return {**found, PASSING: passing} if passing else found

    def _passing(self) -> dict[str, dict[str, list[str]]]:
        """State that is there at some steps only (`TensorSpec.passing`), and now: by adapter and module."""
        found: dict[str, dict[str, list[str]]] = {}
        for run in self.runs:
            for space in run.all_spaces:
                names = [spec.name for spec in run.rule.state(space) if spec.passing]
                names = [name for name in names if name in space.state()]
                if names:
                    found.setdefault(run.adapter, {}).setdefault(space.name, []).extend(names)
        return found

    def allocate_passing(self, model: nn.Module, saved: dict[str, Any]) -> None:
        """Allocate what a checkpoint that says `saved` has of such state, before it is read into the tensors that
        `model` has. (`load_state_dict` needs no such help: layers allocate what they find in it.)"""
        asked = saved.get(PASSING)
        for layer, adapter in trained_adapters(model) if isinstance(asked, dict) else ():
            names = asked.get(adapter, {}).get(layer.module_name, [])
            rules = [self.rule] if self.rule is not None else layer.adapter_configs[adapter].rules
            layer.allocate_rule_state(adapter, rules, passing=names)

    def begin(self, training: Training, saved: dict[str, dict[str, Any]], loop: Any = None) -> None:
        """Take part in `training`: let its data decide what adapters wait for, find the spaces of every rule, prepare
        their state, begin.

        Args:
            training: what the loop knows of the run.
            saved: what a checkpoint brought.
            loop: what the loop's callbacks have in common (`begin_run`); None: nobody else takes part.

        Raises:
            ValueError: no trained adapter asks for a rule, a rule is unknown here or does not fit into the run, or an
                adapter waits for data and the loop has none (`calibrate_waiting`).
        """
        self.training = training
        self._join(training.model, loop)
        calibrate_waiting(training)  # first of all: rules look at supports
        self.runs = list(self._make_runs())
        if not self.runs and not self._runs_for_calibration():
            raise ValueError(why_no_rule_runs(self.owner, self.rule or self.rule_class, training.model))
        for run in self.runs:
            run.saved.update(saved.get(f"{run.adapter}/{run.rule.part_type}", {}))
        if any("trains" in run.rule.writes for run in self.runs) and training.optimizer is not None:
            training.updates.attach(training.optimizer)
        if any("batches" in run.rule.all_needs for run in self.runs):
            for module in training.model.modules():
                keep_4bit_weight_stable(module)  # forward passes without gradients would repack it on a CPU
        if world_size() > 1:
            self._forward_hook = training.dense_means.watch(training.model)
        # What chooses the first support comes before those that look at it.
        for run in sorted(self.runs, key=lambda run: "batches" not in run.rule.all_needs):
            run.begin()

    def before_step(self) -> None:
        """Before the first micro-batch.

        Raises:
            ValueError: another run has begun on the model meanwhile, and ended this one.
        """
        self._check_live()
        self.training.updates.resume()
        scaler = self.training.scaler or getattr(self.training.optimizer, "scaler", None)
        self.training.loss_scale = 1.0 if scaler is None else float(scaler.get_scale())
        for run in sorted(self.runs, key=lambda run: "trains" not in run.rule.writes):
            run.before_step()

    def after_micro_batch(self) -> None:
        """Between micro-batches."""
        for run in self.runs:
            run.close_micro_batch()
        self.training.dense_means.close()
        for run in self.runs:
            run.rule.after_micro_batch(run)

    def gradients(self) -> None:
        """Before the update; raises as `before_step`."""
        self._check_live()
        for run in self.runs:
            run.close_micro_batch()
        self.training.dense_means.close()
        self.training.dense_means.leave()
        for run in self.runs:
            run.close_readers()
            run.rule.gradients(run)

    def after_update(self, skipped: bool = False) -> None:
        """After the update, or instead of one that a gradient scaler has left out (`skipped`)."""
        self.training.step_skipped = skipped
        for run in self.runs:
            run.rule.after_update(run)
        for run in self.runs:
            run.leave_step()

    def after_step(self) -> None:
        """After the step is counted."""
        for run in self.runs:
            run.rule.after_step(run)
            run.readers.clear()
        if is_fully_sharded(self.training.model):
            self.training.updates.suspend()  # its checkpoints leave frozen parameters out

    def end(self) -> None:
        """Take everything off the model. If the last step is done, free the rules' state too, so that the shipped
        adapter is small; a run that stopped early needs it when it is resumed."""
        done = self.training.step >= self.training.total_steps
        if done:
            for run in self.runs:
                run.finish()
        self.leave()
        for run in (run for run in self.runs if done):
            if run.config is None:
                finish_upstream(run)
                continue
            for space in run.all_spaces:
                space.layer.drop_training_state(space.adapter)
            run.config.training_finished = True

    def leave(self) -> None:
        """Take everything off the model; nothing to do a second time."""
        if self._live is not None:
            self._live.leave(self)

    # Runs

    def _join(self, model: nn.Module, loop: Any) -> None:
        self._live = begin_run(model, adapter_layers(model), loop)
        self._live.join(self, self._release)
        self.training.updates = self._live.mask
        optimizer = self.training.optimizer
        groups = innermost(optimizer).param_groups if optimizer is not None else []
        known = {id(parameter) for group in groups for parameter in group["params"]}
        if known and any(id(parameter) not in known for parameter in self._live.released):
            raise ValueError(
                "A run that was broken off held parameters still, and this optimizer was built before they were "
                "released, without them. They train again now: make a new Trainer (or optimizer) and train with that."
            )

    def _check_live(self) -> None:
        if self._live is not None and not self._live.is_live:
            raise ValueError(
                f"Another training run has begun on this model after {self.training.step} steps of this one, and ended "
                "what the rules do here. Train one after the other, or each a model of its own."
            )

    def _release(self) -> None:
        """Called when the run ends, however it does."""
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None
        for run in self.runs:
            run.release()
        leave_upstream(self.training.model)

    def _make_runs(self) -> Iterator[Run]:
        layers: dict[str, list[AdapterLayer]] = {}
        for layer, adapter in trained_adapters(self.training.model):
            layers.setdefault(adapter, []).append(layer)
        for adapter, held in layers.items():
            config = held[0].adapter_configs[adapter]
            config.check_runnable()
            for rule in self.pick(config.rules):
                spaces = [s for layer in held for s in layer.unit_spaces(adapter) if s.kind in rule.acts_on]
                spaces = [space for space in spaces if space.trains or space.kind == "module"]
                if spaces:
                    self._take_charge(rule, config)
                    for space in spaces:
                        space.check_needs(rule.all_needs)
                    for layer in held:
                        _allocate_state(layer, adapter, rule, self._live, fresh=not self.training.resumed)
                    yield Run(self.training, rule, adapter, config, spaces)
        yield from make_upstream_runs(self.training, self.pick, self._take_charge)

    def asked_rules(self, model: nn.Module) -> list[Rule]:
        """The rules to run on the trained adapters of `model`."""
        configs = {id(c): c for layer, adapter in trained_adapters(model) for c in [layer.adapter_configs[adapter]]}
        return [rule for config in configs.values() for rule in self.pick(config.rules)]

    def pick(self, asked: list[Rule]) -> list[Rule]:
        """The rules to run of those that a config asks for, in the order in which they act."""
        rules = [self.rule] if self.rule is not None else in_order(asked)
        return [rule for rule in rules if isinstance(rule, self.rule_class)]

    def _runs_for_calibration(self) -> bool:
        """Whether there is nothing to do but to let data decide, which a checkpoint or a call may have done before."""
        configs = [layer.adapter_configs[adapter] for layer, adapter in trained_adapters(self.training.model)]
        every_rule = self.rule is None and self.rule_class is Rule
        return every_rule and any(config.needs_calibration and not config.schedule for config in configs)

    def _take_charge(self, rule: Rule, config: Any) -> None:
        running = self._live.rules_run_for(config)
        if any(type(one) is type(rule) for one in running):
            raise ValueError(
                f"{type(rule).__name__} is run by two callbacks of this Trainer, {self.owner} and another. "
                "Pass callbacks_for(model), or the callback of that one rule, not both."
            )
        check_pairs([*running, rule])
        if isinstance(config, AdapterConfig):
            if rule is self.rule:  # the config has checked its own
                rule.check(config)
            config.training_finished = False
        self._live.note_rule(config, rule)


def trained_adapters(model: nn.Module) -> Iterator[tuple[AdapterLayer, str]]:
    """Layers with the active adapters that they hold and that are not for inference."""
    for layer in adapter_layers(model):
        for name in layer.active_adapters:
            if layer.holds(name) and not layer.adapter_configs[name].inference_mode:
                yield layer, name


def _allocate_state(layer: AdapterLayer, adapter: str, rule: Rule, live: LiveRun, fresh: bool) -> None:
    """State for `live`; where it starts afresh, not what an earlier run that did not end left behind."""
    runs = _LAST_RUN.setdefault(layer, {})
    if fresh and adapter in runs and runs[adapter]() is not live:
        layer.drop_training_state(adapter)
    runs[adapter] = weakref.ref(live)
    layer.allocate_rule_state(adapter, [rule])


def has_schedule(model: nn.Module) -> bool:
    """Whether the config of an active adapter of `model` has a schedule."""
    active = ((layer, name) for layer in adapter_layers(model) for name in layer.active_adapters)
    return any(layer.adapter_configs[name].schedule for layer, name in active if layer.holds(name))
