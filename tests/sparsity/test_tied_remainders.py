"""Units that rounding leaves over go to layers that tie by a draw, not to the first layers of the model."""

from __future__ import annotations

import pytest
import tiny
from peft import get_peft_model

from hf_sparse_peft import ErdosRenyi, SparseLoraConfig
from hf_sparse_peft.sparsity import UnitGrid, competition_counts, erdos_renyi_counts
from hf_sparse_peft.sparsity.allocation import proportional_counts
from hf_sparse_peft.tuners import adapter_layers

NAMES = [f"layers.{number}" for number in range(24)]
# 1.5 rows a layer: 12 of the 24 layers get a second one, twice the entries of the others.
ROWS = {name: UnitGrid(15, 4, "row") for name in NAMES}
RULES = {
    "erdos_renyi": lambda names, seed: erdos_renyi_counts({name: ROWS[name] for name in names}, 0.1, seed),
    "proportional": lambda names, seed: proportional_counts({name: ROWS[name] for name in names}, 36 * 4, seed),
    "competition": lambda names, seed: competition_counts(
        dict.fromkeys(names, 2.0), dict.fromkeys(names, 15), 36, seed
    ),
    "competition without scores": lambda names, seed: competition_counts(
        dict.fromkeys(names, 0.0), dict.fromkeys(names, 15), 36, seed
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_layers_of_one_shape_are_drawn_for_the_units_left_over(rule):
    early, draws = 0, set()
    for seed in range(20):
        counts = RULES[rule](NAMES, seed)
        assert sum(counts.values()) == 36
        larger = [place for place, name in enumerate(NAMES) if counts[name] == 2]
        assert len(larger) == 12
        early += sum(place < 12 for place in larger)
        draws.add(tuple(larger))
        assert counts == RULES[rule](NAMES[::-1], seed)  # whoever lists the layers in another order agrees
    assert len(draws) == 20
    assert 90 < early < 150  # of 240; 120 expected, standard deviation 5.6


def test_the_configs_seed_decides_which_layers_get_a_row_more():
    def sizes(seed):
        config = SparseLoraConfig(
            r=0, budget=ErdosRenyi(1.5 / 32), granularity="row", target_modules=["q_proj"], seed=seed
        )
        return [
            layer.units("default").numel() for layer in adapter_layers(get_peft_model(tiny.llama(layers=6), config))
        ]

    found = [sizes(seed) for seed in range(3)]
    assert all(sorted(one) == [1, 1, 1, 2, 2, 2] for one in found)
    assert found[0] == sizes(0)
    assert len(set(map(tuple, found))) > 1
