"""`card`, and which base verbs load: as it was trained on, or in full precision; its tokenizer goes along."""

import json
import shutil

import bitsandbytes
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_sparse_peft import SparseLoraConfig, cli, hub


@pytest.fixture(scope="module")
def on_nf4(base, tmp_path_factory):
    """An adapter that was trained on an NF4 base, and a weight of that base, dequantised."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    packed = model.model.layers[0].mlp.up_proj.weight
    weight = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
    model = get_peft_model(model, SparseLoraConfig(r=2, density=0, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    folder = tmp_path_factory.mktemp("nf4") / "adapter"
    model.save_pretrained(folder)
    return folder, weight


def test_merge_takes_the_base_as_trained_and_on_request_in_full(base, on_nf4, tmp_path, capsys):
    folder, trained = on_nf4
    name = "model.layers.0.mlp.up_proj.weight"
    stored = AutoModelForCausalLM.from_pretrained(base).get_parameter(name)
    assert not torch.equal(trained, stored)
    for words, expected in (([], trained), (["--base-as", "trained"], trained), (["--base-as", "full"], stored)):
        out = tmp_path / ("-".join(words) or "default")
        assert cli.main(["merge", str(folder), str(out), "--dtype", "float32", *words]) == 0, capsys.readouterr().err
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out).get_parameter(name), expected)
    assert cli.main(["merge", str(folder), str(tmp_path / "x"), "--nf4", "--base-as", "full"]) == 2
    assert "contradict" in capsys.readouterr().err


def test_the_tokenizer_goes_along_unless_it_is_not_wanted(base, adapter, tmp_path, capsys):
    assert cli.main(["merge", str(adapter("both")), str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"] is True
    words = "Tom has 12 apples ."
    assert AutoTokenizer.from_pretrained(tmp_path / "a")(words) == AutoTokenizer.from_pretrained(base)(words)
    assert cli.main(["merge", str(adapter("both")), str(tmp_path / "b"), "--tokenizer", "none"]) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    assert not (tmp_path / "b" / "tokenizer.json").exists()
    assert cli.main(["merge", str(adapter("both")), str(tmp_path / "c"), "--tokenizer", str(tmp_path / "b")]) == 1
    assert "--tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    command = ["export", str(adapter("both")), str(tmp_path / "d"), "--to", "lora", "--tokenizer", "none"]
    assert cli.main(command) == 2


def test_a_card_is_printed_or_written_and_an_edited_one_stays(adapter, tmp_path, capsys):
    shutil.copytree(adapter("both"), tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    options = ["--metric", "exact match=81.5", "--license", "mit", "--method", "rosa", "--data", "some/data"]
    assert cli.main(["card", folder, *options]) == 0
    shown = capsys.readouterr().out
    assert "81.5" in shown
    assert "license: mit" in shown
    assert "- some/data" in shown
    assert cli.main(["inspect", folder, "--json"]) == 0
    parameters = json.loads(capsys.readouterr().out)["parameters"]
    assert f"An adapter of {parameters:,} parameters" in " ".join(shown.split())
    (tmp_path / "adapter" / "README.md").write_text("mine")
    assert cli.main(["card", folder, "--write"]) == 1
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "adapter" / "README.md").read_text() == "mine"
    assert cli.main(["card", folder, "--write", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "adapter" / "README.md")}
    assert "import hf_sparse_peft" in (tmp_path / "adapter" / "README.md").read_text()
    assert cli.main(["card", folder, "--metric", "high"]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err
    assert cli.main(["card", folder, "--force"]) == 2


def test_inspect_and_card_count_heads_alike(base, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = SparseLoraConfig(r=2, density=0, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, config)
    hub.save_adapter(model, tmp_path / "adapter")
    assert cli.main(["inspect", str(tmp_path / "adapter")]) == 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trained:,}" in capsys.readouterr().out.splitlines()[-1]
    assert f"An adapter of {trained:,} parameters" in " ".join((tmp_path / "adapter" / "README.md").read_text().split())
