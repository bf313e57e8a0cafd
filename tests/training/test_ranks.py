"""Ranks that are unlike: in what they begin with.

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
    found = tmp_path_factory.mktemp("ranks")
    processes.ranks(2, SCRIPT, found, json.dumps(list(ranks_script.CASES)))
    return found


def both(folder, case):
    return [torch.load(folder / f"{case}-rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_that_drew_other_adapters_train_the_first_ones_and_say_so(kind, folder):
    one, two = both(folder, f"unlike-{kind}")
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
    for text in both(folder, f"shapes-{kind}"):
        assert "ValueError: Ranks hold adapters of other tensors" in text
