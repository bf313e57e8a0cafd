"""Subnetworks of runs: how far two agree, and what a method needs before it can train one."""

import pytest
import torch
from safetensors.torch import save_file
from training_toolbox import adapted, layers_of, support_of, tiny_llama

from hf_sparse_peft import measure_mask_overlap, methods

TARGETS = ["q_proj", "v_proj", "down_proj"]


def changed(before, share, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: t + (torch.rand(t.shape, generator=generator) < share) for name, t in before.items()}


def test_overlap_of_two_masks_is_counted_by_definition(tmp_path):
    before = {"a": torch.zeros(10, 4), "b": torch.zeros(60), "steps": torch.tensor(3)}
    first, second = ({k: v.clone() for k, v in before.items()} for _ in range(2))
    first["a"].view(-1)[:8] += 1
    second["a"].view(-1)[6:20] += 1  # 2 of both
    first["b"][[3, 30]] += 1
    second["b"][[30, 50]] -= 1  # 1 of both
    save_file(second, tmp_path / "second.safetensors")
    found = measure_mask_overlap(before, first, tmp_path / "second.safetensors")
    assert found.repeated == pytest.approx(3 / 10)
    assert found.chance == pytest.approx(16 / 100)
    assert found.over_chance == pytest.approx(3 / 10 / (16 / 100))
    counts = {name: (t.numel, t.first, t.second, t.both) for name, t in found.tensors.items()}
    assert counts == {"a": (40, 8, 14, 2), "b": (60, 2, 2, 1)}
    assert measure_mask_overlap(before, first, first).repeated == 1.0


def test_random_masks_overlap_by_chance_and_related_ones_above_it():
    before = {"w": torch.zeros(400, 500)}
    first, second = changed(before, 0.2, 1), changed(before, 0.3, 2)
    found = measure_mask_overlap(before, first, second)
    assert found.over_chance == pytest.approx(1.0, abs=0.03)
    related = {"w": torch.where(torch.arange(400)[:, None] < 200, first["w"], second["w"])}
    assert measure_mask_overlap(before, first, related).over_chance > 2


def test_a_tolerance_and_a_dtype_decide_what_counts_as_changed():
    before = {"w": torch.ones(8)}
    small, large = {"w": torch.ones(8) + 1e-6}, {"w": torch.ones(8) + 0.5}
    assert measure_mask_overlap(before, small, large).repeated == 1.0
    with pytest.raises(ValueError, match="The first run changed no number"):
        measure_mask_overlap(before, small, large, atol=1e-5)
    with pytest.raises(ValueError, match="The second run changed no number"):
        measure_mask_overlap(before, large, small, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'w' has shape"):
        measure_mask_overlap(before, large, {"w": torch.ones(3)})


def test_tied_weights_count_once_whoever_stores_them_once():
    shared = torch.zeros(5)
    before, new = {"e": shared, "head": shared, "w": torch.zeros(5)}, torch.ones(5)
    twice, once = {"e": new, "head": new, "w": new.clone()}, {"e": new, "w": new.clone()}
    for first, second in ((twice, once), (once, twice), (once, once)):
        found = measure_mask_overlap(before, first, second)
        assert {name: t.numel for name, t in found.tensors.items()} == {"e": 5, "w": 5}


@pytest.mark.parametrize("way", ["run", "files"])
def test_preparing_takes_the_subnetwork_of_a_run(way, tmp_path):
    before = {name: p.detach().clone() for name, p in tiny_llama().named_parameters()}
    after = changed(before, 0.1, 4)
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", "atol": 0.5}
    if way == "files":
        save_file(before, tmp_path / "before.safetensors")
        save_file(after, tmp_path / "after.safetensors")
        options |= {"before": tmp_path / "before.safetensors", "after": str(tmp_path / "after.safetensors")}
    method = methods.get("rl-subnetwork", **options)
    model = adapted(method.config)
    method.prepare(model, (lambda: (before, after)) if way == "run" else None)
    for layer in layers_of(model):
        weight = f"{layer.module_name}.weight"
        assert support_of(layer) == (after[weight] != before[weight]).reshape(-1).nonzero().squeeze(1).tolist()


def test_a_run_that_is_missing_is_asked_for_and_other_methods_ask_for_none():
    method = methods.get("rl-subnetwork", target_modules=TARGETS, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"before=.*first_run="):
        method.prepare(adapted(method.config))
    with pytest.raises(ValueError, match="give both or none"):
        methods.get("rl-subnetwork", before="here")
    shira = methods.get("shira", target_modules=TARGETS, task_type="CAUSAL_LM")
    shira.prepare(adapted(shira.config), lambda: pytest.fail("shira needs no run"))
