"""The table and the picture that a fine-tuning run ends with."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, not a window

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from hf_sparse_peft.training.support_picture import save_picture


def print_table(rows: list[tuple[str, str, str]], title: str) -> None:
    """Print `(figure, before, after)` rows."""
    table = Table(title=title)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


def draw_report(path: Path, log_history: list[dict], support_history: list[dict], title: str) -> None:
    """Write `report.png`: training loss, and density and rank of every layer over the steps."""
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(10, 14), height_ratios=(2, 3, 3), layout="constrained")
    figure.suptitle(title)
    _draw_loss(top, log_history)
    _draw_heat_map(figure, middle, support_history, "density", "density of the support [% of the weight's units]", 100)
    _draw_heat_map(figure, bottom, support_history, "rank", "living components (rank)", 1)
    save_picture(figure, path, dpi=110)
    plt.close(figure)


def _draw_loss(axis, log_history: list[dict]) -> None:
    for key, style, label in (("loss", "-", "training"), ("eval_loss", "o-", "evaluation")):
        points = [(record["step"], record[key]) for record in log_history if key in record]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label)
    axis.set(xlabel="optimizer step", ylabel="loss [nats per token]", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_heat_map(figure, axis, history: list[dict], key: str, label: str, factor: float) -> None:
    layers = list(history[-1][key])
    if not layers:
        axis.set_axis_off()
        axis.text(0.5, 0.5, f"no {key}: this half of the adapter is absent", ha="center")
        return
    steps = [record["step"] for record in history]
    values = factor * np.array([[record[key].get(layer, np.nan) for record in history] for layer in layers])
    edges = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1))
    mesh = axis.pcolormesh(edges, np.arange(len(layers) + 1), values, cmap="viridis", vmin=0)
    axis.set_yticks(np.arange(len(layers)) + 0.5, [_short(name) for name in layers], fontsize=6)
    axis.invert_yaxis()
    axis.set(xlabel="optimizer step", title=label)
    figure.colorbar(mesh, ax=axis)


def _short(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `3.q_proj`."""
    parts = name.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return f"{number}.{parts[-1]}" if number else parts[-1]
