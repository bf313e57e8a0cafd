"""A random support is spread over the whole weight, and every layer and seed has a draw of its own."""

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import methods
from hf_sparse_peft.tuners import adapter_layers

SIDE, DENSITY = 64, 0.1
# name -> what gives it a random support of a tenth of the entries
RANDOM = {
    "shira": {"density": DENSITY}, "random-pruning": {"density": DENSITY}, "random-search": {"density": DENSITY},
    "apet": {"unit": "entry", "density": DENSITY}, "sltrain": {"density": DENSITY, "r": 2},
    "gradual-pruning": {"density": DENSITY}, "spiel-ag": {"density": DENSITY}, "spiel-ma": {"density": DENSITY},
    "set": {"density": DENSITY}, "rigl": {"density": DENSITY},
}  # fmt: skip


def supports(name: str, seed: int) -> list[torch.Tensor]:
    config = methods.get(name, **RANDOM[name], target_modules=["q_proj", "o_proj"], seed=seed).config
    model = get_peft_model(tiny.llama(hidden=SIDE), config)
    return [layer.units("default").long() for layer in adapter_layers(model)]


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_support_is_spread_over_rows_and_columns_and_drawn_for_every_layer_and_seed(name):
    found = supports(name, 0) + supports(name, 1)
    size = SIDE * SIDE
    for number, units in enumerate(found):
        assert units.numel() == units.unique().numel()
        assert units.numel() - int(DENSITY * size) in (0, 1)  # Erdos-Renyi hands out what rounding down leaves
        for place in (units // SIDE, units % SIDE):
            # 409 draws of 64 lines: the mean is 31.5 within 1, and no line has a fifth of them.
            assert 28 < place.double().mean() < 35
            assert torch.bincount(place, minlength=SIDE).max() < 20
        for other in found[number + 1 :]:  # chance shares a tenth
            assert torch.isin(units, other).double().mean() < 0.2


def test_mosas_experts_own_entries_of_any_row_and_every_layer_has_a_split_of_its_own():
    model = get_peft_model(tiny.llama(hidden=SIDE), methods.get("mosa", target_modules=["q_proj"]).config)
    maps = [layer.sparse_lora_B_map["default"] for layer in adapter_layers(model)]
    assert len(maps) == 2
    for owners in maps:
        for expert in range(4):
            rows = (owners == expert).nonzero()[:, 0].double()
            assert 24 < rows.mean() < 39  # 128 draws of 64 rows: 31.5 within 1.6
    assert float((maps[0] == maps[1]).double().mean()) < 0.4  # chance: a quarter
