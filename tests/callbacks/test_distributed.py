"""Two processes decide as one: supports, ranks and values on both ranks, and against one process with their batch.

The fast case runs with the others; `python -m pytest -m slow tests/callbacks/test_distributed.py` runs every method.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sparse_peft import methods

HERE = Path(__file__).parent
MOVES = {"density": 0.1, "interval": 3, "collect_steps": 2}
CASES = {
    "spiel-ag": MOVES,
    "gradual-pruning": {"density": 0.1, "pruning": {"final_fraction": 0.5, "interval": 2, "begin": 0.0, "end": 0.7}},
    "adalora": {
        "r": 4,
        "rank_allocation": {"target_r": 2, "interval": 2, "initial_warmup": 0.0, "final_warmup": 0.3},
    },
}
FAST = ("spiel-ag",)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def steps_of(out: Path, name: str, ranks: int) -> list[list[dict[str, torch.Tensor]]]:
    """What each rank recorded after every step; raises with the processes' errors."""
    case = {"name": name, "options": CASES[name]}
    port = free_port()
    running = []
    for rank in range(ranks):
        environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        if ranks > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
        command = [sys.executable, str(HERE / "ddp_script.py"), str(out), json.dumps(case)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0] * ranks, "\n".join(e[-3000:] for e in errors)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_both_ranks_agree_after_every_step_and_with_one_process(name, tmp_path):
    for part in ("pair", "single"):
        (tmp_path / part).mkdir()
    first, second = steps_of(tmp_path / "pair", name, 2)
    (single,) = steps_of(tmp_path / "single", name, 1)
    assert len(first) == len(second) == len(single) == 10
    changed = False
    for step, (one, two, alone) in enumerate(zip(first, second, single, strict=True), 1):
        assert one.keys() == two.keys() == alone.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), f"ranks differ after step {step} in {key}"
            if one[key].is_floating_point():
                torch.testing.assert_close(
                    one[key], alone[key], rtol=1e-3, atol=1e-4, msg=lambda text, at=(step, key): f"{at}: {text}"
                )
            else:
                assert torch.equal(one[key], alone[key]), f"two processes differ from one after step {step} in {key}"
                changed = changed or not torch.equal(one[key], first[0][key])
    assert changed or methods.describe(name).moves == "nothing"
