"""Dead units and components: counted as dead, dropped by compact(), gone from the file, without moving the output."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tuner_toolbox import GRANULARITIES, fill, logits, make_config, same_adapter, trained

from hf_sparse_peft import Allocate, AverageRank, Regrow
from hf_sparse_peft.tuners import adapter_layers

FILE = "adapter_model.safetensors"


def thinned(base_of, case="hybrid-entry", base="fp32", gated=True, **options):
    """An adapter as a pruning and a rank-allocation callback would leave it: fewer units, closed gates."""
    rules = [Regrow(), Allocate(budget=AverageRank(2))] if gated else [Regrow()]
    model = get_peft_model(base_of(base), make_config(case, base, schedule=rules, **options))
    fill(model)
    for number, layer in enumerate(adapter_layers(model)):
        units = layer.units("default")
        kept = units[: max(1, units.numel() * (number + 1) // 8)]
        layer.write_support("default", kept)
        layer.sparse_lora_values["default"].data[kept.numel() :] = 5.0  # must not be read any more
        if gated:
            mask = layer.sparse_lora_rank_mask["default"]
            mask.copy_(torch.tensor([number % 2, 0, number > 1, 0]))
            layer.sparse_lora_gate["default"].data.mul_(mask)
    return model


@tiny.crossed(base=["fp32", "nf4", "conv1d"], granularity=GRANULARITIES, gated=[False, True])
def test_compact_keeps_the_output_shrinks_the_file_and_reloads(base_of, tmp_path, base, granularity, gated):
    model = thinned(base_of, f"hybrid-{granularity}", base, gated)
    before, living = logits(model), sum(p.numel() for p in trained(model).values()) - model.dead_parameters()
    model.save_pretrained(tmp_path / "long")
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(base), tmp_path / "long")), before)
    model.compact()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert model.dead_parameters() == 0
    assert sum(p.numel() for p in trained(model).values()) == living
    after = logits(model)
    model.save_pretrained(tmp_path / "short")
    assert (tmp_path / "short" / FILE).stat().st_size < 0.85 * (tmp_path / "long" / FILE).stat().st_size
    for meta in (False, True):
        loaded = PeftModel.from_pretrained(base_of(base), tmp_path / "short", low_cpu_mem_usage=meta)
        assert torch.equal(logits(loaded), after)
    plain = base_of(base)
    plain.load_adapter(str(tmp_path / "short"))
    same_adapter(plain, model)


def test_compact_ends_the_schedules_and_drops_their_state(base_of, tmp_path):
    model = thinned(base_of)
    assert model.peft_config["default"].has_schedule
    model.compact()
    assert model.peft_config["default"].training_finished
    assert not model.peft_config["default"].has_schedule
    assert not [name for name, _ in model.named_buffers() if "candidates" in name or "sensitivity" in name]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(), tmp_path, is_trainable=True).train()
    assert not [name for name, _ in again.named_buffers() if "candidates" in name]
    assert torch.equal(logits(again), logits(model))


def test_compact_twice_is_compact_once(base_of, tmp_path):
    model = thinned(base_of)
    model.compact()
    first = logits(model)
    for layer in adapter_layers(model):
        if layer.sizes["default"].rank > 1:  # a second training thinned it further
            layer.sparse_lora_rank_mask["default"][0] = 0
            layer.sparse_lora_gate["default"].data[0] = 0
    second = logits(model)
    assert not torch.equal(first, second)
    model.compact()
    torch.testing.assert_close(logits(model), second, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(), tmp_path)), logits(model))


@pytest.mark.parametrize("rslora", [False, True])
def test_compact_keeps_the_scaling_under_patterns(base_of, tmp_path, rslora):
    patterns = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}, "use_rslora": rslora}
    model = get_peft_model(base_of(), make_config(schedule=[Allocate(budget=AverageRank(2))], **patterns))
    fill(model)
    for layer in adapter_layers(model):
        rank = layer.sizes["default"].rank
        mask = layer.sparse_lora_rank_mask["default"]
        mask[4 if rank == 6 else 3 :] = 0  # q_proj: from its pattern's 6 down to the config's own r=4
        layer.sparse_lora_gate["default"].data.mul_(mask)
    before = logits(model)
    model.compact()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(), tmp_path)), logits(model))


class Nested(nn.Module):
    """A module name that is the end of another one."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.a = nn.Sequential()
        self.a.lin = nn.Linear(16, 16)
        self.z = nn.Sequential()
        self.z.lin = nn.Linear(16, 16)

    def forward(self, x):
        return self.z.lin(self.a.lin(self.lin(x)))


