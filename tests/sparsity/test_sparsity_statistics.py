"""Criteria that are estimated from data, against their formulas in float64, and the ranking over layers."""

import pytest
import torch
from ties import best, priority

from hf_sparse_peft.sparsity import (
    Score,
    UnitGrid,
    make_score,
    select_units,
    stream_seed,
    top_units,
)
from hf_sparse_peft.sparsity.ranking import GlobalRanking, raised
from hf_sparse_peft.utils.parts import part_types

ROWS, COLS, SIZE = 8, 12, 4
BY_DATA = sorted(name for name, cls in part_types(Score).items() if cls.needs_data and name != "given")


def tensors(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, COLS, generator=generator) for _ in range(count)]


def ema(items, beta):
    mean = torch.zeros(ROWS, COLS, dtype=torch.float64)
    for item in items:
        mean = beta * mean + (1 - beta) * item
    return mean


def sensitivity(w, gs, uncertain=True, beta1=0.7, beta2=0.6):
    mean, spread = torch.zeros_like(w), torch.zeros_like(w)
    for g in gs:
        mean = beta1 * mean + (1 - beta1) * (w * g).abs()
        spread = beta2 * spread + (1 - beta2) * ((w * g).abs() - mean).abs()
    return mean * spread if uncertain else mean


def sm3(gs, product=True):
    R, C = torch.zeros(ROWS, dtype=torch.float64), torch.zeros(COLS, dtype=torch.float64)
    for g in gs:
        nu = torch.tensor([[min(R[i], C[j]) + g[i, j] ** 2 for j in range(COLS)] for i in range(ROWS)])
        R = torch.stack([max(R[i], nu[i].max()) for i in range(ROWS)])
        C = torch.stack([max(C[j], nu[:, j].max()) for j in range(COLS)])
    return torch.tensor([[R[i] * C[j] if product else min(R[i], C[j]) for j in range(COLS)] for i in range(ROWS)])


FORMULAS = {
    "gradient": ("gradient", {}, lambda w, gs: sum(gs).abs()),
    "fisher": ("fisher", {}, lambda w, gs: sum(g**2 for g in gs)),
    "fisher-absolute": ("fisher", {"mode": "absolute"}, lambda w, gs: sum(g.abs() for g in gs)),
    "movement": ("movement", {}, lambda w, gs: -sum(w * g for g in gs)),
    "snip": ("snip", {}, lambda w, gs: (w * sum(gs)).abs()),
    "momentum": ("momentum", {"beta": 0.8}, lambda w, gs: ema(gs, 0.8).abs()),
    "sensitivity": ("sensitivity", {"beta1": 0.7, "beta2": 0.6}, sensitivity),
    "sensitivity-alone": (
        "sensitivity",
        {"beta1": 0.7, "uncertainty": False},
        lambda w, gs: sensitivity(w, gs, uncertain=False),
    ),
    "sm3": ("sm3", {}, lambda w, gs: sm3(gs)),
    "sm3-min": ("sm3", {"combine": "min"}, lambda w, gs: sm3(gs, product=False)),
    "delta_magnitude": ("delta_magnitude", {}, lambda w, gs: sum(gs).abs()),
}


@pytest.mark.parametrize("granularity", ["entry", "block", "row", "column"])
@pytest.mark.parametrize("case", FORMULAS)
def test_scores_are_the_formula_summed_over_each_unit(case, granularity):
    name, options, formula = FORMULAS[case]
    criterion, weight, gradients = make_score(name, **options), *tensors(1, seed=5), tensors(5)
    state = criterion.start(ROWS, COLS)
    for gradient in gradients:
        criterion.update(state, gradient.clone(), weight)
    assert sum(t.numel() for t in state.values()) == criterion.state_numel(ROWS, COLS)
    expected = formula(weight.double(), [g.double() for g in gradients])
    grid = torch.arange(ROWS * COLS).view(ROWS, COLS)
    cut = {
        "entry": grid.reshape(-1, 1),
        "row": grid,
        "column": grid.t(),
        "block": grid.view(ROWS // SIZE, SIZE, COLS // SIZE, SIZE).transpose(1, 2).reshape(-1, SIZE * SIZE),
    }[granularity]
    chunks = criterion.scores(state, UnitGrid(ROWS, COLS, granularity, SIZE), weight)
    scores = torch.cat(list(chunks()))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected.reshape(-1)[cut].sum(1), rtol=1e-5, atol=1e-5)


