"""The picture of an essential-sparsity sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.support_picture import save_picture

if TYPE_CHECKING:
    from .sparsity_curve import EssentialSparsity

_LABELS = {
    "global": "smallest of the model",
    "layer": "smallest of each matrix",
    "random": "at random",
    "erdos_renyi": "at random, Erdős–Rényi",
    "n:m": "smallest of each group (N:M)",
}


def draw(path: Path, main: EssentialSparsity, others: tuple[EssentialSparsity, ...]) -> None:
    """Write the curves with drop point and knee, and a heat map of what each matrix lost.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install 'hf-sparse-peft[recipes]'.") from error
    rows = len(main.zero_shares)
    # No pyplot: it would choose a backend for the whole process.
    figure = Figure(figsize=(9, 5 + max(2.5, 0.18 * rows)), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(5, max(2.5, 0.18 * rows)))
    _draw_curves(top, main, others)
    _draw_zero_shares(figure, bottom, main)
    save_picture(figure, path, dpi=120)


def _draw_curves(axis: Any, main: EssentialSparsity, others: tuple[EssentialSparsity, ...]) -> None:
    for number, result in enumerate((main, *others)):
        first = number == 0
        axis.plot(
            [100 * s for s in result.sparsities],
            [100 * kept for kept in result.relative],
            "o-" if first else "o--",
            color="C0" if first else f"C{number + 1}",
            linewidth=2.2 if first else 1.2,
            markersize=6 if first else 4,
            label=f"{_LABELS[result.scope]}: $s^*$ = {100 * result.drop_point:g} %",
            zorder=3 if first else 2,
        )
    bar = 100 * main.tolerance
    axis.axhline(bar, color="grey", linewidth=0.8, linestyle=":")
    axis.annotate(f"{bar:g} %", (1, bar), xycoords=("axes fraction", "data"), xytext=(-4, 3), color="grey",
                  textcoords="offset points", ha="right", va="bottom", fontsize=9)  # fmt: skip
    marks = [("drop point", main.drop_point, "C0", "-"), ("knee", main.knee, "C1", "-.")]
    for height, (what, share, color, style) in zip((0.985, 0.92), marks, strict=True):
        if share is not None:
            axis.axvline(100 * share, color=color, linewidth=1.2, linestyle=style)
            axis.annotate(f"{what} {100 * share:g} %", (100 * share, height), xycoords=("data", "axes fraction"),
                          xytext=(5, 0), textcoords="offset points", va="top", color=color)  # fmt: skip
    kind = "q(s) / q(0)" if main.higher_is_better else "loss(0) / loss(s)"
    axis.set(xlabel="weights removed [%]", ylabel=f"relative quality {kind} [%]", title="Essential sparsity, one shot")
    axis.set_ylim(0, 118 * max(1.0, *(kept for result in (main, *others) for kept in result.relative)))
    axis.grid(alpha=0.25)
    axis.legend(title="what is removed", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def _draw_zero_shares(figure: Any, axis: Any, main: EssentialSparsity) -> None:
    names = list(main.zero_shares)
    shares = [[100 * share for share in main.zero_shares[name]] for name in names]
    mesh = axis.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    axis.set_xticks(range(len(main.sparsities)), [f"{100 * s:g}" for s in main.sparsities])
    axis.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=7 if len(names) > 20 else 9)
    title = f"zeros in each matrix [%] ({_LABELS[main.scope]})"
    axis.set(xlabel="weights removed from the whole model [%]", title=title)
    figure.colorbar(mesh, ax=axis, pad=0.01)


def _short(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `3.q_proj`."""
    parts = name.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return f"{number}.{parts[-1]}" if number else parts[-1]
