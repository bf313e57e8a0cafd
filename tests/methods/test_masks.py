"""Methods that prune weights while they train: windows by compute, PST's scores and gradients, rows that train."""

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import MaskedLoraConfig, Prune, methods
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.masked_lora import DenseUpdate, StructuredScores


@pytest.mark.parametrize(
    ("sparsity", "start", "end"), [(0.5, 0.16129, 0.67742), (0.8, 0.09091, 0.54545), (0.9, 0.05830, 0.41704)]
)
def test_the_window_by_compute_is_a_quarter_to_three_quarters_of_what_the_run_costs(sparsity, start, end):
    rule = methods.get("journey-matters", sparsity=sparsity).config.schedule[0]
    assert rule.window() == pytest.approx((start, end), abs=1e-4)
    T = 10_000
    cost = torch.tensor([rule.living_fraction(t, T) for t in range(T)], dtype=torch.float64).cumsum(0)
    for edge, share in zip(rule.window(), (0.25, 0.75), strict=True):
        assert float(cost[round(edge * T) - 1] / cost[-1]) == pytest.approx(share, abs=1e-3)
    assert rule.living_fraction(round(start * T), T) == 1.0
    assert rule.living_fraction(round(end * T), T) == pytest.approx(1 - sparsity)


def test_without_pruning_or_by_steps_the_window_is_that_of_steps():
    assert Prune(1.0, space="mask", unit="compute").window() == pytest.approx((0.25, 0.75))
    assert methods.get("journey-matters", unit="steps").config.schedule[0].window() == (0.25, 0.75)
    whole = Prune(0.1, space="mask", unit="compute", fixed_share=0.99).window()
    assert whole == pytest.approx((0.25, 0.75), abs=0.01)


def one_layer(W, masking, **options):
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data.copy_(W)
    config = MaskedLoraConfig(target_modules=["0"], mask="all", masking=masking, **options)
    return adapter_layers(get_peft_model(torch.nn.Sequential(linear), config))[0]


def space_of(layer):
    return next(space for space in layer.unit_spaces("default") if space.kind == "mask")


def test_psts_gradients_reach_scores_and_through_magnitudes_the_weight():
    # The worked example of the official code's formulas: upstream gradient 3 everywhere, all score factors 0.
    W = torch.tensor([[-2.0, 1.0, 0.5, -3.0]])
    layer = one_layer(W, StructuredScores(rank=1), update=DenseUpdate())
    layer.masked_lora_score_A["default"].data.zero_()
    space_of(layer).resize(2)
    assert layer.kept("default").tolist() == [[True, False, False, True]]
    x = torch.eye(4).requires_grad_()
    layer(x).sum(1).mul(3).sum().backward()
    assert layer.masked_lora_delta["default"].grad.tolist() == [[9.0, 3.0, 1.5, 12.0]]
    assert layer.masked_lora_score_columns["default"].grad.tolist() == [-6.0, 3.0, 1.5, -9.0]
    assert layer.masked_lora_score_rows["default"].grad.tolist() == [-10.5]


def test_psts_mask_is_the_best_of_the_whole_score_and_autograds_gradients_agree():
    torch.manual_seed(0)
    W = torch.randn(6, 8)
    layer = one_layer(W, StructuredScores(rank=2, low_rank=0.5, structured=2.0), init_weights=False, r=3, lora_alpha=3)
    space_of(layer).resize(int(0.3 * 48))
    trained = (*layer.adapter_configs["default"].update.trained, *StructuredScores.trained)
    own = {name: layer.own_tensors("default")[name].detach().double().requires_grad_() for name in trained}
    V = W.double() + own["B"] @ own["A"]
    S = V.abs() + 0.5 * own["score_A"] @ own["score_B"] + 2 * (own["score_rows"][:, None] + own["score_columns"])
    M = torch.zeros(48, dtype=torch.float64)
    M[S.detach().view(-1).argsort(descending=True)[:14]] = 1
    M = M.view(6, 8)
    assert torch.equal(layer.kept("default"), M.bool())
    straight = M + S - S.detach()  # straight-through: the mask's gradient is the score's
    x, dy = torch.randn(5, 8), torch.randn(5, 6)
    (x.double() @ (straight * V).t()).backward(dy.double())
    layer(x).backward(dy)
    for name, tensor in own.items():
        got = layer.own_tensors("default")[name].grad
        assert torch.allclose(got.double(), tensor.grad, atol=1e-4), name


@pytest.mark.parametrize("name", ["gradual-magnitude", "journey-matters", "pst"])
def test_by_name_a_run_ends_at_the_sparsity_and_merges_to_it(name, tmp_path):
    method = methods.get(name, sparsity=0.7, task_type="CAUSAL_LM", **({} if name == "pst" else {"every": 1}))
    model = get_peft_model(tiny.llama(layers=1), method.config)
    tiny.train(model, tmp_path, 8, callbacks=method.callbacks(model))
    counts = {layer.module_name: round(0.3 * layer.in_features * layer.out_features) for layer in adapter_layers(model)}
    merged = model.merge_and_unload()
    assert {name: int(merged.get_submodule(name).weight.count_nonzero()) for name in counts} == counts
