"""Rules on adapters of upstream peft, and on models without any: the runs of one executor, what they begin with and
leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from peft import AdaLoraConfig, PeftConfig
from torch import nn

from ..rules import Rule, Run, Training, UnitSpace
from ..tuners import upstream
from ..tuners.whole_modules import whole_spaces

Pick = Callable[[list[Rule]], list[Rule]]
"""The rules that an executor carries, of those that a config asks for."""


def asks_for_rules(model: nn.Module) -> bool:
    """Whether the config of an active adapter of upstream peft asks for rules."""
    return any(isinstance(config, AdaLoraConfig) for config in upstream.upstream_configs(model).values())


def prepare_upstream(model: nn.Module, pick: Pick = list) -> None:
    """Allocate what rules keep in the layers of upstream's adapters, before a checkpoint is loaded into them.

    `RuleRunner` does it when the Trainer is made; a loop with a `Controller` calls it before it loads the checkpoint of
    a run that goes on.
    """
    configs = upstream.upstream_configs(model)
    for adapter, spaces in upstream.upstream_spaces(model).items():
        config = configs.get(adapter)
        for rule in pick(upstream.rules_of_upstream(config, getattr(config, "total_step", 0))):
            for space in (space for space in spaces if space.kind in rule.acts_on):
                upstream.allocate_upstream_state(space, upstream.upstream_specs(rule, space))


def make_upstream_runs(
    training: Training, pick: Pick, take_charge: Callable[[Rule, PeftConfig], None]
) -> Iterator[Run]:
    """A run for each rule of each active adapter of upstream peft; `take_charge` refuses rules that do not compose with
    what else runs on it.

    Raises:
        ValueError: a rule needs what upstream's layers do not have, or the state of a run that goes on was not loaded.
    """
    configs = upstream.upstream_configs(training.model)
    for adapter, spaces in upstream.upstream_spaces(training.model).items():
        asked = upstream.rules_of_upstream(configs.get(adapter), training.total_steps)
        for rule in pick(asked):
            own = [space for space in spaces if space.kind in rule.acts_on]
            if own and adapter in configs:
                take_charge(rule, configs[adapter])
            for space in own:
                _check(rule, space)
                _begin_state(rule, space, training.resumed)
            if own:
                if rule in asked:
                    upstream.take_over_adalora(training.model)
                yield Run(training, rule, adapter, None, own)
    yield from _whole_runs(training, pick)


def _whole_runs(training: Training, pick: Pick) -> Iterator[Run]:
    """Runs of the rules that were given, on a model whose own weights train."""
    spaces = whole_spaces(training.model)
    for rule in pick([]) if spaces else ():
        own = [space for space in spaces if space.kind in rule.acts_on]
        for space in own:
            space.check_needs(rule.all_needs)
        if own:
            yield Run(training, rule, "", None, own)


def _check(rule: Rule, space: UnitSpace) -> None:
    space.check_needs(rule.all_needs)
    if "gate" in rule.all_needs and rule.gate != "zeros":
        raise ValueError(
            f"{type(rule).__name__} needs gates that start with {rule.gate}, and AdaLoRA's in '{space.name}' start "
            "with zeros. Use SparseLoraConfig(r=..., density=0, schedule=[rule])."
        )


def _begin_state(rule: Rule, space: UnitSpace, resumed: bool) -> None:
    specs = upstream.upstream_specs(rule, space)
    if resumed and {spec.name for spec in specs} - set(upstream.upstream_state(space.layer, space.adapter)):
        raise ValueError(
            f"{type(rule).__name__} keeps tensors in '{space.name}', a layer of upstream peft, and the checkpoint was "
            "loaded before there was room for them. Call hf_sparse_peft.training.prepare_upstream(model) before "
            "loading it."
        )
    upstream.allocate_upstream_state(space, specs)
    for spec in () if resumed else specs:  # a run that was broken off may have left some
        upstream.upstream_state(space.layer, space.adapter)[spec.name].zero_()


def finish_upstream(run: Run) -> None:
    """The last step is done: note the ranks in upstream's config, and free the rule's state."""
    config = upstream.upstream_configs(run.model).get(run.adapter)
    for space in run.all_spaces if run.adapter else ():
        names = [spec.name for spec in upstream.upstream_specs(run.rule, space)]
        if isinstance(config, AdaLoraConfig) and "dead" in names:
            upstream.finish_adalora(space, config, run.total_steps)
        upstream.drop_upstream_state(space.layer, run.adapter, names)


def leave_upstream(model: nn.Module) -> None:
    """Take off the model what is not part of its adapters."""
    upstream.give_back_adalora(model)
