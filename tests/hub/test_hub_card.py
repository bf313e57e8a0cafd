import os
from pathlib import Path

import pytest
import torch
from hub_toolbox import adapted, logits, tiny_base
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_sparse_peft import Allocate, AverageRank, hub
from hf_sparse_peft.hub import card as card_module
from hf_sparse_peft.tuners import adapter_layers


def test_summary_counts_what_lives_in_each_group():
    model = adapted(r=3, density=0.02)
    rows = {row["group"]: row for row in hub.adapter_summary(model)}
    assert list(rows) == ["q_proj", "v_proj", "down_proj"]
    q = rows["q_proj"]
    assert (q["modules"], q["rows"], q["cols"]) == (2, 64, 64)
    count = 2 * int(0.02 * 64 * 64)
    assert q["spaces"] == [
        {"kind": "support", "unit": "entry", "alive": count, "capacity": count},
        {"kind": "rank", "unit": "component", "alive": 6, "capacity": 6},
    ]
    assert q["density"] == pytest.approx(81 / 4096)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row["parameters"] for row in rows.values()) == trained


def test_summary_leaves_out_dead_units_and_components():
    model = adapted(r=4, granularity="row", density=0.1, schedule=[Allocate(budget=AverageRank(2))])
    layer = adapter_layers(model)[0]
    before = hub.adapter_summary(model)[0]
    layer.write_support("default", layer.units("default")[:-2])
    layer.sparse_lora_rank_mask["default"][1] = 0
    after = hub.adapter_summary(model)[0]
    lost = [one["alive"] - two["alive"] for one, two in zip(before["spaces"], after["spaces"], strict=True)]
    assert lost == [2, 1]
    assert [space["capacity"] for space in after["spaces"]] == [space["capacity"] for space in before["spaces"]]
    assert before["parameters"] - after["parameters"] == 2 * 64 + (64 + 64 + 1)


def test_card_tells_base_method_numbers_and_how_to_load():
    model = adapted(r=2)
    card = hub.adapter_card(
        model,
        base_model="me/tiny-base",
        method="spiel-ag",
        paper="Ansell et al., 2024",
        metrics={"accuracy": 0.91, "a|b": 3},
        notes="Two epochs {{ not a template }}.",
        repo_id="me/my-adapter",
        training_data=["me/data"],
        license="apache-2.0",
    )
    text = str(card)
    for part in (
        "pip install -e .",
        "import hf_sparse_peft  # registers the adapter type with peft",
        'AutoPeftModelForCausalLM.from_pretrained("me/my-adapter")',
        "KeyError: 'SPARSE_LORA'",
        "`spiel-ag` (Ansell et al., 2024)",
        "[me/tiny-base](https://huggingface.co/me/tiny-base)",
        "| accuracy | 0.91 |",
        "a\\|b",
        "Two epochs {{ not a template }}.",
        "| 2 x `q_proj` | 64 x 64 | 162 entries | 4 components | 1.9775% | 674 |",
        "- hf-sparse-peft ",
    ):
        assert part in text, part
    data = card.data
    assert data.library_name == "peft"
    assert data.base_model == "me/tiny-base"
    assert data.license == "apache-2.0"
    assert data.datasets == ["me/data"]
    assert {"hf-sparse-peft", "sparse_lora", "spiel-ag", "base_model:adapter:me/tiny-base"} <= set(data.tags)
    assert ModelCard(text).data.to_dict() == data.to_dict()


def test_local_base_path_stays_out_of_hub_metadata(tmp_path):
    # The Hub refuses cards whose base_model is a path, and the whole push with them.
    card = hub.adapter_card(adapted(), base_model=str(tmp_path))
    assert card.data.base_model is None
    assert not any(tag.startswith("base_model:") for tag in card.data.tags)
    assert f"`{tmp_path}`" in card.text


def test_card_refuses_an_adapter_that_is_not_there():
    with pytest.raises(ValueError, match=r"adapter_name='other' is no adapter of this package.*default"):
        hub.adapter_card(adapted(), adapter_name="other")
    with pytest.raises(ValueError, match=r"metrics=0\.9 is not a mapping"):
        hub.adapter_card(adapted(), metrics=0.9)


def test_loading_as_the_card_says_gives_the_same_logits(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    base = type(tiny_base()).from_pretrained(tmp_path / "base")
    model = adapted(base, r=2)
    hub.save_adapter(model, tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["default", "other"])
def test_save_adapter_puts_three_files_and_our_card_into_one_folder(tmp_path, name):
    model = adapted(adapter_name=name)
    place = hub.save_adapter(model, tmp_path / "deep" / "adapter", adapter_name=name, method="spiel-ag")
    assert sorted(p.name for p in place.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert [p.name for p in place.parent.iterdir()] == ["adapter"]
    assert "`spiel-ag`" in (place / "README.md").read_text()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_base(), place)), logits(model))


def test_save_adapter_replaces_an_adapter_and_keeps_other_files(tmp_path):
    place = tmp_path / "adapter"
    hub.save_adapter(adapted(), place)
    (place / "tokenizer.json").write_text("{}")
    (place / "checkpoint-3").mkdir()
    (place / "checkpoint-3" / "optimizer.pt").write_text("x")
    (place / "adapter_model.bin").write_text("stale")
    hub.save_adapter(adapted(r=2), place)
    assert any("sparse_lora_A" in key for key in load_file(place / "adapter_model.safetensors"))
    assert (place / "tokenizer.json").exists()
    assert (place / "checkpoint-3" / "optimizer.pt").exists()
    assert not (place / "adapter_model.bin").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_save_adapter_refuses_folders_of_others(tmp_path):
    model = adapted()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty and holds no adapter"):
        hub.save_adapter(model, tmp_path / "notes")
    get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="holds an adapter of type LORA"):
        hub.save_adapter(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="is a file"):
        hub.save_adapter(model, tmp_path / "notes" / "thesis.tex")
    with pytest.raises(ValueError, match="not a PeftModel"):
        hub.save_adapter(model.get_base_model(), tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora", "notes"]


def test_failed_save_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    place = hub.save_adapter(adapted(), tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in place.iterdir()}

    def half(self, folder, **kwargs):
        (Path(folder) / "adapter_config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(PeftModel, "save_pretrained", half)
    with pytest.raises(OSError, match="disk full"):
        hub.save_adapter(adapted(r=2), place)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_failed_rename_puts_the_old_adapter_back(tmp_path, monkeypatch):
    place = hub.save_adapter(adapted(), tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    real, failed = os.replace, []

    def replace(source, target):
        if Path(target) == place / "adapter_model.safetensors" and not failed:
            failed.append(target)
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no"):
        hub.save_adapter(adapted(r=2), place)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_template_ships_inside_the_package():
    assert card_module.TEMPLATE.is_file()
    assert card_module.TEMPLATE.parent == Path(hub.__file__).parent
    assert "{{ load_code }}" in card_module.TEMPLATE.read_text()
