"""One kind of budget for injection and for training: who answers which question, and who is refused by name."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from training_toolbox import Hook, StopAt, layers_of, run

from hf_sparse_peft import (
    Allocate,
    AverageRank,
    BelowThreshold,
    ByModule,
    Density,
    ErdosRenyi,
    Fraction,
    KernelLoraConfig,
    Numbers,
    RankEquivalent,
    SparseLoraConfig,
    UnitsPerModule,
    methods,
)
from hf_sparse_peft.sparsity import affordable

TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
BOTH = ("rank", "support")


def space(name: str, out: int, inside: int, initial: int, numel: int, entries: int | None = None):
    entries = numel if entries is None else entries
    return SimpleNamespace(
        name=name, weight_shape=(out, inside), initial=initial, unit_numel=numel, unit_entries=entries
    )


MIXED = [
    space("a", 30, 10, 60, 1), space("a", 30, 10, 4, 41, 0),
    space("b", 20, 20, 80, 1), space("b", 20, 20, 4, 41, 0),
]  # fmt: skip
START = 60 + 80 + 8 * 41


@pytest.mark.parametrize(
    ("budget", "target"),
    [
        (Numbers(300), 300),
        (Density(0.3), 210),  # of 300 + 400 entries, whatever kinds of units there are
        (RankEquivalent(2), 2 * (40 + 40)),
        (Fraction(0.5), START // 2),
        (ErdosRenyi(Numbers(300)), 300),
        (ErdosRenyi(0.3), 210),
    ],
    ids=str,
)
def test_a_budget_means_the_same_numbers_for_units_of_any_kind(budget, target):
    assert budget.initial(MIXED) == START
    assert budget.target(MIXED, MIXED) == target
    part = MIXED[:2]  # what some of the spaces started with, of the whole
    assert abs(budget.target(part, MIXED) - target * (60 + 4 * 41) / START) <= 1


def test_units_without_numbers_of_their_own_cost_their_entries():
    kernels = [space("a", 30, 10, 300, 0, 1), space("b", 20, 20, 400, 0, 1)]
    assert Density(0.7).target(kernels, kernels) == 490
    assert Numbers(300).target(kernels, kernels) == 300
    assert Numbers(300).cost(kernels[0]) == 1


def test_average_rank_counts_components_whatever_they_cost():
    ranks = [one for one in MIXED if one.unit_entries == 0]
    assert AverageRank(3).target(ranks, ranks) == 6 == 6 * AverageRank(3).cost(ranks[0])


@pytest.mark.parametrize("budget", [AverageRank(2), Fraction(0.5)], ids=str)
def test_budgets_for_training_alone_are_refused_at_injection_by_name(budget):
    with pytest.raises(ValueError, match=rf"budget={budget!r}".replace("(", r"\(").replace(")", r"\)")) as error:
        SparseLoraConfig(budget=budget)
    assert "'Numbers'" in str(error.value)
    assert f"'{type(budget).__name__}'" not in str(error.value)


@pytest.mark.parametrize("budget", [ByModule({"q_proj": 0.1}), UnitsPerModule(5), BelowThreshold(0.1)], ids=str)
@pytest.mark.parametrize("where", ["rule", "config"])
def test_budgets_for_injection_alone_are_refused_in_training_by_name(budget, where):
    options = {"criterion": "smallest_magnitude"} if isinstance(budget, BelowThreshold) else {}
    if where == "config":
        options["budget"] = budget
    rule = Allocate(BOTH, budget if where == "rule" else None)
    with pytest.raises(ValueError, match=rf"Allocate.budget={type(budget).__name__}.*Set Allocate.budget") as error:
        SparseLoraConfig(r=4, schedule=[rule], **options)
    assert "'AverageRank', 'Density'" in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: SparseLoraConfig(schedule=[Allocate()]), r"Allocate.budget=None.*AverageRank\(r\)"),
        (lambda: SparseLoraConfig(schedule=[Allocate(BOTH)]), "budget=None in the config"),
        # The config's is one of supports.
        (lambda: SparseLoraConfig(budget=Numbers(100), schedule=[Allocate()]), r"spaces=\('rank',\)"),
        (lambda: KernelLoraConfig(schedule=[Allocate(("kernel",))]), "Allocate.budget=None"),
        (lambda: SparseLoraConfig(schedule=[Allocate(BOTH, AverageRank(2))]), "counts components"),
        (lambda: KernelLoraConfig(schedule=[Allocate(("kernel",), AverageRank(2))]), "counts components"),
        (lambda: SparseLoraConfig(schedule=[Allocate(BOTH, Numbers(9), unit_score="sum_of_means")]), "cannot compare"),
    ],
)
def test_a_rule_without_a_budget_that_fits_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        config()


def test_a_budget_that_is_unknown_here_loads_for_inference_and_refuses_to_train(tmp_path):
    rule = Allocate(BOTH, every=2)
    model = trained(SparseLoraConfig(r=4, budget=Numbers(900), schedule=[rule], **TARGETS), tmp_path / "run")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    budget = {"type": "of_a_plugin", "numbers": 900}
    file.write_text(json.dumps({**json.loads(file.read_text()), "budget": budget}))
    loaded = PeftModel.from_pretrained(tiny.base("fp32", layers=2), tmp_path)
    assert loaded.peft_config["default"].to_dict()["budget"] == budget
    loaded = PeftModel.from_pretrained(tiny.base("fp32", layers=2), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="'of_a_plugin' is not registered"):
        run(loaded, tmp_path / "more", 2)


@pytest.mark.parametrize("stop", [1, 4], ids=["before the split", "after it"])
def test_one_split_is_not_made_again_by_a_resumed_run(stop, tmp_path):
    config = methods.get("joint-budget", r=4, density=0.2, once=True, **TARGETS).config
    hooks, seen = [StopAt(stop)], {}
    trained(config, tmp_path / "part", 8, hooks, warmup_steps=2)
    hook = Hook(on_step_end=lambda step, model, _: seen.update({step: [u.alive().tolist() for u in spaces(model)]}))
    whole = trained(config, tmp_path / "whole", 8, [hook], warmup_steps=2)
    assert seen[1] != seen[2] == seen[8]
    resumed = trained(
        config, tmp_path / "part", 8, warmup_steps=2, resume=str(tmp_path / "part" / f"checkpoint-{stop}")
    )
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def spaces(model):
    return [one for layer in layers_of(model) for one in layer.unit_spaces("default") if one.kind in BOTH]


def numbers(model) -> int:
    return sum(one.count * one.unit_numel for one in spaces(model))


def trained(config, out, steps=12, hooks=(), **options):
    torch.manual_seed(2)
    model = get_peft_model(tiny.base("fp32", layers=2), config)
    run(model, out, steps, after=list(hooks), **options)
    return model


def test_the_budget_of_the_config_is_met_where_the_rule_names_none(tmp_path):
    rule = Allocate(["rank", "support"], every=2)
    assert rule.to_dict() == {"type": "allocate", "spaces": ["rank", "support"], "every": 2}
    model = trained(SparseLoraConfig(r=4, budget=Numbers(900), schedule=[rule], **TARGETS), tmp_path)
    largest = max(one.unit_numel for one in spaces(model))
    assert 900 - largest < numbers(model) <= 900
    assert model.peft_config["default"].budget == Numbers(900)


@pytest.mark.parametrize("seed", range(10))
def test_what_a_budget_leaves_pays_for_none_of_the_units_that_are_left_out(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(60, generator=generator)
    costs = torch.tensor([1, 3, 41])[torch.randint(3, (60,), generator=generator)]
    total = int(torch.randint(1, int(costs.sum()) + 50, (), generator=generator))
    taken = affordable(scores, costs, total, seed=0)
    left = total - int(costs[taken].sum())
    assert left >= 0
    assert taken.all() or left < int(costs[~taken].min())
    assert torch.equal(taken, affordable(scores, costs, total, seed=0))


@pytest.mark.parametrize("steps", [3, 8, 12])
@pytest.mark.parametrize("warmup", [0, 2])
def test_one_split_of_a_short_run_waits_for_scores(steps, warmup, tmp_path, recwarn):
    """The learning rate of the first step of a warm-up is 0: gates and values are still 0, and so are their scores."""
    config = methods.get("joint-budget", r=4, density=0.2, fraction=0.5, once=True, **TARGETS).config
    seen = {}
    hook = Hook(on_step_end=lambda step, model, _: seen.update({step: numbers(model)}))
    model = trained(config, tmp_path, steps, [hook], warmup_steps=warmup)
    largest = max(one.unit_numel for one in spaces(model))
    target = round(0.5 * sum(one.initial * one.unit_numel for one in spaces(model)))
    split = next(step for step, found in seen.items() if found <= target)
    assert split == (2 if warmup else 1)
    assert all(target - largest < found <= target for step, found in seen.items() if step >= split)
    assert not [str(one.message) for one in recwarn if "not compared" in str(one.message)]


def test_one_split_without_any_score_is_told(tmp_path):
    config = methods.get("joint-budget", r=4, density=0.2, once=True, **TARGETS).config
    with pytest.warns(UserWarning, match="In the whole run rank and support units were not compared"):
        model = trained(config, tmp_path, 4, lr=0.0)
    assert all(one.count == one.initial for one in spaces(model))
