"""CapaBoost's masks and MoSA's split are draws: independent of place, of each other, of module and seed."""

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import methods
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.sparse_lora.factors import drawn_expert

R = 8


def maps(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    config = methods.get(name, r=R, target_modules=["q_proj", "o_proj"], seed=seed).config
    model = get_peft_model(tiny.llama(hidden=64), config)
    return {
        f"{layer.module_name}.{factor}": getattr(layer, f"sparse_lora_{factor}_map")["default"]
        for layer in adapter_layers(model)
        for factor in "AB"
    }


def layer_of_mosa():
    config = methods.get("mosa", r=R, target_modules=["q_proj"]).config
    return adapter_layers(get_peft_model(tiny.llama(layers=1), config))[0]


def agreement(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one.flatten() == two.flatten()).float().mean())


def test_experts_own_random_entries_and_not_rows_columns_or_strides():
    for owners in maps("mosa").values():
        for view in (owners, owners.t()):
            # Each line of a random quarter has between none and all; a split by rows, columns or strides is constant.
            counts = torch.stack([(view == expert).sum(1) for expert in range(4)], 1).double()
            assert counts.std(0).min() > 0
            assert (counts.max(1).values < view.shape[1]).all()
        flat = owners.flatten()
        for step in (1, 2, 4, R, 64):  # neighbours own alike as often as chance has it
            assert agreement(flat[:-step], flat[step:]) < 0.35


@pytest.mark.parametrize(("name", "chance"), [("mosa", 1 / 4), ("capaboost", 3 / 8)])
def test_draws_of_modules_factors_and_seeds_are_independent(name, chance):
    found = list(maps(name).values()) + list(maps(name, seed=1).values())
    for number, one in enumerate(found):
        for two in found[number + 1 :]:
            # CapaBoost's two bits agree in both with probability 1/4, which includes those that no mask covers.
            assert agreement(one, two) < chance + 0.12


def test_the_two_masks_of_capaboost_overlap_by_chance():
    for bits in maps("capaboost").values():
        both = ((bits & 1 > 0) & (bits & 2 > 0)).float().mean()
        assert 0.15 < both < 0.35


def test_every_expert_is_drawn_as_often_and_factors_draw_apart():
    layer = layer_of_mosa()
    draws = [(step, 0, number) for step in range(200) for number in (0, 1)]
    found = {factor: torch.tensor([drawn_expert(layer, "default", factor, draw) for draw in draws]) for factor in "AB"}
    for drawn in found.values():
        shares = torch.bincount(drawn, minlength=4) / len(draws)
        assert shares.min() > 0.17
        assert shares.max() < 0.33
        assert 0.15 < agreement(drawn[0::2], drawn[1::2]) < 0.35  # the two passes of a batch
    assert 0.15 < agreement(found["A"], found["B"]) < 0.35
