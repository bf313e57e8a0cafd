"""`SupportTelemetryCallback`: what lives where, how old it is and how much of the gradient it sees, over time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback

from ..rules import UnitSpace
from ..tuners import adapter_layers
from ..tuners.shared.live_run import LiveRun, begin_run
from ..utils.file_length import read_safetensors
from ..utils.file_writing import whole_file
from .expert_counts import FIELDS, ExpertCounts
from .loss_watch import LossWatch, watch_losses
from .panels import NUMBERS
from .record_log import RecordLog
from .support_tracker import GradientShare, SupportTracker, quantiles

logger = logging.getLogger(__name__)

STATE_FILE = "support_telemetry.safetensors"
_BY_MODULE = ("density", "rank", "churn", "overlap", "age", "gradient_share")


class SupportTelemetryCallback(TrainerCallback):
    """Records the unit spaces of every layer, whatever its tuner, every `every` steps, in `history` and in
    `support_log.jsonl`.

    List it behind the callbacks that move units. The file lies in the Trainer's `output_dir`, one line a record:
    `step`, and by module (`module:adapter` where several adapters are active)

    - `density`: fraction of the weight's units that are alive: of a support, or the entries of a kernel that survive;
    - `rank`: living components; other kinds of spaces whose units are no parts of the weight likewise, by their kind;
    - `numbers/support`, `numbers/rank`, ...: trained numbers of the living units, where kinds of units can differ;

    and of supports, and every space whose units are parts of the weight and move,

    - `churn`: fraction of the living units that were not alive at the last record;
    - `overlap`: fraction of the living units that were alive when training began;
    - `age`: least, quartiles and largest age of the living units in updates, from the optimizer where it keeps one per
      unit (`AgedAdamW`), otherwise the updates since the unit entered; `age_source` says which;
    - `gradient_share` (with `gradient_share=True`): fraction of the last update's squared gradient in the support
      (`GradientShare`). Costs one more dense product a layer in recorded steps, and keeps the layer's whole
      input there; nothing of the training changes by it. Compiled models show no gradients: the key stays empty.

    Of experts: `expert`, how many live; `tokens`, how many each took in the recorded step's training passes, in this
    process; `dropped`, the part of assignments that found no room.

    `model` holds the whole model's figures, and the Trainer's log has them as `support/density` and so on. Reporters
    (TensorBoard, W&B) stand before this callback in the Trainer's list: `attach(trainer)` lets them see these too.

    A resumed run appends after the step it resumed from. For that every checkpoint gets a file
    `support_telemetry.safetensors`: 12 bytes a unit, which is also the memory that telemetry takes (`SupportTracker`).

    A loss that is not finite ends the run with an error that names the step and the first layer, where it spoils
    trained values (`LossWatch`).

    Files that cannot be written or read are warned about once; the run goes on and `history` stays complete. Records
    that were missed are written as soon as that is possible. Damaged lines of the log are left out at a resume.
    """

    def __init__(self, every: int = 10, write: bool = True, gradient_share: bool = False) -> None:
        if every < 1:
            raise ValueError(f"every={every} is not a number of steps; give an integer >= 1.")
        self.every, self.write, self.gradient_share = every, write, gradient_share
        self.history: list[dict] = []
        self._trackers: dict[str, SupportTracker] = {}
        self._watched: list[GradientShare] = []
        self._experts: ExpertCounts | None = None
        self._attached = self._started = False
        self._run: LiveRun | None = None
        self._losses: LossWatch | None = None

    def attach(self, trainer: Trainer) -> SupportTelemetryCallback:
        """Join `trainer` so that its reporters (TensorBoard, W&B) show the figures too; returns self."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        if not self._attached:
            # Reporters come first in the list and would have sent the log before this callback fills it in.
            trainer.callback_handler.callbacks.insert(0, _FillsLogsFirst(self))
            self._attached = True
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Forget records after the step that training starts from."""
        self._run = begin_run(model, adapter_layers(model), state)
        self._run.join(self, self._stop_watching)
        self._losses = watch_losses(self._run, model, args)
        self._trackers, self._watched, self._started = {}, [], False
        self._log = RecordLog(Path(args.output_dir) / "support_log.jsonl", _record_check(model))
        self.history = self._log.read(state.global_step) if state.global_step else []
        if self.write and state.is_world_process_zero:
            self._log.begin(self.history)
        if args.report_to and not self._attached:
            logger.warning(
                f"{args.report_to} will not show support figures: call telemetry.attach(trainer) before train(). "
                "They are in trainer.state.log_history and support_log.jsonl."
            )

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Take the first record, when all callbacks have chosen their supports; watch gradients of a recorded step."""
        if not self._started:
            self._start(args, state, model, optimizer)
        self._stop_counting()
        if self._records_after(state.global_step + 1, state):
            self._experts = ExpertCounts(dict(_spaces(model)))
        if self.gradient_share and self._records_after(state.global_step + 1, state):
            by_layer: dict[int, list[UnitSpace]] = {}
            for tracker in self._trackers.values():
                by_layer.setdefault(id(tracker.space.layer), []).append(tracker.space)
            for spaces in by_layer.values():
                share = GradientShare(spaces)
                share.layer.passive_gradient_reader = share
                self._watched.append(share)

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        """Close a micro-batch.

        Raises:
            ValueError: the loss is not finite, nor are trained values (`LossWatch`).
        """
        if self._losses is not None:
            self._losses.close_micro_batch(state.global_step + 1)
        for share in self._watched:
            share.finish_micro_batch()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Stop watching gradients; raises as `on_substep_end`."""
        if self._losses is not None:
            self._losses.close_micro_batch(state.global_step + 1)
        for share in self._watched:
            share.finish_micro_batch()
        self._stop_watching()

    def _stop_watching(self) -> None:
        for share in self._watched:
            share.layer.passive_gradient_reader = None
        if self._experts is not None:
            self._experts.close()

    def _stop_counting(self) -> None:
        if self._experts is not None:
            self._experts.close()
        self._experts = None

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Take part in this run no more."""
        if self._run is not None:
            self._run.leave(self)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Follow the moves; take a record every `every` steps and at the last one.

        Raises:
            ValueError: a loss was not finite, and the update has spoiled trained values (`LossWatch`).
        """
        if self._losses is not None:
            self._losses.close_step()
        for tracker in self._trackers.values():
            tracker.follow(state.global_step)
        if self._records_after(state.global_step, state):
            self._record(args, state, model, optimizer)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Put the last record's figures into the Trainer's history."""
        if "loss" in (logs or {}) and state.log_history:
            state.log_history[-1].update(self.latest())

    def on_save(self, args, state, control, **kwargs) -> None:
        """Leave in the checkpoint what a resumed run needs."""
        if not (self.write and self._trackers and state.is_world_process_zero):
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        tensors = {f"{key}/{name}": t for key, tr in self._trackers.items() for name, t in tr.state().items()}
        try:
            if not folder.exists():
                return
            with whole_file(folder / STATE_FILE) as file:
                save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, file)
        except (OSError, SafetensorError) as error:
            self._log.warn(f"has no state in checkpoints: {STATE_FILE} could not be written ({error})")

    def latest(self) -> dict[str, float]:
        """Figures of the whole model at the last record, under the keys of the Trainer's log."""
        figures = self.history[-1]["model"] if self.history else {}
        return {f"support/{name}": value for name, value in figures.items() if value is not None}

    def _records_after(self, update: int, state) -> bool:
        return update % self.every == 0 or update == state.max_steps

    def _start(self, args, state, model, optimizer) -> None:
        self._started = True
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
        saved = self._read_state(file) if state.global_step else {}
        for key, space in _spaces(model):
            if space.unit_entries and space.followers():  # parts of the weight with numbers of their own
                known = {n: saved[f"{key}/{n}"] for n in ("initial", "recorded", "entered") if f"{key}/{n}" in saved}
                self._trackers[key] = SupportTracker(space, state.global_step, known)
        if state.global_step and self._trackers and not saved and state.is_world_process_zero:
            logger.warning(f"No {file}: ages, churn and overlap count from step {state.global_step}.")
        if not self.history:
            self._record(args, state, model, optimizer)

    def _read_state(self, file: Path) -> dict[str, torch.Tensor]:
        try:
            return read_safetensors(file)[0] if file.exists() else {}
        except (OSError, ValueError) as error:
            self._log.warn(f"goes on without the state in '{file}', which could not be read ({error})")
            return {}

    def _record(self, args, state, model, optimizer) -> None:
        record: dict[str, Any] = {"step": state.global_step, **{field: {} for field in _BY_MODULE}}
        squares = {}
        for share in self._watched:
            whole, *parts = share.squares()
            squares |= {space: (part, whole) for space, part in zip(share.spaces, parts, strict=True)}
        self._watched = []
        total = dict.fromkeys(("entries", "numel", "alive", "fresh", "initial", "seen", "square"), 0.0)
        for key, space in _spaces(model):
            tracker = self._trackers.get(key)
            tracker = tracker if tracker is not None and tracker.space == space else None
            count = space.count if tracker is None else tracker.units.numel()
            record.setdefault(_field(space), {})[key] = count / space.size if space.unit_entries else count
            record.setdefault(NUMBERS + space.kind, {})[key] = count * space.unit_numel
            if space.unit_entries:
                total["entries"] += space.alive_entries
                total["numel"] += space.layer.out_features * space.layer.in_features
            if tracker is not None:
                self._record_moves(record, total, key, squares.get(space), state.global_step, optimizer)
        record |= self._experts.fields() if self._experts is not None else {}
        self._stop_counting()
        record["model"] = _whole_model(record, total)
        self.history.append(record)
        if self.write and state.is_world_process_zero:
            self._log.add(self.history)

    def _record_moves(self, record, total, key: str, squares: tuple | None, step: int, optimizer: Any) -> None:
        tracker = self._trackers[key]
        counts = tracker.counts()
        alive = max(counts["alive"], 1)
        record["churn"][key], record["overlap"][key] = counts["fresh"] / alive, counts["initial"] / alive
        record["age_source"], ages = tracker.ages(step, optimizer)
        record["age"][key] = quantiles(ages)
        for name, count in counts.items():
            total[name] += count
        if squares and math.isfinite(squares[1]) and squares[1] > 0:
            record["gradient_share"][key] = squares[0] / squares[1]
            total["seen"] += squares[0]
            total["square"] += squares[1]
        tracker.mark_recorded()


