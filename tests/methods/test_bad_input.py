"""Bad input stops at once, and the message says what to change: one row for every mistake, by what it must contain."""

import pytest
import torch
from contract_toolbox import TokenData, adapted, load_base, save_base, train
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from hf_sparse_peft import Numbers, SparseLoraConfig, callbacks_for, methods

TARGETS = ["q_proj", "down_proj"]  # 32x32 and 32x64

# What is built: options of the config, and what the message must name: field, value, what it was checked against, mend.
CONFIG_MISTAKES = {
    "density too small for one entry": (
        {"density": 1e-6},
        ["density=1e-06", "no entr", "32x32", "Raise density"],
    ),
    "density too small for one block": (
        {"density": 1e-3, "granularity": "block", "block_size": 16},
        ["density=0.001", "block", "32x32", "Raise density"],
    ),
    "block size that does not divide": (
        {"density": 0.5, "granularity": "block", "block_size": 24},
        ["block_size=24", "32x32", "q_proj"],
    ),
    "unknown criterion": (
        {"density": 0.1, "criterion": "magnitud"},
        ["criterion='magnitud'", "unknown", "magnitude", "random"],
    ),
    "unknown granularity": (
        {"density": 0.1, "granularity": "collumn"},
        ["granularity='collumn'", "column", "block"],
    ),
    "budget above the weights": (
        {"budget": Numbers(10_000_000)},
        ["Numbers.numbers=10000000", "6144 entries", "Lower it"],
    ),
    "density above one": ({"density": 20.0}, ["density=20.0", "in [0, 1]"]),
    "percent for a share of a pattern": (
        {"density": 0.1, "sizes": {"model.layers.0.self_attn.q_proj": [99_999, 99_999, 0]}},
        ["sizes", "sizes={}"],
    ),
    "nothing to train": ({"density": 0.0}, ["r=0", "density=0", "Set r >= 1"]),
    "a schedule for a half that is absent": (
        {"r": 4, "density": 0.0, "schedule": [{"type": "regrow", "every": 6}]},
        ["Regrow", "density=0", "Set density > 0"],
    ),
    "more steps to collect than between moves": (
        {
            "density": 0.1,
            "schedule": [{"type": "regrow", "every": 3, "grow": {"type": "accumulated_gradient", "steps": 4}}],
        },
        ["steps=4", "every=3"],
    ),
    "an option that no rule has": (
        {"density": 0.1, "schedule": [{"type": "regrow", "intervall": 3}]},
        ["schedule[0]", "Regrow has no option", "intervall"],
    ),
    "final rank above the first": (
        {"r": 4, "density": 0.0, "schedule": [{"type": "allocate", "budget": {"type": "average_rank", "r": 8}}]},
        ["AverageRank.r=8", "r=4", "Set r to at least 8"],
    ),
    "no module of that name": (
        {"density": 0.1, "target_modules": ["qproj"]},
        ["qproj", "target"],
    ),
}

# Schedules that do not fit into a run of six steps.
RUN_MISTAKES = {
    "a first move after the end": (
        {"density": 0.1, "schedule": [{"type": "regrow", "grow": {"type": "accumulated_gradient", "steps": 9}}]},
        ["AccumulatedGradient.steps=9", "6 steps", "Train longer"],
    ),
    "a pruning window without a step": (
        {"density": 0.1, "schedule": [{"type": "prune", "start": 0.5, "end": 0.52}]},
        ["Prune.start=0.5", "Prune.end=0.52", "Train longer"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    save_base(folder / "base")
    return folder


def says(error: BaseException, parts: list[str]) -> None:
    missing = [part for part in parts if part not in str(error)]
    assert not missing, f"{missing} not in: {error}"


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_config_that_cannot_work_says_what_to_change(mistake, kind, folder):
    options, parts = CONFIG_MISTAKES[mistake]
    base = load_base(folder / "base", kind)
    with pytest.raises(ValueError) as caught:
        get_peft_model(base, SparseLoraConfig(**{"r": 0, "target_modules": TARGETS, **options}))
    says(caught.value, parts)
    assert not any("sparse_lora" in name for name, _ in base.named_parameters()), "the base was changed on the way"


@pytest.mark.parametrize("mistake", RUN_MISTAKES)
def test_a_schedule_longer_than_the_run_says_what_to_change(mistake, folder, tmp_path):
    options, parts = RUN_MISTAKES[mistake]
    config = SparseLoraConfig(**{"r": 0, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(load_base(folder / "base", "dense"), config)
    args = TrainingArguments(str(tmp_path), max_steps=6, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model=model, args=args, train_dataset=TokenData(), callbacks=callbacks_for(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        trainer.train()
    says(caught.value, parts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


DATA_DRIVEN = [name for name in methods.names() if name in ("fish", "lt-sft", "smt")]


@pytest.mark.parametrize("name", DATA_DRIVEN)
def test_a_data_driven_criterion_without_data_shows_both_ways(name, folder, tmp_path):
    model, method = adapted(name, folder / "base", "dense")
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = method.trainer_class(model=model, args=args, train_dataset=TokenData())
    with pytest.raises(ValueError) as caught:
        trainer.train()
    says(caught.value, ["initialize_support", "callbacks"])


@pytest.mark.parametrize("name", methods.names())
def test_every_method_refuses_an_option_that_it_does_not_have(name):
    with pytest.raises((ValueError, TypeError), match="densitty"):
        methods.get(name, densitty=0.1)


@pytest.mark.parametrize("name", [n for n in methods.names() if n in ("spiel-ag", "rigl", "set", "spiel-ma", "lift")])
def test_a_method_by_name_that_cannot_move_in_its_run_says_so(name, folder, tmp_path):
    method = methods.get(name, target_modules=TARGETS, task_type="CAUSAL_LM")  # the paper's period
    torch.manual_seed(0)
    model = get_peft_model(load_base(folder / "base", "dense"), method.config)
    with pytest.raises(ValueError, match=r"Train longer|lower|shorter"):
        train(name, model, method, tmp_path, max_steps=4)
