"""Products with coded weights and with singular vectors, against dense float64 gradients."""

import pytest
import torch

from hf_sparse_peft.ops.codebook_product import codebook_product, coded_weight, pack_codes, unpack_codes
from hf_sparse_peft.ops.spectral_product import spectral_product


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_worked_codebook_gradient_sums_the_entries_of_each_code():
    codes = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 1]], dtype=torch.uint8)
    codebooks = normal(1, 2, 2).requires_grad_()
    # One output and dY = 1: the dense gradient of the weight is x.
    x = torch.arange(1.0, 9.0, dtype=torch.float64)[None]
    codebook_product(x, codebooks, codes, torch.float64).backward(torch.ones(1, 1, dtype=torch.float64))
    assert codebooks.grad.tolist() == [[[5.0, 5.0], [11.0, 15.0]]]


@pytest.mark.parametrize("cols", [12, 9])
def test_codebook_product_and_gradients_are_those_of_the_dense_weight(cols):
    codes = torch.randint(8, (5, cols), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = pack_codes(codes)
    assert packed.shape == (5, (cols + 1) // 2)
    assert torch.equal(unpack_codes(packed, cols), codes)
    codebooks, x, dy = (
        normal(5, 3, 8).requires_grad_(),
        normal(2, 4, cols, seed=2).requires_grad_(),
        normal(2, 4, 5, seed=3),
    )
    for held in (codes, packed):
        y = codebook_product(x, codebooks, held, torch.float64)
        got = torch.autograd.grad(y, [x, codebooks], dy)
        W = torch.stack(
            [codebooks[i, j // (cols // 3), codes[i, j].long()] for i in range(5) for j in range(cols)]
        ).view(5, cols)
        torch.testing.assert_close(coded_weight(codebooks, held, cols), W)
        torch.testing.assert_close(y, x @ W.T)
        for one, expected in zip(got, torch.autograd.grad(x @ W.T, [x, codebooks], dy), strict=True):
            torch.testing.assert_close(one, expected)


def test_codes_of_zero_stay_out_of_training_where_zeros_are_kept():
    codebooks = torch.tensor([[[-1.0, 0.0, 2.0]]], dtype=torch.float64, requires_grad=True)
    codes = torch.tensor([[0, 1, 1, 2]], dtype=torch.uint8)
    codebook_product(normal(3, 4), codebooks, codes, torch.float64, keep_zeros=True).sum().backward()
    assert (codebooks.grad != 0).tolist() == [[[True, False, True]]]


def test_spectral_gradients_leave_out_the_singular_values():
    U, V, sigma = (
        normal(7, 4).requires_grad_(),
        normal(6, 4, seed=1).requires_grad_(),
        normal(4, seed=2).requires_grad_(),
    )
    x, dy = normal(3, 5, 6, seed=3).requires_grad_(), normal(3, 5, 7, seed=4)
    y = spectral_product(x, U, V, sigma, torch.float64)
    dx, dU, dV, dsigma = torch.autograd.grad(y, [x, U, V, sigma], dy)
    W = (U * sigma) @ V.T
    torch.testing.assert_close(y, x @ W.T)
    G = torch.einsum("abo,abi->oi", dy, x)  # the weight's gradient
    torch.testing.assert_close(dx, dy @ W)
    torch.testing.assert_close(dU, G @ V)
    torch.testing.assert_close(dV, G.T @ U)
    torch.testing.assert_close(dsigma, (U * (G @ V)).sum(0))
    plain = torch.autograd.grad((x @ W.T), [U, V], dy)  # autograd's have the factor
    torch.testing.assert_close(dU * sigma, plain[0])
    torch.testing.assert_close(dV * sigma, plain[1])
