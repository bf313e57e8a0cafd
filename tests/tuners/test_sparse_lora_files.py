"""Saving and loading by every road that leads to an adapter file, and what a damaged file does."""

import json
import os
import pickle

import peft
import processes
import pytest
import tiny
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft import set_peft_model_state_dict as set_state
from safetensors.torch import load_file
from tuner_toolbox import (
    BASES,
    CASES,
    fill,
    logits,
    make_base,
    make_config,
    same_adapter,
    saved,
    tiny_llama,
    trained,
)

from hf_sparse_peft import Allocate, AverageRank, Density, ErdosRenyi, Global, Linear, Numbers, Regrow, SparseLoraConfig
from hf_sparse_peft.tuners import adapter_layers

FILE = "adapter_model.safetensors"


@tiny.crossed(base=BASES, case=CASES, meta=[False, True])
def test_loaded_adapter_gives_the_same_bits(base_of, tmp_path, base, case, meta):
    model = saved(tmp_path, base_of, base, case)
    before = logits(model)
    loaded = PeftModel.from_pretrained(base_of(base), tmp_path, low_cpu_mem_usage=meta)
    assert torch.equal(logits(loaded), before)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(base_of(base), tmp_path, low_cpu_mem_usage=meta, is_trainable=True)
    assert all(p.requires_grad for p in trained(trainable).values())
    assert {p.dtype for p in trained(trainable).values()} == {torch.float32}
    for name, parameter in trained(model).items():
        assert torch.equal(trained(trainable)[name], parameter)


@pytest.mark.parametrize("criterion", ["random", "magnitude", "smallest_magnitude", "low_rank_magnitude"])
@pytest.mark.parametrize("allocation", ["density", "erdos_renyi", "global", "numbers"])
def test_support_comes_from_the_file_and_not_from_the_base(base_of, tmp_path, criterion, allocation):
    if (criterion, allocation) == ("random", "global"):
        pytest.skip("refused by the config")
    budgets = {
        "density": Density(0.05),
        "erdos_renyi": ErdosRenyi(0.05),
        "global": Global(0.05),
        "numbers": Numbers(2000),
    }
    model = saved(tmp_path, base_of, criterion=criterion, budget=budgets[allocation])
    loaded = PeftModel.from_pretrained(tiny_llama(seed=99), tmp_path)  # another base, another ranking
    for layer, other in zip(adapter_layers(model), adapter_layers(loaded), strict=True):
        assert torch.equal(layer.units("default"), other.units("default"))


@pytest.mark.parametrize("base", [pytest.param("fp32", marks=pytest.mark.slow), "nf4"])
def test_a_process_that_only_imports_the_package_loads_the_same_bits(base_of, tmp_path, llama_folder, base):
    model = get_peft_model(base_of(base), make_config("hybrid-entry", base))
    model.base_model.model.name_or_path = str(llama_folder)
    model.peft_config["default"].base_model_name_or_path = str(llama_folder)
    fill(model)
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    options = ""
    if base == "nf4":
        options = (
            ", device_map='cpu', dtype=torch.float32, quantization_config=transformers.BitsAndBytesConfig("
            "load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
            "bnb_4bit_compute_dtype=torch.float32)"
        )
    script = f"""
import sys, torch, transformers, hf_sparse_peft
from peft import AutoPeftModelForCausalLM
torch.set_num_threads(1)
sys.path[:0] = [{os.path.dirname(__file__)!r}, {os.path.dirname(tiny.__file__)!r}]
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path)!r}{options})
from tuner_toolbox import logits
assert torch.equal(logits(model), torch.load({str(tmp_path / "logits.pt")!r})), "other logits"
print("SAME")
"""
    result = processes.python("-c", script)
    assert "SAME" in result.stdout, result.stderr[-2000:]


def test_config_reaches_another_process_which_has_not_imported_the_package(tmp_path):
    config = make_config(schedule=[Regrow(every=7)])
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    code = (
        "import pickle, sys; assert 'hf_sparse_peft' not in sys.modules; config = pickle.load(open(sys.argv[1], 'rb'))"
        "; print(config.peft_type.value, config.density, type(config.schedule[0]).__name__)"
    )
    assert processes.python("-c", code, tmp_path / "config.pickle", check=True).stdout == "SPARSE_LORA 0.05 Regrow\n"
    assert pickle.loads(pickle.dumps(config)) == config


def test_config_survives_its_json(tmp_path):
    config = make_config(
        schedule=[Regrow(every=7, fraction=Linear(0.1, 0.0)), Allocate(budget=AverageRank(3))],
        rank_pattern={"q_proj": 8},
        criterion={"type": "low_rank_magnitude", "rank": 4},
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is SparseLoraConfig
    loaded.inference_mode = config.inference_mode
    assert loaded == config
    assert "import hf_sparse_peft" in json.loads((tmp_path / "adapter_config.json").read_text())["install_hint"]


@tiny.crossed(base=BASES, case=CASES)
def test_transformers_adapter_api_keeps_every_bit_of_the_adapter(base_of, tmp_path, base, case):
    model = saved(tmp_path / "peft", base_of, base, case)
    plain = base_of(base)
    report = plain.load_adapter(str(tmp_path / "peft"), adapter_name="first")
    assert not report.missing_keys
    assert not report.unexpected_keys
    same_adapter(plain, model, "first")
    before = logits(plain)
    plain.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(base), tmp_path / "hf")), logits(model))
    plain.disable_adapters()
    with model.disable_adapter():
        assert torch.equal(logits(plain), logits(model))
    plain.enable_adapters()
    plain.add_adapter(make_config("sparse-row", base, seed=3, init_weights=False), adapter_name="second")
    plain.set_adapter("second")
    assert plain.active_adapters() == ["second"]
    assert not torch.equal(logits(plain), before)
    plain.set_adapter("first")
    assert torch.equal(logits(plain), before)
    plain.delete_adapter("second")
    assert not [name for name, _ in plain.named_parameters() if "second" in name]
    assert torch.equal(logits(plain), before)


