"""What `step_cost.py` says about its figures: tables, a picture, and the bars they are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
LABELS = {
    "frozen": "frozen base (floor)",
    "lora": "LoRA r=16",
    "lora_lean": "LoRA, lean",
    "shira": "SHiRA",
    "supertuning": "Super-Tuning",
    "full": "full fine-tuning",
    "spiel": "SpIEL's layer",
    "entry": "entries",
    "block32": "blocks 32x32",
    "row": "rows",
    "column": "columns",
    "hybrid": "LoRA r=8 + entries",
}
SPARSE = ("entry", "block32", "row", "column")
EVERY = (*SPARSE, "hybrid")
LONGEST_BAR = 3.0
"""Where the picture cuts a bar, in LoRA's; the number beside it is whole."""
Figure = Callable[[dict[str, Any], dict[str, Any]], float]


def _time(row: dict[str, Any], reference: dict[str, Any]) -> float:
    return row["time_over"][reference["method"]]


def _ratio(key: str) -> Figure:
    return lambda row, reference: row[key] / reference[key]


def _per_number(*keys: str, reference_keys: tuple[str, ...] | None = None) -> Figure:
    """Bytes for one trained number over the reference's: whole blocks and rows cannot match its count exactly."""

    def figure(row: dict[str, Any], reference: dict[str, Any]) -> float:
        own = sum(row[key] for key in keys) / row["trained_numbers"]
        return own / (sum(reference[key] for key in reference_keys or keys) / reference["trained_numbers"])

    return figure


def _own(key: str) -> Figure:
    return lambda row, reference: row[key]


STATE = "gradient_optimizer_bytes"


@dataclass(frozen=True)
class Bar:
    """`figure` of each of `methods` over `reference` must not exceed `limit`."""

    name: str
    methods: dict[str, float]
    figure: Figure
    reference: str
    bases: tuple[str, ...] = ("bf16", "fp32", "nf4")
    devices: tuple[str, ...] = ("cpu", "cuda")


def _all(methods: tuple[str, ...], limit: float) -> dict[str, float]:
    return dict.fromkeys(methods, limit)


BARS = (
    Bar("saved bytes", _all(("entry", "block32", "row", "hybrid"), 1.02) | {"column": 0.82}, _ratio("saved_bytes"),
        "lora_lean", ("bf16",)),
    Bar("saved bytes", _all(("entry", "block32", "row", "hybrid"), 0.68), _ratio("saved_bytes"), "lora", ("bf16",)),
    Bar("step time", {"entry": 1.12, "block32": 1.05, "row": 0.88, "column": 0.93, "hybrid": 1.20}, _time,
        "lora_lean", ("bf16",), ("cpu",)),
    Bar("step time", _all(SPARSE, 0.86), _time, "lora", ("bf16",), ("cpu",)),
    Bar("step time", {"entry": 1.18, "block32": 1.00, "row": 0.88, "column": 0.93}, _time, "lora", ("fp32",), ("cpu",)),
    Bar("step time", {"entry": 0.85}, _time, "shira"),
    Bar("step time", {"entry": 0.85}, _time, "supertuning"),
    Bar("gradient + optimizer bytes a number", _all(EVERY, 1.00), _per_number(STATE), "lora"),
    Bar("the same with index buffers", _all(EVERY, 1.40),
        _per_number(STATE, "index_bytes", reference_keys=(STATE,)), "lora"),
    Bar("the same with index buffers and ages", _all(EVERY, 1.55),
        _per_number(STATE, "index_bytes", "age_bytes", reference_keys=(STATE,)), "lora"),
    Bar("adapter file, fp32, a number", _all(EVERY, 1.45), _per_number("file_bytes"), "lora"),
    Bar("adapter file, bf16, a number", _all(EVERY, 0.90),
        _per_number("file_bytes_bf16", reference_keys=("file_bytes",)), "lora"),
    Bar("move, share of the plain steps' time", _all(EVERY, 0.05), _own("move_share"), "frozen"),
    Bar("collecting step over plain step", _all(EVERY, 1.60), _own("collect_over_plain"), "frozen"),
    Bar("step time", {"entry": 1.05, "block32": 1.00, "row": 1.00, "column": 1.00}, _time, "lora", ("nf4",)),
    Bar("peak bytes", _all(SPARSE, 1.00), _ratio("peak_bytes"), "lora", ("nf4",)),
    Bar("step time", {"block32": 1.00}, _time, "lora", ("bf16",), ("cuda",)),
    Bar("peak bytes", {"block32": 0.85}, _ratio("peak_bytes"), "lora", ("bf16",), ("cuda",)),
)  # fmt: skip
"""The bars that this benchmark can see, as upper limits."""


