"""Settings of a run that callbacks cannot work with are said before the first step."""

import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState

from hf_sparse_peft import (
    AccumulatedGradient,
    KernelLoraConfig,
    Regrow,
    SampleLayers,
    SparseLoraConfig,
    callbacks_for,
)
from hf_sparse_peft.training import (
    LayerSamplingCallback,
    MaskRegrowthCallback,
    PruningCallback,
    RuleRunner,
    ZerothOrderTrainer,
)

NOT_SHARDED = {"deepspeed": None, "fsdp": None}


def moving(model=None, name="default", **options):
    config = SparseLoraConfig(
        r=0, density=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM",
        schedule=[Regrow(every=2, grow=AccumulatedGradient(steps=1))], **options,
    )  # fmt: skip
    return get_peft_model(model or tiny.llama(layers=1), config, adapter_name=name)


# Sharded runs


@pytest.mark.parametrize("event", ["on_init_end", "on_train_begin"])
@pytest.mark.parametrize("callback", [RuleRunner, PruningCallback])
@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_a_run_sharded_by_accelerates_environment_is_refused(callback, event, variable, name, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=rf"{name}.*{variable}.*FSDP2.*on one device"):
        getattr(callback(), event)(
            SimpleNamespace(**NOT_SHARDED), TrainerState(max_steps=10), TrainerControl(), model=None
        )


def test_a_trainer_is_not_even_built_when_accelerate_launches_fsdp(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "1")
    model = moving()
    with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP"):
        Trainer(
            model=model, args=tiny.arguments(tmp_path, 4), train_dataset=tiny.TokenData(),
            callbacks=callbacks_for(model),
        )  # fmt: skip


def test_an_environment_that_switches_it_off_is_fine(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "0")
    model = moving()
    tiny.train(model, tmp_path, 4, callbacks=callbacks_for(model))


