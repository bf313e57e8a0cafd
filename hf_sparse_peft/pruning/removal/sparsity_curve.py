"""Essential sparsity: how much of a model's small weights can go before it shows (Jaiswal et al., 2023)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...utils.file_writing import whole_file
from ...utils.pictures import heat_map, layer_label, new_figure, save_picture
from ..reading.one_shot import SCOPES, one_shot_pruned

DEFAULT_SPARSITIES = tuple(step / 10 for step in range(10))
"""0 to 90 % in tenths, as the paper sweeps."""
_LABELS = {
    "global": "smallest of the model",
    "layer": "smallest of each matrix",
    "random": "at random",
    "erdos_renyi": "at random, Erdős–Rényi",
    "n:m": "smallest of each group (N:M)",
}


@dataclass(frozen=True)
class EssentialSparsity:
    """Quality of a model over the fraction of its weights that one-shot pruning removed."""

    scope: str
    """How they were chosen; see `one_shot_pruned`."""
    sparsities: tuple[float, ...]
    """Swept sparsities, rising from 0."""
    quality: tuple[float, ...]
    """What `evaluate` gave at each."""
    zero_fractions: dict[str, tuple[float, ...]]
    """Fraction of zeros of each matrix, at each: a global threshold can empty one."""
    higher_is_better: bool = True
    """False: `quality` is a loss."""
    tolerance: float = 0.99
    """Relative quality that counts as unharmed."""

    @property
    def relative(self) -> tuple[float, ...]:
        """`q(s) / q(0)`; of a loss `q(0) / q(s)`. 1 is the whole model's."""
        first = self.quality[0]
        if self.higher_is_better:
            return tuple(quality / first for quality in self.quality)
        return tuple(first / quality if quality else math.inf for quality in self.quality)

    @property
    def drop_point(self) -> float:
        """The essential sparsity :math:`s^*`: the largest swept `s` with a relative quality of `tolerance` or more."""
        return max(s for s, kept in zip(self.sparsities, self.relative, strict=True) if kept >= self.tolerance)

    @property
    def knee(self) -> float | None:
        """Where two least-squares lines, one on each side and both through that sparsity's point, fit the relative
        quality best; None with fewer than four points."""
        return two_segment_knee(self.sparsities, self.relative)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, `drop_point`, `knee` and `relative` included."""
        found = {"drop_point": self.drop_point, "knee": self.knee, "relative": self.relative}
        with whole_file(path) as file:
            file.write_text(json.dumps({**asdict(self), **found}, indent=1) + "\n", encoding="utf-8")

    def plot(self, path: str | Path, *others: EssentialSparsity) -> None:
        """Draw the curve, those of `others` beside it, and what each matrix lost, into a picture file.

        Raises:
            ImportError: matplotlib is missing.
        """
        _draw(Path(path), self, others)


def essential_sparsity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float] | None = None,
    scope: str = "global",
    *,
    higher_is_better: bool = True,
    tolerance: float = 0.99,
    group: int = 4,
    seed: int = 0,
    target_modules: Any = "all-linear",
    exclude_modules: Any = None,
    show_progress: bool = True,
) -> EssentialSparsity:
    """Remove the smallest weights of `model` in one shot, sparsity by sparsity, and ask `evaluate` what is left of it.

    The paper fine-tunes under each mask; for that, let `evaluate` train a copy or an adapter before it measures.
    Without, this is its evaluation-only form. Dense and quantised models; every weight is back, bit for bit, at the
    end.

    Args:
        model: a transformers model, with adapters or without.
        evaluate: `model -> quality`. It chooses the mode (`model.eval()`) and leaves the base weights alone.
        sparsities: fractions to remove, 0 among them; None: 0 to 0.9 in tenths, for `n:m` multiples of `1 / group`.
        scope: `global`, `layer`, `random`, `erdos_renyi` or `n:m`; see `one_shot_pruned`.
        higher_is_better: False where `evaluate` gives a loss.
        tolerance: relative quality that counts as unharmed, for `drop_point`.
        group: neighbours along the inputs, for `n:m`.
        seed: of `random` and `erdos_renyi`.
        target_modules, exclude_modules: as in a peft config.
        show_progress: whether a bar shows on stderr.

    Raises:
        ValueError: an option out of range, no 0 among the sparsities, or a quality of the whole model that is not
            positive, against which nothing can be related.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; choose one of {list(SCOPES)}.")
    if sparsities is None:
        sparsities = tuple(gone / group for gone in range(group)) if scope == "n:m" else DEFAULT_SPARSITIES
    fractions = tuple(sorted({float(s) for s in sparsities}))
    if not fractions or fractions[0] != 0:
        raise ValueError(
            f"sparsities={list(sparsities)} must have 0 among them: quality is related to the whole model's."
        )
    quality, zeros = [], {}
    for sparsity in tqdm(fractions, desc=f"Pruning, {scope}", disable=not show_progress, delay=1):
        options = {"group": group, "seed": seed, "target_modules": target_modules, "exclude_modules": exclude_modules}
        with one_shot_pruned(model, sparsity, scope, **options) as lost:
            quality.append(_checked(float(evaluate(model)), sparsity, first=not quality))
            for name, part in lost.items():
                zeros.setdefault(name, []).append(part)
    zeros = {name: tuple(parts) for name, parts in zeros.items()}
    return EssentialSparsity(scope, fractions, tuple(quality), zeros, higher_is_better, tolerance)


