"""What all benchmarks here share: options, the machine, rows that are measured once, tables, a picture, candidates.

A candidate is a method of the package with options, `name` or `name:option=value,...` with values as YAML writes them:

    spiel-ag   shira:density=0.02,granularity=row   'shira:criterion={type: low_rank_magnitude, rank: 32}'

Upstream's adapters (`UPSTREAM`) are named the same way. A program may have names of its own for some candidates.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import re
import statistics
import string
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports every start on stderr otherwise
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _quiet  # noqa: F401
import matplotlib

matplotlib.use("Agg")  # a file, not a window

import matplotlib.pyplot as plt
import peft
import torch
import transformers
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import hf_sparse_peft
from hf_sparse_peft import methods
from hf_sparse_peft.tuners.upstream import upstream_spaces

UPSTREAM = {
    "lora": peft.LoraConfig,
    "oft": peft.OFTConfig,
    "peft-shira": peft.ShiraConfig,
    "peft-supertuning": peft.SupertuningConfig,
}


def option(default: Any, help: str) -> Any:
    """A field of a program's options: its default and its one description, which `--help` prints."""
    given = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**given, metadata={"help": help})


@dataclass
class Options:
    """Options of every benchmark."""

    output: Path | None = option(None, "folder of rows, tables and pictures; by default runs/ and the program's name")
    again: bool = option(False, "measure again what the JSON file holds already")
    device: Literal["cpu", "cuda"] = option("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    threads: int | None = option(None, "CPU threads; by default torch's own choice")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written, and defaults."""


def parse(options_class: type, description: str, argv: list[str] | None) -> Any:
    """Options of a program from its command line; sets the number of threads."""
    warnings.filterwarnings("ignore", message=".*Sparse invariant checks")
    parser = HfArgumentParser(options_class, description=description, formatter_class=_Help)
    (options,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    return options


def machine(device: str) -> dict[str, Any]:
    """Device, threads, versions, and a hash of the package's source: PYTHONPATH decides which checkout is measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        named = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = named[1] if named else name
    sources = sorted(Path(hf_sparse_peft.__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    return {"device": name, "threads": torch.get_num_threads(), **versions, "code": code}


class Rows:
    """Rows of figures in a JSON file, `{"rows": [...]}`, which is written after every row.

    A row is a key, figures, the `setting` of the run and the `machine`. One that is in the file under the same key and
    setting is not measured again, unless `options.again` says so or it holds an `error`; so a long table may be made in
    pieces, and a broken run goes on where it was. What is timed has the machine in its setting (`timed=True`).
    """

    def __init__(self, options: Options, name: str, setting: dict[str, Any], timed: bool = False):
        self.folder = options.output or Path("runs") / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path, self.again, self.machine = self.folder / f"{name}.json", options.again, machine(options.device)
        self.setting = {**setting, **(self.machine if timed else {})}
        self._beside: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.rows: list[dict[str, Any]] = self._beside.pop("rows", [])

    def measure(self, work: Callable[[], dict[str, Any]], go_on: bool = False, **key: Any) -> dict[str, Any]:
        """The row of that key: the file's, or `work()`'s; with `go_on` an exception becomes the row's `error`."""
        found = [row for row in self.rows if {**row, **key, "setting": self.setting} == row]
        if found and "error" not in found[0] and not self.again:
            return found[0]
        try:
            figures = work()
        except Exception as error:
            if not go_on:
                raise
            traceback.print_exc()
            figures = {"error": ": ".join([type(error).__name__, *str(error).splitlines()[:1]])}
        row = {**key, **figures, "setting": self.setting, "machine": self.machine}
        self.rows = [old for old in self.rows if old not in found] + [row]
        self.save()
        print({name: value for name, value in row.items() if not isinstance(value, dict)}, flush=True)
        return row

    def of(self, part: str, **key: Any) -> list[dict[str, Any]]:
        """Rows of a part of this setting, whose key holds `key`."""
        key |= {"part": part, "setting": self.setting}
        return [row for row in self.rows if {**row, **key} == row]

    def save(self, **more: Any) -> None:
        """Write the file whole or not at all; `more` stands beside the rows, at every later writing too."""
        self._beside |= more
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"rows": self.rows, **self._beside}, indent=1) + "\n")
        temporary.replace(self.path)


def build_method(
    candidate: str, numbers: dict[str, float] | None = None, seed: int | None = None, **options: Any
) -> methods.Method:
    """The method that a candidate names. Its own options come before `options`, `$name` in them is `numbers[name]`, and
    `seed` goes to configs that have one. Methods that keep their papers' places take no `target_modules` of `options`.

    Raises:
        ValueError: no such method, or an option that it does not take.
    """
    name, _, own = string.Template(candidate).substitute(numbers or {}).partition(":")
    if name not in UPSTREAM and methods.describe(name).keeps_places:
        options.pop("target_modules", None)
    options |= yaml.safe_load("{" + re.sub(r"(\w+)=", r"\1: ", own) + "}")
    if name in UPSTREAM:
        return methods.Method(UPSTREAM[name](**options), make_callbacks=lambda model: [])
    method = methods.get(name, **options)
    if seed is not None and "seed" not in options and hasattr(method.config, "seed"):
        method.config.seed = seed
    return method


