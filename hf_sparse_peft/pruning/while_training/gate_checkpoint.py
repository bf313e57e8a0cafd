"""Gates of units in a checkpoint, with their optimizer's moments: JSON, as they are in no layer's file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .tensor_text import as_text, from_text
from .unit_hard_concrete import UnitGates


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    expected: float | None = None
    """Expected sparsity when masks became hard; None: they are not."""
    read: int = 0
    """Batches of the second data set that were read."""


def gates_to_json(
    gates: list[UnitGates], multipliers: Tensor, optimizer: torch.optim.Optimizer, progress: Progress
) -> dict[str, Any]:
    """Gates, multipliers, and the moments of their Adam by the place of the parameter."""
    moments = optimizer.state_dict()["state"].items()
    return {
        "parts": {
            one.key: {"units": as_text(one.units), "part": as_text(one.part), "alive": as_text(one.alive)}
            for one in gates
        },
        "multipliers": as_text(multipliers),
        "moments": {str(at): {name: as_text(value) for name, value in state.items()} for at, state in moments},
        **asdict(progress),
    }


@torch.no_grad()
def gates_from_json(saved: Any, gates: list[UnitGates], multipliers: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Read `gates_to_json`, whole or not at all.

    Raises:
        ValueError: it has no gates, others than the model, or damaged ones.
    """
    parts = saved.get("parts") if isinstance(saved, dict) else None
    if not isinstance(parts, dict) or set(parts) != {one.key for one in gates}:
        raise ValueError(
            "The checkpoint has no gates of the model's heads and channels: it is of a run without this callback, or "
            "of another model. Begin anew, or resume another one."
        )
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    try:
        found = [
            [from_text(parts[one.key][name], like, f"gates of '{one.key}'")
             for name, like in (("units", one.units), ("part", one.part), ("alive", one.units))]
            for one in gates
        ]  # fmt: skip
        read = from_text(saved["multipliers"], multipliers, "multipliers")
        moments = {
            leaves[int(at)]: {
                name: from_text(state[name], torch.zeros(()) if name == "step" else leaves[int(at)], "moments of gates")
                for name in ("step", "exp_avg", "exp_avg_sq")
            }
            for at, state in saved["moments"].items()
        }
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"The checkpoint's gates are damaged ({error!r}): resume from another one.") from error
    progress = Progress(saved.get("expected"), saved.get("read"))
    counts = isinstance(progress.read, int) and not isinstance(progress.read, bool) and progress.read >= 0
    if not counts or not (progress.expected is None or isinstance(progress.expected, float)):
        raise ValueError(f"The checkpoint's gates are damaged ({progress}): resume from another one.")
    for one, (units, part, alive) in zip(gates, found, strict=True):
        one.units.copy_(units)
        one.part.copy_(part)
        one.alive = alive != 0
    multipliers.copy_(read)
    optimizer.state.update(moments)
    return progress