def test_sm3_accumulators_never_decrease():
    criterion, gradients = make_score("sm3"), tensors(6)
    state = criterion.start(ROWS, COLS)
    for gradient in gradients:
        before = {name: tensor.clone() for name, tensor in state.items()}
        criterion.update(state, gradient * torch.rand(()), None)
        assert all((state[name] >= before[name]).all() for name in state)


def test_product_and_minimum_of_sm3_rank_differently():
    product, minimum = (sm3([g.double() for g in tensors(3)], product=p).reshape(-1) for p in (True, False))
    assert product.topk(20).indices.sort().values.tolist() != minimum.topk(20).indices.sort().values.tolist()


@pytest.mark.parametrize("name", BY_DATA)
def test_ranking_by_data_without_data_says_where_it_comes_from(name):
    with pytest.raises(ValueError, match=rf"criterion='{name}' ranks units by data and got none.*initialize_support"):
        select_units(name, torch.ones(4, 4), UnitGrid(4, 4), 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fisher", {"mode": "cube"}, "Fisher.mode='cube' is out of range"),
        ("fisher", {"examples": 0}, "Fisher.examples=0 is out of range"),
        ("sensitivity", {"beta2": 1.0}, "Sensitivity.beta2=1.0 is out of range"),
        ("momentum", {"beta": -0.1}, "Momentum.beta=-0.1 is out of range"),
        ("sm3", {"combine": "sum"}, "SM3.combine='sum' is out of range"),
        ("delta_magnitude", {"warmup_steps": 0}, "warmup_steps=0"),
        ("delta_magnitude", {"warmup_lr": 0.0}, "warmup_lr=0.0"),
        ("delta_magnitude", {"l1": -1.0}, "l1=-1.0"),
        ("gradient", {"beta": 0.5}, "does not take beta"),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_score(name, **options)


# One ranking over layers


def brute_force(scores: dict[str, torch.Tensor], total: int) -> dict[str, list[int]]:
    """Every layer's best unit, then the best of all others, ties by priority."""
    pool = []
    for name, values in scores.items():
        seed = stream_seed(0, name)
        (first,) = best(values.tolist(), 1, seed=seed)
        for unit, score in enumerate(values.tolist()):
            pool.append((0 if unit == first else 1, -score if unit != first else 0, -priority(seed, unit), unit, name))
    chosen = {name: [] for name in scores}
    for *_, unit, name in sorted(pool)[:total]:
        chosen[name].append(unit)
    return {name: sorted(units) for name, units in chosen.items()}


@pytest.mark.parametrize("groups", [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1]])
@pytest.mark.parametrize("total", [5, 6, 40, 137, 250])
@pytest.mark.parametrize("ties", [False, True])
def test_ranking_in_groups_is_the_ranking_of_all_units(groups, total, ties):
    generator = torch.Generator().manual_seed(total)
    sizes = [50, 7, 100, 33, 60]
    scores = {f"layer{i}": torch.randn(size, generator=generator) + i for i, size in enumerate(sizes)}
    if ties:
        scores = {name: values.round() for name, values in scores.items()}
    ranking, names = GlobalRanking(total), iter(scores)
    for count in groups:
        part = [next(names) for _ in range(count)]
        ranking.add({name: (lambda values: lambda: iter(values.split(16)))(scores[name]) for name in part})
    found = {name: units.tolist() for name, units in ranking.units().items()}
    assert found == brute_force(scores, total)
    assert sum(map(len, found.values())) == total


def test_more_layers_than_units_are_refused():
    with pytest.raises(ValueError, match="each keeps at least one"):
        GlobalRanking(1).add({"a": torch.rand(4), "b": torch.rand(4)})


def test_raised_units_are_chosen_first():
    scores = torch.arange(10.0)
    chunks = raised([scores[:4], scores[4:]], torch.tensor([0, 5], dtype=torch.int32))
    assert top_units(chunks, 3).tolist() == [0, 5, 9]
