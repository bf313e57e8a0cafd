"""DyLoRA's nested ranks, against autograd of the rank-b model and worked numbers."""

import pytest
import tiny
import torch
from peft import get_peft_model
from training_toolbox import Hook, layers_of, run

from hf_sparse_peft import SampleRank, SparseLoraConfig
from hf_sparse_peft.rules import Run, Training

R, ALPHA = 8, 16


def adapted(rule: SampleRank, base: str = "fp32", names=("default",)):
    torch.manual_seed(2)
    config = SparseLoraConfig(
        r=R, lora_alpha=ALPHA, density=0.0, target_modules=["q_proj", "down_proj"], schedule=[rule],
        task_type="CAUSAL_LM", init_weights=False,
    )  # fmt: skip
    model = get_peft_model(tiny.base(base, layers=1), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


def factors(model) -> list[dict[str, torch.Tensor]]:
    names = ("A", "B", "gate")
    return [
        {name: getattr(layer, f"sparse_lora_{name}")["default"].detach().clone() for name in names}
        for layer in layers_of(model)
    ]


def test_the_product_of_rank_two_is_scaled_by_eight_and_the_whole_one_is_plain_lora():
    model, rule = adapted(SampleRank()), SampleRank()
    spaces = [s for layer in layers_of(model) for s in layer.unit_spaces("default") if s.kind == "rank"]
    view = Run(Training(model, 4), rule, "default", model.peft_config["default"], spaces)
    for layer, held in zip(layers_of(model), factors(model), strict=True):
        expected = ALPHA / R * held["B"] @ held["A"]
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-6)
    view.for_this_step(space.leading(2) for space in view.spaces())
    for layer, held in zip(layers_of(model), factors(model), strict=True):
        expected = 8 * held["B"][:, :2] @ held["A"][:2]
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-6)
    view.leave_step()
    assert all(held["gate"].tolist() == [1.0] * R for held in factors(model))


def test_drawn_ranks_are_uniform_from_one_to_r():
    model, rule = adapted(SampleRank()), SampleRank()
    spaces = [s for layer in layers_of(model) for s in layer.unit_spaces("default") if s.kind == "rank"]
    view = Run(Training(model, 4), rule, "default", model.peft_config["default"], spaces)
    drawn = []
    for view.training.step in range(4000):
        rule.before_step(view)
        drawn.append(max(view.memory.ranks.values()))
        view.leave_step()
    drawn = torch.tensor(drawn)
    assert torch.bincount(drawn, minlength=R + 1)[1:].min() > 400
    assert (int(drawn.min()), int(drawn.max())) == (1, R)


@pytest.mark.parametrize("freeze_lower", [True, False])
def test_only_what_learns_has_a_gradient_and_it_is_the_rank_b_models(freeze_lower, tmp_path):
    model, seen = adapted(SampleRank(freeze_lower=freeze_lower)), {}

    def look(step, model, optimizer):
        layers = layers_of(model)
        seen[step] = [
            (held["gate"], layer.sparse_lora_A["default"].grad.clone(), layer.sparse_lora_B["default"].grad.clone())
            for layer, held in zip(layers, factors(model), strict=True)
        ]

    run(model, tmp_path, 6, optimizer="default", accumulation=2, after=[Hook(on_pre_optimizer_step=look)])
    ranks = {step: int((found[0][0] != 0).sum()) for step, found in seen.items()}
    assert len(set(ranks.values())) > 1
    for step, found in seen.items():
        learns = torch.arange(R) == ranks[step] - 1 if freeze_lower else torch.arange(R) < ranks[step]
        for gate, A, B in found:
            assert gate[: ranks[step]].tolist() == pytest.approx([R / ranks[step]] * ranks[step])
            assert torch.equal(A.abs().amax(1) > 0, learns)
            assert torch.equal(B.abs().amax(0) > 0, learns)
    assert all(held["gate"].tolist() == [1.0] * R for held in factors(model))


@pytest.mark.parametrize("strict", [True, False])
def test_what_does_not_learn_is_still_when_strict_and_drifts_by_momentum_and_decay_as_released(strict, tmp_path):
    model, before, moved = adapted(SampleRank(strict=strict)), {}, []

    def look(step, model, optimizer):
        before[step] = factors(model)

    def compare(step, model, optimizer):
        rank = int((before[step][0]["gate"] != 0).sum())
        for was, now in zip(before[step], factors(model), strict=True):
            changed = (was["A"] != now["A"]).any(1)
            assert changed[rank - 1]
            changed[rank - 1] = False
            moved.append(bool(changed.any()))

    run(
        model, tmp_path, 5, optimizer="default", weight_decay=0.1,
        before=[Hook(on_pre_optimizer_step=look, on_optimizer_step=compare)],
    )  # fmt: skip
    assert any(moved) != strict


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_the_final_rank_is_a_plain_lora_of_that_rank_and_the_other_adapter_stays(base, tmp_path):
    model = adapted(SampleRank(final_rank=3), base, ("default", "other"))
    model.set_adapter("default")
    before = [layer.get_delta_weight("other") for layer in layers_of(model)]
    run(model, tmp_path, 4, optimizer="default")
    for layer, held, other in zip(layers_of(model), factors(model), before, strict=True):
        expected = ALPHA / 3 * held["B"][:, :3] @ held["A"][:3]
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-6)
        assert layer.alive_components("default") == 3
        assert torch.equal(layer.get_delta_weight("other"), other)


def test_a_broken_step_leaves_all_components(tmp_path):
    model = adapted(SampleRank())

    def stop(step, model, optimizer):
        if step == 3:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run(model, tmp_path, 6, optimizer="default", after=[Hook(on_pre_optimizer_step=stop)])
    assert all(held["gate"].tolist() == [1.0] * R for held in factors(model))
