"""The code of a support: what goes in comes out, and nothing damaged gets through."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_peft.sparsity import (
    GRANULARITIES,
    UnitGrid,
    codes_length,
    decode_support,
    encode_support,
    random_units,
)


@st.composite
def supports(draw):
    kind = draw(st.sampled_from(GRANULARITIES))
    rows, cols = 4 * draw(st.integers(1, 40)), 4 * draw(st.integers(1, 140))
    grid = UnitGrid(rows, cols, kind, block_size=4)
    n = grid.num_units
    density = draw(st.sampled_from([0.0, 0.002, 0.05, 0.5, 1.0]))
    keep = torch.rand(n, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32)))) < density
    for edge in draw(st.sets(st.sampled_from([0, n - 1]))):
        keep[edge] = True
    units = keep.nonzero().squeeze(1).to(draw(st.sampled_from([torch.int32, torch.int64])))
    capacity = draw(st.integers(units.numel(), n))
    return grid, units, capacity


def lines_of(grid: UnitGrid) -> tuple[int, int]:
    """Lines and units of a line: the rows of a weight, unless chunks would waste more than half a row."""
    wide = grid.granularity == "entry" and -(-grid.cols // 255) * 255 <= 1.5 * grid.cols
    return (grid.rows, grid.cols) if wide else (1, grid.num_units)


def decode_by_hand(codes: torch.Tensor, grid: UnitGrid) -> list[int]:
    """The format's definition, a byte at a time."""
    lines, length = lines_of(grid)
    chunks = [(line, first) for line in range(lines) for first in range(0, length, 255)]
    counts, places = codes[24 : 24 + len(chunks)].tolist(), iter(codes[24 + len(chunks) :].tolist())
    units = [
        line * length + first + next(places)
        for (line, first), count in zip(chunks, counts, strict=True)
        for _ in range(count)
    ]
    assert not any(places), "bytes behind the last place"
    return units


@given(supports())
@settings(max_examples=100, deadline=None)
def test_every_support_survives_the_round_trip(case):
    grid, units, capacity = case
    codes = encode_support(units, grid, capacity)
    assert codes.dtype == torch.uint8
    assert tuple(codes.shape) == (codes_length(grid, capacity),)
    lines, length = lines_of(grid)
    assert codes.numel() == 24 + capacity + lines * -(-length // 255)
    back = decode_support(codes, grid, capacity, "m")
    assert back.dtype == grid.index_dtype
    assert back.tolist() == units.tolist() == decode_by_hand(codes, grid)


@given(supports(), st.data())
@settings(max_examples=100, deadline=None)
def test_no_single_damaged_byte_gets_through(case, data):
    grid, units, capacity = case
    codes = encode_support(units, grid, capacity)
    at = data.draw(st.integers(0, codes.numel() - 1))
    codes[at] = int(codes[at]) ^ data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match=r"'layers\.3\.q_proj'"):
        decode_support(codes, grid, capacity, "layers.3.q_proj")


@given(supports(), st.data())
@settings(max_examples=50, deadline=None)
def test_truncated_or_extended_buffers_are_refused(case, data):
    grid, units, capacity = case
    codes = encode_support(units, grid, capacity)
    cut = codes[: data.draw(st.integers(0, codes.numel() - 1))]
    with pytest.raises(ValueError, match=r"'m' .*truncated"):
        decode_support(cut, grid, capacity, "m")
    with pytest.raises(ValueError, match="'m' "):
        decode_support(torch.cat((codes, codes[-1:])), grid, capacity, "m")


GRID = UnitGrid(32, 64)
UNITS = torch.tensor([0, 7, 254, 255, 256, 1100, 2047])


def resealed(**changes):
    """A buffer with a changed header field and every other check in order."""
    fields = ["magic", "version", "granularity", "block_size", "count", "rows", "cols", "crc"]
    codes = encode_support(UNITS, GRID, 10)
    values = dict(zip(fields, struct.unpack("<2sBBIIIII", bytes(codes[:24].tolist())), strict=True)) | changes
    codes[:24] = torch.tensor(list(struct.pack("<2sBBIIIII", *values.values())), dtype=torch.uint8)
    return codes


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(codes_length(GRID, 10), dtype=torch.uint8), "not yet written"),
        (resealed(magic=b"XX"), "not support codes"),
        (resealed(version=9), "version 9.*reads version 1"),
        (resealed(rows=64, cols=32), "64x32.*32x64"),
        (resealed(granularity=2), "'row'.*'entry'"),
        (resealed(granularity=200), "code 200"),
        (resealed(block_size=16), "block_size=16.*block_size=0"),
        (resealed(count=11), "11 units; its capacity is 10"),
        (resealed(count=6), "6 units, but 7"),
        (resealed(crc=1), "checksum"),
        (encode_support(UNITS, GRID, 10).to(torch.float32), "torch.uint8.*torch.float32"),
        (encode_support(UNITS, GRID, 10)[None], "1-D"),
        (encode_support(UNITS, GRID, 11), "capacity=10"),
        (encode_support(UNITS, GRID, 10)[:5], "5 bytes.*truncated"),
        (encode_support(UNITS, GRID, 10).to("meta"), "meta"),
    ],
)
def test_each_kind_of_damage_has_its_own_message(codes, message):
    with pytest.raises(ValueError, match=f"'down_proj'.*{message}"):
        decode_support(codes, GRID, 10, "down_proj")


