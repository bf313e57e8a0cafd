"""Equal scores are drawn for over the whole weight: uniformly, from a seed, and the same however they are read."""

import collections
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ties import best

from hf_sparse_peft.pruning.reading.one_shot import prunable_layers, pruning_masks
from hf_sparse_peft.sparsity import UnitGrid, global_counts, select_units, stream_seed, top_units, unpack_bits
from hf_sparse_peft.sparsity import selection as selection_module
from hf_sparse_peft.sparsity.ranking import GlobalRanking

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
NF4_LIKE = torch.tensor([-1.0, -0.5, 0.0, 0.0, 0.25, 1.0])


def test_every_tied_pair_is_as_likely_over_seeds():
    """Unit 0 scores highest and unit 7 lowest; of the six equal ones between them two get in: 15 pairs, 60 each."""
    scores = torch.tensor([2.0, 1, 1, 1, 1, 1, 1, 0])
    draws = [tuple(top_units(scores, 3, seed=stream_seed(seed, "layer")).tolist()) for seed in range(900)]
    counts = collections.Counter(draws)
    assert set(counts) == {(0, *pair) for pair in itertools.combinations(range(1, 7), 2)}
    assert sum((c - 60) ** 2 / 60 for c in counts.values()) < 14 + 4 * 28**0.5


@pytest.mark.parametrize("largest", [True, False])
def test_tied_units_are_taken_from_the_whole_weight(largest):
    rows = top_units(torch.zeros(100 * 50), 500, largest).long() // 50
    per_tenth = torch.bincount(rows // 10, minlength=10)
    assert rows.min() == 0
    assert rows.max() == 99
    assert per_tenth.min() > 25  # 50 expected, standard deviation 6.4
    assert per_tenth.max() < 75


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, -3.0]), min_size=1, max_size=60),
    st.integers(-(2**63), 2**64),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_one_seed_draws_the_same_units_whatever_the_chunks_and_the_dtype(values, seed, data):
    k, largest = data.draw(st.integers(0, len(values))), data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=60, max_size=60))
    expected = best(values, k, largest, seed)
    for dtype in DTYPES:
        scores = torch.tensor(values, dtype=dtype)
        chunks, start = [], 0
        for size in sizes:
            chunks.append(scores[start : start + size])
            start += size
        for given_as in (scores, chunks):
            assert top_units(given_as, k, largest, seed).tolist() == expected


def test_a_larger_selection_takes_a_smaller_ones_tied_units_and_more():
    supports = [set(top_units(torch.zeros(300), k, seed=5).tolist()) for k in range(0, 301, 20)]
    assert all(small < large for small, large in itertools.pairwise(supports))


def test_distinct_scores_do_not_look_at_the_seed():
    scores = torch.randperm(500).float()
    assert len({tuple(top_units(scores, 40, seed=seed).tolist()) for seed in range(20)}) == 1


@pytest.mark.parametrize(("scores", "k"), [(torch.arange(5000.0), 100), (torch.tensor([2.0, 1, 1, 0] * 1000), 3000)])
def test_without_a_tie_at_the_cut_no_pass_is_added(scores, k):
    passes = []

    def chunks():
        passes.append(1)
        return iter(scores.split(512))

    top_units(chunks, k)
    assert len(passes) == 4  # three to find the cut in fp32, one to collect


def test_many_long_chunks_of_ties_are_exact(monkeypatch):
    monkeypatch.setattr(selection_module, "_CPU_CHUNK", 37)
    scores = torch.zeros(3000)
    scores[::7] = 1.0
    assert top_units(scores, 1000, seed=3).tolist() == best(scores.tolist(), 1000, seed=3)


@pytest.mark.parametrize("criterion", ["magnitude", "smallest_magnitude"])
def test_weights_of_few_values_are_not_chosen_from_the_first_rows(criterion):
    weight = NF4_LIKE[torch.randint(6, (64, 64), generator=torch.Generator().manual_seed(0))]
    grid = UnitGrid(64, 64)
    units = [select_units(criterion, weight, grid, 200, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    rows = units[0] // 64
    assert rows.max() > 56
    assert rows.min() < 8
    assert torch.equal(units[0], units[1])
    assert not torch.equal(units[0], units[2])


def test_equal_layers_share_a_global_budget_evenly_and_keep_what_they_were_counted():
    grids = {f"block.{i}": UnitGrid(20, 50) for i in range(4)}
    scores = {name: torch.ones(1000) for name in grids}
    counts = global_counts(scores, grids, 2000, seed=1)
    assert sum(counts.values()) == 2000
    assert all(abs(count - 500) < 80 for count in counts.values())  # standard deviation 19
    together = GlobalRanking(2000, seed=1)
    for name in reversed(grids):
        together.add({name: scores[name]})
    for name, units in together.units().items():
        alone = top_units(scores[name], counts[name], seed=stream_seed(1, name))
        assert torch.equal(units, alone)
        assert 0 < int(units[0]) + 1 < 30
        assert int(units[-1]) > 970
    assert not torch.equal(together.units()["block.0"][:100], together.units()["block.1"][:100])


@pytest.mark.parametrize("scope", ["global", "layer", "n:m"])
def test_one_shot_pruning_of_equal_weights_draws_over_all_of_them(scope):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (torch.nn.Linear(40, 40, bias=False) for _ in range(2))

    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    layers = prunable_layers(model, target_modules=["first", "second"])
    masks = {n: unpack_bits(m, 1600).view(40, 40) for n, m in pruning_masks(layers, 0.5, scope, seed=3).items()}
    assert sum(int(mask.sum()) for mask in masks.values()) == 1600
    assert not torch.equal(*masks.values())
    for mask in masks.values():
        by_quarter = mask.view(4, 10, 10, 4).sum((1, 2))  # quarters of the rows x places in a group of four
        assert by_quarter.min() > 25  # 50 expected, standard deviation 5
        assert by_quarter.max() < 75
    more = {n: unpack_bits(m, 1600).view(40, 40) for n, m in pruning_masks(layers, 0.75, scope, seed=3).items()}
    assert all((masks[name] <= more[name]).all() for name in masks)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value):
    weight = torch.rand(8, 8)
    weight[3, 4] = value
    with pytest.raises(ValueError, match=r"'block\.3' contain (infinity|NaN)"):
        select_units("magnitude", weight, UnitGrid(8, 8), 4, name="block.3")
    with pytest.raises(ValueError, match="'a' contain"):
        global_counts({"a": weight.view(-1), "b": torch.rand(64)}, {n: UnitGrid(8, 8) for n in "ab"}, 10)