def training_arguments(options: Any, folder: Path, learning_rate: float, seed: int, **more: Any) -> TrainingArguments:
    """Arguments of a short, silent run of `options.steps`."""
    silent = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": options.device == "cpu"}
    run = {"max_steps": options.steps, "learning_rate": learning_rate, "lr_scheduler_type": "cosine", "seed": seed}
    return TrainingArguments(str(folder), **{**silent, **run, **more})


def make_trainer(
    method: methods.Method,
    model: nn.Module,
    args: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
    adjust_optimizer: Callable[[torch.optim.Optimizer | None], torch.optim.Optimizer | None] = lambda own: own,
    **data: Any,
) -> Trainer:
    """A Trainer with all that the method brings; `callbacks` come behind its own."""
    optimizer = adjust_optimizer(method.optimizer(model, args))
    callbacks = [*method.callbacks(model), *callbacks]
    trainer = method.trainer_class(model=model, args=args, callbacks=callbacks, optimizers=(optimizer, None), **data)
    trainer.remove_callback(PrinterCallback)  # a row a run is enough
    return trainer


class LivingUnits:
    """The living units of every support, rank and other space of units of an adapter, to see whether they moved."""

    def __init__(self, model: nn.Module):
        layers = [module for module in model.modules() if hasattr(module, "unit_spaces")]
        self._spaces = [space for layer in layers for space in layer.unit_spaces("default")]
        self._spaces += [space for spaces in upstream_spaces(model).values() for space in spaces]
        self.seen = [space.alive().clone() for space in self._spaces]

    def moved(self) -> bool:
        """Whether one of them is another than at the last call."""
        before, self.seen = self.seen, [space.alive().clone() for space in self._spaces]
        return not all(torch.equal(*pair) for pair in zip(before, self.seen, strict=True))


@dataclass(frozen=True)
class Column:
    """One column of a table: its title, a key or function of the row, and the form of a cell; None leaves it empty.
    Long cells wrap on a terminal with `wrap`."""

    title: str
    value: str | Callable[[dict[str, Any]], Any]
    form: str = "{}"
    wrap: bool = False

    def cell(self, row: dict[str, Any]) -> str:
        """The row's cell."""
        value = self.value(row) if callable(self.value) else row.get(self.value)
        return "" if value is None else self.form.format(value)


def print_table(title: str, columns: Sequence[Column], rows: Iterable[dict[str, Any]]) -> None:
    """Print one line a row; every column but the first is aligned to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        wrap = column.wrap or not number
        table.add_column(column.title, justify="right" if number else "left", no_wrap=not wrap, overflow="fold")
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    Console(width=140, soft_wrap=True, markup=False).print(table)


def markdown(columns: Sequence[Column], rows: Iterable[dict[str, Any]]) -> str:
    """The same table in Markdown."""
    lines = [[column.title for column in columns], ["---"] * len(columns)]
    lines += [[column.cell(row) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


Bars = dict[str, Sequence[Sequence[float]]]
"""Label -> values of each series; several values are drawn as their mean and a line from the lowest to the highest."""


def draw(path: Path, title: str, panels: dict[str, Bars], series: Sequence[str], unit: str = "", cut: float = 1e9):
    """Horizontal bars, a panel beside the other, a line at 1 where `unit` says what that is; bars end at `cut`."""
    size = (1.2 + 5.4 * len(panels), 1.6 + 0.24 * len(series) * max(map(len, panels.values())))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (name, bars) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(axis, bars, series, cut)
        axis.set_title(name, fontsize=10)
        if unit:
            axis.axvline(1.0, color="0.35", linewidth=1, linestyle="--", zorder=1, label=unit)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_panel(axis: Any, bars: Bars, series: Sequence[str], cut: float) -> None:
    height, largest = 0.8 / len(series), 0.0
    for number, label in enumerate(series):
        at = [place + (number - (len(series) - 1) / 2) * height for place in range(len(bars))]
        means = [statistics.mean(values[number]) for values in bars.values()]
        ends = [[min(end(values[number]), cut) for values in bars.values()] for end in (min, max)]
        drawn = axis.barh(at, [min(mean, cut) for mean in means], 0.95 * height, label=label, zorder=2)
        axis.hlines(at, *ends, color="0.25", zorder=3)
        texts = [f"{mean:.2f}" + (" >" if mean > cut else "") for mean in means]
        for text in axis.bar_label(drawn, texts, fontsize=8, padding=2):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        largest = max(largest, *ends[1])
    axis.set_yticks(range(len(bars)), list(bars), fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, largest * 1.12 or 1)
    axis.spines[["top", "right"]].set_visible(False)
