"""Every pair of registered rules, in both orders: composed they train and hold still what either holds, or both are
named in the refusal. Which of the two it is follows from what the rules declare.

The default suite trains schedules of six rules, in which each pair that composes occurs; each pair by itself is slow.
"""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import (
    AdamSSpec,
    Allocate,
    AlternateModules,
    AverageRank,
    BalanceLoss,
    BitPenalty,
    Cast,
    ChooseSupport,
    Distil,
    ErrorFeedback,
    FactoredConfig,
    FactorExperts,
    Freeze,
    GroupEnvelope,
    GroupLasso,
    HalfSpace,
    Hesso,
    KernelLoraConfig,
    L1Norm,
    L1Penalty,
    LearnMask,
    Lobster,
    MaskedLoraConfig,
    MaskSparsity,
    NuclearNorm,
    PairOrthogonality,
    PlateauThreshold,
    Prune,
    Random,
    Regrow,
    RelocateSubnets,
    SampleLayers,
    SampleVectors,
    SearchSupport,
    SeReNe,
    SparseLoraConfig,
    SpectralLoraConfig,
    StableRank,
    StructuredConfig,
    SwitchLayers,
    TrainedRankPruning,
    callbacks_for,
    make_optimizer,
)
from hf_sparse_peft.rules import Rule, conflict
from hf_sparse_peft.rules.pairs import pair_table
from hf_sparse_peft.training import RuleRunner
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.factored import ChannelBits, Spectral
from hf_sparse_peft.tuners.masked_lora import DenseUpdate, ScoredMask
from hf_sparse_peft.tuners.shared.live_run import run_on
from hf_sparse_peft.tuners.spectral_lora import SVD, Diagonal
from hf_sparse_peft.tuners.structured import LowRankExperts, QuasiGivens
from hf_sparse_peft.utils.parts import part_types

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 12
BUSY = {
    "allocate": Allocate(budget=AverageRank(2), every=2),
    "alternate_modules": AlternateModules(period_steps=2),
    "balance_loss": BalanceLoss(0.5),
    "bit_penalty": BitPenalty(20.0, rate=10.0),
    "choose_support": ChooseSupport(3, 2),
    "distil": Distil(0.5),
    "error_feedback": ErrorFeedback(0.5, weight_decay=0.01),
    "factor_experts": FactorExperts(consistency=0.0),
    "freeze": Freeze(at=0.5, threshold=0.05),
    "group_lasso": GroupLasso(weight=1.0, every=2),
    "group_envelope": GroupEnvelope(weight=20.0),
    "half_space": HalfSpace(0.5, 0.5),
    "hesso": Hesso(periods=2),
    "l1_penalty": L1Penalty(weight=50.0),
    "l1_norm": L1Norm(of="update"),
    "lobster": Lobster(0.05),
    "mask_sparsity": MaskSparsity(0.5),
    "pair_orthogonality": PairOrthogonality(0.5),
    "plateau_threshold": PlateauThreshold(0.5, 1, 2, slack=-0.5, data="training", batches=1),
    "serene": SeReNe(0.05),
    "nuclear_norm": NuclearNorm(min_side=8),
    "prune": Prune(start=0.1, end=0.7, every=2),
    "relocate_subnets": RelocateSubnets(every=2, rate="rewarm"),
    "regrow": Regrow(every=2, grow=Random(), fraction=0.5),
    "sample_layers": SampleLayers(trained=0.5, every=5, probes=2),
    "sample_vectors": SampleVectors(every=2, warmup=1),
    "trained_rank_pruning": TrainedRankPruning(every=2, energy=0.5),
    "stable_rank": StableRank(every=1, window=2, last=2, threshold=10.0, first=1),
    "switch_layers": SwitchLayers(1, every=1, seed=1),
    "search_support": SearchSupport(trials=2, steps=1, batches=1),
}
"""Options with which a rule acts within a few steps on a tiny model; other rules are taken with their defaults."""
KINDS = (
    {"support", "rank", "module"},
    {"subnet_row", "subnet_column", "rank", "module"},
    {"basis", "core", "module"},
    {"vector", "module"},
    {"mask", "module"},
    {"factors", "module"},
    {"channel", "module"},
    {"pair", "module"},
    {"expert", "module"},
)
"""Units of sparse adapters, of those with subnets, of spectral ones with a trained basis, of whole SVDs, of masked
weights, of quantisers, of low-rank bases, of maps of pairs, and of routed experts."""
OF_ADAPTERS = ("lora_", ".factored_", ".structured_")
OWN = {name: cls for name, cls in part_types(Rule).items() if cls.__module__.startswith("hf_sparse_peft.")}