@pytest.mark.parametrize("way", ["compact", "combine"])
def test_ranks_by_module_do_not_leak_to_names_that_end_alike(tmp_path, way):
    torch.manual_seed(0)
    base = Nested()
    state = base.state_dict()
    options = {"target_modules": ["lin"], "task_type": None, "block_size": 4}
    if way == "compact":
        model = get_peft_model(base, make_config(schedule=[Allocate(budget=AverageRank(1))], **options))
        fill(model)
        for layer, alive in zip(adapter_layers(model), (1, 3, 4), strict=True):
            layer.sparse_lora_rank_mask["default"][alive:] = 0
            layer.sparse_lora_gate["default"].data.mul_(layer.sparse_lora_rank_mask["default"])
        model.compact()
    else:
        model = get_peft_model(base, make_config(rank_pattern={"^lin": 2, "^a.lin": 3}, **options))
        fill(model)
        model.add_weighted_adapter(["default"], [0.5], "halved", combination_type="cat")
        model.set_adapter("halved")
        model.delete_adapter("default")
    x = torch.randn(3, 16)
    before = model(x)
    model.save_pretrained(tmp_path)
    fresh = Nested()
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "halved" if way == "combine" else tmp_path)
    assert torch.equal(loaded(x), before)


def test_a_layer_left_without_anything_is_fine(base_of, tmp_path):
    model = thinned(base_of)
    layer = adapter_layers(model)[0]
    layer.write_support("default", layer.units("default")[:0])
    layer.sparse_lora_rank_mask["default"].zero_()
    layer.sparse_lora_gate["default"].data.zero_()
    before = logits(model)
    model.compact()
    assert not layer.holds("default")
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(), tmp_path)), logits(model))


def test_compact_in_bf16_rounds_memory_and_file_alike(base_of, tmp_path):
    model = thinned(base_of)
    model.compact(values_dtype="bfloat16")
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(), tmp_path)), before)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}


def test_compact_refuses_merged_adapters_and_unknown_dtypes(base_of):
    model = thinned(base_of)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapter"):
        model.compact()
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="values_dtype='float16'"):
        model.compact(values_dtype="float16")


def test_compact_of_a_full_adapter_changes_nothing(base_of):
    model = get_peft_model(base_of(), make_config())
    fill(model)
    before, parameters = logits(model), trained(model)
    model.compact()
    assert torch.equal(logits(model), before)
    assert all(trained(model)[name] is parameter for name, parameter in parameters.items())
    assert model.peft_config["default"].rank_pattern == {}


def test_printed_trainable_parameters_are_the_living_ones(base_of, capsys):
    model = thinned(base_of)
    trainable, everything = model.get_nb_trainable_parameters()
    by_hand = 0
    for layer in adapter_layers(model):
        by_hand += layer.units("default").numel() * layer.sparse_lora_grid["default"].unit_numel
        by_hand += int(layer.sparse_lora_rank_mask["default"].sum()) * (layer.in_features + layer.out_features + 1)
    assert trainable == by_hand
    base = sum(p.numel() for name, p in model.named_parameters() if "sparse_lora_" not in name)
    assert everything == base + by_hand
    model.print_trainable_parameters()
    assert f"trainable params: {by_hand:,}" in capsys.readouterr().out
    model.compact()
    assert model.get_nb_trainable_parameters() == (by_hand, base + by_hand)


def test_ungated_components_are_not_counted_as_gates(base_of):
    model = get_peft_model(base_of(), make_config("low_rank-entry"))
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in trained(model).values())
