"""CUR, codebooks and dense x sparse factorizations against references written from the equations in float64."""

import itertools

import pytest
import torch

from hf_sparse_peft.sparsity.codebooks import sketch
from hf_sparse_peft.sparsity.cur import cur, cur_rank, greedy_indices
from hf_sparse_peft.sparsity.dense_sparse import (
    dense_sparse,
    largest_of_columns,
    matching_pursuit,
    straight_through_sparse,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# CUR (CURing, 2025)


def rebuilt(W, found):
    return W[:, found.columns] @ found.core @ W[found.rows]


def test_largest_rank_that_saves_nothing_less_than_it_stores():
    assert cur_rank(4096, 4096) == 1696
    for m, n in itertools.product(range(1, 40), repeat=2):
        fits = [r for r in range(min(m, n) + 1) if r * r + r * (m + n) <= m * n]
        assert cur_rank(m, n) == max(fits), (m, n)


def test_core_of_worked_matrix_is_the_inverse_of_the_crossing():
    W = torch.tensor([[4.0, 0, 1], [0, 2, 0], [1, 0, 3]], dtype=torch.float64)
    rank_two = W * torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.float64)
    found = cur(rank_two, 2)
    assert set(found.rows.tolist()) == set(found.columns.tolist()) == {0, 2}
    core = found.core[found.columns.argsort()][:, found.rows.argsort()]
    torch.testing.assert_close(
        core, torch.tensor([[0.27273, -0.09091], [-0.09091, 0.36364]]).double(), atol=6e-6, rtol=0
    )
    torch.testing.assert_close(core, torch.linalg.inv(W[[0, 2]][:, [0, 2]]))


@pytest.mark.parametrize("greedy", ["deim", "one_row"])
def test_matrix_of_that_rank_is_reproduced_and_indices_are_distinct(greedy):
    W = normal(30, 7) @ normal(7, 22, seed=1)
    found = cur(W, 7, normal(22, seed=2).abs(), greedy)
    assert found.rows.unique().numel() == found.columns.unique().numel() == 7
    torch.testing.assert_close(rebuilt(W, found), W, rtol=0, atol=1e-10)


def reference_deim(vectors):
    """Sorensen and Embree's algorithm, with the projector written out."""
    chosen = [int(vectors[:, 0].abs().argmax())]
    for i in range(1, vectors.shape[1]):
        U, P = vectors[:, :i], torch.eye(len(vectors), dtype=torch.float64)[:, chosen]
        residual = vectors[:, i] - U @ torch.linalg.inv(P.T @ U) @ P.T @ vectors[:, i]
        chosen.append(int(residual.abs().argmax()))
    return chosen


def reference_one_row(vectors):
    """Its variant: least-norm combination of vectors 0..i that equals the later vector at the last index alone."""
    Q, chosen = vectors.clone(), []
    for i in range(Q.shape[1]):
        order = Q[:, i].abs().argsort(descending=True).tolist()
        chosen.append(next(at for at in order if at not in chosen))
        row = Q[chosen[-1] : chosen[-1] + 1, : i + 1]
        for j in range(i + 1, Q.shape[1]):
            Q[:, j] = Q[:, j] - Q[:, : i + 1] @ (torch.linalg.pinv(row) @ Q[chosen[-1], j : j + 1])
    return chosen


@pytest.mark.parametrize(("greedy", "reference"), [("deim", reference_deim), ("one_row", reference_one_row)])
def test_greedy_choices_are_those_of_the_equations(greedy, reference):
    for seed in range(20):
        vectors = torch.linalg.qr(normal(24, 6, seed=seed)).Q
        assert greedy_indices(vectors, greedy).tolist() == reference(vectors)


def test_greedy_choices_of_paper_and_code_differ_and_beat_random_ones():
    same, errors = 0, {"deim": 0.0, "one_row": 0.0, "random": 0.0, "svd": 0.0}
    for seed in range(20):
        W = normal(40, 30, seed=seed)
        found = {greedy: cur(W, 8, None, greedy) for greedy in ("deim", "one_row")}
        same += set(found["deim"].rows.tolist()) == set(found["one_row"].rows.tolist())
        drawn = torch.Generator().manual_seed(seed)
        rows, columns = torch.randperm(40, generator=drawn)[:8], torch.randperm(30, generator=drawn)[:8]
        core = torch.linalg.pinv(W[:, columns]) @ W @ torch.linalg.pinv(W[rows])
        errors["random"] += float((W - W[:, columns] @ core @ W[rows]).norm()) / 20
        errors["svd"] += float(torch.linalg.svdvals(W)[8:].norm()) / 20
        for greedy, one in found.items():
            errors[greedy] += float((W - rebuilt(W, one)).norm()) / 20
    assert 0 < same < 20
    assert (
        errors["svd"]
        < min(errors["deim"], errors["one_row"])
        < max(errors["deim"], errors["one_row"])
        < errors["random"]
    )


def test_choice_is_blind_to_a_scale_that_inputs_and_weights_share():
    W, a, c = normal(20, 16), normal(16, seed=1).abs(), torch.rand(16, dtype=torch.float64) + 0.5
    one, other = cur(W, 5, a), cur(W * c, 5, a / c)
    assert one.rows.tolist() == other.rows.tolist()
    assert one.columns.tolist() == other.columns.tolist()
    assert one.columns.tolist() != cur(W, 5).columns.tolist()  # while the inputs' sizes do matter


