"""AdaLoRA's rule on the gate, against hand computations."""

import pytest
import torch
from training_toolbox import Hook, TokenData, adapted, layers_of, make_config, run

from hf_sparse_peft import Allocate, AverageRank, Orthogonality, Smoothed
from hf_sparse_peft.rules import Run, Training
from hf_sparse_peft.rules.allocate import affordable
from hf_sparse_peft.training import RuleRunner

KINDS = ("gate", "A", "B")


def gated(seed: int = 0, r: int = 4, support: bool = False, target: int = 2, orthogonality: float = 0.5, **options):
    rules = [Allocate(**{"budget": AverageRank(target), "every": 2, **options}), Orthogonality(orthogonality)]
    return adapted(make_config(r=r, density=0.05 if support else 0.0, schedule=rules), seed=seed)


def average(layer, kind: str) -> torch.Tensor:
    return torch.cat([layer.rule_state("default")[f"{kind}_{name}"].flatten() for name in KINDS])


def space_of(layer):
    (space,) = [space for space in layer.unit_spaces("default") if space.kind == "rank"]
    return space


def tensors(layer) -> dict[str, torch.Tensor]:
    return {kind: getattr(layer, f"sparse_lora_{kind}")["default"] for kind in KINDS}


def gates(model) -> list[list[bool]]:
    return [(layer.sparse_lora_gate["default"] != 0).tolist() for layer in layers_of(model)]


