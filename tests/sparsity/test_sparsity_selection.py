"""Exact top-k with ties, random supports, seeds."""

import math

import processes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ties import best

from hf_sparse_peft.sparsity import UnitGrid, random_units, select_units, stream_seed, top_units
from hf_sparse_peft.sparsity import selection as selection_module

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


# Few distinct values give many ties; the neighbours of 1 differ in one low bit.
tied = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 1.0000001, 1.0000002, 3.5, 65504.0, 1e-7, -1e-7])
wide = st.floats(width=32, allow_nan=False)


@st.composite
def chunked_scores(draw):
    dtype = draw(st.sampled_from(DTYPES))
    values = draw(st.lists(draw(st.sampled_from([tied, wide, st.one_of(tied, wide)])), max_size=80))
    scores = torch.tensor(values, dtype=torch.float64).to(dtype)
    cuts = sorted(draw(st.lists(st.integers(0, len(values)), max_size=5)))
    chunks = [scores[a:b] for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True)]
    return scores, chunks, draw(st.integers(0, len(values))), draw(st.booleans())


@given(chunked_scores())
@settings(max_examples=100, deadline=None)
def test_top_units_are_the_brute_force_ones_however_chunked(case):
    scores, chunks, k, largest = case
    expected = best(scores.double().tolist(), k, largest)
    for given_as in (scores, chunks, tuple(chunks), lambda: iter(chunks)):
        units = top_units(given_as, k, largest)
        assert units.dtype == torch.int32
        assert units.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [True, False])
def test_long_scores_are_split_inside_without_losing_ties(dtype, largest, monkeypatch):
    monkeypatch.setattr(selection_module, "_CPU_CHUNK", 37)
    torch.manual_seed(0)
    scores = (torch.randn(2000) * 4).round().to(dtype) / 4
    for k in (1, 500, 999, 1999, 2000):
        assert top_units(scores, k, largest).tolist() == best(scores.tolist(), k, largest)


def test_strided_and_graph_attached_scores_are_read_as_they_are():
    scores = torch.arange(10.0).flip(0).repeat_interleave(2)[::2].requires_grad_()
    assert top_units(scores, 3).tolist() == [0, 1, 2]


def test_a_generator_is_refused_because_it_cannot_be_read_twice():
    with pytest.raises(ValueError, match="callable"):
        top_units((c for c in [torch.ones(3)]), 1)


@pytest.mark.parametrize(
    ("scores", "k", "message"),
    [
        (torch.tensor([1.0, math.nan]), 1, "NaN"),
        ([torch.ones(2), torch.tensor([math.nan], dtype=torch.float32)], 1, "NaN"),
        (torch.tensor([-math.inf, math.nan]).bfloat16(), 1, "NaN"),
        (torch.ones(3), 4, "k=4 .* between 0 and 3"),
        (torch.ones(3), -1, "k=-1"),
        (torch.empty(0), 1, "k=1"),
        (torch.ones(2, 2), 1, "1-D"),
        (torch.ones(3, dtype=torch.int64), 1, "torch.int64"),
        ([torch.ones(3), torch.ones(3).half()], 1, "one dtype"),
        ([torch.ones(3).bfloat16(), torch.ones(3).half()], 1, "one dtype"),
    ],
)
def test_scores_without_an_order_are_refused(scores, k, message):
    with pytest.raises(ValueError, match=message):
        top_units(scores, k)


def test_scores_that_change_between_passes_are_noticed():
    passes = iter(range(100))

    def changing():
        return [torch.arange(100.0) + 1000.0 * next(passes)]

    with pytest.raises(ValueError, match="changed between two passes"):
        top_units(changing, 50)


PEAK = """
import resource, sys, torch
from hf_sparse_peft.sparsity import UnitGrid, select_units
weight = torch.empty(4096, 11008, dtype=torch.bfloat16)
for rows in weight.split(64):
    rows.copy_(torch.randn(rows.shape))
grid = UnitGrid(4096, 11008)
select_units("magnitude", weight[:8], UnitGrid(8, 11008), 100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
units = select_units("magnitude", weight, grid, grid.count_for_density(0.01))
assert units.numel() == 450887
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (weight.numel() * 2))
"""


