"""GQSA's groups and saliency against equations written in float64."""

import pytest
import tiny
import torch

from hf_sparse_peft.pruning import GQSA, DSnoT, Groups, InputStatistics, SparseGPT, Wanda, prune_model


def statistics(x):
    found = InputStatistics(x.shape[-1], ("squares", "means", "hessian"), "cpu")
    found.add(x, None)
    return found


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("power", "expected"), [(1.0, [4, 4]), (2.0, [4, 16])])
def test_with_a_diagonal_hessian_the_worked_scores_come_out(power, expected):
    """H = diag(1, 4), w = (2, 1): optimal brain damage ties, the printed score does not."""
    x = torch.diag(torch.tensor([0.5, 2.0])).sqrt()[None]  # H is twice the sum over one sequence
    scores = GQSA(power=power, damping=0.0).scores(torch.tensor([[2.0, 1.0]]), statistics(x), "", 0)
    torch.testing.assert_close(scores, torch.tensor([expected], dtype=torch.float32))


def test_each_row_loses_the_groups_with_the_smallest_mean_saliency():
    weight, x = drawn(5, 24), drawn(3, 20, 24, seed=1) * torch.linspace(0.1, 4, 24)
    gone = GQSA().prune(weight, statistics(x), 0.5, Groups(4))[1]
    tokens = x.reshape(-1, 24).double()
    hessian = 2 / 3 * tokens.T @ tokens
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(24)
    saliency = weight.double() ** 2 / torch.linalg.inv(hessian).diagonal() ** 2
    for row in range(5):
        means = [float(saliency[row, at : at + 4].mean()) for at in range(0, 24, 4)]
        lowest = sorted(range(6), key=means.__getitem__)[:3]
        assert gone[row].tolist() == [at // 4 in lowest for at in range(24)]
    by_size = weight.reshape(5, 6, 4).square().mean(2).argsort(1)[:, :3].sort(1).values
    assert by_size.tolist() != [[g for g in range(6) if row[4 * g]] for row in gone.tolist()]


def test_equal_groups_are_told_apart_by_their_inputs_alone():
    weight, x = torch.ones(1, 8), torch.eye(8)[None] * torch.tensor([1.0] * 4 + [2.0] * 4)
    assert GQSA().prune(weight, statistics(x), 0.5, Groups(4))[1].tolist() == [[True] * 4 + [False] * 4]


@pytest.mark.parametrize("method", [GQSA(), Wanda(), SparseGPT(block=32), "magnitude"])
@pytest.mark.parametrize("base", ["fp32", "conv1d"])
def test_a_pruned_model_has_whole_aligned_groups_and_the_exact_count(base, method):
    model = tiny.base(base)
    data = [{"input_ids": torch.randint(1, tiny.VOCAB, (8, 12), generator=torch.Generator().manual_seed(1))}]
    report = prune_model(model, data, method=method, sparsity=0.5, pattern=Groups(8), show_progress=False)
    for name in report.masks:
        weight = model.get_submodule(name).weight
        groups = (weight.t() if base == "conv1d" else weight).reshape(-1, 8) == 0
        assert (groups.all(1) | ~groups.any(1)).all()
        assert int(groups.all(1).sum()) == len(groups) // 2


def test_what_cuts_groups_is_refused():
    model = tiny.base("fp32")
    data = [{"input_ids": torch.randint(1, tiny.VOCAB, (4, 12))}]
    before = [p.clone() for p in model.parameters()]
    for options, message in (
        ({"pattern": Groups(48)}, "do not divide the 32 inputs"),
        ({"pattern": Groups(16), "method": SparseGPT(block=24)}, "multiple of the size"),
        ({"pattern": Groups(16), "method": DSnoT()}, "swaps single entries"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_model(model, data, show_progress=False, **options)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
