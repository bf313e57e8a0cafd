"""`recipes/benchmarks/gpu.py` without a GPU: the dry run, the real plan on stand-ins, what only a GPU would reach."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_sparse_peft.ops.costs import Costs

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "recipes" / "benchmarks"


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    for folder in (BENCHMARKS.parent, BENCHMARKS):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(ROOT)


def dry_run(folder, *options, **environment):
    """What it printed, and its rows by part. A process of its own: Triton decides at import whether it interprets."""
    command = [sys.executable, BENCHMARKS / "gpu.py", "--dry-run", "--output", folder, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((folder / "gpu.json").read_text())
    parts = {
        row["part"]: [found for found in written["rows"] if found["part"] == row["part"]] for row in written["rows"]
    }
    return done.stdout, parts, written


def check_kernels_and_gradients(parts, written):
    pytest.importorskip("triton")
    assert all(row["right"] for row in parts["kernels"])
    with_kernel = {row["unit"] for row in parts["kernels"] if row["errors"].get("kernel", 1) < 1e-5}
    assert with_kernel == {"entry", "entry in 0.25 x 0.25", "block16"}
    ways = {point["unit"]: set(point["ms"]) for row in parts["gradients"] for point in row["points"].values()}
    assert ways["entry"] == {"dense", "ours", "torch", "sampled"}
    assert ways["entry in 0.25 x 0.25"] == ways["entry"] | {"compacted"}
    assert ways["block16"] == {"dense", "ours", "torch", "kernel"}
    assert {(line["unit"], line["way"]) for line in written["crossovers"]} == {
        (unit, way) for unit, names in ways.items() for way in names - {"dense"}
    }
    (costs,) = (row["costs"] for row in parts["costs"])
    assert costs["sampled_entry"] > 0, "an interpreted entry takes a millisecond"
    assert costs.keys() == {field.name for field in fields(Costs)}


@pytest.mark.slow
def test_dry_run_of_kernels_and_gradients(tmp_path):
    printed, parts, written = dry_run(tmp_path, "--parts", "kernels", "gradients", "crossovers")
    assert set(parts) == {"kernels", "gradients", "costs"}
    check_kernels_and_gradients(parts, written)
    assert "No Triton kernel" not in printed
    assert "not measured: no GPU was available" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_dry_run_of_everything_and_no_row_twice(tmp_path):
    printed, parts, written = dry_run(tmp_path)
    check_kernels_and_gradients(parts, written)
    assert len(parts["steps"]) == 4
    assert {row["base"] for row in parts["steps"]} == {"bf16", "nf4"}
    assert any(row["compiled"] for row in parts["steps"])
    assert all(row["figures"]["entry"]["seconds"] > 0 for row in parts["steps"])
    assert all(row["supports_equal"] and row["bit_equal"] and row["late_moves"] for row in parts["moves"])
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert "bf16: all layers, extrapolated from two depths" in printed
    _, _, again = dry_run(tmp_path)
    assert again["rows"] == written["rows"]


@pytest.mark.slow
def test_dry_run_without_triton_names_what_is_missing(tmp_path):
    printed, parts, _ = dry_run(tmp_path, "--parts", "kernels", "gradients", HF_SPARSE_PEFT_TRITON="0")
    assert "No Triton kernel runs here" in printed
    assert all(row["right"] and "kernel" not in row["errors"] for row in parts["kernels"])


def test_the_real_plan_on_stand_ins(tmp_path, monkeypatch, capsys):
    """What is asked of a GPU, in which order, and what its figures become; whatever would compute answers at once."""
    import engine_costs
    import gpu
    import harness
    import step_cost

    asked = []

    def base_figures(options, base, in_time):
        asked.append(("steps", base, options.compiled, options.layers, tuple(options.candidates)))
        costs = dict(zip(options.candidates, range(10, 30), strict=False))
        rows = {
            n: {"seconds": 1 + c * options.layers, "peak_bytes": 2**30 * (1 + options.layers)} for n, c in costs.items()
        }
        more = {"over": {}, "trained_numbers": 1, "saved_bytes": 1, "gradient_optimizer_bytes": 1, "index_bytes": 1}
        return {"figures": {name: row | more for name, row in rows.items()}, "skipped": {"full": "too large"}}

    def unit_check(unit, dtype, device, large):
        asked.append(("kernels", str(unit), dtype, large))
        return {"cases": 1, "errors": {"kernel": 1e-7}, "right": True}

    def projection(shape, tokens, dtype, units, rounds, device, in_time):
        asked.append(("gradients", *shape, tokens))
        point = {"unit": "entry", "count": 900, "ms": {"dense": 1.0, "sampled": 0.5, "ours": 0.5}}
        return {
            "0.1%": point | {"density": 0.001},
            "1%": {**point, "density": 0.01, "ms": {"dense": 1.0, "sampled": 2.0, "ours": 2.0}},
        }

    def costs(dtype, rounds, device, side):
        asked.append(("costs", dtype))
        return Costs(*range(1, 9))

    def with_moves(device, base, candidate, tiny):
        asked.append(("moves", base, tiny))
        return {"moves": 2, "late_moves": 1, "supports_equal": True, "bit_equal": False, "difference": 1e-4}

    written = []
    monkeypatch.setattr(harness, "machine", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(engine_costs, "machine", harness.machine)
    monkeypatch.setattr(engine_costs, "measure", costs)
    monkeypatch.setattr(engine_costs, "write_costs", lambda *row: written.append(row))
    for name, stand_in in {
        "check_unit": unit_check, "measure_projection": projection, "measure_base": base_figures,
        "run_with_moves": with_moves, "kernels_run": lambda device: False,
    }.items():  # fmt: skip
        monkeypatch.setattr(gpu, name, stand_in)
    assert gpu.main(["--device", "cuda", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Left out" not in printed

    assert list(dict.fromkeys(call[0] for call in asked)) == ["kernels", "gradients", "costs", "steps", "moves"]
    checked = {call[1:] for call in asked if call[0] == "kernels"}
    assert len(checked) == (2 + 5 + 3) * 3 * 2
    assert ("block256", "fp16", True) in checked
    sizes = [call[1:] for call in asked if call[0] == "gradients"]
    assert len(sizes) == 3 * 4 * 3
    assert {(14336, 4096, 8192), (1024, 3072, 1024)} < set(sizes)
    runs = [call[1:] for call in asked if call[0] == "steps"]
    assert [run[:3] for run in runs[:4]] == [(b, False, n) for b in ("bf16", "nf4") for n in (6, 2)]
    assert all(compiled and "entry" in names for _, compiled, _, names in runs[4:])
    assert set(runs[0][-1]) == set(step_cost.CANDIDATES)

    # 28 layers on the line through 6 and 2: block32 is at some 1 + 28 c, and so is the frozen base.
    names = runs[0][-1]
    cost = {name: 1 + 28 * (10 + number) for number, name in enumerate(names)}
    (line,) = (line for line in (tmp_path / "gpu.md").read_text().splitlines() if "step time: row / frozen" in line)
    assert line.split("|")[3].strip() == f"{cost['row'] / cost['frozen']:.2f}"
    assert (tmp_path / "gpu.png").exists()
    (crossing,) = {line["density"] for line in json.loads((tmp_path / "gpu.json").read_text())["crossovers"]}
    assert math.isclose(crossing, 10**-2.5)

    before = len(asked)
    assert not written
    assert gpu.main(["--device", "cuda", "--write", "--output", str(tmp_path)]) == 0
    assert len(asked) == before, "a row was measured twice"
    how = f"measured: a GPU, torch {torch.__version__}"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert written == [("cuda", dtype, Costs(*range(1, 9)), how) for dtype in dtypes]


def test_what_there_is_no_time_for_is_named_and_nothing_is_written_for_it(tmp_path, capsys):
    import gpu

    assert gpu.main(["--dry-run", "--seconds", "0", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for left_out in (
        "kernels: entry, bf16",
        "gradients: tiny q, o, 48 tokens",
        "steps: nf4, 1 layers",
        "moves: row on nf4",
    ):
        assert f"Left out, for want of time: {left_out}" in printed
    assert "crossovers: no row of `gradients` is there" in printed
    assert not (tmp_path / "gpu.json").exists()


def test_a_part_leaves_its_time_to_the_next(monkeypatch):
    import gpu

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = gpu.Clock(100, ["kernels", "steps"])  # 15 to 45: ends at 25 and 100
    now[0] = 24
    assert clock.allows("kernels", "a")
    now[0] = 26
    assert not clock.allows("kernels", "b")
    assert clock.in_time("steps")
    now[0] = 99
    assert clock.in_time("steps")
    assert clock.left_out == ["kernels: b"]


def test_no_gpu_is_said_and_so_is_an_unknown_part(capsys):
    import gpu

    assert gpu.main(["--device", "cpu"]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("no GPU was available.")
    assert "[bf16] step time: row / frozen" in printed
    with pytest.raises(SystemExit, match="speed"):
        gpu.main(["--dry-run", "--parts", "speed"])


def test_a_wrong_gradient_is_found_and_ends_with_1(tmp_path, monkeypatch, capsys):
    import gpu
    import kernel_cost

    right = kernel_cost.unit_gradient
    monkeypatch.setattr(kernel_cost, "unit_gradient", lambda *given: right(*given) * 1.05)
    assert gpu.main(["--dry-run", "--parts", "kernels", "--output", str(tmp_path)]) == 1
    assert "WRONG: entry in bf16: ['gradient']" in capsys.readouterr().out
    assert kernel_cost._error(torch.ones(2), torch.ones(3)) == math.inf
    assert kernel_cost._error(torch.tensor([math.nan]), torch.ones(1)) == math.inf


def test_crossovers_of_known_times():
    import kernel_cost

    # dense: 2 ps an entry and token; sampled: 50 ps an entry and 3 a line; compacted: 1 an entry and 4 a line
    rows = []
    for layer, shape in {"a": (64, 96), "b": (128, 32)}.items():
        points = {}
        for unit, density in ((u, d) for u in ("entry", "entry in 0.25 x 0.25") for d in (0.001, 0.01, 0.1)):
            numel, lines = shape[0] * shape[1], sum(shape)
            ps = {"dense": 2 * numel, "sampled": 50 * density * numel + 3 * lines}
            if "in" in unit:
                ps["compacted"] = numel / 16 + lines
            ms = {name: 1000 * taken / 1e9 for name, taken in ps.items()}
            points[f"{unit} {density}"] = {"unit": unit, "density": density, "count": density * numel, "ms": ms}
        place = {"model": "m", "layer": layer, "rows": shape[0], "cols": shape[1], "tokens": 1000, "dtype": "bf16"}
        rows.append({**place, "points": points})
    crossings = {(line["layer"], line["unit"], line["way"]): line for line in kernel_cost.crossovers(rows)}
    at = crossings["a", "entry", "sampled"]  # 50 d n + 3 * 160 = 2 n, n = 6144
    assert (at["side"], at["density"]) == ("at", pytest.approx((2 - 480 / 6144) / 50, rel=0.2))
    assert crossings["b", "entry in 0.25 x 0.25", "compacted"]["side"] == "above"
    assert kernel_cost.crossover([(0.01, 2.0), (0.1, 3.0)]) == (0.01, "below")


def test_units_of_a_grid_lie_in_so_many_rows_and_columns():
    from kernel_cost import Unit

    drawn = Unit("entry", share=0.25).draw(40, 60, 100, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int32
    assert torch.equal(drawn, drawn.unique())
    assert len(drawn) == 100
    assert len((drawn // 60).unique()) <= 10
    assert len((drawn % 60).unique()) <= 15
    assert Unit("block", 16).total(64, 32) == 8


class FakeEvent:
    """An event of a GPU on which every piece of work takes 7 ms."""

    made = ()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.made += (self,)

    def synchronize(self):
        assert FakeEvent.made[-1] is self, "waits for the end"

    def elapsed_time(self, end):
        assert FakeEvent.made[-2:] == (self, end)
        return 7.0


def test_times_and_memory_of_a_gpu_are_read_around_the_work(monkeypatch):
    import kernel_cost
    import trial

    calls = []
    memory = SimpleNamespace(
        Event=FakeEvent,
        memory_allocated=lambda: 5 << 20,
        reset_peak_memory_stats=lambda: calls.append("reset"),
        max_memory_allocated=lambda: 8 << 20,
        set_sync_debug_mode=calls.append,
    )
    monkeypatch.setattr(kernel_cost.torch, "cuda", memory)
    monkeypatch.setattr(kernel_cost.torch, "empty", lambda *shape, **options: torch.zeros(4))
    kernel_cost.gpu_timer.cache_clear()
    device = torch.device("cuda")
    figures = kernel_cost._time_ways({"a": lambda: calls.append("work")}, 2, device)
    kernel_cost.gpu_timer.cache_clear()
    assert figures == {"ms": {"a": 7.0}, "mib": {"a": 3.0}}
    assert calls == ["work"] * 3 + ["reset", "work"]

    calls.clear()

    def work():
        import warnings

        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert trial.host_waits(work, "cuda") == 2
    assert calls == ["warn", "default"]


def test_benchmarks_page_has_the_expected_figures():
    import gpu
    from harness import markdown

    text = (ROOT / "docs" / "benchmarks.md").read_text()
    between = text.partition("<!-- expected on a GPU -->\n")[2].partition("<!-- /expected on a GPU -->")[0]
    assert between == markdown(gpu.EXPECTED_COLUMNS, gpu.beside_expected({}))
