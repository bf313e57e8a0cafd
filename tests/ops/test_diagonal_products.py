"""Blocks on a diagonal: the published block map, products and gradients, against float64 written from the equations."""

import math

import pytest
import torch

from hf_sparse_peft.ops import DenseSource, Plan, add_units_, diagonal_shape, read_units, sparse_linear, write_units_
from hf_sparse_peft.sparsity import Magnitude, UnitGrid, decode_support, encode_support

SHAPES = [(12, 20, 4), (7, 10, 3), (10, 7, 3), (9, 9, 2), (5, 5, 5), (6, 4, 1)]
"""Rows, columns, blocks: divided, ragged on both sides, in the output alone, single entries, one block."""


def published(rows, cols, blocks):
    """The paper's `b_in`, `b_out` and number of blocks."""
    b_in, b_out = math.ceil(cols / blocks), math.ceil(rows / blocks)
    return b_in, b_out, max(math.ceil(cols / b_in), math.ceil(rows / b_out))


def dense(values, rows, cols, units=None):
    """`dW` `[rows, cols]` float64 of blocks `[k, b_out, b_in]`: scattered into a padded matrix, which is cut."""
    k, b_out, b_in = values.shape
    units = list(range(k)) if units is None else units.tolist()
    number = 1 + max(units)
    padded = torch.zeros(number * b_out + rows, number * b_in + cols, dtype=torch.float64)
    for i, block in zip(units, values.double(), strict=True):
        padded = padded.clone()
        padded[i * b_out : (i + 1) * b_out, i * b_in : (i + 1) * b_in] = block
    return padded[:rows, :cols]


def product(x, weight, values, units, blocks, dtype=torch.float64):
    plan = Plan(*weight.shape, dtype, DenseSource(weight), "diagonal", blocks)
    return sparse_linear(x, plan, values=values, units=units)


def test_the_block_map_of_nine_inputs_and_eight_outputs_in_four_blocks_is_the_published_one():
    number, height, width = diagonal_shape(8, 9, 4)
    assert (number, height, width) == (4, 2, 3)
    ones = torch.ones(number, height, width, dtype=torch.float64)
    weight = torch.zeros(8, 9, dtype=torch.float64)
    dW = product(torch.eye(9, dtype=torch.float64), weight, ones, torch.arange(4), 4).t()
    expected = torch.zeros(8, 9, dtype=torch.float64)
    expected[0:2, 0:3] = expected[2:4, 3:6] = expected[4:6, 6:9] = 1.0
    assert torch.equal(dW, expected)
    add_units_(weight, torch.arange(4), ones, "diagonal", 4)
    assert torch.equal(weight, expected)


def test_blocks_of_a_7b_have_the_published_numbers():
    counts = {}
    for rows, cols in ((4096, 4096), (11008, 4096), (4096, 11008)):
        grid = UnitGrid(rows, cols, "diagonal", 64)
        assert grid.padding == 0
        counts[rows, cols] = grid.num_units * grid.unit_numel
    assert UnitGrid(11008, 4096, "diagonal", 64).values_shape(64) == (64, 172, 64)
    assert list(counts.values()) == [262_144, 704_512, 704_512]
    assert 32 * (3 * counts[4096, 4096] + counts[11008, 4096] + counts[4096, 11008]) == 70_254_592


