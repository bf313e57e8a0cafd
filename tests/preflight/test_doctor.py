"""`doctor` finds the mistakes that were planted, each with its mend, and nothing where there are none."""

import json
import re
import warnings

import contract_toolbox
import pytest
import tiny
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, MambaConfig, MixtralConfig

from hf_sparse_peft import DoctorCallback, Regrow, SparseLoraConfig, callbacks_for, doctor, methods

MODEL = tiny.llama().config
TIED = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
    tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
)  # fmt: skip
MIXTRAL = MixtralConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, num_local_experts=4, architectures=["MixtralForCausalLM"],
)  # fmt: skip
MAMBA = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, architectures=["MambaForCausalLM"])
RUN = {"max_steps": 100, "use_cpu": True}


def sparse(**options):
    return SparseLoraConfig(**{"r": 0, "density": 0.1, "target_modules": ["q_proj", "v_proj"], **options})


def moving(every=10, fraction=0.3, **options):
    return sparse(schedule=[Regrow(every=every, grow="random", fraction=fraction)], **options)


def serious(diagnosis):
    return [(finding.severity, finding.field) for finding in diagnosis.of("error", "warning")]


def test_five_planted_mistakes_are_found_and_nothing_else():
    config = moving(every=500, density=0.5, target_modules=["q_proj", "v_porj", "up_proj", "lm_head"])
    arguments = {
        **RUN, "optim": "adamw_8bit", "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }  # fmt: skip
    diagnosis = doctor(TIED, config, arguments, bits=32)
    assert sorted(serious(diagnosis)) == [
        ("error", "Regrow.every"),
        ("error", "optim"),
        ("warning", "gradient_checkpointing_kwargs"),
        ("warning", "target_modules"),
        ("warning", "target_modules"),
    ]
    assert not diagnosis.ok
    assert all(finding.mend for finding in diagnosis.of("error", "warning"))
    text = str(diagnosis)
    for words in ("v_porj", "lm_head' shares its weight", "100 steps", "8-bit", "Reentrant"):
        assert words in text


PLANTED = {
    "a name that nothing has": (MODEL, sparse(target_modules=["q_porj"]), {}, "error", "target_modules", "q_porj"),
    "a density without a unit": (
        MODEL, sparse(granularity="row", density=0.01), {}, "error", "density", "leaves no row",
    ),
    "moves of nothing": (
        MODEL, moving(granularity="row", fraction=0.1), {}, "warning", "Regrow.fraction", "rounds to 0 units",
    ),
    "experts left out": (
        MIXTRAL, LoraConfig(target_modules=["q_proj", "gate_up_proj"]), {}, "warning", "target_parameters", "experts",
    ),
    "a weight that is only read": (
        MAMBA, sparse(target_modules=["out_proj", "in_proj"]), {}, "error", "target_modules", "never runs",
    ),
    "a method for dense bases": (MODEL, "loha", {"bits": 4}, "error", "bits", "4 bits"),
    "a start for dense bases": (MODEL, "pissa", {"bits": 4}, "error", "target_modules", "PiSSA"),
    "no runner": (MODEL, moving(), {"callbacks": []}, "error", "callbacks", "Regrow"),
    "a head in bf16": (
        MODEL, sparse(modules_to_save=["lm_head"]), {"bits": 16}, "warning", "modules_to_save", "bfloat16",
    ),
    "a file's option that nobody knows": (
        MODEL, {"peft_type": "SPARSE_LORA", "densty": 0.1}, {}, "error", "adapter_config", "densty",
    ),
    "an option out of range": (MODEL, {"density": 2.0}, {}, "error", "density", "2.0"),
    "another peft": (
        MODEL, sparse(peft_version="99.0.0"), {}, "warning", "peft_version", "99.0.0",
    ),
    "an argument that nobody knows": (
        MODEL, sparse(), {"training_arguments": {**RUN, "max_step": 3}}, "error", "max_step", "max_steps",
    ),
    "an argument of another type": (
        MODEL, sparse(), {"training_arguments": {**RUN, "learning_rate": "1e-4x"}}, "error", "learning_rate", "1e-4x",
    ),
    "updates in the backward pass": (
        MODEL, moving(), {"training_arguments": {**RUN, "optim": "lomo"}}, "error", "optim", "backward",
    ),
    "other dropout the second time": (
        MODEL,
        SparseLoraConfig(r=4, density=0.1, lora_dropout=0.1, target_modules=["q_proj"]),
        {"training_arguments": {
            **RUN, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": False},
        }},
        "error", "gradient_checkpointing_kwargs", "preserve_rng_state",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_mistake_is_found_under_its_field(case):
    model, config, options, severity, field, words = PLANTED[case]
    diagnosis = doctor(model, config, **{"training_arguments": RUN, "bits": 32, **options})
    found = [one for one in diagnosis.of(severity) if one.field == field]
    assert found, str(diagnosis)
    assert any(re.search(words, f"{one.what} {one.mend}") for one in found)


def test_a_run_sharded_from_outside_is_found(monkeypatch, tmp_path):
    arguments = tiny.arguments(tmp_path, 100)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = doctor(MODEL, moving(), arguments, bits=32).of("error")
    assert any("ACCELERATE_USE_FSDP" in one.what for one in found)


def test_a_run_counted_in_epochs_is_as_long_as_its_examples_make_it():
    arguments = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "use_cpu": True}
    assert serious(doctor(MODEL, moving(every=30), arguments, bits=32, examples=200)) == []
    assert serious(doctor(MODEL, moving(every=30), arguments, bits=32, examples=20)) == [("error", "Regrow.every")]
    unknown = doctor(MODEL, moving(every=30), arguments, bits=32)
    assert unknown.ok
    assert "max_steps" in [finding.field for finding in unknown.of("note")]


SOUND = ["sparse-lora", "losia", "snella", "lora-xs", "adalora-peft", "sora", "lisa", "mosa"]
SIZES = {"miss": {"r": 4}, "vb-lora": {"vector_length": 16}, "gralora": {"r": 4}}


def sane(name):
    if name in methods.names(upstream=False):
        return contract_toolbox.build(name).config
    return methods.get(name, **SIZES.get(name, {})).config


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SOUND else pytest.mark.slow) for name in methods.names()]
)
def test_a_shipped_method_with_sane_arguments_has_no_error(name):
    diagnosis = doctor(MODEL, sane(name), RUN, bits=32)
    assert diagnosis.ok, str(diagnosis)


