"""Methods by name: what the registry promises about each."""

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import TrainingArguments

from hf_sparse_peft import AccumulatedGradient, Linear, Regrow, methods
from hf_sparse_peft.methods import registry
from hf_sparse_peft.sparsity import Random
from hf_sparse_peft.training import RuleRunner

FITTING = {
    "mask-lora": {"mask": "given"},
    "perp": {"mask": "given"},
    "unlearn-sparse": {"mask": "given"},
    "curing": {"max_rank": 5},
    "sketchtune": {"groups": 1, "bits": 2},
    "sst": {"r": 4},
    "smt": {"block_size": 8},
    "diablo": {"blocks": 8},
    "diffusekrona": {"rows": 8, "cols": 4},
    "mpoe": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "ether": {"blocks": 4},
    "ether+": {"blocks": 4},
    "compacter": {"reduction": 4},
    "compacter++": {"reduction": 4},
    "hyperformer": {"reduction": 8},
    "hyperformer++": {"reduction": 8},
}
"""Options without which a method does not fit a model of width 32."""


@pytest.fixture
def base():
    return tiny.llama(layers=1)


@pytest.mark.parametrize("name", methods.names(upstream=False))
def test_every_method_builds_an_adapter_with_its_callbacks(name, base, tmp_path):
    method = methods.get(name, **{"target_modules": "all-linear", **FITTING.get(name, {})})
    model = get_peft_model(base, method.config)
    ran = [callback for callback in method.callbacks(model) if isinstance(callback, RuleRunner)]
    waits = getattr(method.config, "needs_calibration", False)
    assert len(ran) == bool(waits or getattr(method.config, "schedule", [])) or name == "ist"
    others = [callback for callback in method.callbacks(model) if not isinstance(callback, RuleRunner)]
    asks_for_optimizer = getattr(method.config, "optimizer", None) is not None
    assert len(others) == (not ran and asks_for_optimizer)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    optimizer = method.optimizer(model, args)
    assert optimizer is None or isinstance(optimizer, torch.optim.Optimizer)
    assert method.paper
    assert method.info.name == name


def test_spiel_has_the_papers_defaults():
    config = methods.get("spiel-ag").config
    assert (config.r, config.criterion) == (0, Random())
    assert config.schedule == [Regrow(every=20, grow=AccumulatedGradient(steps=5), fraction=Linear(0.2, 0.0))]
    assert config.rules[0].replaces_random_start


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'lora' is unknown.*spiel-ag"):
        methods.get("lora")


def test_unknown_option_names_the_accepted_ones():
    with pytest.raises(ValueError, match=r"'spiel-ag' does not take one of \['densty'\].*'density'"):
        methods.get("spiel-ag", densty=0.1)


@pytest.mark.parametrize("name", ["Spiel", "spiel_ag", "spiel ag"])
def test_names_that_nobody_could_guess_are_refused(name):
    with pytest.raises(ValueError, match="lower case with dashes"):
        methods.register(name, paper="", moves="", use_when="", cost="")


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="taken"):
        methods.register("spiel-ag", paper="", moves="", use_when="", cost="")


def test_table_has_one_row_a_method():
    assert registry.markdown_table().count("\n") == 1 + len(methods.names())


def test_values_ratio_sets_the_entries_learning_rate_and_no_other(base, tmp_path):
    method = methods.get("sparse-lora", values_ratio=3.0, criterion="random", target_modules="all-linear")
    model = get_peft_model(base, method.config)
    optimizer = method.optimizer(model, TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=1e-3))
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[parameter] == pytest.approx(3e-3 if "sparse_lora_values" in name else 1e-3)


def test_a_ratio_that_is_none_is_refused():
    with pytest.raises(ValueError, match="values_ratio"):
        methods.get("sparse-lora", values_ratio=0.0, criterion="random", target_modules="all-linear")
