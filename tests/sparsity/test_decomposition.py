"""DSEE's decomposition against the released algorithm, written from its equations in float64."""

import pytest
import torch

from hf_sparse_peft.sparsity import UnitGrid, select_units
from hf_sparse_peft.sparsity.decomposition import greedy_low_rank


def seeded(seed: int = 9) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slowly_falling_spectrum(rows: int, cols: int, seed: int) -> torch.Tensor:
    """A matrix like a pretrained one: no small rank explains it; entries of standard deviation 0.04."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (rows, cols))
    spectrum = torch.arange(1, min(rows, cols) + 1) ** -0.7
    weight = U[:, : spectrum.numel()] * spectrum @ V[: spectrum.numel()]
    return weight * (0.04 / weight.std())


def released(weight, rounds, inner, threshold, step, generator):
    """U V and S after `rounds`, by the equations."""
    W = weight.double()
    V = torch.randn(1, W.shape[1], generator=generator).double()
    for number in range(rounds):
        S = torch.zeros_like(W)
        for _ in range(inner):
            U, _ = torch.linalg.qr((W - S) @ V.T)
            V = U.T @ (W - S)
            S = torch.where((W - U @ V).abs() < threshold, 0.0, W - U @ V)
        if number + 1 < rounds:
            V = torch.vstack([V, torch.linalg.qr(W - U @ V - S)[1][:step]])
    return U @ V, S


@pytest.mark.parametrize("shape", [(96, 96), (64, 112), (112, 64)])
def test_the_low_rank_part_explains_as_much_of_a_weight_as_the_released_algorithms(shape):
    weight = slowly_falling_spectrum(*shape, seed=0)
    rounds = 3 * min(shape) // 20  # to three quarters of full rank, as 100 rounds on 768 columns nearly do
    U, V = greedy_low_rank(weight, rounds, 2, 0.01, 5, seeded())
    assert V.shape[0] == U.shape[1] == 1 + 5 * (rounds - 1)
    low_rank, _ = released(weight, rounds, 2, 0.01, 5, seeded())
    error, expected = ((weight - UV).norm() / weight.norm() for UV in (U @ V, low_rank))
    assert expected < 0.25  # where S is carried over from round to round it stays above 0.9
    assert float(error) == pytest.approx(float(expected), rel=0.02)


def test_the_first_rounds_are_the_released_algorithms_to_rounding():
    weight = slowly_falling_spectrum(48, 40, seed=1)
    for rounds in (1, 2, 3):
        U, V = greedy_low_rank(weight, rounds, 2, 0.01, 5, seeded())
        low_rank, _ = released(weight, rounds, 2, 0.01, 5, seeded())
        torch.testing.assert_close((U @ V).double(), low_rank, rtol=0, atol=2e-4)


def test_spikes_below_the_largest_entries_are_found_where_magnitude_finds_none():
    found = dict.fromkeys(("decomposition_residual", "magnitude"), 0)
    for seed in range(5):
        generator = seeded(seed)
        weight = 0.1 * torch.randn(96, 8, generator=generator) @ torch.randn(8, 96, generator=generator) / 8**0.5
        spikes = torch.randperm(96 * 96, generator=generator)[:30]
        weight.view(-1)[spikes] += 0.2 * torch.randn(30, generator=generator).sign()
        assert weight.abs().max() > 0.35
        for criterion, options in (("decomposition_residual", {"rounds": 3}), ("magnitude", {})):
            units = select_units(criterion, weight, UnitGrid(96, 96), 30, generator=seeded(), **options)
            found[criterion] += int(torch.isin(units.long(), spikes).sum())
    assert found["decomposition_residual"] > 0.9 * 150
    assert found["magnitude"] < 0.1 * 150


def test_the_support_is_reproducible_and_not_that_of_magnitude():
    weight, grid = slowly_falling_spectrum(64, 64, seed=2), UnitGrid(64, 64)
    units = [select_units("decomposition_residual", weight, grid, 200, generator=seeded(), rounds=10) for _ in range(2)]
    assert torch.equal(*units)
    largest = select_units("magnitude", weight, grid, 200)
    assert torch.isin(units[0], largest).float().mean() < 0.3


def test_rounds_end_before_full_rank_and_before_the_sparse_part_is_empty():
    weight = slowly_falling_spectrum(40, 24, seed=3)
    U, V = greedy_low_rank(weight, 100, 2, 0.01, 5, seeded())
    assert V.shape[0] < 24
    assert (weight - U @ V).abs().max() >= 0.01  # something is left to rank by
    low_rank = torch.outer(torch.arange(1.0, 41), torch.arange(1.0, 25))
    spike = low_rank.clone()
    spike[3, 4] += 50.0
    U, V = greedy_low_rank(spike, 100, 2, 0.01, 5, seeded())
    assert int((spike - U @ V).abs().argmax()) == 3 * 24 + 4
