"""LoRD, TRP, PELA: starts and rules against their equations in float64, with the sheets' worked numbers."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from hf_sparse_peft import (
    DistilFeatures,
    FactoredConfig,
    LargestError,
    SparseLoraConfig,
    TrainedRankPruning,
    calibrate,
    callbacks_for,
)
from hf_sparse_peft.hub import merge_to_dense
from hf_sparse_peft.rules.trained_rank_pruning import add_product_gradient
from hf_sparse_peft.tuners.factored import FixedRank, OutputFeatures, Whole, factored_layers

TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def float64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_lords_worked_example_keeps_the_output_of_most_variance_and_its_mean():
    W, mean = torch.diag(float64(1, 2)), float64(0, 3)
    state = {"mean": mean, "second": torch.diag(float64(9, 1)) + torch.outer(mean, mean)}
    found = OutputFeatures().start(W, 1, state=state, bias=float64(0, 0))
    assert torch.allclose(found["B"] @ found["A"], float64([1, 0], [0, 0]), atol=1e-12)
    assert torch.allclose(found["bias"], float64(0, 6), atol=1e-12)
    by_weight = OutputFeatures().start(W, 1, state=None)
    assert torch.allclose(by_weight["B"] @ by_weight["A"], float64([0, 0], [0, 2]), atol=1e-12)


def test_lords_error_is_the_sum_of_the_eigenvalues_left_out_and_its_mean_is_exact():
    torch.manual_seed(3)
    W, b = torch.randn(6, 8).double(), torch.randn(6).double()
    x = torch.randn(200, 8).double() * torch.arange(1, 9) + torch.randn(8).double()
    y = x @ W.T + b
    state = {"mean": x.mean(0), "second": x.T @ x / len(x)}
    found = OutputFeatures().start(W, 2, state=state, bias=b)
    approximated = x @ (found["B"] @ found["A"]).T + found["bias"]
    dropped = torch.linalg.eigvalsh((y - y.mean(0)).T @ (y - y.mean(0)) / len(y))[:-2].sum()
    assert torch.allclose((approximated - y).square().sum(1).mean(), dropped)
    assert torch.allclose(approximated.mean(0), y.mean(0))
    assert torch.allclose(found["B"].T @ found["B"], torch.eye(2).double(), atol=1e-12)
    full = OutputFeatures().start(W, 6, state=state, bias=b)
    assert torch.allclose(x @ (full["B"] @ full["A"]).T + full["bias"], y)


def test_lord_in_a_model_says_that_its_biases_are_no_part_of_a_llama(tmp_path):
    data = [{"input_ids": torch.randint(0, tiny.VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))}]
    model = get_peft_model(tiny.llama(), FactoredConfig(form=OutputFeatures(), rank=FixedRank(4), **TARGETS))
    calibrate(model, data)
    before = model.eval()(**data[0]).logits
    with pytest.warns(UserWarning, match="center=False"):
        dense = model.merge_and_unload()
    assert torch.allclose(dense(**data[0]).logits, before, atol=1e-5)
    model = get_peft_model(tiny.llama(), FactoredConfig(form=OutputFeatures(False), rank=FixedRank(4), **TARGETS))
    calibrate(model, data)
    assert factored_layers(model)[0].form("default").bias({}, None) is None


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_a_forms_own_bias_is_merged_over_a_kept_base_or_its_sum_is_refused(base):
    data = [{"input_ids": torch.randint(0, tiny.VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))}]
    options = {"form": OutputFeatures(), "rank": FixedRank(4), "keep_base": True, **TARGETS}
    model = get_peft_model(tiny.base(base), FactoredConfig(**options))
    calibrate(model, data)
    before = model.eval()(**data[0]).logits
    with model.disable_adapter():
        base_logits = model(**data[0]).logits
    assert not torch.allclose(before, base_logits, atol=1e-2)
    with pytest.warns(UserWarning, match="center=False"):
        dense = merge_to_dense(model)
    assert torch.allclose(dense.eval()(**data[0]).logits, before, atol=1e-3)
    with pytest.raises(ValueError, match="a bias of its own"):
        merge_to_dense(model, weights=[0.5])
    if base == "nf4":
        with pytest.raises(ValueError, match="a bias of its own"):
            model.merge_adapter()
    assert torch.equal(model(**data[0]).logits, before)


def trained(model, out, steps=6, **events):
    return tiny.train(model, out, steps, callbacks=[*callbacks_for(model), tiny.At(**events)], weight_decay=0.0)


def test_trps_worked_energies():
    rule = TrainedRankPruning()
    assert rule.rank(torch.tensor([3.0, 2, 1])) == 2  # 9/14 = 0.643, 13/14 = 0.929; of the values 5/6 < 0.9
    assert TrainedRankPruning(energy=1.0).rank(torch.tensor([3.0, 2, 1])) == 3
    assert TrainedRankPruning(energy=1.0).rank(torch.tensor([3.0, 2, 0])) == 2


def test_trp_truncates_whole_weights_before_the_forward_pass_of_every_third_step(tmp_path):
    rule = TrainedRankPruning(every=3, energy=0.8, nuclear_norm=0.0)
    config = FactoredConfig(form=Whole(), schedule=[rule], **TARGETS)
    model = get_peft_model(tiny.llama(), config)
    layer, ranks = factored_layers(model)[0], []
    start = layer.factored_weight("default").double()
    first = []

    def note(step, **_):
        W = layer.factored_W["default"].detach().double()
        ranks.append(int(torch.linalg.matrix_rank(W, rtol=1e-5)))
        first.append(W.clone())

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            note(state.global_step)

    tiny.train(model, tmp_path, 6, callbacks=[*callbacks_for(model), Watch()], weight_decay=0.0)
    U, S, Vh = torch.linalg.svd(start)
    k = 1 + int((S.square().cumsum(0) < 0.8 * S.square().sum()).sum())
    assert torch.allclose(first[0], U[:, :k] * S[:k] @ Vh[:k], atol=1e-5)
    assert ranks[0] == k < ranks[1] == ranks[2] == 32
    assert ranks[3] < 32 == ranks[4]


def test_trp_cuts_products_and_pulls_their_nuclear_norm():
    torch.manual_seed(0)
    A, B = (torch.nn.Parameter(torch.randn(*shape).double().float()) for shape in ((4, 7), (6, 4)))
    space = SimpleNamespace(A=A, B=B, gate=None, alive=lambda: torch.arange(4), name="x", trains=True)
    run = SimpleNamespace(step=0, spaces=lambda: [space], memory=SimpleNamespace(), record=lambda **_: None)
    run.gradient_scale = 1.0
    before = (B @ A).detach().double()
    U, S, Vh = torch.linalg.svd(before, full_matrices=False)
    k = 1 + int((S.square().cumsum(0) < 0.7 * S.square().sum()).sum())
    rule, kept = TrainedRankPruning(energy=0.7, nuclear_norm=0.5), A.detach().clone()
    rule.before_step(run)
    cut = U[:, :k] * S[:k] @ Vh[:k]
    assert torch.allclose((B @ A).detach().double(), cut, atol=1e-5)
    assert torch.equal(A, kept)
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    rule.gradients(run)
    pull = 0.5 * U[:, :k] @ Vh[:k]
    assert torch.linalg.matrix_rank(pull) == k < 4
    assert torch.allclose(B.grad.double(), pull @ A.detach().double().T, atol=1e-5)
    assert torch.allclose(A.grad.double(), B.detach().double().T @ pull, atol=1e-5)
    gate = torch.nn.Parameter(torch.tensor([1.0, 2, 0.5, 1]))
    A.grad, B.grad, gate.grad = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(gate)
    add_product_gradient(SimpleNamespace(A=A, B=B, gate=gate), U[:, :k].float(), Vh[:k].float(), 0.5)
    a, b, g = (p.detach().double().requires_grad_() for p in (A, B, gate))
    (pull * (b * g @ a)).sum().backward()
    for got, due in ((A.grad, a.grad), (B.grad, b.grad), (gate.grad, g.grad)):
        assert torch.allclose(got.double(), due, atol=1e-5)


def test_trp_passes_by_a_lora_that_is_still_zero(tmp_path):
    config = SparseLoraConfig(r=4, density=0, schedule=[TrainedRankPruning(every=2, energy=0.5)], **TARGETS)
    model = get_peft_model(tiny.llama(), config)
    tiny.train(model, tmp_path, 5, callbacks=callbacks_for(model))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def error_space(error):
    """A product of rank 2 whose distance from its base is `error`."""
    torch.manual_seed(1)
    A, B = torch.nn.Parameter(torch.randn(2, error.shape[1])), torch.nn.Parameter(torch.randn(error.shape[0], 2))
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    weight = (B @ A).detach() - error
    return SimpleNamespace(A=A, B=B, base_weight=lambda: weight)


@pytest.mark.parametrize(("largest", "loss"), [(0.004, 9e-6), (-0.0005, 2.5e-7)])
def test_pelas_error_term_is_a_square_that_touches_one_entry(largest, loss):
    error = torch.zeros(5, 6)
    error[3, 2], error[1, 4] = largest, largest / 2
    space = error_space(error)
    LargestError().add_gradient(space, 1.0)
    a, b = (p.detach().double().requires_grad_() for p in (space.A, space.B))
    E = b @ a - space.base_weight().double()
    term = (E.abs().max() - 1e-3) ** 2
    assert abs(term.item() - loss) < 1e-8
    term.backward()
    assert torch.allclose(space.A.grad.double(), a.grad, atol=1e-6)
    assert torch.allclose(space.B.grad.double(), b.grad, atol=1e-6)
    assert space.B.grad.any(1).tolist() == [row == 3 for row in range(5)]
    assert space.A.grad.any(0).tolist() == [column == 2 for column in range(6)]


def test_features_are_pulled_to_those_of_the_dense_base(tmp_path):
    rule = DistilFeatures(features=0.7, logits=0.3)
    config = FactoredConfig(keep_base=True, rank=FixedRank(4), schedule=[rule], **TARGETS)
    model = get_peft_model(tiny.llama(), config)
    student, teacher = get_peft_model(tiny.llama(), config), tiny.llama().eval()
    batch = {k: torch.as_tensor(v)[None] for k, v in tiny.TokenData(1)[0].items()}
    losses = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            losses.append(model.train()(**batch))

    tiny.train(model, tmp_path, 1, callbacks=[*callbacks_for(model), Watch()])
    with torch.no_grad():
        one = student.train()(**batch, output_hidden_states=True)
        two = teacher(**batch, output_hidden_states=True)
    features = torch.stack(
        [(a - b).double().square().mean() for a, b in zip(one.hidden_states[1:], two.hidden_states[1:], strict=True)]
    )
    expected = one.loss + 0.7 * features.mean() + 0.3 * (one.logits - two.logits).double().square().mean()
    assert torch.allclose(losses[0].loss.double(), expected.double(), rtol=1e-5)
    assert features.mean() > 1e-3
    assert model(**batch).loss < losses[0].loss  # outside of a step nothing is added
    with pytest.raises(ValueError, match="keep_base=True"):
        FactoredConfig(schedule=[rule])
