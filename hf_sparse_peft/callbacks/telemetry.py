"""`SupportTelemetryCallback`: what lives where, over time."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerCallback

from ..tuners.sparse_lora import sparse_layers


class SupportTelemetryCallback(TrainerCallback):
    """Records each layer's density and rank every `every` steps, in `history` and in `support_log.jsonl`.

    The file lies in the Trainer's `output_dir`; one line a record: `{"step", "density": {module: share of the weight's
    units}, "rank": {module: components}}`. A resumed run appends after the step it resumed from.
    """

    def __init__(self, every: int = 10, write: bool = True) -> None:
        if every < 1:
            raise ValueError(f"every={every} is not a number of steps; give an integer >= 1.")
        self.every, self.write = every, write
        self.history: list[dict] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Forget records after the step that training starts from, then take the first."""
        path = self._path(args)
        kept = []
        if state.global_step and path.exists():
            # A run that was killed may have left half a line at the end, which has no newline yet.
            lines = path.read_text().split("\n")[:-1]
            kept = [record for record in map(json.loads, lines) if record["step"] < state.global_step]
        self.history = kept
        if self.write and state.is_world_process_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._record(args, state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Take a record every `every` steps and at the last one."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._record(args, state, model)

    def _record(self, args, state, model) -> None:
        record = {"step": state.global_step, "density": {}, "rank": {}}
        for layer in sparse_layers(model):
            for name in layer.active_adapters:
                if name in layer.sparse_lora_values:
                    share = layer.units(name).numel() / layer.sparse_lora_grid[name].num_units
                    record["density"][layer.module_name] = share
                if name in layer.sparse_lora_A:
                    record["rank"][layer.module_name] = layer.alive_components(name)
        self.history.append(record)
        if self.write and state.is_world_process_zero:
            with self._path(args).open("a") as file:
                file.write(json.dumps(record) + "\n")

    @staticmethod
    def _path(args) -> Path:
        return Path(args.output_dir) / "support_log.jsonl"
