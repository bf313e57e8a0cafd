"""Pruning in a real Trainer loop: exact counts, the right units, nothing left of the dead."""

import pytest
import torch
from training_toolbox import Hook, adapted, layers_of, make_config, positions_of, run, snapshot, support_of

from hf_sparse_peft import AccumulatedGradient, Prune, Regrow


def watched(model, out, steps, **options):
    """Runs; returns `{update: (old, new)}` of every update."""
    old, new = {}, {}
    before = [Hook(on_step_end=lambda update, m, optimizer: old.__setitem__(update, snapshot(m, optimizer)))]
    after = [Hook(on_step_end=lambda update, m, optimizer: new.__setitem__(update, snapshot(m, optimizer)))]
    run(model, out, steps, before=before, after=after, **options)
    return {update: (old[update], new[update]) for update in old}


def magnitudes(side: dict) -> list[float]:
    living = len(side["units"])
    return side["values"][:living].abs().reshape(living, -1).sum(1).tolist()


@pytest.mark.parametrize("optimizer", ["aged", "default"])
@pytest.mark.parametrize("granularity", ["entry", "block", "row", "column"])
def test_layers_follow_the_cubic_curve_and_keep_the_largest_units(granularity, optimizer, tmp_path):
    pruning = Prune(final_fraction=0.3, start=0.25, end=0.74, every=3)
    density = 0.05 if granularity == "entry" else 0.5
    model = adapted(make_config(granularity=granularity, density=density, schedule=[pruning]))
    steps, begin, end = 20, 5, 15
    due = {8, 11, 14, 15}
    for update, (old, new) in watched(model, tmp_path, steps, optimizer=optimizer).items():
        for was, now in zip(old, new, strict=True):
            capacity = was["values"].shape[0]
            progress = min(max((update - begin) / (end - begin), 0), 1)
            target = max(1, round((0.3 + 0.7 * (1 - progress) ** 3) * capacity))
            assert now["values"].shape == was["values"].shape  # capacity stays
            if update not in due:
                assert now["units"] == was["units"]
                continue
            worth = magnitudes(was)
            best = sorted(range(len(worth)), key=lambda i: (-worth[i], i))[:target]
            assert now["units"] == sorted(was["units"][i] for i in best)
            at = [was["units"].index(u) for u in now["units"]]
            assert torch.equal(now["values"][:target], was["values"][at])
            assert not now["values"][target:].any()
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(now["state"][key][:target], was["state"][key][at])
                assert not now["state"][key][target:].any()
    for layer in layers_of(model):
        assert len(support_of(layer)) == max(1, round(0.3 * layer.sparse_lora_values["default"].shape[0]))


def test_the_dead_stay_dead_and_out_of_the_forward_pass(tmp_path):
    model = adapted(make_config(r=2, schedule=[Prune(final_fraction=0.4, start=0.1, end=0.5, every=2)]))
    for update, (_, new) in watched(model, tmp_path, 14, decay=0.5).items():
        if update >= 7:
            for side in new:
                living = len(side["units"])
                assert living < side["values"].shape[0]
                assert not side["values"][living:].any()
                assert not side["state"]["exp_avg"][living:].any()
                assert not side["state"]["exp_avg_sq"][living:].any()
    ids = torch.arange(18).view(2, 9)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for layer in layers_of(model):
            values = layer.sparse_lora_values["default"]
            living = len(support_of(layer))
            kept = values.data.clone()
            values.data[living:] = 1e3
            dense = torch.zeros(layer.out_features * layer.in_features)
            dense[positions_of(layer).reshape(-1)] = kept[:living].reshape(-1)
            scale = layer.sparse_lora_scaling["default"]
            dense = dense.view(layer.out_features, layer.in_features)
            dense += scale * layer.sparse_lora_B["default"].data @ layer.sparse_lora_A["default"].data
            torch.testing.assert_close(layer.get_delta_weight("default"), dense)
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("granularity", ["entry", "block"])
def test_compact_after_pruning_keeps_the_logits_and_drops_the_dead(granularity, tmp_path):
    pruning = Prune(final_fraction=0.4, start=0.1, end=0.6, every=2)
    density = 0.05 if granularity == "entry" else 0.5
    model = adapted(make_config(r=2, granularity=granularity, density=density, schedule=[pruning]))
    run(model, tmp_path, 8)
    ids = torch.arange(18).view(2, 9)
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        living = [len(support_of(layer)) for layer in layers_of(model)]
        model.base_model.compact()
        assert torch.equal(model(input_ids=ids).logits, before)
    assert [layer.sparse_lora_values["default"].shape[0] for layer in layers_of(model)] == living
    assert model.base_model.dead_parameters() == 0


