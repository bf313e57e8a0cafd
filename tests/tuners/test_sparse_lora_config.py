"""Registration with peft, configs that are refused, and models that survive a refused injection."""

import dataclasses
import importlib
import importlib.metadata

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from tuner_toolbox import base_bits, fill, logits, make_config, same_bits, tiny_llama

import hf_sparse_peft
from hf_sparse_peft import Allocate, AverageRank, Numbers, Prune, Regrow, SparseLoraConfig, SparseLoraModel
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.shared import registration


def test_peft_knows_the_method_under_every_name():
    member = PeftType.SPARSE_LORA
    assert member is PeftType("SPARSE_LORA") is PeftType["SPARSE_LORA"]
    assert (member.value, member.name, str(member)) == ("SPARSE_LORA", "SPARSE_LORA", "PeftType.SPARSE_LORA")
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SPARSE_LORA"] is SparseLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is SparseLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == SparseLoraModel.prefix == "sparse_lora_"
    assert all(kind in PEFT_TYPE_TO_CONFIG_MAPPING for kind in (member,))


def test_registering_again_changes_nothing():
    members = list(PeftType)
    registration.add_peft_type("SPARSE_LORA")
    registration.register_tuner(SparseLoraConfig, SparseLoraModel)
    counting = PeftModel.get_nb_trainable_parameters
    registration.count_living_parameters()
    importlib.reload(hf_sparse_peft)
    importlib.reload(hf_sparse_peft.tuners)
    importlib.reload(importlib.import_module("hf_sparse_peft.tuners.sparse_lora"))
    assert list(PeftType) == members
    assert PeftModel.get_nb_trainable_parameters is counting
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SPARSE_LORA"] is SparseLoraConfig is hf_sparse_peft.SparseLoraConfig


