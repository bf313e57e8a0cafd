"""FSDP2 switched on by an accelerate config file, or by its environment alone, in a loop of one's own and in a Trainer;
an error on one rank.

`python -m pytest -m slow tests/training/test_fsdp_loop.py`
"""

import json
import os
from pathlib import Path

import ddp_script
import processes
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "recipes" / "accelerate" / "fsdp.yaml"


def launched() -> dict[str, str]:
    """What `accelerate launch --config_file recipes/accelerate/fsdp.yaml` puts into the environment, in fp32."""
    given = ["--config_file", str(CONFIG), "--mixed_precision", "no", "script.py"]
    args = _validate_launch_command(launch_command_parser().parse_args(given))[0]
    found = prepare_multi_gpu_env(args)
    assert found["FSDP_VERSION"] == "2"
    return {name: value for name, value in found.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def test_a_loop_with_accelerate_moves_as_one_process_does(tmp_path):
    processes.python(HERE / "fsdp_loop_script.py", tmp_path, check=True)
    processes.ranks(2, HERE / "fsdp_loop_script.py", tmp_path, env=launched())
    one, first, second = (
        torch.load(tmp_path / f"steps-{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    assert len(one) == 9
    moved = False
    for step, (alone, mine, others) in enumerate(zip(one, first, second, strict=True)):
        assert alone.keys() == mine.keys()
        for key, tensor in alone.items():
            assert torch.equal(mine[key], others[key])
            room = 1e-5 if tensor.is_floating_point() else 0.0
            torch.testing.assert_close(mine[key], tensor, rtol=room, atol=room, msg=lambda m, key=key: f"{key}: {m}")
            moved = moved or ("support" in key and not torch.equal(tensor, one[0][key]))
        assert step < 2 or alone


def test_a_trainer_finds_fsdp2_in_the_environment(tmp_path):
    cases = {"rigl": {"density": 0.1, "every": 3}}
    assert "WORLD_SIZE" not in os.environ
    alone = tmp_path / "alone"
    alone.mkdir()
    ddp_script.main(alone, cases)
    processes.ranks(2, HERE / "ddp_script.py", tmp_path, json.dumps(cases), "environment", env=launched())
    one, mine = (torch.load(folder / "rigl-rank0.pt", weights_only=True) for folder in (alone, tmp_path))
    for expected, found in zip(one, mine, strict=True):
        for key, tensor in expected.items():
            room = 1e-5 if tensor.is_floating_point() else 0.0
            torch.testing.assert_close(found[key], tensor, rtol=room, atol=room)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_error_on_one_rank_ends_the_other(kind, tmp_path):
    case = {"rigl": {"density": 0.1, "every": 3, "raises": 1}}
    processes.ranks(2, HERE / "ddp_script.py", tmp_path, json.dumps(case), kind, timeout=120)
    first, second = (torch.load(tmp_path / f"rigl-rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert "rank 1 alone" in second
    assert "Connection closed by peer" in first or "Connection reset" in first
