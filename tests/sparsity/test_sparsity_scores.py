"""Scores against their formula in float64, and selection by name."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from peft import PeftConfig, get_peft_model

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.sparsity import (
    GRANULARITIES,
    LowRankMagnitude,
    Magnitude,
    Random,
    Score,
    SmallestMagnitude,
    UnitGrid,
    select_units,
    top_units,
)
from hf_sparse_peft.sparsity import scores as scores_module
from hf_sparse_peft.sparsity import selection as selection_module
from hf_sparse_peft.sparsity.scores import chunks_of
from hf_sparse_peft.utils.parts import part_types, register_part


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def per_unit(entries: torch.Tensor, grid: UnitGrid) -> torch.Tensor:
    """Sum over each unit's entries, one unit at a time, in float64."""
    flat = entries.double().reshape(-1)
    return torch.stack([flat[grid.entry_positions(torch.tensor([u]))[0]].sum() for u in range(grid.num_units)])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(selection_module, "_CPU_CHUNK", 50)
    monkeypatch.setattr(scores_module, "_PRODUCT", 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", GRANULARITIES)
def test_unit_scores_are_the_sums_of_their_entries_slab_by_slab(kind, transposed, dtype, small_chunks):
    torch.manual_seed(0)
    grid = UnitGrid(24, 20, kind, block_size=4)
    weight = (torch.randn(20, 24).t() if transposed else torch.randn(24, 20)).to(dtype)
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    low_rank = (u[:, :3] * s[:3]) @ vt[:3]
    for score, expected in [
        (Magnitude(), weight.double().abs()),
        (SmallestMagnitude(), -weight.double().abs()),
        (LowRankMagnitude(rank=3, exact=True), low_rank.abs()),
    ]:
        chunks = score(weight, grid, seeded())
        got = torch.cat(list(chunks()))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), per_unit(expected, grid), rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.cat(list(chunks())), got), "a second pass must read the same scores"


def test_every_slab_is_fp32_and_none_is_the_whole_weight():
    weight = torch.randn(2048, 64).bfloat16()
    chunks = list(Magnitude()(weight, UnitGrid(2048, 64))())
    assert len(chunks) > 1
    assert max(c.numel() for c in chunks) <= selection_module._CPU_CHUNK


def test_full_filter_rank_is_plain_magnitude():
    torch.manual_seed(0)
    weight, grid = torch.randn(12, 20), UnitGrid(12, 20)
    for options in ({"rank": 12, "exact": True}, {"rank": 64}):
        assert torch.equal(
            select_units("low_rank_magnitude", weight, grid, 30, generator=seeded(), **options),
            select_units("magnitude", weight, grid, 30),
        )


@pytest.mark.parametrize("exact", [True, False])
def test_rank_one_weight_selects_by_the_outer_product(exact):
    torch.manual_seed(0)
    u, v = torch.randn(40, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    grid = UnitGrid(40, 30)
    units = select_units(
        "low_rank_magnitude", torch.outer(u, v).float(), grid, 50, generator=seeded(), rank=1, exact=exact
    )
    best = torch.outer(u, v).abs().reshape(-1).topk(50).indices.sort().values
    assert units.tolist() == best.tolist()


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_randomised_svd_finds_a_separated_subspace(shape, small_chunks):
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(shape[0], 64)).Q, torch.linalg.qr(torch.randn(shape[1], 64)).Q
    weight = (left * (0.8 ** torch.arange(64.0))) @ right.t()
    grid = UnitGrid(*shape)
    exact = torch.cat(list(LowRankMagnitude(rank=8, exact=True)(weight, grid)()))
    fast = torch.cat(list(LowRankMagnitude(rank=8)(weight, grid, seeded())()))
    torch.testing.assert_close(fast, exact, rtol=0, atol=2e-3 * float(exact.max()))


def test_scores_take_their_noise_from_the_generator_only():
    torch.manual_seed(0)
    weight, grid = torch.randn(40, 30), UnitGrid(40, 30)
    before = torch.get_rng_state()
    for criterion in ("random", "low_rank_magnitude"):
        options = {"rank": 4} if criterion == "low_rank_magnitude" else {}
        first = select_units(criterion, weight, grid, 100, generator=seeded(5), **options)
        torch.rand(3)
        again = select_units(criterion, weight, grid, 100, generator=seeded(5), **options)
        assert torch.equal(first, again)
        torch.set_rng_state(before)
        select_units(criterion, weight, grid, 100, generator=seeded(5), **options)
        assert torch.equal(torch.get_rng_state(), before)


