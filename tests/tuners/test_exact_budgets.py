"""A budget in entries is that number, also where its share of a large model is no float."""

import pytest

from hf_sparse_peft.sparsity import Global, Numbers, Targets, UnitGrid


@pytest.mark.parametrize(("entries", "size"), [(29718331, 930718711), (14155776, 85054464), (7667712, 85054464)])
def test_a_ranking_of_a_large_model_has_exactly_num_entries(entries, size):
    grids = {"first": UnitGrid(1, size - 1000), "second": UnitGrid(10, 100)}
    assert Global(Numbers(entries)).units_by_data(Targets(grids)) == entries
