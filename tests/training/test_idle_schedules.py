"""A schedule that rounds to nothing says so before the first step; one that does something says nothing."""

import copy
import re
import warnings

import pytest
import tiny
from peft import LoraConfig, get_peft_model

from hf_sparse_peft import (
    AccumulatedGradient,
    Allocate,
    AlternateModules,
    AverageRank,
    FactorExperts,
    Freeze,
    Linear,
    LowRankMagnitude,
    NuclearNorm,
    Prune,
    Regrow,
    SampleLayers,
    SparseLoraConfig,
    callbacks_for,
    methods,
)
from hf_sparse_peft.tuners import KernelLoraConfig

Q, QV = ["q_proj"], ["q_proj", "v_proj"]
RANDOM = {"every": 3, "grow": "random", "fraction": 0.2}


def sparse(**options):
    return SparseLoraConfig(**{"r": 0, "density": 0.1, "target_modules": QV, **options})


def rows(**options):
    return sparse(granularity="row", **options)


def said_at_start(config, out, steps=8, layers=1, model=None, callbacks=None):
    """What is warned of before the first step; a ValueError is raised."""
    model = get_peft_model(tiny.llama(layers=layers), copy.deepcopy(config)) if model is None else model
    at_start = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = tiny.At(on_step_begin=lambda step, *_: at_start or at_start.append(len(caught)))
        tiny.train(model, out, steps, callbacks=[*(callbacks or callbacks_for(model)), count])
    options = ("NuclearNorm.", "Prune.", "AlternateModules.", "SampleLayers", "Regrow", "Freeze", "Allocate")
    found = [str(w.message) for w in caught[: at_start[0]]]
    return [one for one in found if one.startswith(options)]


def regrowing(**options):
    return Regrow(**{**RANDOM, **options})


def masks(**options):
    return KernelLoraConfig(r=4, target_modules=QV, sparsity=0.0, **options)


def ranks(**options):
    return SparseLoraConfig(r=4, density=0.0, target_modules=QV, **options)