@pytest.mark.parametrize(("rows", "cols", "blocks"), SHAPES)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_products_and_gradients_are_those_of_the_dense_form(rows, cols, blocks, some):
    b_in, b_out, number = published(rows, cols, blocks)
    assert diagonal_shape(rows, cols, blocks) == (number, b_out, b_in)
    torch.manual_seed(0)
    units = torch.arange(number)[1::2] if some and number > 1 else torch.arange(number)
    values = torch.randn(units.numel(), b_out, b_in, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(rows, cols, dtype=torch.float64)
    x = torch.randn(2, 5, cols, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 5, rows, dtype=torch.float64)
    y = product(x, weight, values, units, blocks)
    found = torch.autograd.grad(y, (x, values), dy)
    update = dense(values, rows, cols, units)
    assert update.shape == weight.shape
    expected = x @ (weight + update).t()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, torch.autograd.grad(expected, (x, values), dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for slot, i in enumerate(units.tolist()):  # x_i^T dy_i, as published (laid out [b_in, b_out] there)
        x_i = torch.nn.functional.pad(x.detach().view(10, cols), (0, number * b_in - cols))[
            :, i * b_in : (i + 1) * b_in
        ]
        dy_i = torch.nn.functional.pad(dy.view(10, rows), (0, number * b_out - rows))[:, i * b_out : (i + 1) * b_out]
        torch.testing.assert_close(found[1][slot], (x_i.t() @ dy_i).t(), rtol=1e-12, atol=1e-12)


def test_padding_of_the_output_is_cut_and_wraps_nowhere():
    values = torch.ones(3, 3, 4, dtype=torch.float64)
    dW = product(torch.eye(10, dtype=torch.float64), torch.zeros(7, 10).double(), values, torch.arange(3), 3).t()
    expected = torch.zeros(7, 10, dtype=torch.float64)
    expected[0:3, 0:4] = expected[3:6, 4:8] = expected[6:7, 8:10] = 1.0
    assert torch.equal(dW, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "cols", "blocks"), SHAPES)
def test_units_are_read_written_and_added_where_the_grid_says(rows, cols, blocks, transposed):
    grid = UnitGrid(rows, cols, "diagonal", blocks)
    weight = torch.randn(cols, rows).t() if transposed else torch.randn(rows, cols)
    before, units = weight.clone(), torch.arange(grid.num_units)[::2].int()
    values = torch.randn(grid.values_shape(units.numel()))
    inside = grid.entry_positions(units).view_as(values) >= 0
    read = read_units(weight, units, "diagonal", blocks)
    assert torch.equal(
        dense(read, rows, cols, units).float(), dense(inside.float(), rows, cols, units).float() * before
    )
    assert torch.equal(read != 0, inside)
    expected = before + dense(values, rows, cols, units).float()
    overwritten = add_units_(weight, units, values, "diagonal", blocks)
    assert torch.equal(weight, expected)
    write_units_(weight, units, overwritten, "diagonal", blocks)
    assert torch.equal(weight, before)
    positions, flat = grid.as_entries(units, values)
    summed = torch.zeros(rows * cols).index_add(0, positions, flat).view(rows, cols)
    assert torch.equal(summed, dense(values, rows, cols, units).float())
    assert positions.numel() == int(inside.sum())
    assert positions.tolist() == sorted(set(positions.tolist()))
    everything = grid.entry_positions(torch.arange(grid.num_units))
    assert int((everything < 0).sum()) == grid.padding


@pytest.mark.parametrize(("rows", "cols", "blocks"), SHAPES)
def test_scores_of_a_block_are_sums_over_its_entries(rows, cols, blocks):
    grid, weight = UnitGrid(rows, cols, "diagonal", blocks), torch.randn(rows, cols)
    found = torch.cat([chunk.reshape(-1) for chunk in Magnitude()(weight, grid)()])
    height, width = grid.values_shape(1)[1:]
    expected = [
        weight[i * height : (i + 1) * height, i * width : (i + 1) * width].abs().sum() for i in range(grid.num_units)
    ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_small_chunk_of_scores_begins_at_a_block():
    from hf_sparse_peft.sparsity.scores import chunks_of

    grid, weight = UnitGrid(14, 10, "diagonal", 4), torch.randn(14, 10)
    whole, pieces = (
        torch.cat([c.reshape(-1) for c in chunks_of(lambda b, e: weight[b:e].abs(), grid, numel)()])
        for numel in (10**6, 1)
    )
    assert whole.numel() == grid.num_units == 4
    torch.testing.assert_close(whole, pieces)


@pytest.mark.parametrize(
    ("rows", "cols", "blocks", "fit"),
    [(8, 9, 4, "1, 2, 3"), (16, 32, 7, "8"), (4, 400, 64, "4"), (32, 64, 64, "32")],
)
def test_blocks_without_a_row_or_a_column_are_refused_with_numbers_that_fit(rows, cols, blocks, fit):
    b_in, b_out, number = published(rows, cols, blocks)
    assert number * b_in - cols >= b_in or number * b_out - rows >= b_out
    with pytest.raises(
        ValueError, match=rf"diagonal_blocks={blocks} .*{rows}x{cols}.*fit: .*\b{fit}\b.*target_modules"
    ):
        UnitGrid(rows, cols, "diagonal", blocks)


def test_a_lying_header_of_a_huge_weight_is_refused_at_once():
    with pytest.raises(ValueError, match="diagonal_blocks"):
        UnitGrid(2**32 - 1, 2**31, "diagonal", 2**32 - 1)


def test_a_buffer_tells_the_number_of_blocks_and_is_refused_by_another_grid():
    grid = UnitGrid(10, 20, "diagonal", 5)
    codes = encode_support(torch.tensor([0, 3]), grid, 3)
    assert decode_support(codes, grid, 3, "a").tolist() == [0, 3]
    with pytest.raises(
        ValueError, match=r"'diagonal' with diagonal_blocks=5, but .* 'diagonal' with diagonal_blocks=4"
    ):
        decode_support(codes, UnitGrid(10, 20, "diagonal", 4), 3, "a")
    with pytest.raises(ValueError, match=r"'diagonal' with diagonal_blocks=5, but .* 'row' with block_size=0"):
        decode_support(codes, UnitGrid(10, 20, "row"), 3, "a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_bit_gradients_of_many_tokens_are_near_those_in_float64(dtype):
    torch.manual_seed(0)
    x, dy = torch.randn(300, 64).to(dtype), torch.randn(300, 96).to(dtype)
    values = torch.zeros(8, 12, 8, requires_grad=True)
    product(x, torch.randn(96, 64).to(dtype), values, torch.arange(8), 8, dtype).backward(dy)
    expected = torch.stack(
        [dy[:, 12 * i : 12 * i + 12].double().t() @ x[:, 8 * i : 8 * i + 8].double() for i in range(8)]
    )
    assert values.grad.dtype == torch.float32
    assert float((values.grad - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 4e-3)