def test_an_older_peft_is_refused_with_the_mend(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    with pytest.raises(ImportError, match=r"needs peft>=0.21.2, found 0.20.0: pip install -U 'peft>=0.21.2'"):
        registration.check_peft()


def test_a_peft_without_what_we_need_is_refused_with_the_mend(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.0.0")
    monkeypatch.delattr("peft.utils.register_peft_method")
    with pytest.raises(ImportError, match=r"does not know peft 9.0.0: .*register_peft_method.*pip install 'peft=="):
        registration.check_peft()


BAD = [
    ({"r": -1}, "r=-1"),
    ({"density": -0.1}, "density=-0.1"),
    ({"density": 1.5}, "density=1.5"),
    ({"density": float("nan")}, "density=nan"),
    ({"budget": {"type": "numbers", "numbers": 0}}, "Numbers.numbers=0"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
    ({"block_size": 0}, "block_size=0"),
    ({"granularity": "head"}, "granularity='head'"),
    ({"criterion": "gradients"}, "criterion='gradients'"),
    ({"criterion": {"type": "magnitude", "rank": 3}}, "rank"),
    ({"criterion": {"type": "low_rank_magnitude", "rank": 0}}, "rank=0"),
    ({"budget": "even"}, "budget='even'"),
    ({"budget": {"type": "global", "total": 0.1}}, "budget=Global.*criterion='random'"),
    ({"density": 0.1, "budget": {"type": "density", "fraction": 0.1}}, "density=0.1 and budget"),
    ({"values_dtype": "float16"}, "values_dtype='float16'"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
    ({"r": 0, "density": 0.0}, "r=0 and density=0"),
    ({"density": 0.0, "schedule": [{"type": "regrow"}]}, "Regrow moves the support"),
    ({"density": 0.0, "schedule": [{"type": "prune"}]}, "density=0 leaves it out"),
    ({"schedule": [{"type": "allocate", "budget": {"type": "average_rank", "r": 99}}]}, "AverageRank.r=99"),
    ({"r": 0, "schedule": [{"type": "allocate"}]}, "needs units of kind"),
    ({"schedule": [{"type": "regrow", "every": 3}]}, "steps=5.*every=3"),
    ({"schedule": "prune"}, "schedule='prune'"),
    ({"schedule": [3]}, r"schedule\[0\]=3"),
    ({"schedule": [Regrow(every=5), {"type": "regrow", "every": 0, "grow": "random"}]}, "Regrow.every=0"),
    ({"schedule": [{"type": "regrow", "every": 3, "grow": {"type": "accumulated_gradient", "steps": 4}}]}, "steps=4"),
    ({"schedule": [{"type": "regrow", "drop": "random"}]}, "Regrow.drop='random'"),
    ({"schedule": [{"type": "regrow", "grow": "gradients"}]}, "Regrow.grow='gradients'"),
    ({"schedule": [{"type": "regrow", "fraction": 0.0}]}, "Regrow.fraction=0.0"),
    ({"schedule": [{"type": "regrow", "fraction": "step"}]}, "Regrow.fraction='step'"),
    ({"schedule": [{"type": "prune", "final_fraction": 0}]}, "Prune.final_fraction=0"),
    ({"schedule": [{"type": "prune", "start": 0.8, "end": 0.5}]}, "Prune.start=0.8"),
    ({"schedule": [{"type": "prune", "every": 0}]}, "Prune.every=0"),
    ({"schedule": [{"type": "prune", "scope": "model"}]}, "Prune.scope='model'"),
    ({"schedule": [{"type": "allocate", "budget": {"type": "average_rank", "r": 0}}]}, "AverageRank.r=0"),
    ({"schedule": [{"type": "allocate", "initial_warmup": 0.6, "final_warmup": 0.6}]}, "final_warmup"),
    ({"schedule": [{"type": "allocate", "score": {"type": "smoothed", "beta1": 1.0}}]}, "Smoothed.beta1=1.0"),
    ({"schedule": [{"type": "orthogonality", "weight": -1}]}, "Orthogonality.weight=-1"),
    ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform"),
    ({"target_modules": ".*q_proj", "layers_pattern": "layers"}, "layers_pattern"),
    ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "layers_pattern"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_value_is_refused_by_the_name_of_its_field(options, message):
    with pytest.raises(ValueError, match=message):
        SparseLoraConfig(**options)


def test_schedules_may_be_given_as_dicts():
    ranks = {"type": "allocate", "budget": "average_rank"}
    config = SparseLoraConfig(
        schedule=[{"type": "prune", "final_fraction": 0.3}, {"type": "regrow", "every": 8}, ranks]
    )
    assert config.schedule == [Prune(final_fraction=0.3), Regrow(every=8), Allocate(budget=AverageRank(4))]
    assert config.has_schedule
    assert not dataclasses.replace(config, training_finished=True).has_schedule


class Mixed(nn.Module):
    """Two layers that blocks of 16 divide, one that they do not, one that is not linear."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.odd = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 30)
        self.conv = nn.Conv1d(3, 3, 1)

    def forward(self, x):
        return self.odd(self.second(torch.relu(self.first(x))))


BOTH = ["first", "second"]
REFUSED = {
    "block that does not divide": (
        "sparse-block",
        {"target_modules": [*BOTH, "odd"]},
        ValueError,
        "'odd'.*block_size=16",
    ),
    "density without a unit": ("sparse-row", {"density": 0.02}, ValueError, "density=0.02 leaves no row"),
    "too many entries": ("hybrid-entry", {"budget": Numbers(10**9)}, ValueError, "Numbers.numbers=1000000000"),
    "not a linear layer": ("hybrid-entry", {"target_modules": [*BOTH, "conv"]}, TypeError, "'conv' of type Conv1d"),
    "not a linear layer, low-rank": ("low_rank-entry", {"target_modules": [*BOTH, "conv"]}, TypeError, "'conv'"),
    "sizes of another model": ("hybrid-entry", {"sizes": {"first": [3, 3, 4]}}, ValueError, "second"),
    "sizes above the weight": (
        "hybrid-entry",
        {"sizes": {"first": [3, 3, 4], "second": [10**6, 10**6, 4]}},
        ValueError,
        "sizes gives 'second' 1000000",
    ),
    "no such module": ("hybrid-entry", {"target_modules": ["third"]}, ValueError, "third"),
    "everything excluded": ("hybrid-entry", {"exclude_modules": BOTH}, ValueError, "exclude"),
}


@pytest.mark.parametrize("road", ["get_peft_model", "inject", "second adapter", "second injection"])
@pytest.mark.parametrize("why", REFUSED)
def test_a_refused_adapter_leaves_the_model_unharmed(why, road):
    case, options, error, message = REFUSED[why]
    config = make_config(case, **{"target_modules": BOTH, "task_type": None, **options})
    model, x = Mixed(), torch.randn(4, 32)
    if road.startswith("second"):
        first = make_config(target_modules=["first", "odd"], task_type=None)
        model = get_peft_model(model, first) if road == "second adapter" else inject_adapter_in_model(first, model)
        fill(model)
    before, bits, names = model(x), base_bits(model), [name for name, _ in model.named_modules()]
    add = {
        "get_peft_model": lambda c: get_peft_model(model, c),
        "second adapter": lambda c: model.add_adapter("other", c),
    }.get(road, lambda c: inject_adapter_in_model(c, model, adapter_name="other"))
    with pytest.raises(error, match=message):
        add(config)
    assert [name for name, _ in model.named_modules()] == names
    assert same_bits(base_bits(model), bits)
    assert torch.equal(model(x), before)
    assert "other" not in getattr(model, "peft_config", {})
    add(make_config(target_modules=["second"], task_type=None))
    added = "default" if road == "get_peft_model" else "other"
    assert any(added in layer.sparse_lora_values for layer in adapter_layers(model))


def test_support_that_cannot_be_chosen_leaves_the_model_unharmed():
    model = Mixed()
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        get_peft_model(model, make_config(target_modules=["first", "second"], criterion="magnitude", task_type=None))
    assert not adapter_layers(model)
    assert type(model.first) is nn.Linear


def test_schedule_without_callback_warns_once_for_the_whole_model(recwarn):
    model = get_peft_model(tiny_llama(), make_config(schedule=[Regrow()])).train()
    for _ in range(2):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    messages = [str(w.message) for w in recwarn if "asks for regrow" in str(w.message)]
    assert len(messages) == 1
    assert "callbacks_for(model)" in messages[0]


def test_evaluation_does_not_ask_for_a_callback(recwarn):
    model = get_peft_model(tiny_llama(), make_config(schedule=[Regrow()]))
    logits(model)
    assert not [w for w in recwarn if "asks for regrow" in str(w.message)]


@pytest.mark.parametrize("name", ["half", "train", "values", "training"])
def test_an_adapter_name_that_torch_uses_is_refused_and_leaves_the_model(name):
    model = get_peft_model(Mixed(), make_config(target_modules=BOTH, task_type=None))
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=f"adapter_name='{name}'"):
        model.add_adapter(name, make_config(target_modules=BOTH, task_type=None))
    assert set(model.state_dict()) == keys
    assert set(model.peft_config) == {"default"}