class _FillsLogsFirst(TrainerCallback):
    def __init__(self, telemetry: SupportTelemetryCallback) -> None:
        self.telemetry = telemetry

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in (logs or {}):
            logs.update(self.telemetry.latest())


def _spaces(model: torch.nn.Module) -> list[tuple[str, UnitSpace]]:
    """The spaces of every layer's active adapters, each with its key in a record: the module, with the adapter where
    several are active, and with the kind where the module has two spaces of one field."""
    found: dict[tuple[str, str], UnitSpace] = {}
    for layer in adapter_layers(model):
        names = [name for name in layer.active_adapters if layer.holds(name)]
        for name in names:
            module = layer.module_name if len(names) == 1 else f"{layer.module_name}:{name}"
            for space in layer.unit_spaces(name):
                if space.kind == "module":
                    continue
                taken = (_field(space), module) in found
                found[_field(space), f"{module}:{space.kind}" if taken else module] = space
    return [(key, space) for (_, key), space in found.items()]


def _field(space: UnitSpace) -> str:
    """The field of a record that has the space's size."""
    return "density" if space.unit_entries else space.kind


def _record_check(model: torch.nn.Module) -> Callable[[Any], bool]:
    """Whether something that was read from a log is a record of this model's modules."""
    spaces = _spaces(model)
    known = {key for key, _ in spaces}
    fields = [field for _, space in spaces for field in (_field(space), NUMBERS + space.kind)]
    by_module = tuple(dict.fromkeys((*_BY_MODULE, *fields)))

    def is_record(record: Any) -> bool:
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            return False
        if not all(isinstance(record.get(field), dict) for field in (*by_module, "model")):
            return False
        optional = [field for field in FIELDS if isinstance(record.get(field), dict)]
        if not all(set(record[field]) <= known for field in (*by_module, *optional)):
            return False
        figures = [value for field in (*by_module, *optional, "model") for value in record[field].values()]
        figures = [one for value in figures for one in (value if isinstance(value, list) else [value])]
        return all(type(one) in (int, float) for one in figures)

    return is_record


def _whole_model(record: dict, total: dict[str, float]) -> dict[str, float]:
    figures: dict[str, float] = {}
    if total["numel"]:
        figures["density"] = total["entries"] / total["numel"]
    if record["churn"]:
        figures["churn"] = total["fresh"] / max(total["alive"], 1)
        figures["overlap"] = total["initial"] / max(total["alive"], 1)
        medians = [ages[2] for ages in record["age"].values() if ages]
        figures["age_median"] = sum(medians) / max(len(medians), 1)
    if total["square"]:
        figures["gradient_share"] = total["seen"] / total["square"]
    for kind, counts in record.items():  # the mean size of spaces whose units are no parts of the weight
        if kind in ("tokens", "density", "churn", "overlap", "age", "gradient_share") or kind.startswith(NUMBERS):
            continue
        if isinstance(counts, dict) and counts:
            figures[kind] = sum(counts.values()) / len(counts)
    return figures
