"""Random growth is uniform over the units that may enter: no place and no size of weight is preferred."""

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import methods
from hf_sparse_peft.tuners import adapter_layers


def moves(out, steps: int = 6, **options) -> list[tuple[torch.Tensor, set[int], set[int]]]:
    """|weight|, support before and support after of every layer and move."""
    method = methods.get("set", density=0.1, every=2, fraction=0.5, **options)
    model = get_peft_model(tiny.llama(layers=1), method.config)
    layers, seen, found = adapter_layers(model), [], []

    def look(step, model, optimizer):
        seen.append([set(layer.units("default").tolist()) for layer in layers])

    tiny.train(
        model, out, steps, callbacks=[tiny.At(on_step_end=look), *method.callbacks(model), tiny.At(on_step_end=look)],
        optimizer=method.optimizer,
    )  # fmt: skip
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        found += [
            (layer.base_layer.weight.detach().abs().flatten(), old, new)
            for layer, old, new in zip(layers, before, after, strict=True)
            if old != new
        ]
    return found


@pytest.mark.parametrize("unfired", [False, True])
def test_grown_units_are_of_any_place_and_of_weights_of_any_size(unfired, tmp_path):
    places, sizes = [], []
    for weight, old, new in moves(tmp_path, unfired=unfired):
        free = [u for u in range(weight.numel()) if u not in old]
        grown = new - old
        by_size = sorted(free, key=weight.tolist().__getitem__)
        for order, ranks in ((free, places), (by_size, sizes)):
            rank = {u: number / len(free) for number, u in enumerate(order)}
            ranks += [rank[u] for u in grown]
    assert len(places) > 400  # means of so many uniform numbers lie within 0.05 of a half
    for ranks in (places, sizes):
        values = torch.tensor(ranks)
        assert abs(float(values.mean()) - 0.5) < 0.06
        assert abs(float(values.std()) - 12**-0.5) < 0.04  # neither one end nor the middle alone


def test_each_move_layer_and_seed_draws_anew(tmp_path):
    grown = []
    for seed in (0, 1):
        found = moves(tmp_path / str(seed), target_modules=["q_proj", "o_proj"], seed=seed)
        assert len(found) == 4
        grown += [new - old for _, old, new in found]
    for number, one in enumerate(grown):
        for other in grown[number + 1 :]:
            assert len(one & other) < 0.3 * len(one)  # chance: one in 18
