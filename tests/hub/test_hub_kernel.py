"""Kernel adapters leave by the same doors: checked folders, upstream's card, a dense model, the command line."""

import pytest
import tiny
import torch
from hub_toolbox import logits, tiny_base
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_sparse_peft import KernelLoraConfig, hub
from hf_sparse_peft.cli import main
from hf_sparse_peft.utils.checksums import save_checked


def adapted(base=None, **options):
    torch.manual_seed(1)
    targets = ["q_proj", "down_proj"]
    defaults = {"r": 4, "target_modules": targets, "init_weights": False, "task_type": "CAUSAL_LM"}
    config = KernelLoraConfig(**{**defaults, **options})
    return get_peft_model(base if base is not None else tiny_base(), config)


SNELLA = {"kernel": "mixed", "schedule": [tiny.kernel_allocation()]}


@pytest.mark.parametrize("options", [{}, SNELLA], ids=["snell", "snella"])
def test_a_saved_folder_is_checked_and_its_parameters_counted(options, tmp_path):
    model = adapted(**options)
    model.save_pretrained(tmp_path)
    report = hub.check_adapter(tmp_path)
    mixed = 3 * len(report.modules) if options else 0
    assert report.parameters == 4 * sum(m.rows + m.cols for m in report.modules) + mixed
    assert {(m.rows, m.cols) for m in report.modules} == {(64, 64), (64, 96)}
    assert "64x96" in str(report.table())
    assert (tmp_path / "README.md").is_file()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda kind, t: None if kind == "kernel_lora_mix" else t, "kernel_lora_mix' is missing"),
        (lambda kind, t: t[..., :1].contiguous() if kind == "kernel_lora_P" else t, "kernel_lora_P'.* has shape"),
        (lambda kind, t: t * float("inf") if kind == "kernel_lora_Q" else t, "not finite"),
        (lambda kind, t: t + 10**6 if kind == "kernel_lora_survivors" else t, "no count of"),
    ],
    ids=["missing", "shape", "inf", "count"],
)
def test_damage_is_found_without_the_base(damage, message, tmp_path):
    adapted(**SNELLA).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: damage(key.rpartition(".")[2], t) for key, t in load_file(file).items()}
    save_checked({key: t for key, t in tensors.items() if t is not None}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        hub.check_adapter(tmp_path)


def test_the_command_line_merges_a_kernel_adapter_into_a_dense_model(tmp_path, capsys):
    tiny_base().save_pretrained(tmp_path / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"), **SNELLA)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "dense")]) == 0
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-3, atol=1e-3)
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert "down_proj" in capsys.readouterr().out


def test_the_command_line_cuts_a_kernel_adapter_to_a_lora_and_prints_every_modules_error(tmp_path, capsys):
    tiny_base().save_pretrained(tmp_path / "base")
    adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "lora"), "--to", "lora"]) == 1
    assert "has a dense update, which has no exact low-rank form. Pass --rank " in capsys.readouterr().err
    with pytest.warns(UserWarning, match="cut updates to rank 8 by SVD"):
        assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "lora"), "--to", "lora", "--rank", "8"]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["module", "rank", "relative", "error"]
    assert len(lines) == 4
    assert last.startswith("4 modules")
    assert all(0 < float(line.rpartition(" ")[2]) < 1 for line in lines)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    assert loaded.peft_config["default"].peft_type == "LORA"
