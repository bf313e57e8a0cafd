"""Checkpoints of FSDP2, full and sharded, lead to where the whole run went: to the bit on as many processes, to
rounding on twice as many.

`python -m pytest -m slow tests/training/test_fsdp_resume.py`
"""

import json
from pathlib import Path

import processes
import pytest
import torch

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("fsdp_resume_script.py")
KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
CASES = {
    "regrow": {},
    "prune with a head": {"schedule": "prune", "head": True},
    "sample": {"schedule": "sample"},
    "losia": {"schedule": "losia"},  # whose checkpoint has state that is there at some steps only
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where each run wrote: `<case>-<kind>`, and below its name with what it is resumed on."""
    folder = tmp_path_factory.mktemp("resumed")
    two, four = [], []
    for name, options in CASES.items():
        for kind in KINDS:
            out = str(folder / f"{name}-{kind}")
            goes_on = {"kind": kind, "resume": f"{out}/checkpoint-4", **options}
            two += [{"out": out, "kind": kind, **options}, {"out": f"{out}-on-2", **goes_on}]
            four += [{"out": f"{out}-on-4", **goes_on}]
    processes.ranks(2, SCRIPT, json.dumps(two))
    processes.ranks(4, SCRIPT, json.dumps(four))
    return folder


def ends(folder: Path, world: int) -> list:
    return [torch.load(folder / f"end-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_ends_where_the_whole_one_does(name, kind, runs):
    whole = ends(runs / f"{name}-{kind}", 2)[0]
    for world, close in ((2, 0.0), (4, 1e-5)):
        for found in ends(runs / f"{name}-{kind}-on-{world}", world):
            assert not isinstance(found, str), found
            assert found.keys() == whole.keys()
            for key, tensor in whole.items():
                room = close if tensor.is_floating_point() else 0.0
                torch.testing.assert_close(
                    found[key], tensor, rtol=room, atol=room, msg=lambda m, key=key: f"{key}: {m}"
                )


@pytest.mark.parametrize("name", CASES)
def test_both_kinds_of_checkpoint_hold_the_same(name, runs):
    full, sharded = (ends(runs / f"{name}-{kind}-on-2", 2)[0] for kind in KINDS)
    assert all(torch.equal(sharded[key], tensor) for key, tensor in full.items())


def test_the_adapter_is_saved_whole(runs):
    from peft import PeftModel
    from training_toolbox import tiny_llama

    name = f"regrow-{KINDS[0]}"
    model = PeftModel.from_pretrained(tiny_llama(layers=2), str(runs / name / "end"))
    state = model.state_dict()
    for key, tensor in ends(runs / name, 2)[0].items():
        assert torch.equal(state[key], tensor), key


def test_a_checkpoint_in_the_middle_of_a_turn_says_which_state_it_has(runs):
    for kind in KINDS:
        state = json.loads((runs / f"losia-{kind}" / "checkpoint-4" / "trainer_state.json").read_text())
        restored = state["stateful_callbacks"]["RuleRunner"]["attributes"]["restored"]
        (passing,) = restored["passing"]["default"].values()
        assert passing == ["subnet_importance", "subnet_uncertainty"]
