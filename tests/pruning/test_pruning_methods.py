"""One-shot pruning of one weight against references written from the papers' equations, in float64."""

import itertools
import math

import pytest
import torch

from hf_sparse_peft.pruning import (
    NM,
    DSnoT,
    InputStatistics,
    MagnitudePruning,
    RandomPruning,
    SparseGPT,
    Unstructured,
    Wanda,
)

KINDS = ("squares", "means", "hessian")


def statistics(x, mask=None):
    found = InputStatistics(x.shape[-1], KINDS, "cpu")
    found.add(x, mask)
    return found


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(gone):
    return [[j for j, g in enumerate(row) if not g] for row in gone.tolist()]


# Wanda ---------------------------------------------------------------------------------------------------------------

W = torch.tensor([[1.0, -2.0, 0.5, 3.0], [20.0, 3.0, -10.0, 10.0]])
X = torch.tensor([[[3.0, 1.0, 0.0, 1.0], [0.0, 1.0, 4.0, 0.0]]])


def test_wanda_keeps_what_the_worked_example_keeps():
    """Row magnitude would keep {1, 3} in row 0, and one threshold for the matrix would empty it."""
    assert kept(Wanda().prune(W, statistics(X), 0.5, Unstructured())[1]) == [[0, 3], [0, 2]]


def test_wanda_of_alike_inputs_is_the_magnitude_of_each_row():
    x = torch.eye(6)[None] * 3
    weight = drawn(5, 6)
    by_rows = MagnitudePruning().prune(weight, None, 0.5, Unstructured("row"))[1]
    assert torch.equal(Wanda().prune(weight, statistics(x), 0.5, Unstructured())[1], by_rows)


def test_wanda_does_not_see_a_scale_that_moves_from_weights_to_inputs():
    weight, x, scale = drawn(7, 12), drawn(3, 9, 12, seed=1), torch.tensor([2.0] * 6 + [0.25] * 6)
    assert torch.equal(
        Wanda().prune(weight, statistics(x), 0.5, Unstructured())[1],
        Wanda().prune(weight / scale, statistics(x * scale), 0.5, Unstructured())[1],
    )


def test_statistics_of_two_halves_are_those_of_the_whole():
    x = drawn(6, 5, 8)
    whole, halves = statistics(x), statistics(x[:3])
    halves.add(x[3:], None)
    for name in ("mean_square", "mean", "variance", "hessian"):
        assert torch.allclose(getattr(whole, name)(), getattr(halves, name)(), atol=1e-6), name


def test_statistics_are_the_papers_sums_and_leave_hidden_tokens_out():
    x, mask = drawn(3, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    flat = InputStatistics(4, KINDS, "cpu")
    flat.add(x.view(15, 4), mask)
    counted = [s[m.bool()].double() for s, m in zip(x, mask, strict=True)]
    tokens = torch.cat(counted)
    spread = sum(len(s) * s.var(0, correction=0) for s in counted) / len(tokens)
    for found in (statistics(x, mask), flat):
        assert torch.allclose(found.mean_square().double(), tokens.square().sum(0) / 3)
        assert torch.allclose(found.mean().double(), tokens.sum(0) / 3)
        assert torch.allclose(found.variance().double(), spread)
        assert torch.allclose(found.hessian().double(), 2 / 3 * tokens.T @ tokens)


def test_the_variance_leaves_out_how_sequences_differ():
    x = torch.stack([drawn(50, 3), drawn(50, 3, seed=1) + 100])
    assert statistics(x).variance().max() < 2 < x.view(-1, 3).var(0).min()


# counts and patterns -------------------------------------------------------------------------------------------------

METHODS = [MagnitudePruning(), RandomPruning(), Wanda(), SparseGPT(block=8), DSnoT(), DSnoT(MagnitudePruning())]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.part_type)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8)], ids=str)
def test_each_group_of_neighbours_keeps_its_count(method, pattern):
    weight, x = drawn(6, 32), drawn(4, 40, 32, seed=1) + 0.3
    pruned, gone = method.prune(weight, statistics(x), pattern.fixed_sparsity(), pattern, "layer")
    groups = (pruned != 0).view(-1, pattern.of).sum(1)
    assert (groups == pattern.keep).all()
    assert torch.equal(pruned == 0, gone)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.part_type)
