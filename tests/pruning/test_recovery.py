"""LoRAM's recovery: an adapter of a sliced base loads on the full base with peft alone, and does there what it did."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_slicing import kept_of, logits, zeroed
from test_structure import build

from hf_sparse_peft import SparseLoraConfig, hub
from hf_sparse_peft.pruning import KeptUnits, prune_model, recover_adapter, save_kept_units, slice_model, structures_of
from hf_sparse_peft.pruning.repair.recovery import recover_tensors
from hf_sparse_peft.pruning.units.kept_axes import KeptAxes

LORA = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}


def trained(model, kept, **options):
    return get_peft_model(slice_model(model, kept), LoraConfig(**{**LORA, **options}))


def delta(model, name):
    layer = model.get_base_model().get_submodule(name)
    update = layer.get_delta_weight("default")
    return update.t() if layer.fan_in_fan_out else update


def test_the_update_is_scattered_into_zeros_at_the_kept_rows_and_columns():
    """Against a dense float64 scatter: the full update restricted to what is kept is the small one, 0 elsewhere."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), (4, 2)))
    rows, cols = torch.tensor([5, 0, 3, 2]), torch.tensor([1, 4, 6])
    tensors = {"base_model.model.up.lora_A.weight": A, "base_model.model.up.lora_B.weight": B}
    axes, shapes = {"up": KeptAxes(rows, cols)}, {"up": (6, 7)}
    found = recover_tensors(tensors, axes, shapes)
    expected = torch.zeros(6, 7, dtype=torch.float64)
    for at, row in enumerate(rows):
        for place, col in enumerate(cols):
            expected[row, col] = sum(B[at, k] * A[k, place] for k in range(2))
    full = found["base_model.model.up.lora_B.weight"] @ found["base_model.model.up.lora_A.weight"]
    torch.testing.assert_close(full, expected)
    noisy = recover_tensors(tensors, axes, shapes, missing="normal", seed=1)["base_model.model.up.lora_A.weight"]
    assert torch.equal(noisy[:, cols], A)
    assert 0 < noisy[:, [0, 2, 3, 5]].std() < 1  # 1/r = 0.5
    again = recover_tensors(tensors, axes, shapes, missing="normal", seed=1)["base_model.model.up.lora_A.weight"]
    assert torch.equal(again, noisy)


def test_a_group_of_query_heads_goes_back_with_its_key_head(tmp_path):
    model = build("llama")
    kept = KeptUnits.all_of(structures_of(model))
    kept.keep("model.layers.0", "heads", torch.tensor([1]))
    small = trained(model, kept)
    name = "model.layers.0.self_attn"
    B = small.get_base_model().get_submodule(f"{name}.q_proj").lora_B["default"].weight
    with torch.no_grad():
        B.fill_(1)
    tensors = load_file(recover_adapter(small, tmp_path / "full", build("llama")) / "adapter_model.safetensors")
    full = tensors[f"base_model.model.{name}.q_proj.lora_B.weight"]
    assert full[:, 0].nonzero().flatten().tolist() == list(range(32, 64))  # heads 2 and 3 of 16 read key head 1
    assert tensors[f"base_model.model.{name}.k_proj.lora_B.weight"][:16].count_nonzero() == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_recovered_adapter_on_the_masked_full_base_is_the_sliced_model(kind, tmp_path):
    full = build(kind)
    kept = kept_of(full)
    small = trained(build(kind), kept)
    expected = logits(small)
    small.save_pretrained(tmp_path / "small")
    save_kept_units(small, tmp_path / "small")
    recover_adapter(tmp_path / "small", tmp_path / "full", full.config)
    adapted = PeftModel.from_pretrained(zeroed(full, kept), str(tmp_path / "full"))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5)
    for one in structures_of(full):
        axes = {m.module: m for m in one.members("channels") if m.axis}
        for name, member in axes.items():
            update = delta(adapted, name)
            gone = member.lines(kept.blocks[one.name].removed("channels"))
            assert update[:, gone].count_nonzero() == 0
            columns = member.lines(kept.blocks[one.name].channels)
            assert torch.equal(update[:, columns], delta(small, name))
    once, twice = (logits(PeftModel.from_pretrained(build(kind), str(tmp_path / "full"))) for _ in range(2))
    assert torch.equal(once, twice)
    assert (once - logits(build(kind))).abs().max() > 1e-3


