"""`diff` and `combine` against dense updates of the loaded models."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_sparse_peft import cli
from hf_sparse_peft.hub import combine_adapters
from hf_sparse_peft.hub.analysis import adapter_difference
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.utils.checksums import save_checked


def updates(base, folder):
    """Merged minus base weight of every adapted module, float64, by peft's own merge."""
    before = {name: p.double() for name, p in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    names = [layer.module_name for layer in adapter_layers(model)]
    after = {name: p.double() for name, p in model.merge_and_unload().named_parameters()}
    return {name: after[f"{name}.weight"] - before[f"{name}.weight"] for name in names}


@pytest.mark.parametrize(
    ("one", "two"),
    [("entries", "entries"), ("both", "entries"), ("factors", "both"), ("kernel", "core"), ("subnet", "entries")],
)
def test_norms_cosine_and_overlap_are_those_of_the_dense_updates(one, two, base, adapter):
    found = adapter_difference(adapter(one), adapter(two, 1))
    first, second = updates(base, adapter(one)), updates(base, adapter(two, 1))
    assert set(found.modules) == set(first) == set(second)
    for name, module in found.modules.items():
        a, b = first[name], second[name]
        assert module.first == pytest.approx(float(a.norm()), rel=1e-4)
        assert module.second == pytest.approx(float(b.norm()), rel=1e-4)
        assert module.difference == pytest.approx(float((a - b).norm()), rel=1e-4)
        assert module.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-4)
        if {one, two} <= {"entries", "kernel", "subnet"}:
            living = [update.abs() > 1e-7 for update in (a, b)]
            assert module.overlap.both == pytest.approx(int((living[0] & living[1]).sum()), abs=2)
            assert module.overlap.first == pytest.approx(int(living[0].sum()), abs=2)
        elif "factors" in (one, two) or "core" in (one, two):
            assert module.overlap is None


def test_an_adapter_does_not_differ_from_itself(adapter, capsys):
    found = adapter_difference(adapter("both"), adapter("both"))
    assert found.equal
    assert found.config == {}
    assert found.overlap.repeated == 1
    assert cli.main(["diff", str(adapter("both")), str(adapter("both"))]) == 0
    assert "Both change the base alike." in capsys.readouterr().out


def test_diff_names_options_that_differ_and_modules_of_one_side(base, adapter, tmp_path, capsys):
    shutil.copytree(adapter("entries"), tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_checked({k: v for k, v in tensors.items() if "layers.1.mlp" not in k}, file, {"format": "pt"})
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    (tmp_path / "cut" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}))
    assert cli.main(["diff", str(adapter("entries")), str(tmp_path / "cut"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["only_first"] == ["model.layers.1.mlp.up_proj"]
    assert found["only_second"] == []
    assert found["config"]["lora_alpha"][1] == 3
    assert not found["equal"]
    assert cli.main(["diff", str(adapter("entries")), str(tmp_path / "cut"), "--plot", str(tmp_path / "a.png")]) == 0
    shown = capsys.readouterr().out
    assert "only in" in shown
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_diff_refuses_what_is_no_adapter(adapter, tmp_path, capsys):
    assert cli.main(["diff", str(adapter("both")), str(tmp_path)]) == 1
    assert "adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["entries", "both", "factors"])
def test_combine_writes_the_weighted_sum_of_the_updates(kind, base, adapter, tmp_path, capsys):
    folders = [str(adapter(kind)), str(adapter(kind, 1))]
    command = ["combine", *folders, "--weights", "0.7,-0.4", "--out", str(tmp_path / "sum"), "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "sum")
    found = updates(base, tmp_path / "sum")
    first, second = (updates(base, folder) for folder in folders)
    assert set(found) == set(first)
    for name, update in found.items():
        expected = 0.7 * first[name] - 0.4 * second[name]
        torch.testing.assert_close(update, expected, atol=1e-6, rtol=1e-4)


def test_combine_refuses_before_it_loads_a_base(base, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_sparse_peft.hub.combining.load_adapter", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    one, two = str(adapter("entries")), str(adapter("entries", 1))
    for words, status, said in (
        ([one, two, "--weights", "1", "--out", str(tmp_path / "x")], 1, "--weights"),
        ([one, "--weights", "1", "--out", str(tmp_path / "x")], 1, "two or more"),
        ([one, str(adapter("kernel")), "--weights", "1,1", "--out", str(tmp_path / "x")], 1, "peft_type"),
        ([one, two, "--weights", "1,1", "--out", str(tmp_path / "taken")], 1, "not empty"),
        ([one, two, "--weights", "1,a", "--out", str(tmp_path / "x")], 2, "--weights"),
    ):
        assert cli.main(["combine", *words]) == status
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["notes.txt"]


def test_combine_says_what_a_type_needs_in_flags(adapter, tmp_path, capsys):
    folders = [str(adapter("entries")), str(adapter("entries", 1))]
    words = ["combine", *folders, "--weights", "1,1", "--out", str(tmp_path / "x")]
    assert cli.main([*words, "--type", "ties"]) == 1
    assert "--type ties needs density" in capsys.readouterr().err
    assert cli.main([*words, "--type", "sum"]) == 1
    assert "--type sum is unknown" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_heads_of_different_adapters_are_asked_for_by_flag(base, tmp_path, capsys):
    from peft import get_peft_model

    from hf_sparse_peft import SparseLoraConfig, hub

    for seed in (0, 1):
        model = AutoModelForCausalLM.from_pretrained(base)
        config = SparseLoraConfig(r=2, density=0, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = get_peft_model(model, config)
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.add_(seed + 1.0)
        hub.save_adapter(model, tmp_path / str(seed))
    words = [str(tmp_path / "0"), str(tmp_path / "1"), "--weights", "1,1", "--out", str(tmp_path / "sum")]
    assert cli.main(["combine", *words]) == 1
    assert "--heads-from" in capsys.readouterr().err
    assert cli.main(["combine", *words, "--heads-from", str(tmp_path / "1")]) == 0
    heads = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sum", "1")]
    key = "base_model.model.lm_head.weight"
    assert torch.equal(heads[0][key], heads[1][key])
    with pytest.raises(ValueError, match="is none of"):
        combine_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "y", [1, 1], modules_to_save_from="elsewhere")
