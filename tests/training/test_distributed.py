"""Two and four processes decide as one: supports, ranks and values on all ranks, and against one process with their
batch; under DDP, and under FSDP2, which shards the base.

`python -m pytest -m slow tests/training/test_distributed.py` (two processes train each case twice, four some).
"""

import json
import os
from pathlib import Path

import ddp_script
import processes
import pytest
import torch

from hf_sparse_peft import methods

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
MOVES = {"density": 0.1, "every": 3}
CASES: dict[str, dict] = {
    "spiel-ag": {**MOVES, "steps": 2},
    "gradual-pruning": {
        "density": 0.1,
        "schedule": [{"type": "prune", "final_fraction": 0.5, "every": 2, "start": 0.0, "end": 0.7}],
    },
    "adalora": {
        "r": 4,
        "schedule": [
            {
                "type": "allocate",
                "budget": {"type": "average_rank", "r": 2},
                "every": 2,
                "initial_warmup": 0.0,
                "final_warmup": 0.3,
            }
        ],
    },
    "cuttlefish": {
        "r": 4,
        "schedule": [{"type": "stable_rank", "every": 2, "window": 2, "last": 2, "threshold": 10.0, "first": 0}],
    },
    "spiel-ma": MOVES,
    "spiel-ma-with-ties": {"method": "spiel-ma", "score": "min", **MOVES},
    "set": {"density": 0.1, "every": 3},
    "rigl": {"density": 0.1, "every": 3},
    "lift": {"density": 0.1, "every": 3},
    "s2ft": {},
    "s2ft-by-activation": {
        "method": "s2ft",
        "layers": 2,
        "down": 0.1,
        "scope": "block",
        "criterion": "activation",
        "largest": False,
    },
    "s2ft-by-gradient": {"method": "s2ft", "layers": 2, "down": 0.1, "criterion": "gradient"},
    "hft": {"layers": 2, "period_steps": 3},
    "losia": {"layers": 2, "every": 2, "rate": "rewarm"},
    "ist": {"layers": 4, "trained": 0.5, "every": 3, "r": 4},
    "mosa": {"r": 4, "experts": 2},
    "mezo": {},
    "sparse-mezo": {},
    "random-search": {"density": 0.1, "trials": 4, "steps": 3},
    "shira": {"density": 0.1},
    "fish": {"density": 0.1, "examples": 16},
    "lt-sft": {"density": 0.1, "warmup_steps": 3, "warmup_lr": 1e-3},
    "smt": {"attention": 0.02, "block_size": 8, "warmup_steps": 3},
    "lora-sb": {"r": 4, "step_size": 1e-3, "examples": 16},
    "gora": {"r": 4, "steps": 3, "least": 1},
    "joint-budget-at-start": {"method": "joint-budget", "at_start": True, "r": 4, "density": 0.05},
    "lamda": {"r": 4, "until": 0.5},
    "s2-lora": {"layers": 2, "r": 4, "weight": 0.9},
    "mos": {"layers": 2, "r": 3, "shards": 2},
    "nola": {"r": 4, "k": 8},
    "intrinsic-dimension": {"dimension": 40},
    "snella": {"r": 4, "sparsity": 0.6, "init_weights": False},
    "gradual-magnitude": {},
    "movement": {"final_density": 0.5},
    "bdwp": {},
    "mask-lora": {"mask": "all"},
    "losparse": {"window": 2},
    "sst": {"r": 4, "every": 2},
    "sketchtune": {"groups": 1, "bits": 2, "examples": 8},
    "compacter": {"layers": 2, "reduction": 4, "norms": False},
    "houlsby": {"size": 4},
    "ether": {"blocks": 4},
    "molora": {"r": 2, "experts": 3, "top_k": 2},
    "rigl-accumulated": {"method": "rigl", **MOVES, "arguments": {"gradient_accumulation_steps": 2}},
    "spiel-ag-accumulated": {
        "method": "spiel-ag",
        **MOVES,
        "steps": 2,
        "arguments": {"gradient_accumulation_steps": 2},
    },
    "rows": {"method": "rigl", "density": 0.3, "every": 3, "fraction": 0.6, "granularity": "row"},
    "hybrid": {"method": "spiel-ag", **MOVES, "steps": 2, "r": 2},
    "hybrid-allocated": {
        "method": "gradual-pruning",
        "density": 0.1,
        "r": 4,
        "schedule": [
            {
                "type": "allocate",
                "spaces": ["rank", "support"],
                "budget": {"type": "numbers", "numbers": 300},
                "every": 2,
                "initial_warmup": 0.0,
                "final_warmup": 0.3,
            }
        ],
    },
    "rigl-all-used": {"method": "rigl", **MOVES, "arguments": {"ddp_find_unused_parameters": False}},
    "rigl-checkpointed": {"method": "rigl", **MOVES, "arguments": {"gradient_checkpointing": True}},
}
ALONE: dict[str, dict] = {
    "rigl-uneven": {"method": "rigl", **MOVES, "samples": 21},
    "rigl-masked": {"method": "rigl", **MOVES, "masked": 1},
    "molora-balanced": {
        "method": "molora",
        "r": 2,
        "experts": 3,
        "top_k": 2,
        "schedule": [{"type": "balance_loss", "weight": 0.1}],
    },
    "ist-all-used": {**CASES["ist"], "method": "ist", "arguments": {"ddp_find_unused_parameters": False}},
}
"""What one process does not do: an epoch whose last batch does not fill all ranks, one rank without labels, a
balance that ranks compute of their own tokens, as passes do."""
SHARDED = (
    "spiel-ag", "gradual-pruning", "adalora", "rigl", "lift", "losia", "s2ft-by-activation", "ist", "hft", "mezo",
    "mos", "snella", "gradual-magnitude", "movement", "losparse", "sst", "compacter", "molora", "rigl-accumulated",
    "spiel-ag-accumulated", "rigl-checkpointed", "rows", "hybrid", "hybrid-allocated",
)  # fmt: skip
"""Those that run under FSDP2 too: units of every kind, what reads base weights between steps, starts from data, parts
that are held still, an adapter shared by layers, no gradients."""
FOUR = ("spiel-ag", "rigl", "rows", "hybrid", "adalora", "hybrid-allocated")
"""Those that four processes run: entries, rows, entries beside a low-rank half, ranks, ranks and entries in one
budget."""


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Where the single process recorded."""
    folder = tmp_path_factory.mktemp("single")
    assert "WORLD_SIZE" not in os.environ
    ddp_script.main(folder, CASES)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, single):
    """`runs(kind, method)`: what each rank and the single process recorded after every step."""
    folders: dict[tuple[str, int], Path] = {}

    def recorded(kind: str, name: str, world: int = 2):
        if (kind, world) not in folders:
            folder = folders[kind, world] = tmp_path_factory.mktemp(kind)
            cases = ALONE | (CASES if kind == "ddp" else {name: CASES[name] for name in SHARDED})
            cases = cases if world == 2 else {name: CASES[name] for name in FOUR}
            processes.ranks(world, HERE / "ddp_script.py", folder, json.dumps(cases), kind)
        files = [folders[kind, world] / f"{name}-rank{rank}.pt" for rank in range(world)]
        files += [single / f"{name}-rank0.pt"] if name in CASES else []
        return [torch.load(file, weights_only=True) for file in files]

    return recorded


@pytest.mark.parametrize(("kind", "name"), [*(("ddp", name) for name in CASES), *(("fsdp", name) for name in SHARDED)])
def test_both_ranks_agree_after_every_step_and_with_one_process(kind, name, runs):
    moved = compare(runs(kind, name))
    found_at_start = name in ("gora", "joint-budget-at-start")  # by calibration, before the first step
    assert moved != (found_at_start or methods.describe(CASES[name].get("method", name)).moves == "nothing")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_agree_after_every_step_and_with_one_process(kind, name, runs):
    assert compare(runs(kind, name, world=4))


def compare(recorded: list) -> bool:
    """Asserts that ranks agree to the bit, and with the single process, which is last, to rounding; whether something
    moved."""
    assert not [steps for steps in recorded if isinstance(steps, str)]
    assert [len(steps) for steps in recorded] == [ddp_script.STEPS] * len(recorded)
    moved = False
    for step, (*ranks, alone) in enumerate(zip(*recorded, strict=True), 1):
        one = ranks[0]
        assert one
        assert all(other.keys() == one.keys() for other in (*ranks, alone))
        for key in one:
            assert all(torch.equal(one[key], two[key]) for two in ranks), f"ranks differ after step {step} in {key}"
            if one[key].is_floating_point():
                distance = (one[key] - alone[key]).abs().max()
                assert distance <= 1e-4 + 1e-3 * alone[key].abs().max(), f"step {step}, {key}: {distance}"
            else:
                assert torch.equal(one[key], alone[key]), f"two processes differ from one after step {step} in {key}"
                moved = moved or not torch.equal(one[key], recorded[0][0][key])
    return moved


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["rigl-uneven", "rigl-masked"])
def test_ranks_agree_where_their_batches_are_unlike(kind, name, runs):
    one, two = runs(kind, name)
    assert len(one) == ddp_script.STEPS
    moved = False
    for first, second in zip(one, two, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
        moved = moved or any("support" in key and not torch.equal(first[key], one[0][key]) for key in first)
    assert moved


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_agree_where_each_balances_the_experts_of_its_own_tokens(kind, runs):
    one, two = runs(kind, "molora-balanced")
    assert len(one) == ddp_script.STEPS
    routers = [key for key in one[0] if ".structured_router." in key and one[0][key].is_floating_point()]
    assert routers
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(one[-1][key], one[0][key]) for key in routers)


def test_parameters_held_still_under_a_ddp_that_waits_for_them_are_refused(runs):
    assert all("ddp_find_unused_parameters=False makes DDP wait" in text for text in runs("ddp", "ist-all-used"))
