"""Maestro's ordered sampling and nested group lasso, against autograd of the double sum and worked numbers."""

import itertools

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn
from training_toolbox import Hook, layers_of, run

from hf_sparse_peft import Controller, GroupLasso, SampleRank, SparseLoraConfig, methods
from hf_sparse_peft.rules import Run, Training
from hf_sparse_peft.sparsity import nested_group_slopes, nested_group_threshold

R = 4
SAMPLED = SampleRank(modules="one", freeze_lower=False, rescaled=False)


def adapted(rules, base: str = "fp32", **options):
    torch.manual_seed(2)
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": R, "init_weights": False, **options}
    return get_peft_model(tiny.base(base, layers=1), SparseLoraConfig(density=0.0, schedule=rules, **options))


def factors(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    layers = layers_of(model)
    return [tuple(getattr(one, f"sparse_lora_{name}")["default"].detach().double() for name in "AB") for one in layers]


def penalty(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The double loop."""
    return sum(B[:, b:].norm() + A[b:].norm() for b in range(len(A)))


def masks(model) -> list[list[int]]:
    return [layer.sparse_lora_rank_mask["default"].tolist() for layer in layers_of(model)]


def test_worked_numbers_of_penalty_and_proximal_operator():
    B = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    value = penalty(A, B)
    assert float(value) == pytest.approx(13.2361, abs=5e-5)
    value.backward()
    torch.testing.assert_close(nested_group_slopes(A.detach().norm(dim=1))[:, None] * A.detach(), A.grad)
    torch.testing.assert_close(nested_group_slopes(B.detach().norm(dim=0)) * B.detach(), B.grad)
    norms = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert (nested_group_threshold(norms, 1.0) * norms).tolist() == pytest.approx([2.2929, 2.2929], abs=5e-5)


def test_the_proximal_operator_is_stationary_and_zero_from_the_end():
    """What was taken away is the penalty's subgradient at the result: of the double loop, by autograd."""
    for seed in range(5):
        x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = nested_group_threshold(x.norm(dim=1), 0.3)[:, None] * x
        alive = int((found != 0).any(1).sum())
        assert 0 < alive <= 6
        assert not found[alive:].any()
        kept = found[:alive].clone().requires_grad_()
        sum(kept[b:].norm() for b in range(alive)).backward()
        torch.testing.assert_close(x[:alive] - found[:alive], 0.3 * kept.grad)
        for b in range(alive, 6):  # a tail that went is within reach of the groups that hold it
            assert float(x[b:].norm()) <= 0.3 * sum(range(1, 7 - b)) + 1e-12
    assert not nested_group_threshold(torch.zeros(3), 0.1).any()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_is_that_of_the_double_sum_once_a_step(accumulation, tmp_path):
    model, seen = adapted([GroupLasso(0.5, kind="gradient", every=1)]), {}

    def look(when):
        def at(step, model, optimizer):
            held = [(one.sparse_lora_A["default"], one.sparse_lora_B["default"]) for one in layers_of(model)]
            seen[when, step] = [(A.detach().double(), B.detach().double(), A.grad + 0, B.grad + 0) for A, B in held]

        return Hook(on_pre_optimizer_step=at)

    run(model, tmp_path, 2, optimizer="default", accumulation=accumulation, before=[look(0)], after=[look(1)])
    for (A, B, was_A, was_B), (_, _, now_A, now_B) in zip(seen[0, 2], seen[1, 2], strict=True):
        A, B = A.requires_grad_(), B.requires_grad_()
        (0.5 * penalty(A, B)).backward()
        torch.testing.assert_close((now_A - was_A).double(), A.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close((now_B - was_B).double(), B.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_ranks_shrink_from_their_end_and_the_update_does_not_feel_it(base, tmp_path):
    model, seen, full = adapted([SAMPLED, GroupLasso(4.0, every=2)], base), [], {}

    def before(step, model, optimizer):
        scalings = [layer.sparse_lora_scaling["default"] for layer in layers_of(model)]
        held = zip(scalings, factors(model), seen[-1] if seen else [[1] * R] * 3, strict=True)
        full[step] = [(scaling * B * torch.tensor(mask) @ A).float() for scaling, (A, B), mask in held]

    def after(step, model, optimizer):
        seen.append(masks(model))
        assert [gate.tolist() for gate in gates(model)] == masks(model)
        for layer, was in zip(layers_of(model), full[step], strict=True):
            torch.testing.assert_close(layer.get_delta_weight("default"), was, rtol=1e-5, atol=1e-7)

    hooks = {"before": [Hook(on_step_end=before)], "after": [Hook(on_step_end=after)]}
    run(model, tmp_path, 24, optimizer="default", decay=0.0, **hooks)
    counts = [list(map(sum, one)) for one in seen]
    assert all(mask == sorted(mask, reverse=True) for one in seen for mask in one)
    assert all(now <= was for one, two in itertools.pairwise(counts) for was, now in zip(one, two, strict=True))
    assert 0 < sum(counts[-1]) < 3 * R
    assert len({sum(one) for one in counts}) > 2
    delta = [layer.get_delta_weight("default") for layer in layers_of(model)]
    model.base_model.compact("default")
    for layer, was in zip(layers_of(model), delta, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), was, rtol=1e-5, atol=1e-7)


def gates(model) -> list[torch.Tensor]:
    return [layer.sparse_lora_gate["default"].detach().clone() for layer in layers_of(model)]


def test_one_module_is_cut_at_a_step_unscaled_and_its_tail_has_no_gradient(tmp_path):
    model, cut = adapted([SAMPLED]), []

    def look(step, model, optimizer):
        for number, (layer, gate) in enumerate(zip(layers_of(model), gates(model), strict=True)):
            alive = int(gate.sum())
            assert gate.tolist() == [1.0] * alive + [0.0] * (R - alive)
            assert not layer.sparse_lora_A["default"].grad[alive:].any()
            assert not layer.sparse_lora_B["default"].grad[:, alive:].any()
            assert layer.sparse_lora_A["default"].grad[:alive].any(1).all()
            cut.extend([(step, number)] if alive < R else [])

    run(model, tmp_path, 12, optimizer="default", after=[Hook(on_pre_optimizer_step=look)])
    assert len({step for step, _ in cut}) == len(cut)
    assert len({number for _, number in cut}) > 1
    assert all(gate.tolist() == [1.0] * R for gate in gates(model))


def test_pairs_are_drawn_alike_so_that_a_rank_of_eight_is_drawn_four_times_as_often_as_one_of_two():
    model = adapted([SAMPLED], r=2, rank_pattern={"q_proj": 8}, target_modules=["q_proj", "v_proj"])
    spaces = [s for layer in layers_of(model) for s in layer.unit_spaces("default") if s.kind == "rank"]
    view = Run(Training(model, 4), SAMPLED, "default", model.peft_config["default"], spaces)
    drawn = torch.zeros(2, 9)
    for view.training.step in range(3000):
        ranks = SAMPLED._draw(view, {space: space.size for space in spaces})
        short = [number for number, (space, rank) in enumerate(ranks.items()) if rank < space.size]
        for number in short:
            drawn[number, ranks[spaces[number]]] += 1
    # Of ten pairs seven cut the first module, one the second, and two draw a full rank.
    assert drawn.sum(1).tolist() == pytest.approx([2100, 300], rel=0.15)
    assert drawn[0, 1:8].tolist() == pytest.approx([300.0] * 7, rel=0.25)


@pytest.mark.parametrize("sampled", [True, False])
def test_ordered_sampling_recovers_the_svd_of_a_linear_teacher(sampled):
    """Whitened inputs, singular values 3, 2, 1: every product of leading components becomes the truncated SVD, of
    which training at full rank alone knows nothing."""
    teacher = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(teacher)
    teacher = U @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ Vh
    base = nn.Sequential(nn.Linear(3, 3, bias=False))
    nn.init.zeros_(base[0].weight)
    rules = [SAMPLED] if sampled else []
    torch.manual_seed(1)
    config = SparseLoraConfig(
        r=3, lora_alpha=3, density=0.0, target_modules=["0"], schedule=rules, init_weights=False, seed=3
    )
    model = get_peft_model(base, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500, 1e-4)

    def step():
        (model(torch.eye(3)).t() - teacher).square().sum().backward()
        optimizer.step()
        schedule.step()

    model.train()
    if sampled:
        with Controller(model, optimizer, total_steps=500) as rules:
            for _ in range(500):
                rules.before_step()
                step()
                rules.after_step()
                optimizer.zero_grad()
    else:
        for _ in range(500):
            step()
            optimizer.zero_grad()
    ((A, B),) = factors(model)
    errors = [
        float((B[:, :b] @ A[:b] - (U[:, :b] * torch.tensor([3.0, 2.0, 1.0])[:b]) @ Vh[:b]).norm()) for b in (1, 2, 3)
    ]
    assert errors[2] < 1e-2
    assert (max(errors) < 2e-2) == sampled, errors


def test_a_row_has_both_rules_and_layers_without_gradient_keep_their_ranks(tmp_path):
    config = methods.get("maestro").config
    assert [rule.part_type for rule in config.schedule] == ["sample_rank", "group_lasso"]
    assert config.schedule[0] == SAMPLED
    model = adapted([SAMPLED, GroupLasso(100.0, every=1)])
    before = factors(model)
    run(model, tmp_path / "masked", 4, optimizer="default", decay=0.0, data=tiny.TokenData(masked=True))
    pairs = zip(itertools.chain(*before), itertools.chain(*factors(model)), strict=True)
    assert all(torch.equal(was, now) for was, now in pairs)
    assert masks(model) == [[1] * R] * 3
    model = adapted([GroupLasso()])
    with pytest.raises(ValueError, match=r"GroupLasso\.every=None is an epoch"):
        Controller(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), 4).__enter__()
