"""Every pair of registered rules, in both orders: composed they train and hold still what either holds, or both are
named in the refusal. Which of the two it is follows from what the rules declare."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import (
    AlternateModules,
    FactorExperts,
    Freeze,
    KernelLoraConfig,
    L1Penalty,
    NuclearNorm,
    Prune,
    Random,
    Regrow,
    SampleLayers,
    SparseLoraConfig,
    callbacks_for,
)
from hf_sparse_peft.rules import Rule, conflict
from hf_sparse_peft.rules.pairs import pair_table
from hf_sparse_peft.training import RuleRunner
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.shared.live_run import run_on
from hf_sparse_peft.utils.parts import part_types

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 8
BUSY = {
    "alternate_modules": AlternateModules(period_steps=2),
    "factor_experts": FactorExperts(consistency=0.0),
    "freeze": Freeze(at=0.5, threshold=0.05),
    "l1_penalty": L1Penalty(weight=50.0),
    "nuclear_norm": NuclearNorm(min_side=8),
    "prune": Prune(start=0.1, end=0.7, interval=2),
    "regrow": Regrow(every=2, grow=Random(), fraction=0.5),
    "sample_layers": SampleLayers(trained=0.5, interval=3, probes=2),
}
"""Options with which a rule acts within a few steps on a tiny model; other rules are taken with their defaults."""
OWN = {name: cls for name, cls in part_types(Rule).items() if cls.__module__.startswith("hf_sparse_peft.")}


def rule_of(name: str) -> Rule:
    return BUSY.get(name) or OWN[name]()


def config_of(*rules: Rule) -> SparseLoraConfig | KernelLoraConfig:
    options = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "schedule": list(rules)}
    if any(rule.acts_on == {"kernel"} for rule in rules):
        return KernelLoraConfig(sparsity=0.5, **options)
    if any("experts" in rule.needs for rule in rules):
        options["factor_masks"] = {"kind": "stochastic", "experts": 2}
    return SparseLoraConfig(density=0.1, **options)


class Watch:
    """At every update: who is held still, by any of the rules, has no gradient and keeps every bit, and nobody else."""

    def __init__(self) -> None:
        self.kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.seen = 0
        self.callbacks = [tiny.At(on_pre_optimizer_step=self.before), tiny.At(on_optimizer_step=self.after)]

    def before(self, step, model, optimizer):
        mask = run_on(model).mask
        held = {id(p): p for parameters in mask._held.values() for p in parameters.values()}
        trained = [p for n, p in model.named_parameters() if "lora_" in n]
        for parameter in trained:
            assert parameter.requires_grad == (id(parameter) not in held)
            assert id(parameter) not in held or parameter.grad is None
        self.kept = [(p, slice(None), p.detach().clone()) for p in held.values()]
        parts = [(p, rows()) for parts in mask._parts.values() for p, rows, _, keeps in parts if keeps]
        for parameter, rows in parts:
            if rows is not None and rows.shape != parameter.shape[:1] and rows.shape != parameter.shape:
                raise AssertionError(rows.shape)
            if rows is not None and parameter.grad is not None:
                at = rows.bool()
                self.kept.append((parameter, at, parameter.detach()[at].clone()))
        self.seen += 1

    def after(self, step, model, optimizer):
        for parameter, at, value in self.kept:
            assert torch.equal(parameter.detach()[at], value), step


def test_every_rule_of_the_package_is_busy_here():
    assert set(BUSY) <= set(OWN)


@pytest.mark.parametrize("names", list(itertools.permutations(OWN, 2)), ids="+".join)
@pytest.mark.filterwarnings("ignore")
def test_a_pair_composes_or_is_refused_by_name_as_declared(names, tmp_path):
    first, second = map(rule_of, names)
    units = "units" in first.writes and "units" in second.writes and first.acts_on & second.acts_on
    nested = second.part_type in first.within or first.part_type in second.within
    fixed = first.acts_on & second.acts_on and any(
        "fixed_units" in a.needs and "units" in b.writes for a, b in ((first, second), (second, first))
    )
    refused = bool((units and not nested) or fixed)
    assert refused == (conflict(first, second) is not None) == (conflict(second, first) is not None)
    if refused:
        with pytest.raises(ValueError, match=type(first).__name__) as error:
            config_of(first, second)
        assert type(second).__name__ in str(error.value)
        return
    torch.manual_seed(0)
    model, watch = get_peft_model(tiny.llama(layers=4), config_of(first, second)), Watch()
    (runner,) = [one for one in callbacks_for(model) if isinstance(one, RuleRunner)]
    before, after = watch.callbacks
    tiny.train(model, tmp_path, STEPS, callbacks=[runner, before, after], weight_decay=0.1)
    assert {run.rule.part_type for run in runner.runs} == set(names)
    assert watch.seen == STEPS
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    layers = adapter_layers(model)
    assert all(torch.isfinite(layer.get_delta_weight("default")).all() for layer in layers)
    assert any(layer.get_delta_weight("default").any() for layer in layers)


def test_a_rule_twice_is_refused():
    for name in OWN:
        with pytest.raises(ValueError, match=f"{OWN[name].__name__} twice"):
            config_of(rule_of(name), rule_of(name))


def test_the_table_shows_every_rule_and_what_is_refused():
    table = pair_table([Prune(), Freeze(), L1Penalty()])
    assert "| `Prune` | refused | refused | composes |" in table
    assert "| `L1Penalty` | composes | composes | refused |" in table
    assert "- Freeze needs the units that training began with, and Prune moves them." in table
    assert all(f"`{cls.__name__}`" in pair_table() for cls in OWN.values())
