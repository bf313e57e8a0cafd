"""What merging leaves of three tasks, method by method, and the memory that it takes.

    python recipes/benchmarks/merging.py                                   # half an hour on one core, offline
    python recipes/benchmarks/merging.py --families entries --seeds 0      # a part; rows in the JSON file are kept

For each family of adapters and each seed three are trained on the demo base, each on a fresh one: word problems
answered in digits, in words, and by what was counted (`recipes/merge_adapters.py`). Each method merges their files; of
its candidates (a scale, a density) the one with the lowest mean loss of an answer's token on validation rows is taken,
as the papers do, and measured on test rows, which share no sum with training. Families: `entries` (random supports,
another one for each task), `one support` (the same for all), `factors` (low-rank; what is no sum is fitted by SVD, the
error in the last column).

Memory: three adapters with random numbers for a Llama of `--width` and `--layers`, merged in a process of its own; the
highest resident memory over that before the merge, beside the bytes of the model's weights in fp32.

The tables go to the terminal, `merging.json`, `.md` and `.png` to `--output`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
from harness import Column, option

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import merge_adapters as recipe
import torch
from transformers import TrainingArguments, set_seed

from hf_sparse_peft.merging import fisher_importance, merge_adapters

FAMILIES: dict[str, dict[str, Any]] = {
    "entries": {"r": 0, "density": 0.3, "criterion": "random"},
    "one support": {"r": 0, "density": 0.3, "criterion": "random"},
    "factors": {"r": 8, "lora_alpha": 16, "density": 0.0},
}
RATES = {"entries": 1e-3, "one support": 1e-3, "factors": 2e-3}
SCALES = (0.5, 0.75, 1.0)
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "sum": [{"scale": scale} for scale in SCALES],
    "soup": [{}],
    "ties": [{"density": density, "scale": scale} for density in (0.2, 1.0) for scale in (1.0, 1.5)],
    "dare": [{"rate": 0.5, "scale": scale} for scale in SCALES],
    "darex-q": [{"rate": 0.5, "q": q, "scale": 0.75} for q in (0.6, 0.8)],
    "della": [{"scale": scale} for scale in (1.0, 1.5)],
    "breadcrumbs": [{"keep": 0.9, "outliers": 0.01, "scale": scale} for scale in SCALES],
    "pcb": [{"ratio": ratio, "scale": 1.2} for ratio in (0.1, 0.5)],
    "fisher": [{}],
    "lora-lego": [{"clusters": clusters} for clusters in (8, 24)],
}
MEMORY = {
    "sum, entries": ("entries", "sum", {}),
    "ties, entries": ("entries", "ties", {}),
    "pcb, entries": ("entries", "pcb", {}),
    "sum, factors": ("factors", "sum", {}),
    "ties, factors": ("factors", "ties", {"rank": 16}),
}


@dataclass
class MergingOptions(harness.Options):
    """Options of this benchmark."""

    families: list[str] = option(list(FAMILIES), "kinds of adapters")
    seeds: list[int] = option([0, 1, 2], "seeds of data, supports and training")
    steps: int = option(50, "updates of each adapter, of 16 rows")
    train_rows: int = option(1000, "rows to train on")
    validation_rows: int = option(40, "rows of each task that candidates are chosen on")
    test_rows: int = option(100, "rows of each task to measure on")
    width: int = option(1024, "columns of the model whose memory is measured; 0 leaves it out")
    layers: int = option(8, "its layers")


def train(family: str, seed: int, options: MergingOptions, folder: Path) -> dict[str, Path]:
    """Three adapters, trained where they are not there yet."""
    folders = {task: folder / task for task in recipe.TASKS}
    for number, (task, place) in enumerate(folders.items()):
        if (place / "adapter_config.json").is_file():
            continue
        set_seed(seed)
        own = {**FAMILIES[family], "seed": seed if family == "one support" else 10 * seed + number}
        arguments = SimpleNamespace(
            model_name_or_path="", load_in_4bit=False, adapter={**own, "target_modules": "all-linear"}, method="",
            method_options={},
        )  # fmt: skip
        args = TrainingArguments(
            str(folder / "run"), max_steps=options.steps, learning_rate=RATES[family], lr_scheduler_type="cosine",
            per_device_train_batch_size=16, seed=seed, use_cpu=options.device == "cpu", report_to=[],
            save_strategy="no", disable_tqdm=True, logging_steps=1000,
        )  # fmt: skip
        rows = recipe.rows_of(task, options.train_rows, seed, "train")
        recipe.train_task(task, rows, arguments, args, place)
    return folders


def importance_of(folders: dict[str, Path], seed: int, options: MergingOptions) -> list[dict[str, torch.Tensor]]:
    """The empirical Fisher information of each adapter on 64 rows of its task."""
    from demo_data import tokenize_pairs
    from peft import PeftModel
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    tokenizer, found = AutoTokenizer.from_pretrained(common.DEMO_BASE), []
    for task, folder in folders.items():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(common.DEMO_BASE), str(folder))
        rows = tokenize_pairs(recipe.rows_of(task, 64, seed, "train"), tokenizer)
        data = DataLoader(rows, batch_size=16, collate_fn=DataCollatorForSeq2Seq(tokenizer))
        found.append(fisher_importance(model, data, examples=64, show_progress=False))
    return found


def measure(method: str, family: str, seed: int, options: MergingOptions, folder: Path) -> dict[str, Any]:
    """Scores of the best candidate of a method."""
    folders = train(family, seed, options, folder)
    validation = {task: recipe.rows_of(task, options.validation_rows, seed + 1000, "train") for task in folders}
    test = {task: recipe.rows_of(task, options.test_rows, seed, "test") for task in folders}
    if method in (*recipe.TASKS, "base"):
        return recipe.scores(folders.get(method), common.DEMO_BASE, test)
    given = {"importance": importance_of(folders, seed, options)} if method == "fisher" else {}
    best: tuple[float, dict, float] | None = None
    with tempfile.TemporaryDirectory() as temporary:
        for number, candidate in enumerate(CANDIDATES[method]):
            out = Path(temporary) / str(number)
            report = merge_adapters(list(folders.values()), out, method, show_progress=False, **candidate, **given)
            found = statistics.mean(recipe.scores(out, common.DEMO_BASE, validation, generate=False).values())
            if best is None or found < best[0]:
                best = found, candidate, max(report.errors.values(), default=0.0)
                chosen = out
        scores = recipe.scores(chosen, common.DEMO_BASE, test)
    return {**scores, "svd_error": best[2], "chosen": best[1], "validation": best[0]}


def memory(name: str, options: MergingOptions) -> dict[str, Any]:
    """Peak memory of one merge, in a process of its own."""
    family, method, own = MEMORY[name]
    words = json.dumps({"family": family, "method": method, "options": own, "width": options.width})
    words = json.dumps({**json.loads(words), "layers": options.layers})
    done = subprocess.run([sys.executable, __file__, "--child", words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(words: str) -> None:
    """Merge adapters with random numbers, and print what that took."""
    import resource
    import time

    from hf_sparse_peft.merging.results import write_adapter
    from hf_sparse_peft.sparsity import UnitGrid
    from hf_sparse_peft.tuners.shared.pieces import Entries, LowRank

    asked = json.loads(words)
    width, generator = asked["width"], torch.Generator().manual_seed(0)
    up = (4 * width, width)
    sides = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    sides |= {"up_proj": up, "gate_proj": up, "down_proj": up[::-1]}
    shapes = {f"layers.{at}.{name}": side for at in range(asked["layers"]) for name, side in sides.items()}
    model_bytes = 4 * sum(rows * cols for rows, cols in shapes.values())
    about = {"base_model_name_or_path": "none", "modules_to_save": None, "saved_base_weights": None, "bias": "none"}
    with tempfile.TemporaryDirectory() as folder:
        folders = []
        for number in range(3):
            pieces = {}
            for name, (rows, cols) in shapes.items():
                if asked["family"] == "entries":
                    units = torch.randperm(rows * cols, generator=generator)[: rows * cols // 100].sort().values
                    values = torch.randn(units.numel(), generator=generator)
                    pieces[name] = [Entries(units, values, UnitGrid(rows, cols))]
                else:
                    B, A = (torch.randn(*side, generator=generator) for side in ((rows, 16), (16, cols)))
                    pieces[name] = [LowRank(B, A)]
            folders.append(Path(folder) / str(number))
            write_adapter(folders[-1], pieces, shapes, {}, about, "random")
        del pieces
        adapters = sum((one / "adapter_model.safetensors").stat().st_size for one in folders)
        before, start = _resident(), time.perf_counter()
        _reset_peak()
        merge_adapters(folders, Path(folder) / "merged", asked["method"], show_progress=False, **asked["options"])
        peak = _peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"model_bytes": model_bytes, "adapter_bytes": adapters, "peak_bytes": peak - before,
                      "seconds": time.perf_counter() - start}))  # fmt: skip


def _resident() -> int:
    return int(_status("VmRSS") or 0)


def _peak() -> int | None:
    return _status("VmHWM")


def _status(key: str) -> int | None:
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    found = next((line for line in lines if line.startswith(f"{key}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not allowed: the peak then holds what came before, too
        return


def columns() -> list[Column]:
    """Of a table of scores."""

    def of(task: str) -> Column:
        def shown(row: dict) -> str:
            return f"{statistics.mean(row[task]):.0f} ({statistics.mean(row[f'{task}_loss']):.2f})"

        return Column(task, shown)

    def mean(names: list[str]) -> Callable[[dict], float]:
        return lambda row: statistics.mean(statistics.mean(row[name]) for name in names)

    losses = [f"{task}_loss" for task in recipe.TASKS]
    means = [Column("mean", mean(list(recipe.TASKS)), "{:.1f}"), Column("mean loss", mean(losses), "{:.2f}")]
    error = Column("error of SVD", lambda row: max(row["svd_error"]) or None if "svd_error" in row else None, "{:.2f}")
    return [Column("method", "method"), *map(of, recipe.TASKS), *means, error]


def memory_columns() -> list[Column]:
    """Of the table of memory."""
    mega = 2**20
    return [
        Column("merge", "merge"),
        Column("model in fp32, MiB", lambda row: row["model_bytes"] / mega, "{:.0f}"),
        Column("adapter files, MiB", lambda row: row["adapter_bytes"] / mega, "{:.0f}"),
        Column("peak, MiB", lambda row: row["peak_bytes"] / mega, "{:.0f}"),
        Column("of the model", lambda row: row["peak_bytes"] / row["model_bytes"], "{:.0%}"),
        Column("seconds", "seconds", "{:.0f}"),
    ]


def main(argv: list[str] | None = None) -> list[dict]:
    """Train, merge, measure, print, draw and write; returns the rows."""
    options = harness.parse(MergingOptions, __doc__, argv)
    names = ("steps", "train_rows", "validation_rows", "test_rows")
    rows = harness.Rows(options, "merging", {name: getattr(options, name) for name in names})
    tables, drawn, everything = [], {}, []
    for family in options.families:
        found = []
        for method in ("base", *recipe.TASKS, *CANDIDATES):
            if method == "lora-lego" and family != "factors":
                continue
            measured = []
            for seed in options.seeds:
                folder = rows.folder / "adapters" / f"{family.replace(' ', '-')}-{options.steps}-{seed}"
                key = {"part": "scores", "family": family, "method": method, "seed": seed}
                work = lambda m=method, f=family, s=seed, o=folder: measure(m, f, s, options, o)  # noqa: E731
                measured.append(rows.measure(work, go_on=True, **key))
            if any("error" in row for row in measured):
                continue
            figures = (*recipe.TASKS, *(f"{task}_loss" for task in recipe.TASKS), "svd_error")
            kept = {key: [row[key] for row in measured] for key in figures if key in measured[0]}
            label = f"adapter of {method}" if method in recipe.TASKS else method
            found.append({"method": label, **kept})
        title = f"{family}: exact match in % (loss of an answer's token), mean over seeds {options.seeds}"
        harness.print_table(title, columns(), found)
        tables.append(f"{title}\n\n{harness.markdown(columns(), found)}")
        drawn[family] = {row["method"]: [row[f"{task}_loss"] for task in recipe.TASKS] for row in found}
        everything += found
    if options.width:
        timed = {"width": options.width, "layers": options.layers}
        found = [
            rows.measure(lambda n=name: memory(n, options), go_on=True, part="memory", merge=name, **timed)
            for name in MEMORY
        ]
        found = [row for row in found if "error" not in row]
        harness.print_table("memory of a merge of three adapters", memory_columns(), found)
        tables.append(f"memory of a merge of three adapters\n\n{harness.markdown(memory_columns(), found)}")
        everything += found
    (rows.folder / "merging.md").write_text("\n".join(tables))
    title = "loss of an answer's token after merging three adapters, nats"
    harness.draw(rows.folder / "merging.png", title, drawn, list(recipe.TASKS))
    return everything


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main()