@pytest.mark.parametrize("case", CASES)
def test_transformers_load_adapter_of_a_bf16_file_keeps_its_values(base_of, tmp_path, case):
    model = saved(tmp_path, base_of, case=case, values_dtype="bfloat16")
    loaded = PeftModel.from_pretrained(base_of(), tmp_path)
    plain = base_of()
    plain.load_adapter(str(tmp_path))
    same_adapter(plain, loaded)
    for name, parameter in trained(model).items():
        assert torch.equal(trained(loaded)[name], parameter.bfloat16().float())


@pytest.mark.parametrize("case", CASES)
def test_inject_adapter_and_state_dict_functions_round_trip(case):
    config = make_config(case)
    model = inject_adapter_in_model(config, tiny_llama())
    fill(model)
    state = get_peft_model_state_dict(model)
    assert state
    assert all("sparse_lora_" in key and "default" not in key for key in state)
    other = inject_adapter_in_model(make_config(case, seed=4), tiny_llama())
    result = set_state(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))
    # Targets taken from the file's keys instead of the config
    guided = inject_adapter_in_model(make_config(case, seed=4), tiny_llama(), state_dict=state)
    set_state(guided, state)
    assert torch.equal(logits(guided), logits(model))


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_targets_taken_from_a_state_dict_get_supports_that_the_config_alone_would_not_give():
    state = get_peft_model_state_dict(inject_adapter_in_model(make_config(target_modules=["q_proj"]), tiny_llama()))
    model = inject_adapter_in_model(make_config(target_modules=["o_proj"]), tiny_llama(), state_dict=state)
    layers = adapter_layers(model)
    assert len(layers) == 2
    assert all("q_proj" in layer.module_name and "default" in layer.sparse_lora_values for layer in layers)


def test_second_adapter_is_loaded_beside_the_first(base_of, tmp_path):
    first, second = saved(tmp_path / "a", base_of), saved(tmp_path / "b", base_of, case="sparse-column", seed=4)
    model = PeftModel.from_pretrained(base_of(), tmp_path / "a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    assert torch.equal(logits(model), logits(first))
    model.set_adapter("b")
    assert torch.equal(logits(model), logits(second))


def test_training_state_is_saved_for_a_resume_and_left_out_of_inference(base_of, tmp_path):
    schedules = {"schedule": [Regrow(), Allocate(budget=AverageRank(2))]}
    model = get_peft_model(base_of(), make_config(**schedules))
    fill(model)
    for layer in adapter_layers(model):
        layer.sparse_lora_rule_candidate_sums["default"].normal_()
        layer.sparse_lora_rule_sensitivity_A["default"].uniform_()
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(base_of(), tmp_path, is_trainable=True)
    for layer, other in zip(adapter_layers(model), adapter_layers(resumed), strict=True):
        held = [name for name in layer.training_state_names if "default" in getattr(layer, name)]
        assert {
            "sparse_lora_rule_candidates",
            "sparse_lora_rule_candidate_sums",
            "sparse_lora_rule_sensitivity_A",
        } <= set(held)
        for name in held:
            assert torch.equal(getattr(layer, name)["default"], getattr(other, name)["default"])
    served = PeftModel.from_pretrained(base_of(), tmp_path)
    assert all(not getattr(layer, n) for layer in adapter_layers(served) for n in layer.training_state_names)
    assert torch.equal(logits(served), logits(model))


def test_nothing_is_unpickled_from_an_adapter_folder(base_of, tmp_path):
    saved(tmp_path, base_of)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "adapter_config.json", FILE]
    assert peft.utils.SAFETENSORS_WEIGHTS_NAME == FILE


def test_bf16_values_halve_the_file_and_leave_modules_to_save_alone(base_of, tmp_path):
    saved(tmp_path / "wide", base_of, case="sparse-row", modules_to_save=["lm_head"])
    saved(tmp_path / "narrow", base_of, case="sparse-row", modules_to_save=["lm_head"], values_dtype="bfloat16")
    wide, narrow = load_file(tmp_path / "wide" / FILE), load_file(tmp_path / "narrow" / FILE)
    assert wide.keys() == narrow.keys()
    for key, tensor in narrow.items():
        if "sparse_lora_values" in key:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, wide[key].bfloat16())
        else:
            assert tensor.dtype == wide[key].dtype
    assert any("lm_head" in key for key in narrow)


def test_saving_leaves_the_model_as_it_was(base_of, tmp_path):
    for base in BASES:
        model = get_peft_model(
            make_base(base, None) if base in ("fp32", "bf16", "conv1d") else base_of(base), make_config(base=base)
        )
        fill(model)
        before = logits(model)
        model.save_pretrained(tmp_path / base)
        assert torch.equal(logits(model), before)