def _checked(quality: float, sparsity: float, first: bool) -> float:
    if math.isnan(quality) or (first and not 0 < quality < math.inf):
        raise ValueError(
            f"evaluate(model) gave {quality} at sparsity {sparsity:g}. It must give a number, and a positive one for "
            "the whole model (accuracy, or a loss with higher_is_better=False)."
        )
    return quality


def two_segment_knee(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """The `x` at which splitting the points into two least-squares lines leaves the smallest sum of squares; the point
    itself belongs to both, the earliest wins a tie. None with fewer than four points."""
    if len(xs) < 4:
        return None
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
    splits = range(1, len(xs) - 1)
    errors = [_residual(x[: at + 1], y[: at + 1]) + _residual(x[at:], y[at:]) for at in splits]
    return float(xs[splits[min(range(len(errors)), key=errors.__getitem__)]])


def _residual(x: torch.Tensor, y: torch.Tensor) -> float:
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy) / (dx @ dx)
    return round(float(((dy - slope * dx) ** 2).sum()), 15)


# The picture


def _draw(path: Path, main: EssentialSparsity, others: tuple[EssentialSparsity, ...]) -> None:
    """Write the curves with drop point and knee, and a heat map of what each matrix lost.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows = len(main.zero_fractions)
    figure = new_figure(9, 5 + max(2.5, 0.18 * rows), "plot()")
    top, bottom = figure.subplots(2, 1, height_ratios=(5, max(2.5, 0.18 * rows)))
    _draw_curves(top, main, others)
    _draw_zero_fractions(bottom, main)
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
    for height, (what, sparsity, color, style) in zip((0.985, 0.92), marks, strict=True):
        if sparsity is not None:
            axis.axvline(100 * sparsity, color=color, linewidth=1.2, linestyle=style)
            axis.annotate(f"{what} {100 * sparsity:g} %", (100 * sparsity, height), xycoords=("data", "axes fraction"),
                          xytext=(5, 0), textcoords="offset points", va="top", color=color)  # fmt: skip
    kind = "q(s) / q(0)" if main.higher_is_better else "loss(0) / loss(s)"
    axis.set(xlabel="weights removed [%]", ylabel=f"relative quality {kind} [%]", title="Essential sparsity, one shot")
    axis.set_ylim(0, 118 * max(1.0, *(kept for result in (main, *others) for kept in result.relative)))
    axis.grid(alpha=0.25)
    axis.legend(title="what is removed", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def _draw_zero_fractions(axis: Any, main: EssentialSparsity) -> None:
    names = list(main.zero_fractions)
    fractions = [[100 * sparsity for sparsity in main.zero_fractions[name]] for name in names]
    removed = [f"{100 * s:g}" for s in main.sparsities]
    heat_map(axis, fractions, [layer_label(name) for name in names], removed, top=100.0)
    title = f"zeros in each matrix [%] ({_LABELS[main.scope]})"
    axis.set(xlabel="weights removed from the whole model [%]", title=title)
