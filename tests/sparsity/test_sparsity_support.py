"""Units: what they hold, where they lie, and that reading and adding agree with plain indexing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_peft.sparsity import GRANULARITIES, UnitGrid

GRIDS = [UnitGrid(12, 20, kind, block_size=4) for kind in GRANULARITIES]


def positions_by_hand(grid: UnitGrid, unit: int) -> list[int]:
    """Row-major positions of a unit, written from the table in the class's docstring."""
    if grid.granularity == "entry":
        return [unit]
    if grid.granularity == "row":
        return [unit * grid.cols + c for c in range(grid.cols)]
    if grid.granularity == "column":
        return [r * grid.cols + unit for r in range(grid.rows)]
    if grid.granularity == "diagonal":  # 4 blocks of 12 x 20
        return [(unit * 3 + r) * grid.cols + unit * 5 + c for r in range(3) for c in range(5)]
    down, right = divmod(unit, grid.cols // grid.block_size)
    size = grid.block_size
    return [(down * size + r) * grid.cols + right * size + c for r in range(size) for c in range(size)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.granularity)
def test_units_partition_the_weight_or_its_diagonal(grid):
    everything = grid.entry_positions(torch.arange(grid.num_units, dtype=grid.index_dtype))
    assert everything.shape == (grid.num_units, grid.unit_numel)
    assert everything.dtype == torch.int64
    by_hand = {position for unit in range(grid.num_units) for position in positions_by_hand(grid, unit)}
    assert sorted(everything.reshape(-1).tolist()) == sorted(by_hand)
    assert len(by_hand) == (4 * 15 if grid.granularity == "diagonal" else grid.rows * grid.cols)
    for unit in range(grid.num_units):
        assert everything[unit].tolist() == positions_by_hand(grid, unit)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.granularity)
def test_gather_reads_and_scatter_writes_through_any_strides(grid, index_dtype, layout):
    torch.manual_seed(0)
    if layout == "contiguous":
        dense = torch.randn(grid.rows, grid.cols)
    elif layout == "transposed":
        dense = torch.randn(grid.cols, grid.rows).t()
    else:
        dense = torch.randn(grid.rows * 2, grid.cols + 3)[::2, 3:]
    units = torch.tensor([0, 2, grid.num_units - 1], dtype=index_dtype)
    flat = [p for u in units.tolist() for p in positions_by_hand(grid, u)]
    before = dense.clone()
    values = grid.gather(dense, units)
    assert tuple(values.shape) == grid.values_shape(3)
    assert torch.equal(values.reshape(-1), before.reshape(-1)[flat])

    delta = torch.randn(grid.values_shape(3))
    expected = before.double().reshape(-1)
    expected[flat] += delta.double().reshape(-1)
    returned = grid.scatter_add_(dense, units, delta)
    assert returned is dense
    torch.testing.assert_close(dense.double().reshape(-1), expected, rtol=0, atol=1e-6)
    untouched = torch.ones(grid.rows * grid.cols, dtype=torch.bool)
    untouched[flat] = False
    assert torch.equal(dense.reshape(-1)[untouched], before.reshape(-1)[untouched])


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.granularity)
def test_scatter_rounds_to_bf16_once_after_the_addition(grid):
    torch.manual_seed(0)
    dense = torch.randn(grid.rows, grid.cols).bfloat16()
    units = torch.arange(grid.num_units)
    delta = torch.randn(grid.values_shape(grid.num_units)) * 0.01
    flat = grid.entry_positions(units).reshape(-1)
    expected = dense.double().reshape(-1)
    expected[flat] += delta.double().reshape(-1)
    expected = expected.float().bfloat16()
    rounded_twice = dense.clone().reshape(-1)
    rounded_twice[flat] += delta.bfloat16().reshape(-1)
    grid.scatter_add_(dense, units, delta)
    assert torch.equal(dense.reshape(-1), expected)
    # 60 of the 240 entries are on the diagonal, too few to meet one where the two differ.
    told_apart = grid.granularity == "diagonal" or not torch.equal(rounded_twice, expected)
    assert told_apart, "the case must be able to tell the two apart"


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.granularity)
def test_empty_support_reads_nothing_and_changes_nothing(grid):
    dense = torch.randn(grid.rows, grid.cols)
    before, none = dense.clone(), torch.empty(0, dtype=grid.index_dtype)
    assert tuple(grid.gather(dense, none).shape) == grid.values_shape(0)
    grid.scatter_add_(dense, none, torch.empty(grid.values_shape(0)))
    assert torch.equal(dense, before)
    assert tuple(grid.entry_positions(none).shape) == (0, grid.unit_numel)


def test_scatter_writes_into_a_parameter_that_requires_grad():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    UnitGrid(4, 4).scatter_add_(weight, torch.tensor([5]), torch.ones(1))
    assert weight[1, 1] == 1
    assert weight.requires_grad
    assert weight.is_leaf


def test_float64_weights_are_added_in_float64():
    dense = torch.ones(2, 2, dtype=torch.float64)
    UnitGrid(2, 2).scatter_add_(dense, torch.tensor([0]), torch.tensor([1e-12], dtype=torch.float64))
    assert dense[0, 0] == 1 + 1e-12


def test_wrong_shapes_are_refused_with_both_shapes_named():
    grid = UnitGrid(4, 6)
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(4, 6\)"):
        grid.gather(torch.zeros(6, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        grid.scatter_add_(torch.zeros(4, 6), torch.tensor([0]), torch.zeros(2))


def test_bad_grids_are_refused_with_what_would_fit():
    with pytest.raises(ValueError, match=r"'square'.*entry, block, row, column, diagonal"):
        UnitGrid(4, 4, "square")
    with pytest.raises(ValueError, match=r"block_size=32 .* 12x20.*: 1, 2, 4\."):
        UnitGrid(12, 20, "block")
    with pytest.raises(ValueError, match="block_size=0"):
        UnitGrid(12, 20, "block", 0)
    with pytest.raises(ValueError, match="0x4"):
        UnitGrid(0, 4)


def test_index_dtype_widens_where_int32_ends():
    assert UnitGrid(2**16, 2**15 - 1).index_dtype == torch.int32
    assert UnitGrid(2**16, 2**15).index_dtype == torch.int64
    assert UnitGrid(2**16, 2**15, "row").index_dtype == torch.int32


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_density_of_a_whole_number_of_units_is_that_number(numerator, units):
    count = min(numerator, units)
    assert UnitGrid(1, units).count_for_density(count / units) == count


@given(st.floats(1e-6, 1.0), st.integers(1, 10**9))
@settings(max_examples=100)
def test_count_is_the_floor_and_never_nothing(density, units):
    grid = UnitGrid(1, units)
    exact = density * units
    if exact < 1 - 1e-9:
        with pytest.raises(ValueError, match=r"leaves no entry in 'q_proj'"):
            grid.count_for_density(density, "q_proj")
    elif exact >= 1:
        assert grid.count_for_density(density) in (math.floor(exact), round(exact))
        assert exact - 1 < grid.count_for_density(density) <= exact * (1 + 1e-11)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_density_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match=r"in 'mlp' must be in \(0, 1\]"):
        UnitGrid(8, 8).count_for_density(density, "mlp")