@pytest.mark.slow
def test_selecting_one_percent_of_a_7b_projection_stays_below_twice_its_bytes():
    done = processes.python("-c", PEAK, check=True)
    assert float(done.stdout) < 2.0


def test_the_units_of_a_7b_projection_are_those_above_one_threshold():
    torch.manual_seed(0)
    weight = torch.randn(1024, 11008).bfloat16()
    grid = UnitGrid(1024, 11008)
    units = select_units("magnitude", weight, grid, grid.count_for_density(0.01))
    score = weight.abs().float().reshape(-1)
    threshold = score[units.long()].min()
    assert int((score > threshold).sum()) < units.numel() <= int((score >= threshold).sum())


@given(st.integers(0, 3000), st.integers(0, 2**40), st.data())
@settings(max_examples=100, deadline=None)
def test_random_units_are_exact_distinct_sorted_and_in_range(num_units, seed, data):
    k = data.draw(st.sampled_from(sorted({0, min(1, num_units), num_units // 100, num_units // 2, num_units})))
    units = random_units(num_units, k, torch.Generator().manual_seed(seed))
    assert units.dtype == torch.int32
    assert len(set(units.tolist())) == k == units.numel()
    assert units.tolist() == sorted(units.tolist())
    assert all(0 <= u < num_units for u in units.tolist())
    assert torch.equal(units, random_units(num_units, k, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(("num_units", "k"), [(97, 2), (12, 3), (12, 6), (12, 9), (600, 10)])
def test_random_units_are_uniform_in_every_branch(num_units, k):
    draws = 1500
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(num_units)
    for _ in range(draws):
        counts[random_units(num_units, k, generator).long()] += 1
    p = k / num_units
    # Sampling without replacement: the statistic is (N - 1)/N of a chi-square with N - 1 degrees of freedom.
    chi = float(((counts - draws * p) ** 2 / (draws * p * (1 - p))).sum()) * (num_units - 1) / num_units
    freedom = num_units - 1
    assert abs(chi - freedom) < 4 * math.sqrt(2 * freedom)


def test_random_pairs_are_uniform_too():
    """Equal shares per unit could hide a preference for neighbours: all 15 pairs of 6 units must be as likely."""
    generator, counts = torch.Generator().manual_seed(2), {}
    for _ in range(1500):
        pair = tuple(random_units(6, 2, generator).tolist())
        counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 15
    assert sum((c - 100) ** 2 / 100 for c in counts.values()) < 14 + 4 * math.sqrt(28)


def test_random_units_leave_the_global_rng_alone():
    before = torch.get_rng_state()
    random_units(10_000, 5, torch.Generator().manual_seed(0))
    random_units(100, 50, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_few_of_two_billion_units_need_no_memory_per_unit():
    units = random_units(2**31 + 11, 20, torch.Generator().manual_seed(0))
    assert units.dtype == torch.int64
    assert units.unique().numel() == 20


@pytest.mark.parametrize(("k", "generator"), [(6, torch.Generator()), (-1, torch.Generator()), (2, None)])
def test_impossible_random_requests_are_refused(k, generator):
    with pytest.raises(ValueError, match=r"k=|generator=None"):
        random_units(5, k, generator)


def test_seeds_are_the_same_in_every_process():
    # A constant from another process: Python's salted hash would not meet it twice.
    assert stream_seed(3, "layers.0.q_proj", 20) == 879339038747616237


def test_seeds_tell_their_parts_apart_and_fit_a_generator():
    seeds = [stream_seed(0, "a", "bc"), stream_seed(0, "ab", "c"), stream_seed(0, 1), stream_seed(0, "1")]
    seeds += [stream_seed(0), stream_seed(1), stream_seed(-1), stream_seed(0, 0)]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)
    with pytest.raises(ValueError, match=r"0\.5"):
        stream_seed(0, 0.5)