def test_random_scores_repeat_within_a_call_and_differ_between_calls(small_chunks):
    generator, grid = seeded(), UnitGrid(12, 20)
    chunks = Random()(None, grid, generator)
    first = torch.cat(list(chunks()))
    assert first.numel() == 240
    assert torch.equal(torch.cat(list(chunks())), first)
    assert not torch.equal(torch.cat(list(Random()(None, grid, generator)())), first)
    assert top_units(chunks, 7).numel() == 7


@pytest.mark.parametrize(
    "criterion",
    sorted(name for name, cls in part_types(Score).items() if not cls.needs_data and not name.startswith("test_")),
)
@pytest.mark.parametrize("kind", GRANULARITIES)
def test_every_criterion_gives_an_exact_count_for_every_granularity(criterion, kind):
    torch.manual_seed(0)
    grid = UnitGrid(24, 20, kind, block_size=4)
    weight = torch.randn(24, 20).bfloat16()
    for k in (1, grid.num_units // 2, grid.num_units):
        units = select_units(criterion, weight, grid, k, generator=seeded())
        assert units.dtype == grid.index_dtype
        assert units.numel() == k == units.unique().numel()
        assert torch.equal(units, units.sort().values)


def test_smallest_magnitude_is_the_other_end_of_magnitude():
    weight, grid = torch.tensor([[0.1, -3.0], [2.0, -0.2]]), UnitGrid(2, 2)
    assert select_units("smallest_magnitude", weight, grid, 2).tolist() == [0, 3]
    assert select_units("magnitude", weight, grid, 2).tolist() == [1, 2]


def test_random_needs_no_weight():
    assert select_units("random", None, UnitGrid(8, 8), 5, generator=seeded()).numel() == 5


@pytest.mark.parametrize(
    ("criterion", "weight", "options", "message"),
    [
        ("fischer", torch.ones(4, 4), {}, "criterion='fischer'.*low_rank_magnitude, magnitude, momentum"),
        ("magnitude", torch.ones(4, 4), {"rank": 3}, "criterion='magnitude' does not take rank.*none"),
        ("low_rank_magnitude", torch.ones(4, 4), {"rnak": 3}, "does not take rnak.*rank, oversampling"),
        ("low_rank_magnitude", torch.ones(4, 4), {"rank": 0}, "rank=0"),
        ("low_rank_magnitude", torch.ones(4, 4), {"oversampling": -1}, "oversampling=-1"),
        ("low_rank_magnitude", torch.ones(4, 4), {"rank": 1}, "needs a generator"),
        ("random", None, {}, "generator"),
        ("magnitude", None, {}, "criterion='magnitude'.*None"),
        ("magnitude", torch.ones(4, 3), {}, r"\(4, 3\).*4x4"),
        ("magnitude", torch.ones(4, 4).to(torch.uint8), {}, "torch.uint8.*dequantised"),
        ("magnitude", torch.ones(4, 4, device="meta"), {}, "meta"),
        ("magnitude", torch.full((4, 4), float("nan")), {}, "NaN"),
    ],
)
def test_requests_that_cannot_be_met_say_why(criterion, weight, options, message):
    with pytest.raises(ValueError, match=message):
        select_units(criterion, weight, UnitGrid(4, 4), 2, generator=None, **options)


@register_part("test_first_columns")
@dataclass(frozen=True)
class FirstColumns(Score):
    """A score from outside the package: columns in their order."""

    weight_of_columns: float = 1.0

    def __call__(self, weight, grid, generator=None):
        ranks = -torch.arange(grid.cols, dtype=torch.float32) * self.weight_of_columns
        return chunks_of(lambda begin, end: ranks.expand(end - begin, -1), grid, 1 << 10)


def test_a_registered_score_chooses_the_first_support(tmp_path):
    config = SparseLoraConfig(
        r=0, density=0.25, granularity="column", target_modules=["q_proj"], criterion="test_first_columns"
    )
    model = get_peft_model(tiny.llama(layers=1), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.units("default").tolist() == list(range(8))
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).criterion == FirstColumns()
    by_options = SparseLoraConfig(criterion={"type": "test_first_columns", "weight_of_columns": -1.0})
    assert by_options.criterion == FirstColumns(-1.0)
