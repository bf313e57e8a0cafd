"""An adapter knows what its base was quantised to: it is merged into the weights that it was trained on, or, where that
is asked for, into those in full precision."""

import json
import warnings

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_sparse_peft import SparseLoraConfig, cli, hub

NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip


def quantised(folder, kind, **options):
    if kind == "nf4":
        given = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    else:
        given = BitsAndBytesConfig(load_in_8bit=True)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=given, **options)


def filled(model):
    config = SparseLoraConfig(r=2, density=0.05, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


@pytest.fixture(scope="module", params=["nf4", "int8"])
def trained(request, tmp_path_factory):
    """Folder of an adapter that was trained on a quantised base, and its model."""
    root = tmp_path_factory.mktemp(request.param)
    tiny.llama(layers=1).save_pretrained(root / "base")
    model = filled(quantised(root / "base", request.param, dtype=torch.bfloat16))
    hub.save_adapter(model, root / "adapter")
    return root, model, request.param


def overrides(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_overrides"]


def equal(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_file_says_how_the_base_was_quantised(trained):
    root, _, kind = trained
    found = overrides(root / "adapter")
    assert found["quantized_from"] == "bfloat16"
    if kind == "nf4":
        assert found["quantization_config"] == NF4
    else:
        assert found["quantization_config"]["load_in_8bit"] is True
        assert "load_in_4bit" not in found["quantization_config"]


def test_a_merge_of_the_folder_is_the_merge_of_the_model_that_was_trained_to_the_bit(trained):
    root, model, _ = trained
    wanted = hub.merge_to_dense(model)
    found = hub.merge_to_dense(hub.load_adapter(root / "adapter"))
    assert equal(found, wanted)
    assert equal(hub.merge_to_dense(hub.load_adapter(root / "adapter", base_as="trained")), wanted)


def test_in_full_precision_the_update_is_added_to_the_stored_weights(trained):
    root, model, _ = trained
    dense = hub.merge_to_dense(hub.load_adapter(root / "adapter", base_as="full", dtype=torch.float32)).state_dict()
    stored = LlamaForCausalLM.from_pretrained(root / "base").state_dict()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    delta = layer.get_delta_weight("default").double()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(dense[name].double(), stored[name].double() + delta, atol=1e-6, rtol=0)
    trained_on = hub.merge_to_dense(model).state_dict()[name]
    assert (dense[name] - trained_on).abs().max() > 1e-3  # the grid of the quantised weights
    assert torch.equal(dense["lm_head.weight"], stored["lm_head.weight"])


def test_the_command_line_merges_into_what_was_trained_on(trained, tmp_path, capsys):
    root, model, _ = trained
    assert cli.main(["merge", str(root / "adapter"), str(tmp_path / "dense")]) == 0, capsys.readouterr().err
    written, wanted = load_file(tmp_path / "dense" / "model.safetensors"), hub.merge_to_dense(model).state_dict()
    assert all(torch.equal(written[key], wanted[key]) for key in wanted)
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config, "quantization_config")


def test_an_adapter_loaded_to_be_used_keeps_what_it_was_trained_on(trained, tmp_path):
    root, _, _ = trained
    used = hub.load_adapter(root / "adapter", base_as="full")
    hub.save_adapter(used, tmp_path / "again")
    assert overrides(tmp_path / "again") == overrides(root / "adapter")
    on = hub.load_adapter(root / "adapter", base_as="full", is_trainable=True)  # trains on in full precision
    hub.save_adapter(on, tmp_path / "on")
    assert "quantization_config" not in overrides(tmp_path / "on")


def test_the_card_names_the_quantisation_and_loads_it(trained):
    root, model, kind = trained
    card = (root / "adapter" / "README.md").read_text()
    assert ("bnb_4bit_quant_type=nf4" if kind == "nf4" else "load_in_8bit=True") in card
    code = card.split("```python\n")[2].partition("```")[0]
    names = {}
    exec(code.replace('"path/or/repo-of-this-adapter"', repr(str(root / "adapter"))), names)
    assert equal(hub.merge_to_dense(names["model"]), hub.merge_to_dense(model))


def changed(root, folder, **options):
    """A copy of the adapter whose file says something else."""
    hub.save_adapter(hub.load_adapter(root / "adapter", base_as="full"), folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_overrides"] = {**config["base_overrides"], **options}
    if options.get("quantization_config", ()) is None:
        for key in ("quantization_config", "quantized_from"):
            del config["base_overrides"][key]
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"quant_method": "hqq", "nbits": 4}, "quant_method='hqq'"),
        ({**NF4, "bnb_4bit_speed": 3}, "no option 'bnb_4bit_speed'"),
        ({**NF4, "load_in_4bit": "yes"}, "no BitsAndBytesConfig"),
        ("nf4", "quant_method=None"),
    ],
)
def test_a_quantisation_that_is_none_is_refused_and_full_precision_still_loads(trained, says, message, tmp_path):
    folder = changed(trained[0], tmp_path / "lies", quantization_config=says)
    with pytest.raises(ValueError, match=message):
        hub.load_adapter(folder)
    hub.load_adapter(folder, base_as="full")
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(trained[0] / "base"), folder)