def test_cur_refuses_what_it_cannot_choose_from():
    with pytest.raises(ValueError, match="rank=5"):
        cur(normal(4, 6), 5)
    with pytest.raises(ValueError, match="not finite"):
        cur(normal(4, 6), 2, torch.full((6,), torch.inf))


# Codebooks (SketchTune, 2025)


def rebuilt_sketch(found):
    rows, groups, _ = found.codebooks.shape
    return found.codebooks.gather(2, found.codes.view(rows, groups, -1).long()).view(rows, -1)


def best_split(values, weights, size):
    """The lowest weighted error of one line: all ways to cut the sorted values into parts."""
    order = values.argsort()
    v, h = values[order], weights[order]

    def error(part):
        x, w = v[part], h[part]
        return float((w * (x - (w * x).sum() / w.sum()).square()).sum())

    n, best = len(v), torch.inf
    for cuts in itertools.combinations(range(1, n), size - 1):
        ends = [0, *cuts, n]
        best = min(best, sum(error(slice(a, b)) for a, b in itertools.pairwise(ends)))
    return best


def test_sketch_is_near_the_lowest_weighted_error():
    W, h = normal(12, 20), normal(20, seed=1).square()
    found = sketch(W, 2, 2, h)
    assert found.codebooks.shape == (12, 2, 4)
    assert found.codes.dtype == torch.uint8
    left = (h * (W - rebuilt_sketch(found)).square()).view(12, 2, 10).sum(2)
    best = sum(best_split(W[i, 10 * g : 10 * g + 10], h[10 * g : 10 * g + 10], 4) for i in range(12) for g in range(2))
    assert float(left.sum()) <= 1.6 * best
    plain = (h * (W - rebuilt_sketch(sketch(W, 2, 2))).square()).sum()
    assert float(left.sum()) < 0.8 * float(plain)  # the importance is what it was found by


def test_few_values_are_kept_exactly_and_zeros_have_a_code_of_their_own():
    levels = normal(16)
    W = levels[torch.randint(16, (6, 128), generator=torch.Generator().manual_seed(3))]
    torch.testing.assert_close(rebuilt_sketch(sketch(W, 2, 4)), W)
    pruned = normal(6, 64).masked_fill(normal(6, 64, seed=4).abs() < 0.7, 0)
    found = sketch(pruned, 2, 3, keep_zeros=True)
    assert torch.equal(rebuilt_sketch(found) == 0, pruned == 0)
    assert torch.equal(found.codebooks.sort(2).values, found.codebooks)
    assert bool(((found.codebooks == 0).sum(2) == 1).all())


def test_sketch_refuses_parts_of_unequal_length():
    with pytest.raises(ValueError, match="groups=3"):
        sketch(normal(4, 8), 3, 2)


# Dense x sparse (DSFormer, 2023)


def pursuit_of_one(D, t, q):
    chosen, residual = [], t
    for _ in range(q):
        size = ((D / D.norm(dim=0)).T @ residual).abs()
        size[chosen] = -1
        chosen.append(int(size.argmax()))
        weights = torch.linalg.lstsq(D[:, chosen], t[:, None]).solution[:, 0]
        residual = t - D[:, chosen] @ weights
    found = torch.zeros(D.shape[1], dtype=torch.float64)
    found[chosen] = weights
    return found


def test_matching_pursuit_of_all_columns_is_that_of_each():
    D, T = normal(12, 20), normal(12, 9, seed=1)
    residuals = []
    for q in (1, 2, 4, 6):
        found = matching_pursuit(D, T, q)
        torch.testing.assert_close(found, torch.stack([pursuit_of_one(D, t, q) for t in T.T], 1), rtol=1e-6, atol=1e-8)
        assert bool(((found != 0).sum(0) == q).all())
        residuals.append((T - D @ found).norm(dim=0))
    assert all(bool((b <= a + 1e-12).all()) for a, b in itertools.pairwise(residuals))


def test_all_nonzeros_of_one_dictionary_are_the_truncated_svd():
    M = normal(14, 18)
    D, S = dense_sparse(M, 5, 5)
    assert float((M - D @ S).norm()) == pytest.approx(float(torch.linalg.svdvals(M)[5:].norm()))


def test_columns_of_several_subspaces_need_fewer_numbers_than_their_common_rank():
    bases, weights = normal(4, 16, 2), normal(4, 2, 12, seed=1)
    M = (bases @ weights).permute(1, 0, 2).reshape(16, 48)  # rank 8, each column in one of four planes
    D, S = dense_sparse(M, 16, 2, rounds=40)
    assert D.shape == (16, 16)
    assert bool(((S != 0).sum(0) <= 2).all())
    error = float((M - D @ S).norm() / M.norm())
    assert error < 0.5 * float(torch.linalg.svdvals(M)[2:].norm() / M.norm())


def test_straight_through_keeps_exactly_q_and_gives_all_a_gradient():
    latent = normal(2, 6, 5).requires_grad_()
    sparse = straight_through_sparse(latent, 2)
    assert bool(((sparse != 0).sum(1) == 2).all())
    assert torch.equal(sparse != 0, largest_of_columns(latent, 2))
    upstream = normal(2, 6, 5, seed=2)
    sparse.backward(upstream)
    assert torch.equal(latent.grad, upstream)
    assert int(largest_of_columns(torch.zeros(6, 5), 2).sum()) == 10  # ties too
