"""`RunRecord`: a run as reports and cards tell it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

ESTIMATES = ("seconds", "gpu_bytes", "process_bytes")
"""What a run is measured in: seconds of a step, bytes on the GPU at their highest, bytes of the process."""
SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""Ends of the names under which Trainer logs how fast it was."""


@dataclass(frozen=True)
class RunRecord:
    """A run as reports and cards tell it."""

    title: str = ""
    """Heading of the report."""
    facts: dict[str, str] = field(default_factory=dict)
    """What was trained, on what, how: a line each."""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions of packages, and the device."""
    log: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """`trainer.state.log_history`."""
    support: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """`SupportTelemetryCallback.history`."""
    measured: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """Records of `step` and, as far as measured, of `ESTIMATES`."""
    estimate: dict[str, float] = field(default_factory=dict)
    """What was expected of some of `ESTIMATES`."""
    events: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """What rules did."""

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of the last evaluation, without those of its speed."""
        for record in reversed(self.log):
            found = {
                key.removeprefix("eval_"): value
                for key, value in record.items()
                if key.startswith("eval_") and not key.endswith(SPEED) and isinstance(value, (int, float))
            }
            if found:
                return found
        return {}

    @property
    def cost(self) -> dict[str, str]:
        """Time and memory of the run, in words."""
        found = {}
        if times := [record["seconds"] for record in self.measured if "seconds" in record]:
            found["time of a step, median"] = f"{1000 * statistics.median(times):.0f} ms"
        if runtime := [record["train_runtime"] for record in self.log if "train_runtime" in record]:
            found["training time"] = _duration(runtime[-1])
        for key, name in (("gpu_bytes", "GPU memory, highest"), ("process_bytes", "memory of the process, highest")):
            if values := [record[key] for record in self.measured if key in record]:
                found[name] = f"{max(values) / 1e9:.2f} GB"
        return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