@pytest.mark.parametrize("granularity", ["entry", "block"])
def test_global_scope_keeps_the_units_of_largest_mean_magnitude_of_the_whole_model(granularity, tmp_path):
    pruning = Prune(final_fraction=0.3, start=0.25, end=0.75, every=4, scope="global")
    density = 0.05 if granularity == "entry" else 0.5
    model = adapted(make_config(granularity=granularity, density=density, schedule=[pruning]))
    total = 0
    for update, (old, new) in watched(model, tmp_path, 16).items():
        total = sum(round(0.3 * side["values"].shape[0]) for side in old)
        if update not in (8, 12):
            assert all(was["units"] == now["units"] for was, now in zip(old, new, strict=True))
            continue
        share = 0.3 + 0.7 * (1 - (update - 4) / 8) ** 3
        target = sum(max(1, round(share * side["values"].shape[0])) for side in old)
        entries = [side["values"][0].numel() for side in old]
        ranking = sorted(
            (-worth / entries[number], number, unit)
            for number, side in enumerate(old)
            for unit, worth in zip(side["units"], magnitudes(side), strict=True)
        )
        # No layer goes without a unit: its best one is set before all others compete.
        seeded = [next(item for item in ranking if item[1] == number) for number in range(len(old))]
        others = [item for item in ranking if item not in seeded][: target - len(seeded)]
        for number, now in enumerate(new):
            assert now["units"] == sorted(unit for _, owner, unit in seeded + others if owner == number)
        assert sum(len(side["units"]) for side in new) == target
    assert sum(len(support_of(layer)) for layer in layers_of(model)) == total
    assert (
        len({len(support_of(layer)) / layer.sparse_lora_values["default"].shape[0] for layer in layers_of(model)}) > 1
    )


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_layer_keeps_a_unit_however_hard_the_pruning(scope, tmp_path):
    pruning = Prune(final_fraction=1e-4, start=0.0, end=0.5, every=2, scope=scope)
    model = adapted(make_config(density=0.01, schedule=[pruning]))
    run(model, tmp_path, 6)
    assert all(len(support_of(layer)) >= 1 for layer in layers_of(model))
    if scope == "layer":
        assert all(len(support_of(layer)) == 1 for layer in layers_of(model))


@pytest.mark.parametrize(("end", "last"), [(0.5, 14), (0.95, 19)])
def test_with_regrowth_units_leave_at_moves_only_and_the_final_count_is_exact(end, last, tmp_path):
    # end=0.5: the move after the window's end (step 14) prunes last. end=0.95: no move follows, so step 19 itself does.
    pruning = Prune(final_fraction=0.4, start=0.1, end=end, every=1)
    model = adapted(make_config(schedule=[pruning, Regrow(every=6, grow=AccumulatedGradient(steps=2))]))
    counts, fresh = {}, {}
    for update, (old, new) in watched(model, tmp_path, 20).items():
        counts[update] = [len(side["units"]) for side in new]
        changed = [len(was["units"]) != len(now["units"]) for was, now in zip(old, new, strict=True)]
        if any(changed):
            assert update in (2, 8, 14, last)
            fresh[update] = all(side["values"][: len(side["units"])].all() for side in old)
    assert all(fresh.values())  # nothing was judged while its value was still 0
    assert max(fresh) == last
    for layer, count in zip(layers_of(model), counts[20], strict=True):
        assert count == round(0.4 * layer.sparse_lora_values["default"].shape[0])
