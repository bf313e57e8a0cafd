"""`GradientSplit`, a reading of RA-SpaRC (of which the abstract alone is known), against its definition in float64."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from training_toolbox import StopAt, all_state, differences
from transformers import Trainer

from hf_sparse_peft import (
    AgedAdamWSpec,
    GradientSplit,
    Grid,
    Regrow,
    SparseLoraConfig,
    calibrate,
    hub,
    initialize_support,
    make_optimizer,
    methods,
    trainer_options,
)
from hf_sparse_peft.sparsity import Global, Numbers
from hf_sparse_peft.sparsity.decomposition import low_rank_beside_entries
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.sparse_lora.starts import StartSite

TARGETS = ["q_proj", "v_proj", "down_proj"]


def site(name, matrix, rank, units):
    return StartSite(name, *matrix.shape, rank, units, 0, torch.device("cpu"), None, None)


def split(matrices, numbers, **options):
    """What the start decides for these gradients with `numbers` numbers in all."""
    start, shares = GradientSplit(**options), [numbers // len(matrices)] * len(matrices)
    shares[0] += numbers - sum(shares)
    sites = {name: site(name, m, 0, share) for (name, m), share in zip(matrices.items(), shares, strict=True)}
    return start.decide(sites, {name: start.summary(sites[name], {"mean": m.clone()}) for name, m in matrices.items()})


def counts(found):
    return {name: (len(one.A), 0 if one.units is None else one.units.numel()) for name, one in found.items()}


def error(matrix, one, c=1.0):
    """Squared distance of the matrix from what its halves start at, over -c."""
    update = one.B.double() @ one.A.double()
    flat = update.flatten()
    if one.units is not None:
        flat[one.units.long()] += one.values.double()
    return float((matrix.double() + flat.view_as(update) / c).square().sum())


def best_of_fixed_sizes(matrix, r, k, rounds=40):
    """Entries and components in turns in float64, at r and k, from both starts."""
    M, lowest = matrix.double(), float("inf")
    for S in (torch.zeros_like(M), keep(M, k)):
        for _ in range(rounds):
            U, s, Vh = torch.linalg.svd(M - S)
            L = U[:, :r] @ torch.diag(s[:r]) @ Vh[:r]
            S = keep(M - L, k)
            lowest = min(lowest, float((M - L - S).square().sum()))
    return lowest


def keep(M, k):
    S = torch.zeros_like(M).flatten()
    at = M.flatten().abs().topk(k).indices
    S[at] = M.flatten()[at]
    return S.view_as(M)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SPIKED = torch.ones(4, 4)
SPIKED[0, 3] += 6


def test_a_matrix_of_rank_1_is_one_component_and_a_diagonal_is_entries():
    outer = torch.outer(gaussian(8, seed=1), gaussian(8, seed=2))
    assert counts(split({"x": outer}, 16)) == {"x": (1, 0)}
    assert counts(split({"x": outer}, 19)) == {"x": (1, 3)}  # the rest of the budget goes to entries
    diagonal = torch.diag(gaussian(8, seed=3).abs() + 1)
    found = split({"x": diagonal}, 16, step_size=1.0)
    assert counts(found) == {"x": (0, 16)}
    assert set(range(0, 64, 9)) <= set(found["x"].units.tolist())
    assert error(diagonal, found["x"]) == 0


def test_one_large_entry_in_a_matrix_of_rank_1_is_found_by_the_entries_first_alone():
    found = split({"x": SPIKED}, 9, step_size=1.0)
    assert counts(found) == {"x": (1, 1)}
    assert found["x"].units.tolist() == [3]
    assert error(SPIKED, found["x"]) <= 0.63
    # What an SVD first comes to, by the definition: 5.07 at once and 5.03 in the end; entries alone 7, rank alone 5.54.
    U, s, Vh = torch.linalg.svd(SPIKED.double())
    left = SPIKED.double() - s[0] * torch.outer(U[:, 0], Vh[0])
    assert float((left - keep(left, 1)).square().sum()) == pytest.approx(5.07, abs=0.005)
    assert float((SPIKED - keep(SPIKED, 9)).square().sum()) == pytest.approx(7.0)
    assert float(left.square().sum()) == pytest.approx(5.54, abs=0.005)


def test_the_split_is_close_to_the_best_of_all_sizes_of_its_budget():
    m, n, numbers, ratios = 7, 6, 30, []
    for seed in range(10):
        low_rank = gaussian(m, 2, seed=seed) @ gaussian(2, n, seed=seed + 10)
        spikes = keep(3 * gaussian(m, n, seed=seed + 20), 4).float()
        matrix = low_rank + spikes + 0.1 * gaussian(m, n, seed=seed + 30)
        found = split({"x": matrix}, numbers, step_size=1.0)
        r, k = counts(found)["x"]
        assert r * (m + n) + k == numbers
        all_sizes = [best_of_fixed_sizes(matrix, r, numbers - r * (m + n)) for r in range(numbers // (m + n) + 1)]
        ratios.append((error(matrix, found["x"]) / min(all_sizes), all_sizes[1] / min(all_sizes)))
    ours, half_and_half = (torch.tensor(one).sort().values for one in zip(*ratios, strict=True))
    assert ours[5] < 1.1
    assert ours[-1] < 1.65
    assert half_and_half[5] > 3
    assert half_and_half[-1] > 5


def test_every_number_of_the_budget_is_used_and_the_entries_are_the_largest_residuals():
    matrices = {name: gaussian(*shape, seed=at) for at, (name, shape) in enumerate({"a": (9, 7), "b": (5, 12)}.items())}
    for numbers in (1, 5, 17, 40, 73):
        found = split(matrices, numbers, step_size=1.0)
        assert sum(r * sum(matrices[name].shape) + k for name, (r, k) in counts(found).items()) == numbers
        left = {name: matrices[name].double() + one.B.double() @ one.A.double() for name, one in found.items()}
        chosen = {name: [] if one.units is None else one.units.tolist() for name, one in found.items()}
        inside = [float(left[name].flatten()[u].abs()) for name in found for u in chosen[name]]
        outside = [
            float(v.abs()) for name in found for u, v in enumerate(left[name].flatten()) if u not in chosen[name]
        ]
        assert not inside or min(inside) >= max(outside) - 1e-5
        assert all(units == sorted(set(units)) for units in chosen.values())
        for one in found.values():
            torch.testing.assert_close(one.A @ one.A.t(), torch.eye(len(one.A)), rtol=1e-5, atol=1e-5)


def test_a_gradient_ten_times_as_large_draws_numbers_to_its_matrix():
    matrices = {"a": gaussian(8, 8, seed=1), "b": gaussian(8, 8, seed=2)}
    cost = lambda found, name: counts(found)[name][0] * 16 + counts(found)[name][1]  # noqa: E731
    alike, scaled = split(matrices, 40), split({**matrices, "a": 10 * matrices["a"]}, 40)
    assert cost(scaled, "a") > cost(alike, "a")
    assert cost(scaled, "a") + cost(scaled, "b") == 40


def test_permuted_rows_have_a_permuted_support_and_the_same_rank():
    matrix, order = (
        gaussian(8, 6, seed=5) + 2 * torch.outer(gaussian(8, seed=6), gaussian(6, seed=7)),
        torch.randperm(8),
    )
    plain, permuted = split({"x": matrix}, 25)["x"], split({"x": matrix[order]}, 25)["x"]
    assert len(plain.A) == len(permuted.A) > 0
    rows, cols = plain.units.long() // 6, plain.units.long() % 6
    inverse = order.argsort()
    assert sorted((inverse[rows] * 6 + cols).tolist()) == permuted.units.tolist()


@pytest.mark.parametrize(("rank", "entries"), [(1, 0), (1, 3), (2, 4), (3, 5), (2, 54)])
def test_the_low_rank_part_beside_entries_is_near_the_best_of_both_starts(rank, entries):
    for seed in range(3):
        matrix = gaussian(6, 9, seed=seed) + keep(4 * gaussian(6, 9, seed=seed + 5), 3).float()
        B, A = low_rank_beside_entries(matrix, rank, entries)
        assert (B.shape, A.shape) == ((6, rank), (rank, 9))
        torch.testing.assert_close(A @ A.t(), torch.eye(rank), rtol=1e-5, atol=1e-5)
        left = (matrix - B @ A).double()
        found, best = float((left - keep(left, entries)).square().sum()), best_of_fixed_sizes(matrix, rank, entries)
        starts = []
        for first in (torch.zeros_like(matrix), keep(matrix, entries)):
            U, s, Vh = torch.linalg.svd((matrix - first).double())
            rest = matrix.double() - U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank]
            starts.append(float((rest - keep(rest, entries)).square().sum()))
        assert found <= 1.0001 * min(starts)
        assert found <= 1.6 * best + 1e-9


# On models


def adapted(kind="fp32", **options):
    options = {"r": 2, "density": 0.05, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    options = {"start": GradientSplit(steps=2), "optimizer": AgedAdamWSpec(), **options}
    torch.manual_seed(1)
    return get_peft_model(tiny.base(kind, layers=1), SparseLoraConfig(**options))


def batches(count=2):
    data = tiny.TokenData()
    return [
        {key: torch.stack([data[i][key] for i in range(at, at + 4)]) for key in ("input_ids", "labels")}
        for at in range(0, 4 * count, 4)
    ]


def sizes_of(model):
    return {
        layer.module_name: [layer.units("default").numel(), layer.alive_components("default")]
        for layer in adapter_layers(model)
    }


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


@tiny.crossed(kind=["fp32", "bf16", "nf4", "conv1d"], c=[0.0, 0.1])
def test_both_halves_of_a_model_start_from_its_gradients_within_the_budget(kind, c, tmp_path):
    targets = {"target_modules": ["c_attn", "c_proj"]} if kind == "conv1d" else {}
    model = adapted(kind, lora_alpha=3, scale_support=2.0, start=GradientSplit(steps=2, step_size=c), **targets)
    dense, data = hub.merge_to_dense(copy.deepcopy(model).eval()).double(), batches()
    names = [layer.module_name for layer in adapter_layers(model)]
    weights = [dense.get_submodule(name).weight.requires_grad_() for name in names]
    gradients = {}
    for batch in data:
        for name, g in zip(names, torch.autograd.grad(dense(**batch).loss, weights), strict=True):
            gradients[name] = gradients.get(name, 0) + (g.t() if kind == "conv1d" else g) / 2
    before = {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}
    budget = sum(2 * sum(g.shape) + int(0.05 * g.numel() + 1e-9) for g in gradients.values())
    calibrate(model, data, show_progress=False)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    sizes = sizes_of(model)
    assert sum(k + r * sum(gradients[name].shape) for name, (k, r) in sizes.items()) == budget
    assert len({tuple(one) for one in sizes.values()}) > 1
    left = []
    for layer in adapter_layers(model):
        G, delta = gradients[layer.module_name], layer.get_delta_weight("default").double()
        delta = delta.t() if kind == "conv1d" else delta
        left.append(float((G + delta / c).square().sum()) if c else float(delta.abs().max()))
    total = sum(float(g.square().sum()) for g in gradients.values())
    assert sum(left) < 0.75 * total if c else max(left) == 0
    ids = data[0]["input_ids"]
    logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.base(kind, layers=1), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, logits)
    assert sizes_of(loaded) == sizes
    written = json.loads((tmp_path / "adapter_config.json").read_text())["sizes"]
    assert written == {name: [k, k, r] for name, (k, r) in sizes.items()}


def run(folder, stop=None, resume=None, made_before=False, **options):
    model = adapted(**options)
    after = [StopAt(stop)] if stop else []
    args = tiny.arguments(folder, 6, lr_scheduler_type="constant")
    options = trainer_options(model, args)
    options["callbacks"] += after
    if made_before:  # before a checkpoint is loaded, whose modules may lack what these have
        del options["optimizer_cls_and_kwargs"]
        options["optimizers"] = (make_optimizer(model, args), None)
    trainer = Trainer(model=model, train_dataset=tiny.TokenData(), **options)
    trainer.train(resume_from_checkpoint=resume)
    return model, all_state(model, trainer.optimizer)


@pytest.mark.parametrize(
    ("rules", "made_before"),
    [
        pytest.param([], False, marks=pytest.mark.slow),
        ([], True),
        ([Regrow(every=2, grow="gradient", fraction=0.3)], False),
        pytest.param([Regrow(every=2, grow="gradient", fraction=0.3)], True, marks=pytest.mark.slow),
    ],
    ids=["still-late", "still-early", "moving-late", "moving-early"],
)
def test_a_trainer_splits_the_budget_and_a_resumed_run_goes_on_to_the_bit(rules, made_before, tmp_path):
    # So little that some modules, or all, are left without one half: the optimizer forgets what is removed.
    options = {"schedule": rules, "r": 2 if made_before else 4, "density": 0.02, "made_before": made_before}
    model, whole = run(tmp_path / "whole", **options)
    assert any(0 in one for one in sizes_of(model).values())
    run(tmp_path / "stopped", stop=3, **options)
    resumed, state = run(tmp_path / "stopped", resume=str(tmp_path / "stopped" / "checkpoint-3"), **options)
    assert not differences(whole, state)
    assert resumed.peft_config["default"].to_dict() == model.peft_config["default"].to_dict()


def test_a_run_whose_modules_all_lose_one_half_says_that_it_cannot_go_on(tmp_path):
    with pytest.warns(UserWarning, match=r"No module has any left.*before creating the Trainer"):
        model, _ = run(tmp_path, r=2, density=0.02)
    assert not any(r for _, r in sizes_of(model).values())


def test_an_interrupted_start_leaves_supports_and_factors_as_they_were(monkeypatch):
    model = adapted(schedule=[Regrow(every=2, grow="gradient")])
    before, parameters = state_of(model), dict(model.named_parameters())
    last = adapter_layers(model)[-1]
    monkeypatch.setattr(last, "take_start", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, batches(), show_progress=False)
    assert not differences(before, state_of(model))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    monkeypatch.undo()
    calibrate(model, batches(), show_progress=False)
    fresh = adapted(schedule=[Regrow(every=2, grow="gradient")])
    calibrate(fresh, batches(), show_progress=False)
    assert not differences(state_of(fresh), state_of(model))


def test_joint_budget_splits_at_the_start_what_fraction_leaves_it():
    method = methods.get("joint-budget", at_start=True, r=4, density=0.1, fraction=0.5, target_modules=TARGETS)
    model = get_peft_model(tiny.base(layers=1), method.config)
    assert not method.config.schedule
    layers = {layer.module_name: layer for layer in adapter_layers(model)}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    budget = sum(4 * (m + n) + int(0.1 * m * n + 1e-9) for m, n in shapes.values())
    calibrate(model, batches(), show_progress=False)
    assert sum(k + r * sum(shapes[name]) for name, (k, r) in sizes_of(model).items()) == round(0.5 * budget)
    with pytest.raises(ValueError, match=r"at_start=True and once=True"):
        methods.get("joint-budget", at_start=True, once=True)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"density": 0.0}, "density=0.0 leaves the sparse one out"),
        ({"criterion": "fisher"}, "criterion="),
        ({"criterion": "magnitude"}, "criterion="),
        ({"pattern": Grid(0.5, 0.5)}, "pattern="),
        ({"granularity": "row"}, "granularity=row"),
        ({"support_init": "uniform"}, "support_init=uniform"),
        ({"scale_support": True}, "scale_support=True"),
        ({"granularity": "subnet"}, "subnets and structures have sizes of their own"),
    ],
)
def test_what_chooses_otherwise_is_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        adapted(**options)


def test_a_budget_that_ranks_by_itself_is_refused_and_one_of_numbers_is_taken():
    options = {"r": 2, "target_modules": TARGETS, "start": GradientSplit(steps=2)}
    with pytest.raises(ValueError, match="budget="):
        SparseLoraConfig(**options, budget=Global(0.05))
    model = get_peft_model(tiny.base(layers=1), SparseLoraConfig(**options, budget=Numbers(300)))
    layers = adapter_layers(model)
    wanted = sum(2 * (layer.out_features + layer.in_features) + layer.sizes["default"].units for layer in layers)
    calibrate(model, batches(), show_progress=False)
    shapes = {layer.module_name: layer.out_features + layer.in_features for layer in layers}
    assert sum(k + r * shapes[name] for name, (k, r) in sizes_of(model).items()) == wanted


def test_a_support_by_itself_is_not_chosen_for_an_adapter_whose_halves_start_together():
    model = adapted()
    with pytest.raises(ValueError, match=r"sizes and starts both halves together.*calibrate"):
        initialize_support(model, batches(), "fisher", show_progress=False)
    with pytest.raises(ValueError, match="starts from data"):
        model.train()(**batches()[0])
