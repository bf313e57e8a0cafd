"""`export --to gguf-lora`: a LoRA whose update llama.cpp would compute, and the command of its converter."""

import json
import shlex

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from test_two_adapters import updates
from transformers import AutoModelForCausalLM

from hf_sparse_peft import SparseLoraConfig, cli, hub


def llama_cpp_updates(folder):
    """As llama.cpp scales a converted LoRA: alpha over the rank of each tensor; patterns are not read."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    assert len(tensors) == 2 * len(names)
    halves = {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}
    return {
        n.removeprefix("base_model.model."): alpha / len(A) * (B.double() @ A.double()) for n, (A, B) in halves.items()
    }


@pytest.mark.parametrize("kind", ["both", "factors"])
def test_the_update_is_the_adapters_without_patterns(kind, base, adapter, tmp_path, capsys):
    command = ["export", str(adapter(kind)), str(tmp_path / "lora"), "--to", "gguf-lora", "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    expected = updates(base, adapter(kind))
    for name, update in llama_cpp_updates(tmp_path / "lora").items():
        torch.testing.assert_close(update, expected[name], atol=1e-6, rtol=1e-4)
    words = shlex.split(found["command"])
    assert words[:3] == ["python", "convert_lora_to_gguf.py", str(tmp_path / "lora")]
    assert words[words.index("--outfile") + 1] == f"{tmp_path / 'lora'}.gguf"
    assert words[words.index("--base") + 1] == str(base)
    assert set(found["lora"]["ranks"].values()) == {found["rank"]}


def test_it_says_that_no_gguf_file_was_written(adapter, tmp_path, capsys):
    command = ["export", str(adapter("entries")), str(tmp_path / "lora"), "--to", "gguf-lora"]
    assert cli.main(command) == 1
    assert "Pass --rank" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="cut updates to rank 4"):
        assert cli.main([*command, "--rank", "4"]) == 0
    shown = capsys.readouterr().out
    assert "no GGUF file yet" in shown
    assert "convert_lora_to_gguf.py" in shown
    assert not list(tmp_path.glob("*.gguf"))


def test_what_the_converter_refuses_is_refused_before_anything_is_written(base, tmp_path, capsys):
    for number, options in enumerate(({"modules_to_save": ["lm_head"]}, {"bias": "all"})):
        model = AutoModelForCausalLM.from_pretrained(base)
        config = SparseLoraConfig(r=2, density=0, target_modules=["q_proj"], **options)
        hub.save_adapter(get_peft_model(model, config), tmp_path / str(number))
        command = ["export", str(tmp_path / str(number)), str(tmp_path / "out"), "--to", "gguf-lora"]
        assert cli.main(command) == 1
        assert "low-rank updates alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