@pytest.mark.parametrize(
    ("counts", "places", "message"),
    [
        ([0] * 8 + [1], [8], "out of range"),  # 2048 units: the last chunk has 8
        ([1] + [0] * 8, [255], "out of range"),
        ([2] + [0] * 7 + [0], [5, 5], "out of order"),
        ([2] + [0] * 7 + [0], [5, 4], "out of order"),
        ([3] + [0] * 8, [1, 2], "2 units, but 3"),
    ],
)
def test_forged_buffers_are_refused_even_with_a_valid_checksum(counts, places, message):
    import zlib

    payload = torch.tensor(counts + places + [0] * (10 - len(places)), dtype=torch.uint8)
    header = struct.pack("<2sBBIIIII", b"SU", 1, 0, 0, len(places), 32, 64, zlib.crc32(payload.numpy()))
    codes = torch.cat([torch.tensor(list(header), dtype=torch.uint8), payload])
    with pytest.raises(ValueError, match=f"'m' .*{message}"):
        decode_support(codes, GRID, 10, "m")


def test_a_place_beyond_a_narrow_last_chunk_of_a_row_is_refused():
    import zlib

    grid = UnitGrid(2, 400)  # chunks of 255 and 145, twice
    codes = encode_support(torch.tensor([256, 401]), grid, 2)
    assert decode_support(codes, grid, 2, "m").tolist() == [256, 401]
    codes[24 + 4] = 145
    codes[20:24] = torch.tensor(list(struct.pack("<I", zlib.crc32(codes[24:].numpy()))), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"'m' .*out of range"):
        decode_support(codes, grid, 2, "m")


def test_block_size_is_part_of_the_layout():
    codes = encode_support(torch.tensor([1]), UnitGrid(32, 64, "block", 16), 2)
    with pytest.raises(ValueError, match=r"block_size=16.*block_size=8"):
        decode_support(codes, UnitGrid(32, 64, "block", 8), 2, "m")


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (torch.tensor([3, 2]), "sorted"),
        (torch.tensor([3, 3]), "sorted"),
        (torch.tensor([-1, 3]), "non-negative"),
        (torch.tensor([5, 2048]), "2048 is out of range"),
        (torch.arange(11), "11 units do not fit .*capacity=10"),
        (torch.tensor([1.0]), "integer"),
        (torch.tensor([[1]]), "1-D"),
        (torch.tensor([True]), "integer"),
    ],
)
def test_what_is_no_support_is_not_encoded(units, message):
    with pytest.raises(ValueError, match=message):
        encode_support(units, GRID, 10)


@pytest.mark.parametrize("capacity", [-1, 2049])
def test_capacity_stays_within_the_weight(capacity):
    with pytest.raises(ValueError, match=f"capacity={capacity} .* 2048"):
        codes_length(GRID, capacity)


def test_half_a_million_units_code_in_1_4_bytes_each():
    grid = UnitGrid(4096, 11008)
    k = grid.count_for_density(0.01)
    units = random_units(grid.num_units, k, torch.Generator().manual_seed(0))
    codes = encode_support(units, grid, k)
    back = decode_support(codes, grid, k, "m")
    assert torch.equal(back, units)
    assert codes.numel() / k < 1.4


def test_the_format_does_not_drift():
    """Bytes written by version 1: files in the wild must keep loading."""
    codes = encode_support(torch.tensor([0, 2, 300]), UnitGrid(16, 32), 4)
    assert codes[24:].tolist() == [2, 1, 0, 0, 2, 45, 0]
    assert bytes(codes[:20].tolist()).hex() == "5355" + "01" + "00" + "00000000" + "03000000" + "10000000" + "20000000"
