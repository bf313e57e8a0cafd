"""What a checked adapter folder is reported to hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tuners.shared.config import AdapterConfig
from ..utils.tables import Table, table


@dataclass(frozen=True)
class ModuleReport:
    """What one module of an adapter holds."""

    name: str
    """Module name in the base model."""
    rows: int
    """`out_features`."""
    cols: int
    """`in_features`."""
    spaces: list[dict[str, Any]]
    """A dict for each unit space: `kind` ("support", "rank", ...), `unit` (what one unit is), `alive` and `capacity`
    (units that there is room for), `bytes` (of the tensors that its units lie in)."""
    density: float
    """Fraction of the weight's entries that living units are or contain."""
    parameters: int
    """Trained numbers of living units."""
    bytes: int
    """Bytes of the module's tensors in the file."""

    def space(self, kind: str) -> dict[str, Any] | None:
        """The space of that kind; None without one."""
        return next((space for space in self.spaces if space["kind"] == kind), None)


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter folder holds; every tensor was checked."""

    path: Path
    """The folder."""
    config: AdapterConfig
    """Its adapter_config.json."""
    modules: tuple[ModuleReport, ...]
    """One report for each adapted module, by name."""
    file_bytes: int
    """Size of adapter_model.safetensors."""
    other_bytes: int
    """Bytes of tensors beside the adapted modules: biases, modules_to_save, state of running schedules."""
    other_parameters: int = 0
    """Trained numbers beside the adapted modules: biases and modules_to_save."""

    @property
    def density(self) -> float:
        """Fraction of all adapted weights' entries in living units."""
        return sum(m.density * m.rows * m.cols for m in self.modules) / sum(m.rows * m.cols for m in self.modules)

    @property
    def parameters(self) -> int:
        """Trained numbers of the adapter: of living units of all adapted modules, heads and biases."""
        return sum(m.parameters for m in self.modules) + self.other_parameters

    def table(self) -> Table:
        """The report as a table, a line for each module and one for the whole; `str()` of it is aligned text."""
        kinds = list(dict.fromkeys(space["kind"] for m in self.modules for space in m.spaces))
        rows = [
            (
                m.name,
                f"{m.rows}x{m.cols}",
                *(_units(m.space(kind)) for kind in kinds),
                f"{m.density:.4%}" if m.density else None,
                m.parameters,
                m.bytes,
            )
            for m in self.modules
        ]
        if self.other_parameters:
            rows.append(("heads and biases", "", *("" for _ in kinds), "", self.other_parameters, None))
        alive = [sum(s["alive"] for m in self.modules for s in m.spaces if s["kind"] == kind) for kind in kinds]
        totals = (f"{len(self.modules)} modules", "", *alive, f"{self.density:.4%}", self.parameters, self.file_bytes)
        return table(("module", "shape", *kinds, "density", "parameters", "bytes"), rows, totals=totals)


def _units(space: dict[str, Any] | None) -> str:
    if space is None:
        return "-"
    of = f" of {space['capacity']}" if space["capacity"] != space["alive"] else ""
    return f"{space['alive']}{of} {space['unit']}"