def masks(model) -> list[list[int]]:
    return [layer.sparse_lora_rank_mask["default"].tolist() for layer in layers_of(model)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_moving_averages_after_two_steps_equal_a_hand_computation(accumulation, tmp_path):
    model = gated(score=Smoothed(beta1=0.8, beta2=0.7), initial_warmup=0.5)
    products = {}

    def see(update, model, optimizer):
        # After the optimizer's step, with the gradients of before still there.
        products[update] = [
            torch.cat([(t.detach().double() * t.grad.double()).abs().reshape(-1) for t in tensors(layer).values()])
            for layer in layers_of(model)
        ]

    seen = {}

    def look(update, model, optimizer):
        seen[update] = [(average(layer, "sensitivity"), average(layer, "uncertainty")) for layer in layers_of(model)]

    run(
        model, tmp_path, 10, accumulation=accumulation, optimizer="default",
        after=[Hook(on_optimizer_step=see, on_step_end=look)],
    )  # fmt: skip
    for number in range(len(layers_of(model))):
        first, second = products[1][number], products[2][number]
        mean_1 = 0.2 * first
        spread_1 = 0.3 * (first - mean_1).abs()
        mean_2 = 0.8 * mean_1 + 0.2 * second
        spread_2 = 0.7 * spread_1 + 0.3 * (second - mean_2).abs()
        sensitivity, uncertainty = seen[2][number]
        torch.testing.assert_close(sensitivity.double(), mean_2, rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(uncertainty.double(), spread_2, rtol=1e-4, atol=1e-12)
        assert spread_2.max() > 0


def test_a_component_is_worth_its_gate_plus_the_means_over_its_row_and_column():
    layer = layers_of(gated())[1]
    rank, rows, cols = 4, layer.out_features, layer.in_features
    size = rank * (1 + rows + cols)
    generator = torch.Generator().manual_seed(0)
    sensitivity, uncertainty = (torch.rand(size, generator=generator) for _ in range(2))
    for kind, values in (("sensitivity", sensitivity), ("uncertainty", uncertainty)):
        kept = [layer.rule_state("default")[f"{kind}_{name}"] for name in KINDS]
        for tensor, part in zip(kept, values.split([tensor.numel() for tensor in kept]), strict=True):
            tensor.copy_(part.view_as(tensor))
    score = (sensitivity.double() * uncertainty.double()).tolist()
    found = Allocate().scores(space_of(layer)).tolist()
    for i in range(rank):
        of_A = [score[rank + i * cols + j] for j in range(cols)]
        of_B = [score[rank + rank * cols + j * rank + i] for j in range(rows)]
        assert found[i] == pytest.approx(score[i] + sum(of_A) / cols + sum(of_B) / rows, rel=1e-5)


def test_exactly_the_budget_lives_also_where_all_scores_tie():
    scores, costs = torch.zeros(16), torch.ones(16, dtype=torch.long)
    assert affordable(scores, costs, 5, seed=0).sum() == 5  # upstream's "<= threshold" masks all of them here


@pytest.mark.parametrize("target", [1, 2, 4])
def test_living_gates_follow_the_budget_and_end_at_target_times_layers(target, tmp_path):
    model = gated(target=target, initial_warmup=0.1, final_warmup=0.3)
    count = len(layers_of(model))
    alive = {}

    def look(update, model, optimizer):
        alive[update] = (sum(map(sum, masks(model))), sum(map(sum, gates(model))))

    run(model, tmp_path, 20, after=[Hook(on_step_end=look)])
    for update, (masked, nonzero) in alive.items():
        if update <= 2:
            assert masked == 4 * count
        elif update < 14 and update % 2 == 0:
            budget = int(target * count + (4 - target) * count * (1 - (update - 2) / 12) ** 3)
            assert masked == nonzero == budget, update
        elif update >= 14:
            assert masked == nonzero == target * count, update
    assert sum(map(sum, gates(model))) == target * count
    # No two layers have to end alike, the average does.
    assert sum(layer.alive_components("default") for layer in layers_of(model)) == target * count


def test_zeroed_gates_train_on_in_the_middle_and_may_come_back_but_not_at_the_end(tmp_path):
    # Little smoothing and one sample a step: the ranking of components is restless.
    model = gated(
        r=6, every=3, initial_warmup=0.0, final_warmup=0.4, orthogonality=0.0, score=Smoothed(beta1=0.1, beta2=0.1)
    )
    history, zero = {}, {}

    def look(update, model, optimizer):
        history[update] = masks(model)
        zero[update] = [[not alive for alive in row] for row in gates(model)]

    run(model, tmp_path, 40, after=[Hook(on_step_end=look)], lr=3e-2, batch=1)
    back, moved_again = 0, 0
    for update in range(3, 24, 3):
        for earlier, later in zip(history[update], history[min(update + 3, 24)], strict=True):
            back += sum(not a and b for a, b in zip(earlier, later, strict=True))
        dead = [not alive for row in history[update] for alive in row]
        still_zero = [gate for row in zero[update + 1] for gate in row]
        if update < 21:
            moved_again += sum(d and not z for d, z in zip(dead, still_zero, strict=True))
    assert moved_again > 0
    assert back > 0
    for update in range(24, 41):
        assert history[update] == history[24]
        assert zero[update] == [[not alive for alive in row] for row in history[24]]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_orthogonality_adds_the_autograd_gradient_of_its_formula_once_a_step(accumulation, tmp_path):
    model = gated(orthogonality=0.3, initial_warmup=0.5)
    before, after, expected = {}, {}, {}

    def grads(model):
        return [{kind: t.grad.clone() for kind, t in tensors(layer).items()} for layer in layers_of(model)]

    def formula(model):
        leaves = [
            {kind: tensors(layer)[kind].detach().double().requires_grad_() for kind in ("A", "B")}
            for layer in layers_of(model)
        ]
        gaps = [
            torch.linalg.matrix_norm(square - torch.eye(len(square), dtype=torch.float64))
            for leaf in leaves
            for square in (leaf["A"] @ leaf["A"].t(), leaf["B"].t() @ leaf["B"])
        ]
        (0.3 * sum(gaps) / (2 * len(leaves))).backward()
        return [{kind: leaf.grad for kind, leaf in leaf.items()} for leaf in leaves]

    run(
        model, tmp_path, 4, accumulation=accumulation, batch=2, optimizer="default",
        before=[Hook(on_pre_optimizer_step=lambda u, m, _: before.update({u: grads(m)}))],
        after=[
            Hook(on_pre_optimizer_step=lambda u, m, _: (after.update({u: grads(m)}), expected.update({u: formula(m)})))
        ],
    )  # fmt: skip
    assert sorted(after) == [1, 2, 3, 4]
    for update in after:
        for was, now, wanted in zip(before[update], after[update], expected[update], strict=True):
            assert torch.equal(was["gate"], now["gate"])
            for kind in ("A", "B"):
                torch.testing.assert_close((now[kind] - was[kind]).double(), wanted[kind], rtol=1e-3, atol=1e-6)
                assert wanted[kind].abs().max() > 1e-4


def test_the_orthogonality_gradient_is_zero_at_orthogonal_factors():
    layers = layers_of(gated())
    for layer in layers:
        for kind, held in tensors(layer).items():
            if kind != "gate":
                held.data = torch.linalg.qr(torch.randn(max(held.shape), 4))[0]
                held.data = held.data.t().contiguous() if kind == "A" else held.data
            held.grad = torch.zeros_like(held)
    spaces = [space_of(layer) for layer in layers]
    Orthogonality(0.5).gradients(Run(Training(None, 1), Orthogonality(0.5), "default", None, spaces))
    for layer in layers:
        for held in tensors(layer).values():
            assert torch.isfinite(held.grad).all()


def test_the_regulariser_never_shows_in_the_loss(tmp_path):
    losses = []
    for weight in (0.0, 50.0):
        model = gated(orthogonality=weight, initial_warmup=0.5)
        trainer = run(model, tmp_path / str(weight), 2, optimizer="default", logging_steps=1)
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


def test_a_step_that_is_not_finite_leaves_the_averages_untouched(tmp_path):
    model = gated(initial_warmup=0.5)
    callback = RuleRunner()
    seen = []

    def spoil(update, model, optimizer):
        if update == 2:
            layers_of(model)[0].sparse_lora_A["default"].grad[0, 0] = float("inf")

    def look(update, model, optimizer):
        seen.append(average(layers_of(model)[0], "sensitivity"))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data.nan_to_num_()

    run(
        model, tmp_path, 3, callbacks=[callback], optimizer="default", lr=0.0, data=TokenData(),
        before=[Hook(on_pre_optimizer_step=spoil)], after=[Hook(on_optimizer_step=look)],
    )  # fmt: skip
    assert seen[0].any()
    assert torch.equal(seen[0], seen[1])


def test_rank_and_support_move_in_one_run(tmp_path):
    model = gated(support=True, initial_warmup=0.0, final_warmup=0.3)
    run(model, tmp_path, 10)
    assert sum(map(sum, gates(model))) == 2 * len(layers_of(model))
    ids = torch.arange(18).view(2, 9)
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.base_model.compact()
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
    assert sum(layer.sizes["default"].rank for layer in layers_of(model)) == 2 * len(layers_of(model))
