"""LoRA-LEGO: the worked pair, invariances, and the sum as its limit."""

import pytest
import torch

from hf_sparse_peft.merging import RankClusters, merge_adapters
from hf_sparse_peft.sparsity import UnitGrid
from hf_sparse_peft.tuners.shared.pieces import Entries, LowRank


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float32)


FIRST, SECOND = LowRank(row(2, 0).t(), row(1, 0)), LowRank(row(0, 1).t(), row(0, 1))


def dense(method, *adapters, weights=None):
    weights = weights or [1.0] * len(adapters)
    shape = (adapters[0][0].B.shape[0], adapters[0][0].A.shape[1])
    ((_, (piece,)),) = method.results({"w": [list(one) for one in adapters]}, {"w": shape}, weights)
    update = torch.zeros(shape)
    piece.add_(update)
    return update


def drawn(seed, r=3, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(6, r, generator=generator), torch.randn(r, 5, generator=generator), scale=scale,
        gate=torch.linspace(-1, 1, r),
    )  # fmt: skip


def test_two_units_of_unequal_halves_in_one_cluster():
    method = RankClusters(1, balanced=False, align_signs=False)
    expected = torch.tensor([[0.951754, 0.951754], [0.475877, 0.475877]])
    torch.testing.assert_close(dense(method, [FIRST], [SECOND]), expected, atol=1e-6, rtol=0)


def test_a_unit_and_its_negative_are_one_component_where_signs_are_aligned():
    negative = LowRank(-FIRST.B, -FIRST.A)
    aligned = RankClusters(1, balanced=False)
    torch.testing.assert_close(dense(aligned, [FIRST], [negative]), torch.tensor([[2.0, 0], [0, 0]]))
    plain = RankClusters(1, balanced=False, align_signs=False)
    assert not dense(plain, [FIRST], [negative]).any()
    pair = LowRank(-SECOND.B, -SECOND.A)
    torch.testing.assert_close(dense(aligned, [FIRST], [SECOND]).abs(), dense(aligned, [FIRST], [pair]).abs())


def test_the_scale_of_a_component_does_not_matter_where_units_are_balanced():
    other = LowRank(FIRST.B / 5, FIRST.A * 5)
    for method, same in ((RankClusters(1), True), (RankClusters(1, balanced=False), False)):
        equal = torch.allclose(dense(method, [FIRST], [SECOND]), dense(method, [other], [SECOND]), atol=1e-6)
        assert equal == same


def test_as_many_clusters_as_components_are_the_weighted_sum_exactly():
    pieces, weights = [drawn(0), drawn(1)], [0.5, -2.0]
    expected = torch.zeros(6, 5)
    for piece, weight in zip(pieces, weights, strict=True):
        expected += weight * piece.scale * (piece.B * piece.gate) @ piece.A
    found = dense(RankClusters(6), *[[piece] for piece in pieces], weights=weights)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    duplicates = dense(RankClusters(6), [pieces[0]], [pieces[0]])
    torch.testing.assert_close(duplicates, 2 * dense(RankClusters(6), [pieces[0]]), atol=1e-5, rtol=1e-5)


def test_two_equal_adapters_give_one_of_them_and_the_order_of_components_does_not_matter():
    piece = drawn(2)
    order = torch.tensor([2, 0, 1])
    turned = LowRank(piece.B[:, order], piece.A[order], piece.gate[order], piece.scale)
    expected = piece.scale * (piece.B * piece.gate) @ piece.A
    alive = int((piece.gate != 0).sum())
    torch.testing.assert_close(dense(RankClusters(alive), [piece], [turned]), expected, atol=1e-5, rtol=1e-5)


def test_the_number_of_clusters_is_kept_where_units_are_equal():
    piece = LowRank(torch.ones(6, 4), torch.ones(4, 5))
    ((_, (found,)),) = RankClusters(3).results({"w": [[piece]]}, {"w": (6, 5)}, [1.0])
    assert found.A.shape[0] == 3
    assert bool(torch.isfinite(found.A).all())


def test_output_reweighting_multiplies_by_the_root_of_the_ranks_ratio():
    pieces = [[drawn(0)], [drawn(1)]]
    plain, scaled = (dense(RankClusters(1, output=kind), *pieces) for kind in ("none", "sqrt"))
    torch.testing.assert_close(scaled, plain * 2**0.5, atol=1e-5, rtol=1e-5)  # two components live in each: r = 2


def test_supports_are_refused_by_name_and_loras_are_merged_from_files(adapter, updates, tmp_path):
    entries = Entries(torch.tensor([1]), torch.ones(1), UnitGrid(6, 5))
    with pytest.raises(ValueError, match=r"'w' has entries"):
        list(RankClusters().results({"w": [[entries]]}, {"w": (6, 5)}, [1.0]))
    folders = [adapter("lora"), adapter("rs-lora")]
    report = merge_adapters(folders, tmp_path / "m", "lora-lego", clusters=99, form="lora", show_progress=False)
    found, first, second = (updates(folder) for folder in (tmp_path / "m", *folders))
    for name, update in found.items():
        torch.testing.assert_close(update, first[name] + second[name], atol=1e-4, rtol=1e-3)
    assert set(report.ranks.values()) == {5, 7}
    fewer = merge_adapters(folders, tmp_path / "k", "lora-lego", clusters=2, show_progress=False)
    assert set(fewer.ranks.values()) == {2}
