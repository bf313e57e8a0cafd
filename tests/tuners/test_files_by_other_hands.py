"""Files and state dicts that somebody else wrote or named: whole ones load, mislabelled ones are refused by name."""

import json
import warnings

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig
from hf_sparse_peft.hub import check_adapter
from hf_sparse_peft.tuners import FactorMaskConfig
from hf_sparse_peft.utils.checksums import save_checked

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TUNERS = pytest.mark.parametrize("cls", [SparseLoraConfig, KernelLoraConfig])


def base(**options):
    return tiny.llama(layers=1, hidden=16, **options).eval()


def adapted(cls=SparseLoraConfig, seed=1, **options):
    model = get_peft_model(base(), cls(**{"r": 2, "target_modules": ["q_proj"], **options})).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 9)[None]).logits


def refused(folder, message):
    with pytest.raises(ValueError, match=message):
        check_adapter(folder)
    model = base()
    before = {name: id(module) for name, module in model.named_modules()}
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for load in (lambda: PeftModel.from_pretrained(model, folder), lambda: model.load_adapter(str(folder))):
        with pytest.raises(ValueError, match=message):
            load()
        assert {name: id(module) for name, module in model.named_modules()} == before
        assert all(tensor.equal(kept[name]) for name, tensor in model.state_dict().items())
        assert not hasattr(model, "peft_config")


@TUNERS
@pytest.mark.parametrize("peft_type", ["SPARSE_LORa", None, 3, [], {"a": 1}, "missing"])
def test_type_that_no_tuner_has_is_refused_by_the_config(tmp_path, cls, peft_type):
    adapted(cls).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    if peft_type == "missing":
        del config["peft_type"]
    else:
        config["peft_type"] = peft_type
    (tmp_path / CONFIG).write_text(json.dumps(config))
    refused(tmp_path, "adapter_config.json.*peft_type")


@TUNERS
def test_file_that_says_it_is_lora_is_not_loaded_as_random_lora(tmp_path, cls):
    adapted(cls).save_pretrained(tmp_path)
    LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    refused(tmp_path, "LORA")
    get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    PeftModel.from_pretrained(base(), tmp_path)


@TUNERS
@pytest.mark.parametrize("where", [WEIGHTS, CONFIG])
def test_name_that_comes_twice_is_refused_where_parsers_take_the_last(tmp_path, cls, where):
    adapted(cls).save_pretrained(tmp_path)
    content = (tmp_path / where).read_bytes()
    if where == CONFIG:
        (tmp_path / where).write_bytes(content.rstrip()[:-1] + b', "r": 2}')
    else:
        length = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + length].decode().rstrip()
        name, entry = next((k, v) for k, v in json.loads(header).items() if k != "__metadata__")
        header = f"{header[:-1]},{json.dumps(name)}:{json.dumps(entry)}}}".encode()
        (tmp_path / where).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    refused(tmp_path, f"{where}.*twice")


@TUNERS
def test_tensor_without_the_prefix_of_adapter_files_is_refused_alike_everywhere(tmp_path, cls):
    adapted(cls).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = sorted(tensors)[0]
    tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)
    save_checked(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    refused(tmp_path, key.rpartition(".")[2])


@pytest.mark.parametrize(
    ("masks", "due"),
    [
        ({}, ("A_map", "B_map")), ({"kind": "stochastic"}, ("A_map", "B_map", "A_start")),
        ({"kind": "stochastic", "split": "B"}, ("B_map",)),
    ],
)  # fmt: skip
def test_each_map_of_the_factors_is_missed_without_a_base_too(tmp_path, masks, due):
    adapted(factor_masks=FactorMaskConfig(**masks)).save_pretrained(tmp_path)
    check_adapter(tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    assert {key.rpartition("sparse_lora_")[2] for key in whole} >= set(due)
    for kind in due:
        save_checked({k: t for k, t in whole.items() if not k.endswith(kind)}, tmp_path / WEIGHTS, {"format": "pt"})
        refused(tmp_path, f"sparse_lora_{kind}")
    if "A_map" not in due:
        key = next(key for key in whole if key.endswith("lora_A"))
        save_checked({**whole, f"{key}_map": torch.zeros_like(whole[key]).byte()}, tmp_path / WEIGHTS, {"format": "pt"})
        refused(tmp_path, "sparse_lora_A_map")


@TUNERS
def test_state_dict_of_an_adapted_output_embedding_goes_into_a_fresh_model_and_replaces_no_base_weight(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = adapted(cls, target_modules=["q_proj", "lm_head"])
        tensors = get_peft_model_state_dict(trained)
    key = next(key for key in tensors if key.endswith("lm_head.base_layer.weight"))
    fresh = adapted(cls, target_modules=["q_proj", "lm_head"], seed=2)
    before = logits(fresh)
    with pytest.raises(ValueError, match=r"lm_head\.base_layer"):
        set_peft_model_state_dict(fresh, {**tensors, key: tensors[key] + 1})
    assert logits(fresh).equal(before)
    set_peft_model_state_dict(fresh, tensors)
    assert logits(fresh).equal(logits(trained))


@TUNERS
@pytest.mark.parametrize("heads", [["lm_head"], ["lm_head", "embed_tokens"]])
def test_head_that_is_an_embedding_saved_with_all_embeddings_loads_everywhere(tmp_path, cls, heads):
    model = adapted(cls, modules_to_save=heads)
    model.add_adapter("other", cls(r=2, target_modules=["q_proj"], modules_to_save=heads))
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head").modules_to_save["other"].weight.mul_(3)
    model.save_pretrained(tmp_path, save_embedding_layers=True, selected_adapters=["default"])
    check_adapter(tmp_path)
    keys = set(load_file(tmp_path / WEIGHTS))
    assert "base_model.model.lm_head.weight" in keys
    assert not any("other" in key or "modules_to_save" in key for key in keys)
    bare = base()
    bare.load_adapter(str(tmp_path))
    loaded = [PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=meta) for meta in (False, True)]
    assert all(logits(one).equal(logits(model)) for one in (bare, *loaded))
