"""APET: whole tensors at random places up to a budget, and the random mask."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

from hf_sparse_peft import Numbers, Proportional, SparseLoraConfig, WholeTensors, methods
from hf_sparse_peft.sparsity.budget_splits import draw_tensors
from hf_sparse_peft.tuners import adapter_layers


def adapted(**options):
    return get_peft_model(tiny.llama(), methods.get("apet", **options).config)


def taken(model) -> tuple[set[str], set[str]]:
    """Modules whose pair of factors trains, and those whose whole matrix does."""
    pairs, matrices = set(), set()
    for layer in adapter_layers(model):
        A, B = (f"sparse_lora_{name}" for name in "AB")
        assert ("default" in getattr(layer, A)) == ("default" in getattr(layer, B))
        if "default" in getattr(layer, A):
            pairs.add(layer.module_name)
        if "default" in layer.sparse_lora_values:
            assert layer.sparse_lora_values["default"].numel() == layer.in_features * layer.out_features
            matrices.add(layer.module_name)
    return pairs, matrices


class InOrder:
    """Stands for a generator: the draws follow `order`."""

    def __init__(self, monkeypatch, order):
        monkeypatch.setattr(torch, "randperm", lambda count, generator=None: torch.tensor(order))


def test_the_walk_takes_what_fits_and_skips_what_does_not(monkeypatch):
    # The sheet of the released rule: half of 20 goes through the pairs (4, 4), (8, 8), (1, 1), half through 7, 12, 3.
    InOrder(monkeypatch, [0, 1, 2])
    assert draw_tensors({"a": 8, "b": 16, "c": 2}, 10, None) == ["a", "c"]
    assert draw_tensors({"x": 7, "y": 12, "z": 3}, 10, None) == ["x", "z"]
    InOrder(monkeypatch, [2, 1, 0])
    assert draw_tensors({"x": 7, "y": 9, "z": 3}, 10, None) == ["z", "x"]


@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_whole_tensors_stay_within_their_halves_of_the_budget_and_leave_no_room_for_another(r, seed):
    budget = 9000
    model = adapted(budget=budget, r=r, seed=seed)
    sizes = {layer.module_name: (layer.out_features, layer.in_features) for layer in adapter_layers(model)}
    pairs, matrices = taken(model)
    share = budget // 2 if r else budget
    spent = {
        "pairs": sum(r * sum(sizes[n]) for n in pairs),
        "matrices": sum(m * n for m, n in map(sizes.get, matrices)),
    }
    assert 0 < spent["matrices"] <= share
    assert spent["pairs"] <= share
    assert model.get_nb_trainable_parameters()[0] == sum(spent.values())
    left = [m * n for name, (m, n) in sizes.items() if name not in matrices]
    assert all(size > share - spent["matrices"] for size in left)
    assert (not pairs) if r == 0 else len(pairs) > 0


def test_the_set_follows_from_the_seed_and_places_are_arbitrary():
    sets = [taken(adapted(budget=9000, r=2, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert sets[0] == sets[1]
    assert len({(frozenset(p), frozenset(m)) for p, m in sets}) > 2
    # A rule by size or by order would always take the same: over seeds, every kind of matrix is among the taken.
    drawn = {n.rpartition(".")[2] for seed in range(12) for n in taken(adapted(budget=9000, r=0, seed=seed))[1]}
    assert drawn == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_training_moves_the_drawn_tensors_only_and_a_file_brings_them_back(tmp_path):
    model = adapted(budget=9000, r=2, task_type="CAUSAL_LM")
    ids = tiny.TokenData()[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny.llama()(ids).logits)  # it starts as the model
    before = taken(model)
    tiny.train(model, tmp_path / "run", 3, weight_decay=0.1)
    assert taken(model) == before
    for layer in adapter_layers(model):
        moved = bool(layer.get_delta_weight("default").any()) if layer.holds("default") else False
        assert moved == (layer.module_name in before[0] | before[1])
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    assert taken(loaded) == before
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_without_a_budget_it_is_that_of_a_lora_of_the_rank():
    model = adapted(budget_rank=4)
    lora = sum(4 * (layer.in_features + layer.out_features) for layer in adapter_layers(model))
    assert 0.6 * lora < model.get_nb_trainable_parameters()[0] <= lora


def test_a_random_mask_is_proportional_to_the_sizes_and_no_rule_of_size_chooses_it():
    model = adapted(unit="entry", budget=2000)
    whole = sum(layer.in_features * layer.out_features for layer in adapter_layers(model))
    picked, every = [], []
    for layer in adapter_layers(model):
        weight = layer.base_layer.weight.detach().double()
        units = layer.units("default").long()
        assert abs(units.numel() - 2000 * weight.numel() / whole) < 1
        assert not layer.sparse_lora_values["default"].any()
        unit = weight / weight.std()
        picked.append(unit.flatten()[units].abs())
        every.append(unit.flatten().abs())
    ratio = float(torch.cat(picked).mean() / torch.cat(every).mean())
    assert 0.93 < ratio < 1.07  # by magnitude it is 2 and more


@pytest.mark.parametrize("budget", [3, 1999, 2000, 2001])
def test_a_random_mask_spends_its_budget_to_the_last_entry_and_a_file_brings_it_back(budget, tmp_path):
    model = adapted(unit="entry", budget=budget, task_type="CAUSAL_LM")  # 14 matrices: with 3, most have no entry
    assert model.get_nb_trainable_parameters()[0] == budget
    tiny.train(model, tmp_path / "run", 2)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    ids = tiny.TokenData()[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert loaded.peft_config["default"].budget == Proportional(Numbers(budget))


def test_a_random_mask_of_a_density_has_that_share_of_all_entries():
    model = adapted(unit="entry", density=0.013)
    whole = sum(layer.in_features * layer.out_features for layer in adapter_layers(model))
    assert model.get_nb_trainable_parameters()[0] == int(0.013 * whole)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="unit='row' is unknown"):
        methods.get("apet", unit="row")
    with pytest.raises(ValueError, match=r"budget=WholeTensors.* trains whole matrices, and granularity='entry'"):
        SparseLoraConfig(r=0, budget=WholeTensors(0.005))
    with pytest.raises(ValueError, match="has 10 numbers for whole matrices, and the smallest has 512"):
        adapted(budget=10, r=0)
