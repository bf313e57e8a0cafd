"""`RunReportCallback`: measures a run, and writes it down as one page, `report.html`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..tuners import adapter_layers
from ..tuners.shared.counts import adapter_counts
from ..tuners.shared.live_run import current_trainer
from ..utils.environment import environment
from ..utils.option_types import PositiveInt, check_value
from .executor import RuleExecutor
from .record_log import RecordLog
from .report_page import write_report
from .run_record import ESTIMATES, RunRecord
from .telemetry import SupportTelemetryCallback


class RunReportCallback(TrainerCallback):
    """Measures time and memory of a run's steps and writes `report.html` into the Trainer's `output_dir` when training
    ends, and again after every evaluation that follows.

    The page stands alone: losses and measures, heat maps of density, rank and churn, ages, the budget's flow, time and
    memory beside their estimates, moves, settings and versions. It takes what the other callbacks of the Trainer have
    recorded (`SupportTelemetryCallback`, the runner of rules), draws nothing that is the same everywhere, and follows
    the reader's choice of dark or light. `record` is the same as data, for cards (`adapter_card(run=...)`).

    Measurements lie in `run_log.jsonl`, one line a record of `every` steps: `step`, `seconds` (median of a step, from
    its first micro-batch to after its update), `gpu_bytes` (highest of the run so far, `torch.cuda`) or, without a GPU,
    `process_bytes` (resident size of the process). A resumed run goes on after the step it resumed from.
    A page or line that cannot be written is warned about; the run goes on.

    Args:
        every: steps between two measurements.
        title: heading of the page; empty: the type of the adapter and its base.
        estimate: what was expected, by name (`ESTIMATES`), drawn beside what was measured.
        facts: lines for the page's table, beside those that the run itself gives.

    Raises:
        ValueError: `every` is below 1, or an estimate has an unknown name or is no number.
        ImportError: matplotlib is not installed.
    """

    def __init__(
        self,
        every: int = 10,
        title: str = "",
        estimate: Mapping[str, float] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        check_value(every, PositiveInt, "RunReportCallback(every)")
        for name, value in (estimate or {}).items():
            if name not in ESTIMATES or isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"RunReportCallback(estimate={{{name!r}: {value!r}}}): numbers for {list(ESTIMATES)}.")
        import matplotlib.figure  # noqa: F401  now, and not after hours of training

        self.every, self.title = every, title
        self.estimate, self.facts = dict(estimate or {}), dict(facts or {})
        self.measured: list[dict[str, Any]] = []
        self.record = RunRecord()
        """Of the run that ended last."""
        self._times: list[float] = []
        self._began: float | None = None
        self._others: list[TrainerCallback] = []
        self._ended = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control, **kwargs: Any) -> None:
        """Forget measurements after the step that training starts from."""
        trainer = current_trainer()
        self._others = [] if trainer is None else list(trainer.callback_handler.callbacks)
        self._log = RecordLog(Path(args.output_dir) / "run_log.jsonl", _is_measurement)
        self.measured = self._log.read(state.global_step) if state.global_step else []
        self._times, self._ended = [], False
        if state.is_world_process_zero:
            self._log.begin(self.measured)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """The step's first micro-batch."""
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control, **kwargs: Any) -> None:
        """Measure; take a record every `every` steps and at the last one."""
        if self._began is not None:
            self._times.append(time.perf_counter() - self._began)
        if self._times and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            self.measured.append({"step": state.global_step, "seconds": statistics.median(self._times), **_memory()})
            self._times = []
            if state.is_world_process_zero:
                self._log.add(self.measured)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control, model=None, **kwargs: Any) -> None:
        """Write the page."""
        self._ended = True
        self._write(args, state, model)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control, model=None, **kwargs: Any) -> None:
        """Write it again with what a later evaluation has found."""
        if self._ended:
            self._write(args, state, model)

    def on_log(self, args: TrainingArguments, state: TrainerState, control, model=None, logs=None, **kwargs) -> None:
        """Take the summary that Trainer logs after the end."""
        if self._ended and "train_runtime" in (logs or {}):
            self._write(args, state, model)

    def _write(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        telemetry = next((one for one in self._others if isinstance(one, SupportTelemetryCallback)), None)
        executors = [one for one in self._others if isinstance(one, RuleExecutor)]
        self.record = RunRecord(
            title=self.title or _title(model),
            facts={**_facts(args, state, model), **{name: str(value) for name, value in self.facts.items()}},
            environment=environment(),
            log=list(state.log_history),
            support=[] if telemetry is None else list(telemetry.history),
            measured=list(self.measured),
            estimate=self.estimate,
            events=[event for executor in executors for event in executor.events],
        )
        if not state.is_world_process_zero:
            return
        try:
            write_report(self.record, Path(args.output_dir) / "report.html")
        except OSError as error:
            self._log.warn(f"has no page beside it: report.html could not be written ({error})")


def _memory() -> dict[str, int]:
    if torch.cuda.is_available():
        return {"gpu_bytes": torch.cuda.max_memory_allocated()}
    return {"process_bytes": psutil.Process().memory_info().rss}


def _is_measurement(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and type(record.get("step")) is int
        and set(record) <= {"step", *ESTIMATES}
        and all(type(value) in (int, float) for value in record.values())
    )


def _title(model: nn.Module | None) -> str:
    layers = adapter_layers(model) if model is not None else []
    kinds = dict.fromkeys(c.peft_type.value for layer in layers for c in layer.adapter_configs.values())
    base = getattr(getattr(model, "config", None), "_name_or_path", "")
    base = Path(base).name if os.path.exists(base) else base  # pages are passed on: no path of this machine
    return " on ".join(part for part in (" + ".join(kinds) or "A run", base) if part)


def _facts(args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> dict[str, str]:
    found: dict[str, str] = {}
    layers = adapter_layers(model) if model is not None else []
    for name in dict.fromkeys(name for layer in layers for name in layer.active_adapters if layer.holds(name)):
        counts = adapter_counts(model, name)
        whose = "the adapter" if name == "default" else f"adapter '{name}'"
        found[f"numbers of {whose}, living"] = f"{counts.living:,}"
        if rules := layers[0].adapter_configs[name].rule_types:
            found[f"rules of {whose}"] = ", ".join(rules)
    found["steps"] = f"{state.global_step:,} of {state.max_steps:,}"
    batch = args.train_batch_size * args.gradient_accumulation_steps * max(args.world_size, 1)
    found["examples a step"] = f"{batch:,}"
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    found["learning rate"] = f"{args.learning_rate:g}, {schedule}"
    found["precision"] = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "as the model is"
    found["seed"] = str(args.seed)
    return found
