"""Kernels, competition and the product, against the papers' equations in dense float64."""

import math
from dataclasses import replace

import pytest
import torch
from kernel_toolbox import KERNELS, MODES, factors, plan, reference_kernel, reference_update
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse_peft.tuners.kernel_lora.kernels import kernel_tile, update_tiles
from hf_sparse_peft.tuners.kernel_lora.product import kernel_product

SHAPES = ((7, 12), (1, 33), (33, 1), (40, 24))


def update(P, Q, mix, the_plan) -> torch.Tensor:
    """The competed update as `[out, in]`."""
    return torch.cat([tile for _, tile in update_tiles(P, Q, mix, the_plan)]).t()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_zeros_are_the_asked_fraction_to_the_entry(kernel, mode, shape):
    P, Q, mix = factors(*shape, 6, kernel == "mixed")
    numel = shape[0] * shape[1]
    for survivors in sorted({0, 1, numel // 3, numel - 1, numel}):
        found = update(P, Q, mix, plan(mode, survivors, tile=50))
        assert int((found != 0).sum()) == survivors


@pytest.mark.parametrize("mode", MODES)
def test_exactly_as_many_win_above_two_to_the_24_entries_where_quantile_refuses(mode):
    P, Q, _ = factors(4099, 4099, 2, False)
    survivors = 5_000_000
    found = sum(int((tile != 0).sum()) for _, tile in update_tiles(P, Q, None, plan(mode, survivors)))
    assert 4099 * 4099 > 2**24
    # Differences of distances on a line coincide now and then; ties at tau keep |w| - tau = 0 in the paper's form.
    assert found == survivors if mode == "code" else survivors - 50 < found <= survivors


def line(values) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose kernel is the given `[out, in]` matrix of one input: |Q1 - 0| - |Q2 - 0| at scale 1."""
    values = torch.tensor(values)
    Q = torch.stack([values.clamp(min=0), (-values).clamp(min=0)]).unsqueeze(-1)
    return torch.zeros(2, 1, 1), Q


def test_code_mode_squares_the_winners_of_a_known_matrix_and_keeps_their_sign():
    P, Q = line([3.0, -0.5, 2.0, -4.0, 1.0, 0.25])
    found = update(P, Q, None, plan("code", 3, scale=1.0)).flatten()
    assert found.tolist() == [9.0, 0.0, 4.0, -16.0, 0.0, 0.0]


def test_paper_mode_takes_the_largest_loser_off_the_second_factor_of_a_known_matrix():
    P, Q = line([3.0, -0.5, 2.0, -4.0, 1.0, 0.25])
    found = update(P, Q, None, plan("paper", 3, scale=1.0)).flatten()
    assert found.tolist() == [3.0 * 2.0, 0.0, 2.0 * 1.0, -4.0 * 3.0, 0.0, 0.0]


@pytest.mark.parametrize("tile", [1, 2, 100])
def test_ties_at_the_cut_never_change_the_number_of_winners(tile):
    P, Q = line([1.0, -2.0, 2.0, 2.0, -2.0, 3.0])
    P = P.repeat(1, 2, 1)  # two inputs, all values twice
    for survivors in (3, 7):
        found = update(P, Q, None, plan("code", survivors, tile=6 * tile, scale=1.0))
        assert sorted(found[found != 0].abs().tolist()) == [4.0] * (survivors - 2) + [9.0, 9.0]
        assert torch.equal(found, update(P, Q, None, plan("code", survivors, tile=600, scale=1.0)))
        plans = (replace(plan("code", survivors, scale=1.0), name=f"layer.{i}") for i in range(8))
        assert len({tuple(update(P, Q, None, each).flatten().tolist()) for each in plans}) > 1


def test_without_competition_the_update_is_the_kernel_and_not_its_square():
    P, Q, _ = factors(7, 12, 6, False)
    for mode in MODES:
        torch.testing.assert_close(
            update(P, Q, None, plan(mode)).double(), reference_kernel(P.double(), Q.double(), None)
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_update_of_random_factors_has_a_higher_rank_than_q(kernel):
    P, Q, mix = factors(48, 48, 8, kernel == "mixed")
    assert torch.linalg.matrix_rank(update(P, Q, mix, plan()).double()) > 40


@pytest.mark.parametrize("mode", [None, *MODES])
def test_swapping_the_heads_negates_the_update(mode):
    P, Q, _ = factors(20, 30, 8, False)
    the_plan = plan(mode or "paper", 200 if mode else None)
    assert torch.equal(update(P.flip(0), Q.flip(0), None, the_plan), -update(P, Q, None, the_plan))


def test_the_softmax_of_the_mixed_kernel_runs_over_the_outputs():
    P, Q, _ = factors(20, 30, 8, False)
    mixed = kernel_tile(P, Q, torch.tensor([1.0, 0.1, 0.0]), 0.1) - kernel_tile(P, Q, None, 0.1)  # [in, out]
    torch.testing.assert_close(mixed.sum(1), torch.ones(30))
    assert (mixed.sum(0) - 1).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_mixed_kernel_without_its_additions_is_snell(mode):
    P, Q, _ = factors(20, 30, 8, False)
    assert torch.equal(
        update(P, Q, torch.tensor([0.0, 1.0, 0.0]), plan(mode, 123)), update(P, Q, None, plan(mode, 123))
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_tiles_change_no_bit_of_the_update(kernel):
    P, Q, mix = factors(40, 24, 6, kernel == "mixed")
    whole = update(P, Q, mix, plan("code", 300))
    for tile in (1, 100, 333):
        assert torch.equal(update(P, Q, mix, plan("code", 300, tile=tile)), whole)


@pytest.mark.parametrize("tile", [60, 1 << 22])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("kernel", KERNELS)
def test_output_and_gradients_are_those_of_the_equations(kernel, mode, shape, tile):
    rows, cols = shape
    P, Q, mix = (None if t is None else t.requires_grad_() for t in factors(*shape, 6, kernel == "mixed"))
    survivors = None if mode is None else max(1, (2 * rows * cols) // 3)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, cols, generator=generator, requires_grad=True)
    target = torch.randn(2, 5, rows, generator=generator)
    leaves = [t for t in (x, P, Q, mix) if t is not None]
    y = kernel_product(x, P, Q, mix, plan(mode or "paper", survivors, tile=tile))
    found = torch.autograd.grad((y * target).sum(), leaves)

    doubles = [t.detach().double().requires_grad_() for t in leaves]
    of_x, *of_factors = doubles
    dense = reference_update(*of_factors, *[None] * (3 - len(of_factors)), mode, survivors)
    expected = torch.autograd.grad(((of_x @ dense.t()) * target.double()).sum(), doubles)
    torch.testing.assert_close(y.double(), of_x.detach() @ dense.detach().t(), rtol=1e-4, atol=1e-6)
    for name, one, other in zip(("x", "P", "Q", "mix"), found, expected, strict=False):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert other.abs().max() > 1e-4


def test_gradients_stay_finite_and_right_where_points_coincide():
    P, Q, _ = factors(6, 8, 4, False)
    with torch.no_grad():
        Q[0, :3] = P[0, 2:5]
        Q[1, 1] = P[1, 0]
    P.requires_grad_(), Q.requires_grad_()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(kernel_product(x, P, Q, None, plan()).square().sum(), (P, Q))
    doubles = [t.detach().double().requires_grad_() for t in (P, Q)]
    dense = reference_update(*doubles, None, "paper", None)
    expected = torch.autograd.grad((x.double() @ dense.t()).square().sum(), doubles)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)


def test_in_bf16_the_kernel_is_still_computed_in_fp32():
    P, Q, _ = factors(20, 30, 8, False, std=1e-3)
    P, Q = (3.0 + P).bfloat16(), (3.0 + Q).bfloat16()  # distances a hundredth of the points' size
    torch.testing.assert_close(
        update(P, Q, None, plan()).double(), reference_kernel(P.double(), Q.double(), None), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_kept_for_the_backward_is_the_input_and_the_factors(kernel):
    rows, cols, tokens, q = 96, 128, 10, 8
    P, Q, mix = (None if t is None else t.requires_grad_() for t in factors(rows, cols, q, kernel == "mixed"))
    x = torch.randn(tokens, cols, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.numel() * t.element_size()), t)[1], lambda t: t
    ):
        kernel_product(x, P, Q, mix, plan("code", 4000, tile=1024))
    assert sum(kept) == 4 * (tokens * cols + q * (rows + cols) + (3 if mix is not None else 0))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.seen = max(self.seen, tensor.numel())
        return result


@pytest.mark.parametrize("mode", MODES)
def test_no_tensor_larger_than_a_tile_ever_exists(mode):
    rows, cols, tile = 96, 128, 1024
    P, Q, mix = (t.requires_grad_() for t in factors(rows, cols, 8, True))
    x = torch.randn(4, cols, requires_grad=True)
    with Largest() as largest:
        kernel_product(x, P, Q, mix, plan(mode, 4000, tile=tile)).sum().backward()
    assert math.isfinite(float(P.grad.sum()))
    # The largest are counters of the selection (2,048), the factors, and tiles.
    assert 960 <= largest.seen <= 2048 < rows * cols


def test_a_kernel_with_nan_names_the_layer():
    P, Q, _ = factors(6, 8, 4, False)
    P[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="'layer' contain NaN"):
        kernel_product(torch.randn(3, 8), P, Q, None, plan("paper", 10))
