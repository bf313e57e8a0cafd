"""Batches of one task each under DDP: all ranks have the same task, and train what one process trains."""

from pathlib import Path

import processes
import pytest
import task_ranks_script
import torch

pytestmark = pytest.mark.slow


def test_two_ranks_have_the_same_task_at_every_step_and_train_what_one_process_trains(tmp_path):
    task_ranks_script.main(tmp_path)
    processes.ranks(2, Path(task_ranks_script.__file__), tmp_path)
    names = ("world2-rank0", "world2-rank1", "world1-rank0")
    first, second, single = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in names)
    assert first["tasks"] == second["tasks"] == single["tasks"]
    assert set(single["tasks"]) == {"a", "b"}
    for name, tensor in first["tensors"].items():
        assert torch.equal(tensor, second["tensors"][name]), name
        torch.testing.assert_close(tensor, single["tensors"][name], rtol=1e-3, atol=1e-4)