def test_a_file_a_folder_and_a_yaml_of_arguments_are_read(tmp_path):
    sparse().save_pretrained(tmp_path)
    MODEL.save_pretrained(tmp_path / "base")
    (tmp_path / "run.yaml").write_text("max_steps: 100\nlearning_rate: 1e-4\nuse_cpu: true\n")
    for config in (tmp_path, tmp_path / "adapter_config.json"):
        diagnosis = doctor(tmp_path / "base", config, tmp_path / "run.yaml", bits=32)
        assert diagnosis.ok, str(diagnosis)
    assert json.loads(json.dumps(diagnosis.to_dict()))["ok"]
    with pytest.raises(ValueError, match="no-such-folder"):
        doctor(MODEL, "no-such-folder")
    with pytest.raises(TypeError, match="adapter_config is a int"):
        doctor(MODEL, 3)


def warned(out, config, callbacks=None, **options):
    model = get_peft_model(tiny.llama(layers=1), config)
    callback = DoctorCallback()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = callbacks_for(model) if callbacks is None else callbacks
        tiny.train(model, out, 4, callbacks=[*callbacks, callback], **options)
    return callback, [str(one.message) for one in caught if "Before this run" in str(one.message)]


def test_the_callback_warns_once_of_what_a_run_lacks_and_of_nothing_in_a_sound_one(tmp_path):
    callback, said = warned(tmp_path / "sound", moving(every=2))
    assert said == []
    assert callback.diagnosis.ok
    callback, said = warned(tmp_path / "bare", moving(every=2), callbacks=())
    assert len(said) == 1
    assert "Pass callbacks=" in said[0]
    assert [finding.field for finding in callback.diagnosis.of("error")] == ["callbacks"]


def test_the_callback_leaves_model_and_random_numbers_as_they_were(tmp_path):
    losses = []
    for callbacks in ((), (DoctorCallback(),)):
        model = get_peft_model(tiny.llama(layers=1), sparse())
        trainer = tiny.train(model, tmp_path, 3, callbacks=callbacks)
        losses.append(trainer.state.log_history[-1]["train_loss"])
    assert losses[0] == losses[1]