def rule_of(name: str) -> Rule:
    return BUSY.get(name) or OWN[name]()


def config_of(*rules: Rule) -> SparseLoraConfig | KernelLoraConfig | SpectralLoraConfig:
    options = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "schedule": list(rules)}
    if any(rule.acts_on == {"kernel"} for rule in rules):
        return KernelLoraConfig(sparsity=0.5, **options)
    if any(rule.acts_on == {"basis"} for rule in rules):
        return SpectralLoraConfig(bases=SVD(train_B=True), core=Diagonal(), **options)
    if any(rule.acts_on == {"factors"} for rule in rules):
        return FactoredConfig(keep_base=True, **{k: v for k, v in options.items() if k != "r"})
    if any(rule.acts_on == {"vector"} for rule in rules):
        return FactoredConfig(form=Spectral(4), keep_base=True, **{k: v for k, v in options.items() if k != "r"})
    if any(rule.acts_on == {"mask"} for rule in rules):
        parts = {"masking": ScoredMask()} if any(isinstance(rule, LearnMask) for rule in rules) else {}
        parts |= {"optimizer": AdamSSpec()} if any(isinstance(rule, Cast) for rule in rules) else {}
        return MaskedLoraConfig(update=DenseUpdate(), mask="all", **parts, **options)
    if any(rule.acts_on == {"channel"} for rule in rules):
        return FactoredConfig(form=ChannelBits(4), keep_base=True, **{k: v for k, v in options.items() if k != "r"})
    if any(rule.acts_on == {"pair"} for rule in rules):
        return StructuredConfig(form=QuasiGivens(), **{k: v for k, v in options.items() if k != "r"})
    if any(rule.acts_on == {"expert"} for rule in rules):
        return StructuredConfig(form=LowRankExperts(4, 2), **{k: v for k, v in options.items() if k != "r"})
    if any("experts" in rule.needs for rule in rules):
        options["factor_masks"] = {"kind": "stochastic", "experts": 2}
    if any("subnet_row" in rule.acts_on for rule in rules):
        options["granularity"] = "subnet"
    return SparseLoraConfig(density=0.1, **options)


def fit(rules: list[Rule], kinds: set[str]) -> bool:
    """Whether all of them have something to act on there."""
    unscaled = kinds & {"vector", "mask", "factors", "channel"} and any(
        rule.part_type == "sample_layers" for rule in rules
    )
    return all(rule.acts_on & kinds for rule in rules) and not unscaled


def composes(*names: str) -> bool:
    """Whether no two conflict, and there are adapters with units for all."""
    rules = [rule_of(name) for name in names]
    together = any(fit(rules, kinds) for kinds in KINDS)
    return together and all(conflict(a, b) is None for a, b in itertools.combinations(rules, 2))


def schedules(length: int = 6) -> list[tuple[str, ...]]:
    """Schedules of `length` rules, in which every pair of rules that composes occurs; every other one is reversed."""
    order, found = list(OWN), []
    left = {pair for pair in itertools.combinations(order, 2) if composes(*pair)}

    def pairs(names):
        return set(itertools.combinations(sorted(names, key=order.index), 2))

    while left:
        names = min(left)
        while len(names) < length:
            longer = [(*names, name) for name in order if name not in names and composes(*names, name)]
            best = max(longer, key=lambda names: len(pairs(names) & left), default=names)
            if not (pairs(best) - pairs(names)) & left:
                break
            names = best
        left -= pairs(names)
        found.append(tuple(sorted(names, key=order.index, reverse=len(found) % 2 == 1)))
    return found


ALONE = [pair for pair in itertools.permutations(OWN, 2) if composes(*pair)]