SPIEL = Regrow(every=3, grow=AccumulatedGradient(steps=1))
NEVER = {
    "a period without a module": (
        sparse(target_modules=Q, schedule=[AlternateModules(period_steps=2)]),
        r"AlternateModules\.fraction=0\.5.*0 in period 0",
    ),
    "a nuclear norm after the end": (
        sparse(schedule=[NuclearNorm(every=9, min_side=8)]), r"NuclearNorm\.every=9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NEVER)
def test_a_schedule_that_cannot_do_anything_is_refused_with_the_mend(case, tmp_path):
    config, words = NEVER[case]
    with pytest.raises(ValueError, match=words):
        said_at_start(config, tmp_path)


IDLE = {
    # v_proj has 16 rows, q_proj 32: one unit and three
    "moves of rows": (
        rows(schedule=[regrowing(fraction=0.3)]), r"fraction=0\.3 of 1 or 3 units.*no unit ever moves in all 2",
    ),
    "moves of a full support": (
        rows(density=1.0, schedule=[regrowing()]), r"never moves a unit.*all 2 layers.*density",
    ),
    "moves of lift on a full support": (
        sparse(density=1.0, criterion={"type": "low_rank_magnitude", "rank": 2},
               schedule=[Regrow(every=3, drop=None, grow=LowRankMagnitude(rank=2))]),
        "never moves a unit",
    ),
    "moves after a falling share": (
        rows(density=0.25, schedule=[regrowing(every=6, fraction=Linear(0.25, 0.0))]), r"fraction=Linear\(start=0.25",
    ),
    "moves after the first": (rows(schedule=[SPIEL]), r"fraction=Linear\(start=0\.2.*after the first in all 2 layers"),
    "pruning that keeps all": (sparse(schedule=[Prune(final_fraction=1.0)]), r"final_fraction=1\.0.*0 units ever"),
    "pruning of one unit": (rows(density=0.07, schedule=[Prune(final_fraction=0.9)]), "keeps all of 1 or 2 units"),
    "global pruning of nothing": (
        sparse(schedule=[Prune(final_fraction=1.0, scope="global")]), "0 units ever leave in all 2",
    ),
    "pruning at one step": (sparse(schedule=[Prune(every=10)]), r"Prune\.every=10 .* 4 steps"),
    "ranks that all stay": (ranks(schedule=[Allocate(budget=AverageRank(4))]), r"AverageRank\(r=4\) .* 0 units"),
    "ranks that leave at once": (
        ranks(schedule=[Allocate(budget=AverageRank(2), every=50)]), r"Allocate\.every=50",
    ),
    "layers that all train": (ranks(schedule=[SampleLayers(trained=1.0)]), r"trained=1\.0 of 4 layers"),
    "no layer of four": (ranks(schedule=[SampleLayers(trained=0.2)]), r"trained=0\.2 of 4.* rounds to 0"),
    "probes that are all alike": (ranks(schedule=[SampleLayers(suppressed=1.0)]), r"suppressed=1\.0 of 4"),
    "probes of no layer": (ranks(schedule=[SampleLayers(suppressed=0.1)]), r"suppressed=0\.1.* rounds to 0"),
    "probes after the end": (ranks(schedule=[SampleLayers(every=8)]), "every=8 leaves no probe"),
    "a threshold below all weights": (sparse(schedule=[Freeze(threshold=1e-9)]), r"1e-09 .* all 8 layers"),
    "matrices too small for the norm": (
        sparse(schedule=[NuclearNorm(min_side=16)]), r"min_side=16 .* never pulls in 1 of 2 .*v_proj",
    ),
    "one matrix that competes": (
        KernelLoraConfig(r=4, target_modules=Q, layers_to_transform=[0], sparsity=0.0,
                         schedule=[tiny.kernel_allocation(0.5, every=2)]),
        "one matrix",
    ),
    "a budget that jumps": (masks(schedule=[tiny.kernel_allocation(0.5, every=7)]), "every=7 leaves no"),
    "no room to retire": (
        rows(density=0.2, schedule=[regrowing(fraction=0.4, retired=0.1)]), r"retired=0\.1 leaves room for 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IDLE)
def test_a_schedule_that_comes_to_nothing_says_so_at_the_start(case, tmp_path):
    config, words = IDLE[case]
    four = "layer" in case or "probes" in case or "threshold" in case
    said = said_at_start(config, tmp_path, layers=4 if four else 1)
    assert len(said) == 1, said
    assert re.search(words, said[0]), said[0]


NO_ENTRY = {
    "masks without an entry": (
        "capaboost",
        {"r": 2, "density": 1e-3},
        r"factor_masks\.density=0\.001 leaves 0 of the 64",
    ),
    "experts without an entry": ("mosa", {"r": 1, "experts": 40}, r"factor_masks\.experts=40 .* 32 entries of [AB]"),
    "a share of no weight": ("essential-sparsity", {"sparsity": 1e-6}, r"density=1\.00e-06 leaves 0 of the"),
}


@pytest.mark.parametrize("case", NO_ENTRY)
def test_a_share_that_leaves_nothing_to_train_is_refused_at_injection(case):
    name, options, words = NO_ENTRY[case]
    with pytest.raises(ValueError, match=words):
        get_peft_model(tiny.llama(layers=1), methods.get(name, target_modules=QV, **options).config)


def test_layers_that_never_move_are_named_among_those_that_do(tmp_path):
    # q_proj: 3 of 32 rows, of which 0.4 is one; v_proj: 1 of 16.
    said = said_at_start(rows(schedule=[regrowing(fraction=0.4)]), tmp_path, layers=5)
    assert len(said) == 1
    assert "in 5 of 10 layers ('model.layers.0.self_attn.v_proj', 'model.layers.1" in said[0]
    assert "and 2 more" in said[0]
    assert "q_proj" not in said[0]


def test_matrices_that_never_train_are_named(tmp_path):
    # One block: 0.34 of 3 FFN matrices is one; of the only attention matrix it is none, in even and in odd periods.
    turns = AlternateModules(period_steps=2, fraction=0.34)
    config = sparse(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], schedule=[turns])
    said = said_at_start(config, tmp_path)
    assert len(said) == 1
    assert "AlternateModules.fraction=0.34" in said[0]
    assert "in 1 of 4 layers ('model.layers.0.self_attn.q_proj')" in said[0]


def test_a_threshold_that_nothing_outgrew_is_said_when_it_is_due(tmp_path):
    model = get_peft_model(tiny.llama(layers=1), sparse(schedule=[Freeze(threshold=1e3)]))
    with pytest.warns(UserWarning, match="no entry had grown past its threshold at step 4"):
        tiny.train(model, tmp_path, 8, callbacks=callbacks_for(model))


def test_pruning_a_pruned_support_again_says_that_it_is_done(tmp_path):
    model = get_peft_model(tiny.llama(layers=1), sparse(schedule=[Prune(every=1)]))
    assert not said_at_start(None, tmp_path, model=model)
    assert "0 units ever leave" in said_at_start(None, tmp_path, model=model)[0]


def test_sampling_over_upstreams_lora_says_it_too(tmp_path):
    method = methods.get("ist", adapter=LoraConfig(r=2, target_modules=Q), trained=1.0, every=2)
    model = get_peft_model(tiny.llama(layers=2), method.config)
    assert "trains all of them" in said_at_start(None, tmp_path, model=model, callbacks=method.callbacks(model))[0]


WORKING = {
    "regrow": sparse(schedule=[SPIEL]),
    "regrow and prune": sparse(schedule=[Prune(), regrowing(every=1)]),
    "pruning": sparse(schedule=[Prune(every=1)]),
    "allocated ranks": ranks(schedule=[Allocate(budget=AverageRank(2), every=1)]),
    "alternating modules": sparse(schedule=[AlternateModules(period_steps=2)]),
    "sampled layers": ranks(schedule=[SampleLayers(every=2)]),
    "freeze": sparse(schedule=[Freeze()], criterion="smallest_magnitude"),
    "experts": ranks(factor_masks={"kind": "stochastic"}, schedule=[FactorExperts(consistency=0.0)]),
    "a nuclear norm": sparse(schedule=[NuclearNorm(min_side=8)]),
    "allocated entries": masks(schedule=[tiny.kernel_allocation(0.5)]),
}


@pytest.mark.parametrize("case", WORKING)
def test_a_schedule_that_does_something_says_nothing(case, tmp_path):
    assert not said_at_start(WORKING[case], tmp_path, layers=4)


def test_a_resumed_run_does_not_say_it_again(tmp_path):
    config = rows(schedule=[SPIEL])

    def run(**options):
        model = get_peft_model(tiny.llama(layers=1), copy.deepcopy(config))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny.train(
                model, tmp_path, 6, callbacks=callbacks_for(model), save_strategy="steps", save_steps=3, **options
            )
        return [w for w in caught if "Regrow" in str(w.message)]

    assert len(run()) == 1
    assert not run(resume=str(tmp_path / "checkpoint-3"))
