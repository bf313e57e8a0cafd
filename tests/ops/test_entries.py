"""Entries packed into bytes, unpacked for a product, and compacted to the rows and columns that they lie in."""

import itertools
import weakref

import pytest
import torch

from hf_sparse_peft.ops import (
    DenseSource,
    DequantizedSource,
    EntryIndex,
    Plan,
    core,
    live_lines,
    pack_entries,
    sparse_linear,
    support_product,
    units,
    unpack_entries,
)

ROWS, COLS, TOKENS = 30, 40, 14


def drawn(rows, cols, share, seed=0):
    keep = torch.rand(rows * cols, generator=torch.Generator().manual_seed(seed)) < share
    return keep.nonzero().squeeze(1)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 1.0])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 254), (3, 255), (3, 256), (2, 700), (5, 1024), (40, 9)])
def test_packed_entries_come_back_in_every_form(rows, cols, share):
    flat = drawn(rows, cols, share)
    places, counts = pack_entries(flat.int(), rows, cols)
    assert places.dtype == counts.dtype == torch.uint8
    assert unpack_entries(places, counts, rows, cols).tolist() == flat.tolist()
    for index in (EntryIndex(places, counts, rows, cols), EntryIndex(flat.int(), None, rows, cols)):
        starts, columns = index.compressed_rows
        assert index.flat.tolist() == flat.tolist()
        assert columns.tolist() == [unit % cols for unit in flat.tolist()]
        in_row = [sum(unit // cols == row for unit in flat.tolist()) for row in range(rows)]
        assert starts.diff().tolist() == in_row


def test_an_index_takes_a_byte_an_entry_and_one_for_every_255_columns():
    rows, cols = 64, 1024
    places, counts = pack_entries(drawn(rows, cols, 0.03), rows, cols)
    assert counts.nbytes == rows * 5
    assert places.nbytes == places.numel()


def in_a_corner(seed=0, sides=(7, 11), share=0.6):
    """Units, and the rows and columns of a sub-grid, one line of each without a unit."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.randperm(n, generator=generator)[:k].sort().values for n, k in zip((ROWS, COLS), sides, strict=True)
    )
    found = [
        (r, c)
        for r, c in itertools.product(rows.tolist()[1:], columns.tolist()[1:])
        if torch.rand((), generator=generator) < share
    ]
    return torch.tensor([r * COLS + c for r, c in found]), rows, columns


def test_places_in_a_sub_grid_are_those_of_the_gathered_matrix():
    flat, rows, columns = in_a_corner()
    index = EntryIndex(*pack_entries(flat, ROWS, COLS), ROWS, COLS, rows.to(torch.int16), columns.to(torch.int16))
    dense = torch.arange(ROWS * COLS).view(ROWS, COLS)
    assert dense[rows][:, columns].flatten()[index.inside].tolist() == flat.tolist()
    live = live_lines(flat, ROWS, COLS)
    assert live[0].tolist() == sorted({unit // COLS for unit in flat.tolist()})
    assert live[1].tolist() == sorted({unit % COLS for unit in flat.tolist()})


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("product", ["copy", "sparse", "compacted"])
@pytest.mark.parametrize("gradient", ["dense", "sampled", "compacted"])
@pytest.mark.parametrize("kind", ["dense", "transposed", "dequantized", "update alone"])
def test_every_way_of_entries_matches_float64(kind, gradient, product, rank, dtype, monkeypatch):
    for module in (core, units):
        monkeypatch.setattr(module, "entry_gradient_way", lambda *_, **__: gradient)
    monkeypatch.setattr(
        support_product,
        "entry_product_way",
        lambda *_, may_copy=True, **__: product if may_copy or product != "copy" else "sparse",
    )
    flat, rows, columns = in_a_corner(seed=rank)
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    weight = (0 if kind == "update alone" else 1) * randn(ROWS, COLS)
    tensors = {"x": randn(2, TOKENS // 2, COLS).to(dtype), "values": randn(flat.numel()).to(wide)}
    if rank:
        tensors |= {"A": randn(rank, COLS).to(wide), "B": randn(ROWS, rank).to(wide)}
    weight, grad = weight.to(dtype), randn(2, TOKENS // 2, ROWS).to(dtype)

    theirs = {name: t.double().clone().requires_grad_() for name, t in tensors.items()}
    delta = torch.zeros(ROWS * COLS, dtype=torch.float64).index_put((flat,), theirs["values"]).view(ROWS, COLS)
    full = weight.double() + delta + (theirs["B"] @ theirs["A"] if rank else 0)
    expected = theirs["x"] @ full.t()
    expected.backward(grad.double())

    source = {
        "dense": DenseSource(weight),
        "transposed": DenseSource(weight.t().contiguous(), transposed=True),
        "dequantized": DequantizedSource(lambda dtype: weight.to(dtype, copy=True)),
    }.get(kind)
    ours = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    places, counts = pack_entries(flat, ROWS, COLS)
    packed = {"units": places, "counts": counts, "live_rows": rows.short(), "live_columns": columns.short()}
    arguments = {name: leaf for name, leaf in ours.items() if name != "x"}
    y = sparse_linear(ours["x"], Plan(ROWS, COLS, dtype, source), **packed, **arguments)
    y.backward(grad)
    assert relative(y, expected) < TOLERANCE[dtype]
    for name, leaf in ours.items():
        assert relative(leaf.grad, theirs[name].grad) < TOLERANCE[dtype], name


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def run_on(x, flat, rows, columns, reader=None, **more):
    """A layer's product with entries of a sub-grid over `x`, and what is kept of it for the backward pass."""
    kept, values = [], torch.randn(flat.numel(), generator=torch.Generator().manual_seed(0)).requires_grad_()
    plan = Plan(ROWS, COLS, x.dtype, DenseSource(torch.zeros(ROWS, COLS, dtype=x.dtype)), gradient_reader=reader)
    own = {values.untyped_storage().data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = sparse_linear(x, plan, values=values, units=flat, live_rows=rows, live_columns=columns, **more)
    kept = [t for t in kept if t is not None and t.is_floating_point() and t.untyped_storage().data_ptr() not in own]
    return y, values, kept


def leaf(seed=0):
    return torch.randn(TOKENS, COLS, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.fixture
def compacting(monkeypatch):
    """Whatever the table says, entries of a known sub-grid are compacted."""
    for module in (core, units):
        monkeypatch.setattr(module, "entry_gradient_way", lambda *given: "compacted" if given[4] else "dense")


def test_compacted_entries_keep_their_columns_of_the_input_only(compacting):
    _, _, kept = run_on(leaf(), *in_a_corner())
    assert [tuple(t.shape) for t in kept] == [(TOKENS, 11)]


def test_a_reader_and_a_sub_grid_of_many_columns_keep_the_input_whole(compacting):
    seen = []
    _, _, kept = run_on(leaf(), *in_a_corner(), reader=seen.append)
    assert [tuple(t.shape) for t in kept] == [(TOKENS, COLS)]
    _, _, kept = run_on(leaf(), *in_a_corner(sides=(7, 20)))
    assert [tuple(t.shape) for t in kept] == [(TOKENS, COLS)]


def test_no_slice_is_kept_of_an_input_that_another_layer_keeps_whole(compacting):
    x = leaf()
    _, _, kept = run_on(x, drawn(ROWS, COLS, 0.2), None, None)
    assert kept[0].data_ptr() == x.data_ptr()
    y, values, kept = run_on(x, *in_a_corner())
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    y.backward(torch.ones_like(y))
    flat = in_a_corner()[0]
    torch.testing.assert_close(values.grad, (torch.ones(ROWS, TOKENS) @ x.detach()).flatten()[flat])


@pytest.mark.parametrize("corner", [False, True], ids=["free", "in a sub-grid"])
def test_an_input_that_is_a_product_of_two_activations_is_not_kept_and_multiplied_again(corner, compacting):
    flat, rows, columns = in_a_corner() if corner else (drawn(ROWS, COLS, 0.2), None, None)
    gate, up = leaf(1), leaf(2)
    x = torch.nn.functional.silu(gate) * (up + 1)
    reference, alive = x.detach().clone(), weakref.ref(x)
    y, values, kept = run_on(x, flat, rows, columns)
    assert not kept
    del x
    assert alive() is None
    grad = torch.randn(TOKENS, ROWS, generator=torch.Generator().manual_seed(3))
    y.backward(grad)
    torch.testing.assert_close(values.grad, (grad.t() @ reference).flatten()[flat])
    assert gate.grad.any()
    assert up.grad.any()


@pytest.mark.parametrize("kind", ["a frozen factor", "a broadcast factor", "changed in place", "a checkpoint"])
def test_inputs_whose_factors_cannot_be_read_again_are_kept(kind, compacting):
    flat = drawn(ROWS, COLS, 0.2)
    gate, up = leaf(1), leaf(2)
    if kind == "a checkpoint":
        found = []

        def block(gate, up):
            y, values, _ = run_on(torch.sin(gate) * torch.sin(up), flat, None, None)
            found.append(values)
            return y

        grad = torch.ones(TOKENS, ROWS)
        torch.utils.checkpoint.checkpoint(block, gate, up, use_reentrant=False).backward(grad)
        expected = (grad.t() @ (gate.sin() * up.sin())).flatten()[flat]
        torch.testing.assert_close(found[0].grad, expected.detach())
        return
    other = {"a frozen factor": up.detach(), "a broadcast factor": up[:1] + 0}.get(kind, up + 0)
    x = torch.sin(gate) * other
    if kind == "changed in place":
        with torch.no_grad():
            x.add_(1)
    y, values, kept = run_on(x, flat, None, None)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(values.grad, (torch.ones(ROWS, TOKENS) @ x.detach()).flatten()[flat])


def test_packed_entries_that_moved_between_forward_and_backward_are_refused():
    flat = drawn(ROWS, COLS, 0.2)
    places, counts = pack_entries(flat, ROWS, COLS)
    version = [0]
    plan = Plan(ROWS, COLS, torch.float32, units_version=lambda: version[0])
    values = torch.zeros(flat.numel(), requires_grad=True)
    y = sparse_linear(leaf(), plan, values=values, units=places, counts=counts)
    version[0] = 1
    with pytest.raises(RuntimeError, match="moved between"):
        y.sum().backward()