class Watch:
    """At every update: what is held still, by any of the rules, has no gradient and keeps every bit, and nothing else;
    a layer without gradients keeps its units too, whichever rule acts at this step."""

    def __init__(self) -> None:
        self.kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.layers: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}
        self.trained: list[set[torch.nn.Module]] = []

    def around(self, runner: RuleRunner) -> list[tiny.TrainerCallback]:
        """Callbacks that look before any rule has moved something at a step, and when all have."""
        first = tiny.At(on_step_begin=self.begin, on_pre_optimizer_step=self.gradients, on_optimizer_step=self.updated)
        last = tiny.At(on_pre_optimizer_step=self.before, on_optimizer_step=self.after, on_step_end=self.end)
        return [first, runner, last]

    def begin(self, step, model, optimizer):
        self.layers = {
            layer: {kind: tensor.detach().clone() for kind, tensor in state_of(layer).items()}
            for layer in adapter_layers(model)
        }

    def gradients(self, step, model, optimizer):
        self.trained.append(
            {layer for layer in self.layers if any(t.grad is not None for t in state_of(layer).values())}
        )

    def before(self, step, model, optimizer):
        mask = run_on(model).mask
        held = {id(p): p for parameters in mask._held.values() for p in parameters.values()}
        trained = [p for n, p in model.named_parameters() if any(kind in n for kind in OF_ADAPTERS)]
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

    def updated(self, step, model, optimizer):
        for parameter, at, value in self.kept:
            assert torch.equal(parameter.detach()[at], value), step

    def after(self, step, model, optimizer):
        # Gates that a step alone uses are put back by now, and those of components that enter are written.
        gates = {id(p) for n, p in model.named_parameters() if "lora_gate" in n}
        self.kept = [held for held in self.kept if id(held[0]) not in gates]
        self.updated(step, model, optimizer)

    def end(self, step, model, optimizer):
        for layer in set(self.layers) - self.trained[-1]:
            for kind, tensor in state_of(layer).items():
                assert torch.equal(tensor, self.layers[layer][kind]), (step, layer.module_name, kind)


def state_of(layer, name: str = "default") -> dict[str, torch.Tensor]:
    """What an adapter consists of in a layer, units included."""
    kinds = (
        *layer.adapter_layer_names,
        *layer.buffer_names,
        "sparse_lora_support",
        "sparse_lora_rank_mask",
        "kernel_lora_survivors",
    )
    return {kind: getattr(layer, kind)[name] for kind in kinds if name in getattr(layer, kind, {})}


def train_schedule(names: tuple[str, ...], out) -> None:
    torch.manual_seed(0)
    model, watch = get_peft_model(tiny.llama(), config_of(*map(rule_of, names))), Watch()
    (runner,) = [one for one in callbacks_for(model) if isinstance(one, RuleRunner)]
    tiny.train(model, out, STEPS, callbacks=watch.around(runner), optimizer=make_optimizer, weight_decay=0.1)
    assert {run.rule.part_type for run in runner.runs} == set(names)
    assert len(watch.trained) == STEPS
    assert all(p.requires_grad for n, p in model.named_parameters() if any(kind in n for kind in OF_ADAPTERS))
    layers = adapter_layers(model)
    routed = any(rule.acts_on == {"expert"} for rule in map(rule_of, names))  # whose update is of no weight
    updates = [state_of(one)["structured_experts_b"] if routed else one.get_delta_weight("default") for one in layers]
    assert all(torch.isfinite(update).all() for update in updates)
    assert any(update.any() for update in updates)
    if any(rule.acts_on == {"module"} and "trains" in rule.writes for rule in map(rule_of, names)):
        assert any(step < set(layers) for step in watch.trained)
        assert set().union(*watch.trained) == set(layers)
    else:
        assert all(step == set(layers) for step in watch.trained)


def test_every_rule_of_the_package_is_busy_here():
    assert set(BUSY) <= set(OWN)


@pytest.mark.parametrize("name", OWN)
def test_a_pair_is_refused_by_name_exactly_where_declared(name):
    for other in sorted(set(OWN) - {name}):
        first, second = map(rule_of, (name, other))
        units = "units" in first.writes and "units" in second.writes and first.acts_on & second.acts_on
        nested = second.part_type in first.within or first.part_type in second.within
        fixed = first.acts_on & second.acts_on and any(
            "fixed_units" in a.needs and "units" in b.writes for a, b in ((first, second), (second, first))
        )
        decided = first.decides is not None and first.decides == second.decides
        whole = any(
            "all_modules" in a.needs and b.acts_on == {"module"} and "trains" in b.writes
            for a, b in ((first, second), (second, first))
        )
        refused = bool((units and not nested) or fixed or decided or whole)
        assert refused == (conflict(first, second) is not None) == (conflict(second, first) is not None)
        if refused:
            with pytest.raises(ValueError, match=type(first).__name__) as error:
                config_of(first, second)
            assert type(second).__name__ in str(error.value)
        elif composes(name, other):
            config_of(first, second)
        else:
            with pytest.raises(ValueError, match="acts on units of"):
                config_of(first, second)


@pytest.mark.parametrize("names", schedules(), ids="+".join)
@pytest.mark.filterwarnings("ignore")
def test_a_schedule_of_rules_that_compose_trains_and_leaves_what_is_held_still(names, tmp_path):
    train_schedule(names, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("names", ALONE, ids="+".join)
@pytest.mark.filterwarnings("ignore")
def test_a_pair_of_rules_by_itself_trains_and_leaves_what_is_held_still(names, tmp_path):
    train_schedule(names, tmp_path)


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
