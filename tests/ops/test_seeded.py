"""Random numbers that are a function of seed and position, and sums of random matrices that are never stored."""

import pytest
import torch

from hf_sparse_peft.ops import seeded
from hf_sparse_peft.ops.seeded import hashed, seeded_combination, seeded_permutation, seeded_uniform

SEED = 9876543210123  # above 2**24, which a float32 would round


def reference(seed: int, position: int) -> int:
    """The hash in Python's integers."""
    mask = 0xFFFFFFFF
    x = ((position & mask) * (((seed >> 31) | 1) & 0x7FFFFFFF) + (seed & mask)) & mask
    x = ((x ^ x >> 16) * 0x21F0AAAD) & mask
    x = ((x ^ x >> 15) * 0x735A2D97) & mask
    return x ^ x >> 15


def test_hashes_are_those_of_the_integers_and_distinct():
    assert hashed(SEED, 5, 100).tolist() == [reference(SEED, position) for position in range(5, 105)]
    assert hashed(SEED, 0, 1 << 16).unique().numel() == 1 << 16


def test_files_that_name_this_generator_depend_on_these_numbers():
    assert seeded.GENERATOR == "hash32"
    assert hashed(SEED, 0, 4).tolist() == [1019427948, 1472426243, 233777880, 1653738409]
    assert seeded_permutation(SEED, 5).tolist() == [2, 0, 1, 3, 4]
    assert seeded_permutation(SEED, 8).tolist() == [7, 6, 1, 0, 3, 4, 5, 2]


def test_numbers_are_uniform_and_independent_of_seed_neighbour_and_row():
    drawn, other = seeded_uniform(SEED, 400, 400), seeded_uniform(SEED + 1, 400, 400)
    assert -1 <= drawn.min() < -0.999 < 0.999 < drawn.max() < 1
    assert drawn.mean().abs() < 5 * (1 / 3) ** 0.5 / 400
    assert abs(3 * drawn.var().item() - 1) < 0.02
    for product in (drawn * other, drawn[1:] * drawn[:-1], drawn[:, 1:] * drawn[:, :-1]):
        assert product.mean().abs() < 5 / 3 / 400


def test_a_later_start_gives_the_same_bits():
    whole = seeded_uniform(SEED, 40)
    assert torch.equal(seeded_uniform(SEED, 4, 5, start=20).flatten(), whole[20:])


def test_a_permutation_has_each_number_once():
    found = seeded_permutation(SEED, 1000)
    assert found.sort().values.tolist() == list(range(1000))
    assert found.tolist() != list(range(1000))


@pytest.mark.parametrize("chunk", [1, 50, 1 << 22])
def test_sums_and_their_gradient_are_those_of_materialised_matrices_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(seeded, "_CHUNK", chunk)
    matrices = seeded_uniform(SEED, 7, 3, 8)
    coefficients = torch.randn(7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    state = torch.get_rng_state()
    found = seeded_combination(coefficients, SEED, 3, 8, 0.5)
    gradient = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    (found * gradient).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    expected = 0.5 * torch.einsum("k,kij->ij", coefficients.detach().double(), matrices.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    expected = 0.5 * torch.einsum("ij,kij->k", gradient.double(), matrices.double())
    torch.testing.assert_close(coefficients.grad.double(), expected, rtol=1e-6, atol=1e-6)