def test_unstructured_pruning_removes_exactly_what_was_asked(method, sparsity):
    weight, x = drawn(6, 32), drawn(4, 40, 32, seed=1) + 0.3
    gone = method.prune(weight, statistics(x), sparsity, Unstructured(), "layer")[1]
    if isinstance(method, SparseGPT):
        assert int(gone.sum()) == 4 * int(6 * 8 * sparsity)
    elif isinstance(method, (Wanda, DSnoT)) and getattr(method, "initial", method) == Wanda():
        assert gone.sum(1).tolist() == [int(32 * sparsity)] * 6
    else:
        assert int(gone.sum()) == int(6 * 32 * sparsity)


def test_equal_scores_go_from_the_front_and_exactly():
    gone = MagnitudePruning().prune(torch.ones(2, 4), None, 0.5, Unstructured())[1]
    assert gone.tolist() == [[True] * 4, [False] * 4]


def test_random_pruning_follows_seed_and_name():
    def gone(seed, name):
        return RandomPruning().prune(drawn(8, 8), None, 0.5, Unstructured(), name, seed)[1]

    assert torch.equal(gone(0, "a"), gone(0, "a"))
    assert not torch.equal(gone(0, "a"), gone(1, "a"))
    assert not torch.equal(gone(0, "a"), gone(0, "b"))


# SparseGPT -----------------------------------------------------------------------------------------------------------


class Hessian:
    """Statistics that are a given H."""

    def __init__(self, hessian):
        self._hessian = torch.as_tensor(hessian)

    def hessian(self):
        return self._hessian.clone()