def test_a_file_that_does_not_say_loads_the_base_as_it_is_stored(trained, tmp_path):
    folder = changed(trained[0], tmp_path / "silent", quantization_config=None)
    assert equal(
        hub.merge_to_dense(hub.load_adapter(folder)), hub.merge_to_dense(hub.load_adapter(folder, base_as="full"))
    )
    with pytest.raises(ValueError, match="base_as='half' is neither 'trained'"):
        hub.load_adapter(folder, base_as="half")


def test_a_base_that_is_stored_quantised_has_no_full_precision(tmp_path):
    tiny.llama(layers=1).save_pretrained(tmp_path / "dense")
    quantised(tmp_path / "dense", "nf4").save_pretrained(tmp_path / "base")
    model = filled(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    hub.save_adapter(model, tmp_path / "adapter")
    assert equal(hub.merge_to_dense(hub.load_adapter(tmp_path / "adapter")), hub.merge_to_dense(model))
    with pytest.raises(ValueError, match=r"base_as='full': the weights of .* are stored quantised"):
        hub.load_adapter(tmp_path / "adapter", base_as="full")


def test_adapters_of_upstream_load_the_same_way(tmp_path):
    tiny.llama(layers=1).save_pretrained(tmp_path / "base")
    lora = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert isinstance(hub.load_adapter(tmp_path / "lora").get_base_model(), LlamaForCausalLM)


# The tokenizer of a dense model


def tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]", chat_template="{{ messages[0].content }}")
    made.save_pretrained(folder)
    return made


def test_a_dense_model_has_the_tokenizer_of_its_base_beside_it(tmp_path):
    tiny.llama(layers=1).save_pretrained(tmp_path / "base")
    made = tokenizer(tmp_path / "base")
    model = filled(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    hub.merge_to_dense(model, tmp_path / "dense")
    found = PreTrainedTokenizerFast.from_pretrained(tmp_path / "dense")
    assert found.get_vocab() == made.get_vocab()
    assert found.chat_template == made.chat_template
    hub.merge_to_dense(model, tmp_path / "without", tokenizer=None)
    assert not (tmp_path / "without" / "tokenizer_config.json").exists()


def test_a_dense_model_takes_another_tokenizer_and_refuses_what_is_none(tmp_path):
    model, made = filled(tiny.llama(layers=1)), tokenizer(tmp_path / "other")
    hub.merge_to_dense(model, tmp_path / "dense", tokenizer=tmp_path / "other")
    hub.merge_to_dense(model, tmp_path / "object", tokenizer=made)
    for name in ("dense", "object"):
        assert PreTrainedTokenizerFast.from_pretrained(tmp_path / name).get_vocab() == made.get_vocab()
    for given, message in ((3, "tokenizer=3 is a int"), (str(tmp_path / "none"), "could not be loaded")):
        with pytest.raises(ValueError, match=message):
            hub.merge_to_dense(model, tmp_path / "x", tokenizer=given)
    assert not (tmp_path / "x").exists()


def test_a_base_without_a_tokenizer_is_no_trouble_and_one_out_of_reach_is_named(tmp_path):
    tiny.llama(layers=1).save_pretrained(tmp_path / "base")
    model = filled(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hub.merge_to_dense(model, tmp_path / "dense")
    model.get_base_model().config._name_or_path = "me/nowhere"
    model.get_base_model().name_or_path = "me/nowhere"
    with pytest.warns(UserWarning, match=r"without a tokenizer: that of its base 'me/nowhere'"):
        hub.merge_to_dense(model, tmp_path / "second")
    assert (tmp_path / "second" / "model.safetensors").is_file()
