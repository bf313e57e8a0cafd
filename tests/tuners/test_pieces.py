"""Pieces: their sum is the adapter's update, and each form that a piece offers is the piece itself."""

import hypothesis.strategies as st
import kernel_toolbox
import pytest
import tiny
import torch
from hypothesis import given, settings
from peft import get_peft_model
from tuner_toolbox import CASES, dense_delta, fill, make_config

from hf_sparse_peft import Allocate, AverageRank
from hf_sparse_peft.sparsity import UnitGrid
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.shared.pieces import Entries, LowRank, Tiles


def support_mask(grid: UnitGrid, unit: int) -> torch.Tensor:
    """Bool `[rows, cols]`, by the definition of the granularity."""
    mask = torch.zeros(grid.rows, grid.cols, dtype=torch.bool)
    if grid.granularity == "entry":
        mask[unit // grid.cols, unit % grid.cols] = True
    elif grid.granularity == "row":
        mask[unit] = True
    elif grid.granularity == "column":
        mask[:, unit] = True
    else:
        top, left = divmod(unit, grid.cols // grid.block_size)
        size = grid.block_size
        mask[top * size : (top + 1) * size, left * size : (left + 1) * size] = True
    return mask


@st.composite
def pieces_of_one_weight(draw):
    """Some pieces of one weight and, float64, the sum of their updates from the formulas."""
    block = draw(st.integers(1, 3))
    rows, cols = block * draw(st.integers(1, 5)), block * draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    pieces, total = [], torch.zeros(rows, cols, dtype=torch.float64)
    for kind in draw(st.lists(st.sampled_from(["low_rank", "gated", "entries", "tiles"]), min_size=1, max_size=4)):
        if kind == "entries":
            grid = UnitGrid(rows, cols, draw(st.sampled_from(["entry", "block", "row", "column"])), block)
            units = torch.randperm(grid.num_units, generator=generator)[: draw(st.integers(0, grid.num_units))].sort()
            values = torch.randn(grid.values_shape(units.values.numel()), generator=generator)
            pieces.append(Entries(units.values.int(), values, grid))
            for unit, value in zip(units.values.tolist(), values, strict=True):
                total.masked_scatter_(
                    support_mask(grid, unit), total[support_mask(grid, unit)] + value.reshape(-1).double()
                )
        elif kind == "tiles":
            dense = torch.randn(rows, cols, generator=generator) * (torch.rand(rows, cols, generator=generator) < 0.5)
            pieces.append(Tiles((rows, cols), tiles_of(dense, draw(st.integers(1, rows)), draw(st.integers(1, cols)))))
            total += dense.double()
        else:
            r, scale = draw(st.integers(1, 4)), draw(st.sampled_from([1.0, 0.25, 3.0]))
            B, A = torch.randn(rows, r, generator=generator), torch.randn(r, cols, generator=generator)
            gate = torch.randn(r, generator=generator) * (torch.rand(r, generator=generator) < 0.7)
            gate = gate if kind == "gated" else None
            pieces.append(LowRank(B, A, gate, scale))
            g = torch.ones(r, dtype=torch.float64) if gate is None else gate.double()
            for k in range(r):
                total += scale * g[k] * torch.outer(B[:, k].double(), A[k].double())
    return pieces, total


def tiles_of(dense, height, width):
    def tiles():
        for top in range(0, dense.shape[0], height):
            for left in range(0, dense.shape[1], width):
                rows, columns = slice(top, top + height), slice(left, left + width)
                yield rows, columns, dense[rows, columns]

    return tiles


@settings(max_examples=100, deadline=None)
@given(pieces_of_one_weight())
def test_pieces_and_every_form_that_they_offer_add_up_to_the_formula(case):
    pieces, expected = case
    for weight in (torch.zeros(expected.shape), torch.zeros(expected.shape[::-1]).t()):
        for piece in pieces:
            piece.add_(weight)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-5)
    forms = torch.zeros_like(expected)
    for piece in pieces:
        own = torch.zeros(expected.shape)
        piece.add_(own)
        if piece.exact_rank is not None:
            A, B = piece.factors()
            assert (A.shape, B.shape) == ((piece.exact_rank, own.shape[1]), (own.shape[0], piece.exact_rank))
            torch.testing.assert_close(B @ A, own, rtol=1e-5, atol=1e-5)
        else:
            with pytest.raises(ValueError, match="no exact low-rank form"):
                piece.factors()
        if isinstance(piece, LowRank):
            with pytest.raises(ValueError, match="no list of entries"):
                piece.entries()
            forms += own.double()
        else:
            positions, values = piece.entries()
            assert positions.tolist() == sorted(set(positions.tolist()))
            forms.view(-1).index_add_(0, positions, values.double())
    torch.testing.assert_close(forms, expected, rtol=1e-5, atol=1e-5)


ADAPTERS = {
    **{
        case: lambda base, case=case: get_peft_model(tiny.base(base, hidden=64), make_config(case, base))
        for case in CASES
    },
    "gated": lambda base: get_peft_model(
        tiny.base(base, hidden=64), make_config("hybrid-row", base, schedule=[Allocate(budget=AverageRank(2))])
    ),
    "kernel": lambda base: kernel_toolbox.adapted(tiny.base(base, hidden=64), base),
    "kernel-mixed-code": lambda base: kernel_toolbox.adapted(
        tiny.base(base, hidden=64), base, kernel="mixed", mode="code", tile_entries=500
    ),
    "kernel-dense": lambda base: kernel_toolbox.adapted(tiny.base(base, hidden=64), base, sparsity=0.0),
}


@tiny.crossed(adapter=list(ADAPTERS), base=["fp32", "bf16", "nf4", "conv1d"])
def test_the_update_of_every_layer_is_the_sum_of_its_pieces_and_the_papers_formula(adapter, base):
    model = ADAPTERS[adapter](base)
    if not adapter.startswith("kernel"):
        fill(model)
    formula = kernel_toolbox.reference_of if adapter.startswith("kernel") else dense_delta
    for layer in adapter_layers(model):
        weight = torch.zeros(layer.out_features, layer.in_features)
        for piece in layer.pieces("default"):
            piece.add_(weight)
        delta = layer.get_delta_weight("default")
        assert torch.equal(delta.t() if layer.fan_in_fan_out else delta, weight)
        torch.testing.assert_close(weight.double(), formula(layer, "default"), rtol=1e-4, atol=1e-5)


def test_an_adapter_without_a_part_of_a_layer_has_no_pieces_there():
    model = get_peft_model(tiny.base(hidden=64), make_config("sparse-entry", target_modules=["q_proj"]))
    model.add_adapter("other", make_config("low_rank-entry", target_modules=["v_proj"]))
    for layer in adapter_layers(model):
        assert bool(layer.pieces("other")) == (layer.module_name.endswith("v_proj"))
    assert [layer.module_name for layer in adapter_layers(model, adapter_name="other")] == [
        f"model.layers.{i}.self_attn.v_proj" for i in range(2)
    ]
    with pytest.raises(ValueError, match=r"adapter_name='third' is no adapter.*\['default', 'other'\]"):
        adapter_layers(model, adapter_name="third")


def test_factors_of_two_dtypes_are_added_in_the_wider_one():
    # model.half() leaves bases that are kept in fp32 as they are: spectral_lora multiplies them by an fp16 core.
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(shape, generator=generator) for shape in ((5, 3), (3, 4)))
    weight = torch.ones(5, 4, dtype=torch.float16)
    LowRank(B, A.half(), scale=2.0).add_(weight)
    expected = 1 + 2 * B.double() @ A.half().double()
    assert weight.dtype == torch.float16
    torch.testing.assert_close(weight.double(), expected, rtol=1e-3, atol=1e-3)