def test_zeroth_order_training_and_supports_from_data_are_refused_under_a_launched_fsdp(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj"], criterion="gradient")
    model = get_peft_model(tiny.llama(layers=1), config)
    with pytest.raises(ValueError, match=r"gradient.*ACCELERATE_USE_FSDP.*calibrate"):
        tiny.train(model, tmp_path, 2, callbacks=callbacks_for(model))
    with pytest.raises(ValueError, match=r"FSDP.*ACCELERATE_USE_FSDP"):
        ZerothOrderTrainer(model=model, args=tiny.arguments(tmp_path, 2), train_dataset=tiny.TokenData())


@pytest.mark.parametrize("how", ["plugin", "parallelism", "FSDP", "DEEPSPEED", "MEGATRON_LM", "wrapped"])
def test_other_ways_to_shard_are_refused(how, monkeypatch):
    args, model = SimpleNamespace(**NOT_SHARDED), None
    if how == "plugin":
        args.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    elif how == "parallelism":
        args.parallelism_config = SimpleNamespace(dp_shard_size=2)
    elif how.isupper():
        monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", SimpleNamespace(value=how))
    else:
        model = type("FullyShardedDataParallel", (nn.Sequential,), {})(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"under (FSDP|DeepSpeed|Megatron-LM): .* on one device"):
        MaskRegrowthCallback().on_train_begin(args, TrainerState(max_steps=10), TrainerControl(), model=model)


# Adapters with a name


def best(model, out, **options):
    data = tiny.TokenData(8)
    args = tiny.arguments(
        out, 4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks_for(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(w.message) for w in caught if "load_best_model_at_end" in str(w.message)]


def test_a_named_adapter_whose_best_state_trainer_will_not_load_is_named_once(tmp_path):
    said = best(moving(name="mine"), tmp_path)
    assert len(said) == 1
    assert "['mine']" in said[0]
    assert "load_adapter" in said[0]


def test_the_second_of_two_active_adapters_is_named(tmp_path):
    model = moving()
    model.add_adapter("more", SparseLoraConfig(r=2, density=0.1, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "more"])
    assert ["['more']" in text for text in best(model, tmp_path)] == [True]


def test_a_named_adapter_without_any_schedule_is_named_too(tmp_path):
    config = SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert ["['mine']" in text for text in best(get_peft_model(tiny.llama(layers=1), config, "mine"), tmp_path)] == [
        True
    ]
    assert callbacks_for(get_peft_model(tiny.llama(layers=1), config)) == []


def test_the_default_adapter_gets_its_best_state_and_no_warning(tmp_path):
    assert best(moving(), tmp_path) == []


def test_a_named_adapter_resumes_where_the_whole_run_went(tmp_path):
    def end(resume=None):
        model = moving(name="mine")
        tiny.train(
            model, tmp_path, 6, callbacks=callbacks_for(model), resume=resume, save_strategy="steps", save_steps=3
        )
        return {k: v for k, v in model.state_dict().items() if "sparse_lora_" in k}

    whole, resumed = end(), end(str(tmp_path / "checkpoint-3"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


# Frozen adapters


@pytest.fixture
def folder(tmp_path):
    moving().save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_the_message_for_an_adapter_that_was_loaded_frozen_says_so(folder, tmp_path):
    model = PeftModel.from_pretrained(tiny.llama(layers=1), folder)
    with pytest.raises(ValueError, match=r"Regrow.*'default'.*is_trainable=False.*is_trainable=True"):
        tiny.train(model, tmp_path, 4, callbacks=[MaskRegrowthCallback()])


def test_layer_sampling_says_that_its_adapter_was_loaded_frozen(folder, tmp_path):
    model = PeftModel.from_pretrained(tiny.llama(layers=1), folder)
    with pytest.raises(ValueError, match=r"'default' is frozen.*is_trainable=True"):
        tiny.train(model, tmp_path, 4, callbacks=[LayerSamplingCallback(SampleLayers())])


def test_the_message_for_an_adapter_that_is_not_active_says_so(tmp_path):
    model = moving(name="moves")
    model.add_adapter("plain", SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("plain")
    with pytest.raises(ValueError, match=r"'moves'.*not active.*set_adapter\('moves'\)"):
        tiny.train(model, tmp_path, 4, callbacks=[MaskRegrowthCallback()])


@pytest.mark.parametrize("kind", ["sparse", "kernel"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_plain_loop_over_a_frozen_adapter_is_told_once(kind, frozen, tmp_path):
    common = {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    config = SparseLoraConfig(r=2, density=0.1, **common) if kind == "sparse" else KernelLoraConfig(r=4, **common)
    get_peft_model(tiny.llama(layers=1), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.llama(layers=1), str(tmp_path), is_trainable=not frozen).train()
    ids = torch.ones(1, 4, dtype=torch.long)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(input_ids=ids, labels=ids)
    assert len([w for w in caught if "is_trainable=True" in str(w.message)]) == frozen


# Layer sampling on several stacks


class Towers(nn.Module):
    """Two towers of numbered layers; batches reach `text` only, through `shared` modules of another name."""

    def __init__(self):
        super().__init__()
        self.vision = nn.Module()
        self.vision.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.text = nn.Module()
        self.text.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x, labels):
        for layer in self.text.layers:
            x = torch.tanh(layer(x))
        return {"loss": (x - labels).square().mean(), "logits": x}


def rows(count=16):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, 2, 8, generator=generator)
    return [{"x": x, "labels": y} for x, y in drawn]


def test_layer_sampling_trains_and_suppresses_a_share_of_every_stack(monkeypatch, tmp_path):
    """Drawn over both towers at once, there are steps at which no layer that the batch reaches trains."""
    config = SparseLoraConfig(r=2, density=0.1, target_modules=r".*(blocks|layers)\.\d+")
    model, seen, sets = get_peft_model(Towers(), config), [], []
    callback = LayerSamplingCallback(SampleLayers(trained=0.25, suppressed=0.5, every=4, probes=3))
    draw = SampleLayers._suppressed_sets
    monkeypatch.setattr(SampleLayers, "_suppressed_sets", lambda *args: sets.extend(found := draw(*args)) or found)
    look = tiny.At(on_step_end=lambda step, model, optimizer: seen.append(tuple(callback.runs[0].memory.trained)))
    tiny.train(model, tmp_path, 12, callbacks=[callback, look], data=rows())
    names = list(callback.runs[0].memory.layers)
    assert [name.split(".")[-2] for name in names] == ["blocks"] * 6 + ["layers"] * 4
    assert all(len([n for n in step if n < 6]) == 1 and len([n for n in step if n >= 6]) == 1 for step in seen)
    assert all(len([n for n in one if n < 6]) == 3 and len([n for n in one if n >= 6]) == 2 for one in sets)
    assert len(sets) == 6
    assert len({step[0] for step in seen}) > 1
    assert len({step[1] for step in seen}) > 1


def test_layers_of_a_list_that_the_pattern_does_not_match_are_named(tmp_path):
    model = get_peft_model(Towers(), SparseLoraConfig(r=2, density=0.1, target_modules="all-linear"))
    options = SampleLayers(trained=0.5, every=3)
    with pytest.warns(UserWarning, match=r"\['stages'\] always train.*layers_pattern='.*\|stages'"):
        tiny.train(model, tmp_path, 2, callbacks=[LayerSamplingCallback(options)], data=rows())
