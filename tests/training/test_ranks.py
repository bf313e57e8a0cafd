"""Ranks in loops of one's own: unlike at the start; adapters that are sharded and move; shards of replicas, and
offloaded ones.

`python -m pytest -m slow tests/training/test_ranks.py`
"""

import json
from pathlib import Path

import processes
import pytest
import ranks_script
import torch

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ranks_script.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found, two = (
        tmp_path_factory.mktemp("ranks"),
        [case for case in ranks_script.CASES if case not in ranks_script.FOUR],
    )
    alone = [*ranks_script.ALIKE, *ranks_script.FOUR]
    for world, cases in ((1, alone), (2, two), (4, [*ranks_script.FOUR])):
        (found / str(world)).mkdir()
        processes.ranks(world, SCRIPT, found / str(world), json.dumps(cases))
    return found


def ends(folder, case, world=2):
    return [torch.load(folder / str(world) / f"{case}-rank{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("case", [*ranks_script.ALIKE, *ranks_script.FOUR])
def test_sharded_runs_end_where_one_process_does(case, folder):
    (alone,), ranks = ends(folder, case, 1), ends(folder, case, 4 if case in ranks_script.FOUR else 2)
    assert not [text for text in (alone, *ranks) if isinstance(text, str)]
    for one in ranks:
        assert_equal(one, ranks[0])
    for name, tensor in alone.items():
        room = 2e-5 if tensor.is_floating_point() else 0.0
        torch.testing.assert_close(
            ranks[0][name], tensor, rtol=room, atol=room, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_moves_of_ranks_that_may_end_early_are_refused(folder):
    assert all("Join" in text and "as many batches" in text for text in ends(folder, "joined"))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_that_drew_other_adapters_train_the_first_ones_and_say_so(kind, folder):
    one, two = ends(folder, f"unlike-{kind}")
    assert isinstance(one, dict), one
    unlike = {name for name in one["before"] if not torch.equal(one["before"][name], two["before"][name])}
    assert {name.split("sparse_lora_")[1].partition(".")[0] for name in unlike} >= {"A", "support"}
    assert_equal(one["end"], two["end"])
    assert any(not torch.equal(one["end"][name], one["before"][name]) for name in unlike if "support" in name)
    for told in (one["told"], two["told"]):
        assert len(told) == 1
        assert "differed between ranks" in told[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_with_adapters_of_other_sizes_are_refused_on_all(kind, folder):
    for text in ends(folder, f"shapes-{kind}"):
        assert "ValueError: Ranks hold adapters of other tensors" in text
