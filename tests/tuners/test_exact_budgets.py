"""A budget in entries is that number, also where its share of a large model is no float."""

from types import SimpleNamespace

import pytest

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.sparsity import UnitGrid
from hf_sparse_peft.training.calibrated_selection import _global_budget


@pytest.mark.parametrize(("entries", "size"), [(29718331, 930718711), (14155776, 85054464), (7667712, 85054464)])
def test_a_ranking_of_a_large_model_has_exactly_num_entries(entries, size):
    grids = [UnitGrid(1, size - 1000), UnitGrid(10, 100)]
    layers = [SimpleNamespace(sparse_lora_grid={"default": grid}) for grid in grids]
    config = SparseLoraConfig(r=0, num_entries=entries, allocation="global", criterion="fisher")
    assert _global_budget(None, config, layers, "default") == entries