def test_layers_that_were_not_cut_keep_every_bit_and_so_do_all_of_a_base_of_zeros(tmp_path):
    full = build("llama")
    kept = KeptUnits.all_of(structures_of(full))
    kept.keep("model.layers.0", "channels", torch.arange(7))
    small = trained(build("llama"), kept, target_modules=["q_proj", "down_proj", "lm_head"])
    small.save_pretrained(tmp_path / "small")
    before = load_file(tmp_path / "small" / "adapter_model.safetensors")
    after = load_file(recover_adapter(small, tmp_path / "full", full) / "adapter_model.safetensors")
    changed = [
        key for key in before if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])
    ]
    assert changed == ["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]

    prune_model(full, method="magnitude", sparsity=0.5, show_progress=False)
    masked = get_peft_model(full, LoraConfig(**LORA))
    masked.save_pretrained(tmp_path / "masked")
    before = load_file(tmp_path / "masked" / "adapter_model.safetensors")
    recover_adapter(tmp_path / "masked", tmp_path / "same", build("llama"))
    after = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_the_file_names_the_full_base_and_forgets_the_small_one(tmp_path):
    full = build("llama")
    full.config.name_or_path = "some/full-base"
    small = trained(build("llama"), kept_of(full))
    recover_adapter(small, tmp_path / "full", full.config)
    config = json.loads((tmp_path / "full" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/full-base"
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert not (tmp_path / "full" / "kept_units.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "export"),
    [({"r": 4, "density": 0}, hub.export_lora), ({"density": 0.1, "granularity": "row"}, hub.export_lora),
     ({"r": 0, "density": 0.2}, hub.export_shira)],
    ids=["factors", "rows", "entries"],
)  # fmt: skip
def test_sparse_updates_are_exported_and_scattered(options, export, tmp_path):
    full = build("llama")
    kept = kept_of(full)
    config = SparseLoraConfig(**options, target_modules="all-linear", task_type="CAUSAL_LM")
    small = get_peft_model(slice_model(build("llama"), kept), config)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if "sparse_lora" in name:
                parameter.normal_(std=0.1)
    expected = logits(small)
    export(small, tmp_path / "small")
    save_kept_units(small, tmp_path / "small")
    recover_adapter(tmp_path / "small", tmp_path / "full", full)
    adapted = PeftModel.from_pretrained(zeroed(full, kept), str(tmp_path / "full"))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5)


def dora(folder, config, tensors):
    config["use_dora"] = True


def other_type(folder, config, tensors):
    config["peft_type"] = "LOHA"


def base_changed(folder, config, tensors):
    config["init_lora_weights"] = "pissa"


def copied_weight(folder, config, tensors):
    tensors["base_model.model.model.layers.0.mlp.down_proj.weight"] = torch.zeros(32, 20)


def other_shape(folder, config, tensors):
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    tensors[key] = tensors[key][:, 1:].contiguous()


def not_finite(folder, config, tensors):
    tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"][0, 0] = torch.nan


def no_units(folder, config, tensors):
    (folder / "kept_units.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(dora, "use_dora"), (other_type, "LORA and SHIRA"), (base_changed, "pissa"), (copied_weight, "more than factors"),
     (other_shape, "does not fit"), (not_finite, "not finite"), (no_units, "does not fit")],
)  # fmt: skip
def test_what_cannot_be_recovered_is_refused_and_nothing_is_written(spoil, message, tmp_path):
    full = build("llama")
    small = trained(build("llama"), kept_of(full))
    folder = tmp_path / "small"
    small.save_pretrained(folder)
    save_kept_units(small, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    spoil(folder, config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        recover_adapter(folder, tmp_path / "full", full)
    assert not (tmp_path / "full").exists()


def test_kept_units_of_another_base_are_refused(tmp_path):
    small = trained(build("llama"), kept_of(build("llama")))
    with pytest.raises(ValueError, match="which the model does not have"):
        recover_adapter(small, tmp_path, build("mistral"), kept=kept_of(build("gpt2"), (1, 2)))