def sparsegpt(weight, hessian, keep_of=None, sparsity=0.5, damping=0.01, block=128):
    """The paper's loop, element by element."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    rows, cols = weight.shape
    for j in range(cols):
        if hessian[j, j] == 0:
            hessian[j, j] = 1
            weight[:, j] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(cols, dtype=torch.double)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    gone = torch.zeros(rows, cols, dtype=torch.bool)
    for begin in range(0, cols, block):
        columns = range(begin, min(begin + block, cols))
        if keep_of is None:
            scored = sorted((float(weight[i, j] ** 2 / upper[j, j] ** 2), i, j) for i in range(rows) for j in columns)
            for _, i, j in scored[: int(len(scored) * sparsity)]:
                gone[i, j] = True
        for j in columns:
            if keep_of is not None and (j - begin) % keep_of[1] == 0:
                for i in range(rows):
                    scored = sorted((float(weight[i, k] ** 2 / upper[k, k] ** 2), k) for k in range(j, j + keep_of[1]))
                    for _, k in scored[: keep_of[1] - keep_of[0]]:
                        gone[i, k] = True
            for i in range(rows):
                if gone[i, j]:
                    error = weight[i, j] / upper[j, j]
                    weight[i, j:] -= error * upper[j, j:]
    return weight.masked_fill(gone, 0), gone


def test_sparsegpt_makes_up_for_what_goes_as_in_the_worked_example():
    """A mask without the update leaves 0.9; damping 0.01 gives 1.1481."""
    weight, hessian = torch.tensor([[1.0, 0.9]]), [[1.0, 0.5], [0.5, 2.0]]
    pruned, _ = SparseGPT(damping=0.0).prune(weight, Hessian(hessian), 0.5, Unstructured())
    assert torch.allclose(pruned, torch.tensor([[0.0, 1.15]]), atol=1e-6)
    damped, _ = SparseGPT().prune(weight, Hessian(hessian), 0.5, Unstructured())
    assert abs(float(damped[0, 1]) - 1.1481) < 1e-3


@pytest.mark.parametrize("keep_of", [None, (2, 4)])
@pytest.mark.parametrize("block", [8, 16])
def test_sparsegpt_is_the_papers_loop(keep_of, block):
    x = drawn(4, 30, 32, seed=2) @ drawn(32, 32, seed=3)
    x[..., 5] = 0  # an input that is always 0 loses its weights
    weight, found = drawn(6, 32), statistics(x)
    pattern = Unstructured() if keep_of is None else NM(*keep_of)
    pruned, gone = SparseGPT(block=block).prune(weight, found, 0.5, pattern)
    expected, expected_gone = sparsegpt(weight, found.hessian(), keep_of, block=block)
    assert torch.equal(gone, expected_gone)
    assert torch.allclose(pruned.double(), expected, atol=1e-4)


def test_sparsegpt_of_unrelated_inputs_is_the_magnitude_in_each_block_of_columns():
    weight = drawn(6, 16)
    pruned, gone = SparseGPT(block=8).prune(weight, Hessian(torch.eye(16)), 0.5, Unstructured())
    for begin in (0, 8):
        part = MagnitudePruning().prune(weight[:, begin : begin + 8], None, 0.5, Unstructured())[1]
        assert torch.equal(gone[:, begin : begin + 8], part)
    assert torch.allclose(pruned, weight.masked_fill(gone, 0))


def test_sparsegpt_loses_less_of_the_outputs_than_its_mask_alone():
    x, weight = drawn(4, 60, 32, seed=2) @ drawn(32, 32, seed=3), drawn(6, 32)
    pruned, gone = SparseGPT().prune(weight, statistics(x), 0.5, Unstructured())
    lost, masked = ((weight - w) @ x.view(-1, 32).T for w in (pruned, weight.masked_fill(gone, 0)))
    assert lost.norm() < 0.9 * masked.norm()


def test_sparsegpt_names_the_layer_whose_inputs_are_not_finite():
    with pytest.raises(ValueError, match=r"inputs of 'down_proj' are not finite.*damping=0"):
        SparseGPT().prune(drawn(4, 4), Hessian(torch.full((4, 4), float("nan"))), 0.5, Unstructured(), "down_proj")


# DSnoT ---------------------------------------------------------------------------------------------------------------


class Moments:
    """Statistics that are given means, variances and mean squares."""

    def __init__(self, mean, variance, squares):
        self.mean, self.variance, self.mean_square = (lambda v=v: torch.as_tensor(v) for v in (mean, variance, squares))


class Keeping(MagnitudePruning):
    """A first mask that is given."""

    def prune(self, weight, inputs, sparsity, pattern, name="", seed=0):
        gone = torch.ones(weight.shape, dtype=torch.bool)
        gone[:, [0, 4, 5]] = False
        return weight, gone


def test_dsnot_swaps_as_in_the_worked_example():
    weight, ones = torch.tensor([[2.0, 1.0, -1.0, 0.5, -3.0, 1.5]]), torch.ones(6)

    def after(**options):
        return kept(DSnoT(Keeping(), **options).prune(weight, Moments(ones, ones, ones), 0.5, Unstructured())[1])[0]

    assert after(cycles=1) == [0, 1, 5]
    assert after(cycles=2) == after() == [0, 1, 2]
    assert after(same_sign=True) == [0, 4, 5]
    assert after(cycles=0) == after(threshold=1e9) == [0, 4, 5]


def dsnot(weight, gone, m, v, a, cycles, threshold, same_sign, group=None, signed=True):
    """The sheet's cycle in plain Python, a row at a time."""
    rows = []
    for w, removed in zip(weight.double().tolist(), gone.tolist(), strict=True):
        d = [w[j] * m[j] for j in range(len(w))]
        wanda = [abs(w[j]) * math.sqrt(a[j]) for j in range(len(w))]
        now, error = list(removed), sum(d[j] for j in range(len(w)) if removed[j])
        first = (error > 0) - (error < 0)
        returned, left = set(), set()
        for _ in range(cycles):
            up = 1 if error > 0 else -1
            grow = [j for j in range(len(w)) if removed[j] and j not in returned and d[j] * up > 0]
            if not grow or abs(error) <= threshold:
                break
            enter = max(grow, key=lambda j: (up * d[j] / v[j], -j))
            go = [j for j in range(len(w)) if not removed[j] and j not in left]
            if group:
                go = [j for j in go if j // group == enter // group]
            if signed:
                go = [j for j in go if (d[j] > 0 if error < 0 else d[j] < 0)]
            if not go:
                break
            leave = min(go, key=lambda j: (wanda[j], j))
            after = error + d[leave] - d[enter]
            if same_sign and (after > 0) - (after < 0) != first:
                break
            error, now[enter], now[leave] = after, False, True
            returned.add(enter)
            left.add(leave)
        rows.append(now)
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({}, Unstructured()),
        ({"same_sign": True}, Unstructured()),
        ({}, NM(2, 4)),
        ({"sign_in_groups": False}, NM(2, 4)),
        ({"sign_in_groups": False}, Unstructured()),
    ],
)
def test_dsnot_is_the_papers_cycle(options, pattern):
    weight, x = drawn(40, 16), drawn(4, 30, 16, seed=1) + drawn(16, seed=2)
    found = statistics(x)
    first = Wanda().prune(weight, found, 0.5, pattern)[1]
    grouped = isinstance(pattern, NM)
    signed = not grouped or "sign_in_groups" not in options
    expected = dsnot(
        weight, first, found.mean().tolist(), found.variance().tolist(), found.mean_square().tolist(), 50, 0.1,
        "same_sign" in options or grouped, pattern.of if grouped else None, signed,
    )  # fmt: skip
    gone = DSnoT(**options).prune(weight, found, 0.5, pattern)[1]
    assert torch.equal(gone, expected)
    assert not torch.equal(gone, first)
    assert torch.equal(gone.sum(1), first.sum(1))


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_dsnot_with_one_sign_never_raises_a_rows_expected_error(pattern):
    weight, x = drawn(40, 16), drawn(4, 30, 16, seed=1) + drawn(16, seed=2)
    found = statistics(x)
    first = Wanda().prune(weight, found, 0.5, pattern)[1]

    def error(gone):
        return (weight * found.mean()).masked_fill(~gone, 0).sum(1).abs()

    after = error(DSnoT(same_sign=True).prune(weight, found, 0.5, pattern)[1])
    assert (after <= error(first) + 1e-4).all()
    assert after.sum() < 0.8 * error(first).sum()


def test_dsnot_of_inputs_without_a_mean_changes_nothing():
    found = Moments(torch.zeros(16), torch.ones(16), torch.ones(16))
    first = Wanda().prune(drawn(5, 16), found, 0.5, Unstructured())[1]
    assert torch.equal(DSnoT().prune(drawn(5, 16), found, 0.5, Unstructured())[1], first)


def test_dsnot_refuses_a_first_method_that_changes_weights():
    with pytest.raises(ValueError, match=r"initial=SparseGPT.*Wanda\(\)"):
        DSnoT(SparseGPT())


def test_dsnot_refuses_a_first_method_without_scores():
    with pytest.raises(ValueError, match=r"initial=DSnoT.*scores no entries.*Wanda\(\)"):
        DSnoT(DSnoT())


@pytest.mark.parametrize(("keep", "of"), itertools.product((0, 4), (4,)))
def test_a_pattern_that_keeps_nothing_or_all_is_refused(keep, of):
    with pytest.raises(ValueError, match="keep"):
        NM(keep, of)