def check(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar that applies to what was measured: its name, what was got and wanted, whether it is met."""
    results = []
    for base, figures in report["bases"].items():
        rows = {method: row | {"method": method} for method, row in figures["rows"].items()}
        for bar in BARS:
            if base not in bar.bases or report["settings"]["device"] not in bar.devices or bar.reference not in rows:
                continue
            for method in (m for m in bar.methods if m in rows):
                got, wanted = bar.figure(rows[method], rows[bar.reference]), bar.methods[method]
                over = "" if bar.figure.__qualname__.startswith("_own") else f" / {bar.reference}"
                name = f"[{base}] {bar.name}: {method}{over}"
                results.append({"name": name, "got": got, "wanted": wanted, "met": round(got, 3) <= wanted})
    return results


def print_tables(report: dict[str, Any]) -> None:
    """Two tables a base, one of times and one of bytes; with rich where it is installed."""
    for base, figures in report["bases"].items():
        rows = figures["rows"]
        _print_table(f"{base}: time of a step", *_times(rows))
        _print_table(f"{base}: MiB (files: KiB)", *_bytes(rows))
        for method, reason in figures["skipped"].items():
            print(f"  {LABELS[method]}: left out. {reason}")


def _times(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["method", "trained", "ms", "/ floor", "/ LoRA", "/ lean", "move ms", "share", "collecting", "first", "next"]
    body = []
    for method, row in rows.items():
        over = {**row["time_over"], method: 1.0}
        body.append([
            LABELS[method], f"{row['trained_numbers']:,}", f"{1000 * row['seconds']:.0f}",
            *(_number(over.get(other), 2) for other in ("frozen", "lora", "lora_lean")),
            _number(row.get("move_seconds"), 1, 1000), _number(row.get("move_share"), 1, 100, " %"),
            *(_number(row.get(f"collect_{kind}over_plain"), 2) for kind in ("", "first_", "next_")),
        ])  # fmt: skip
    return head, body


def _bytes(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["method", "saved", "/ floor", "/ LoRA", "/ lean", "grad + opt", "+ index", "+ ages", "peak", "file", "bf16"]
    body = []
    for method, row in rows.items():
        others = [rows.get(other, {}).get("saved_bytes") for other in ("frozen", "lora", "lora_lean")]
        state = row["gradient_optimizer_bytes"]
        with_index = state + row["index_bytes"]
        body.append([
            LABELS[method], _number(row["saved_bytes"], 1, 1 / MIB),
            *(_number(row["saved_bytes"] / other if other else None, 3) for other in others),
            *(_number(n, 1, 1 / MIB) for n in (state, with_index, with_index + row["age_bytes"], row["peak_bytes"])),
            *(_number(row.get(key), 0, 1 / 1024) for key in ("file_bytes", "file_bytes_bf16")),
        ])  # fmt: skip
    return head, body


def _number(value: float | None, digits: int, factor: float = 1, unit: str = "") -> str:
    return "" if value is None else f"{value * factor:,.{digits}f}{unit}"


def _print_table(title: str, head: list[str], body: list[list[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n" + "\n".join(_plain(title, head, body)))
        return
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for line in body:
        table.add_row(*line)
    Console(width=140, soft_wrap=True).print(table)


def _plain(title: str, head: list[str], body: list[list[str]]) -> Iterator[str]:
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    yield title
    for line in (head, *body):
        yield "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )


def draw(report: dict[str, Any], path: Path) -> None:
    """Step time and bytes kept for the backward pass, both over LoRA's defaults, a panel for each base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bases = {name: figures["rows"] for name, figures in report["bases"].items() if "lora" in figures["rows"]}
    if not bases:
        return
    most = max(len(rows) for rows in bases.values())
    figure, axes = plt.subplots(
        1, len(bases), figsize=(1.2 + 5.4 * len(bases), 1.6 + 0.48 * most), squeeze=False, layout="constrained"
    )
    for axis, (base, rows) in zip(axes[0], bases.items(), strict=True):
        _panel(axis, base, rows)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    model = report["settings"]["model"]
    figure.suptitle(
        "Cost of a training step at equal trained numbers, LoRA r=16 on all linears = 1\n"
        f"Llama of {model['layers']} x {model['hidden']}, {model['batch'] * model['tokens']} tokens, "
        f"{report['machine']['device']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axis: Any, base: str, rows: dict[str, Any]) -> None:
    names = list(rows)
    places = range(len(names))
    time = [{**rows[name]["time_over"], name: 1.0}["lora"] for name in names]
    kept = [rows[name]["saved_bytes"] / rows["lora"]["saved_bytes"] for name in names]
    for shift, values, color, label in (
        (-0.2, time, "#2a6f97", "step time"),
        (0.2, kept, "#e9a23b", "bytes kept for the backward pass"),
    ):
        shown = [min(value, LONGEST_BAR) for value in values]
        bars = axis.barh([place + shift for place in places], shown, 0.38, color=color, label=label, zorder=2)
        texts = [f"{value:.2f}" + (" >" if value > LONGEST_BAR else "") for value in values]
        for text in axis.bar_label(bars, texts, fontsize=8, padding=2):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axis.axvline(1.0, color="0.35", linewidth=1, linestyle="--", zorder=1, label="LoRA with its defaults")
    axis.set_yticks(list(places), [LABELS[name] for name in names], fontsize=9)
    for tick, name in zip(axis.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if name in EVERY else "normal")
    axis.invert_yaxis()
    axis.set_xlim(0, min(LONGEST_BAR, max(*time, *kept)) * 1.12)
    axis.set_title(f"{base} base", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
