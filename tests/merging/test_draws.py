"""Laws of the random rows: means, variances, counts; and DAREx-q's searches against closed forms."""

import math

import pytest
import torch
from worked_example import deltas, merged

from hf_sparse_peft.merging import Deltas, DropByRank, analytic_q, find_q, get_merge

N = 2000


@pytest.fixture(scope="module")
def row():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return deltas(tuple(values.tolist())), values


def draws(name, one, **options):
    return torch.stack([merged(get_merge(name, seed=seed, **options), one) for seed in range(N)])


def test_dare_is_unbiased_with_the_variance_of_a_binomial_and_exact_survivors(row):
    one, values = row
    found = draws("dare", one, rate=0.75)
    kept = found != 0
    torch.testing.assert_close(found[kept], (values / 0.25).expand_as(found)[kept])
    deviation = values.abs() * math.sqrt(3 / N)
    assert ((found.mean(0) - values).abs() < 4 * deviation).all()
    torch.testing.assert_close(found.var(0), values**2 * 3, rtol=0.15, atol=0)
    counts = kept.sum(1).double()
    assert counts.var() == pytest.approx(40 * 0.25 * 0.75, rel=0.15)  # a fixed number would have none
    assert torch.equal(merged(get_merge("dare", rate=0.0), one), values)


def test_dare_k_is_unbiased_for_any_k_and_the_identity_at_1(row):
    one, values = row
    for k in (-0.5, 0.5):
        found = draws("dare-k", one, rate=0.5, k=k)
        deviation = (1 - k) * values.abs() / math.sqrt(N)
        assert ((found.mean(0) - values).abs() < 4 * deviation + 1e-12).all()
    torch.testing.assert_close(merged(get_merge("dare-k", k=1.0), one), values)


def test_magprune_is_unbiased_for_each_entry_and_mergekits_norm_is_not(row):
    one, values = row
    found = draws("magprune", one, density=0.5, epsilon=0.3)
    rank = values.abs().argsort().argsort().double()
    keep = 0.2 + 0.6 * rank / 39
    deviation = values.abs() * ((1 - keep) / keep / N).sqrt()
    assert ((found.mean(0) - values).abs() < 4 * deviation).all()
    torch.testing.assert_close((found != 0).double().mean(0), keep, atol=0.05, rtol=0)
    by_norm = draws("della", one, density=0.5, epsilon=0.3, rescale="by_norm")
    assert ((by_norm.mean(0) - values).abs() > 4 * deviation).any()


def test_magprune_with_no_window_is_dare(row):
    one, _ = row
    found = merged(get_merge("magprune", density=0.25, epsilon=0.0, seed=3), one)
    assert torch.equal(found, merged(get_merge("dare", rate=0.75, seed=3), one))


def test_equal_magnitudes_are_ranked_by_a_draw_and_not_by_their_place():
    flat = Deltas("w", (1, 64), torch.arange(64), torch.ones(1, 64), torch.ones(1, 64, dtype=torch.bool))
    first = [float(DropByRank(0.5, 0.4)(flat, None, seed).probability[0, 0]) for seed in range(200)]
    assert 0.4 < sum(first) / 200 < 0.6
    method = get_merge("ties", density=0.25)
    kept = sum((merged(method.__class__(**{**vars(method), "seed": seed}), flat) != 0).double() for seed in range(200))
    assert float(kept.min()) > 20  # 50 each, were the draw even
    assert float(kept.max()) < 80


def test_a_window_beyond_the_density_and_a_rescaling_without_a_draw_are_refused():
    with pytest.raises(ValueError, match="epsilon"):
        DropByRank(0.2, 0.2)
    with pytest.raises(ValueError, match="needs no draw"):
        get_merge("ties", rescale="by_probability")


def test_find_q_is_the_least_squares_q_of_fixed_masks_within_a_step():
    generator = torch.Generator().manual_seed(1)
    W, x = torch.randn(8, 100, generator=generator), torch.randn(100, 32, generator=generator)
    mask = torch.rand(8, 100, generator=generator) < 0.3
    y, y_m = W @ x, (W * mask) @ x
    closed = float((y_m * y_m).sum() / (y * y_m).sum())
    asked = []

    def measure(q):
        asked.append(q)
        return float((y - y_m / q).square().sum())

    found = find_q(measure, 0.7, patience=30, high=1.0)
    assert found == pytest.approx(min(max(closed, 0.3), 1.0), abs=0.005)
    assert asked[0] == pytest.approx(0.3)
    assert find_q(lambda q: q, 0.7) == pytest.approx(0.3)  # 1 - p is DARE
    with pytest.raises(ValueError, match="is nan"):
        find_q(lambda q: float("nan"), 0.7)


def analytic_reference(delta, x, p, h, gamma):
    """The scan of one output after another, in Python floats."""
    phi = (1 - 2 * p) / math.log((1 - p) / p)
    chosen = []
    for row in delta.tolist():
        c = [w * one for w, one in zip(row, x.tolist(), strict=True)]
        s, s2, least = sum(c), sum(one * one for one in c), math.inf
        for q in (t / 1000 for t in range(round((1 - p) * 1000), 999)):
            bound = abs(h * (1 - (1 - p) / q) * s + h * h * phi * s2 / (4 * q * q) + math.log(2 / (1 - gamma)))
            if bound >= least:
                break
            least, best = bound, q
        chosen.append(best)
    return sum(chosen) / len(chosen)


def test_analytic_q_is_the_mean_over_outputs_of_the_bounds_minimum():
    generator = torch.Generator().manual_seed(2)
    delta, x = 0.2 + 0.2 * torch.randn(16, 100, generator=generator), 1 + 0.1 * torch.randn(4, 100, generator=generator)
    found = analytic_q(delta, x, 0.9, passed=1.0)
    expected = analytic_reference(delta.double(), x.double().mean(0), 0.9, 0.45, 0.95)
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0.12 < found < 0.9
    half = analytic_q(delta, x, 0.5)
    assert 0.5 <= half <= 0.998  # the authors' code divides 0 by 0
    with pytest.raises(ValueError, match=r"\[out, in\]"):
        analytic_q(delta, x.t(), 0.9)
