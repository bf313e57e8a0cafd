"""What a checked adapter folder is reported to hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..tuners.shared.config import AdapterConfig
from ..utils.tables import Table, table
from .analysis.module_picture import draw_modules


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
class ModuleGroup:
    """Modules of one kind: of one last name, one shape and the same unit spaces."""

    name: str
    """Last part of their names."""
    modules: int
    """How many they are."""
    rows: int
    """`out_features`."""
    cols: int
    """`in_features`."""
    spaces: list[dict[str, Any]]
    """As `ModuleReport.spaces`, summed."""
    density: float
    """Fraction of all of their weights' entries that living units are or contain."""
    parameters: int
    """Trained numbers of living units."""
    bytes: int
    """Bytes of their tensors in the file."""


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

    def groups(self) -> list[ModuleGroup]:
        """The modules by kind, in order of first appearance."""
        found: dict[tuple, list[ModuleReport]] = {}
        for m in self.modules:
            kinds = tuple((space["kind"], space["unit"]) for space in m.spaces)
            found.setdefault((m.name.rpartition(".")[2], m.rows, m.cols, kinds), []).append(m)
        return [
            ModuleGroup(
                *key[:1], len(held), *key[1:3], [_summed([m.spaces[at] for m in held]) for at in range(len(key[3]))],
                sum(m.density for m in held) / len(held), sum(m.parameters for m in held), sum(m.bytes for m in held),
            )
            for key, held in found.items()
        ]  # fmt: skip

    def table(self, by: Literal["module", "group"] = "module") -> Table:
        """The report as a table, a line for each module or for each kind of module, and one for the whole; `str()` of
        it is aligned text."""
        kinds = list(dict.fromkeys(space["kind"] for m in self.modules for space in m.spaces))
        held = self.modules if by == "module" else self.groups()
        rows = [
            (
                m.name if by == "module" else f"{m.modules} x {m.name}",
                f"{m.rows}x{m.cols}",
                *(_units(next((space for space in m.spaces if space["kind"] == kind), None)) for kind in kinds),
                f"{m.density:.4%}" if m.density else None,
                m.parameters,
                m.bytes,
            )
            for m in held
        ]
        if self.other_parameters:
            rows.append(("heads and biases", "", *("" for _ in kinds), "", self.other_parameters, None))
        alive = [sum(s["alive"] for m in self.modules for s in m.spaces if s["kind"] == kind) for kind in kinds]
        totals = (f"{len(self.modules)} modules", "", *alive, f"{self.density:.4%}", self.parameters, self.file_bytes)
        first = "module" if by == "module" else "modules"
        return table((first, "shape", *kinds, "density", "parameters", "bytes"), rows, totals=totals)

    def draw(self, path: str | Path, of: Literal["density", "rank", "parameters"] | None = None) -> Path:
        """A heat map, blocks over kinds of matrices, of what the modules hold: density in percent, living components,
        or trained numbers; None: the first of these that they have. Returns `path`.

        Raises:
            ValueError: `of` is none of the three, or no module has it.
            ImportError: matplotlib is not installed.
        """
        ranks = {m.name: m.space("rank") for m in self.modules}
        values = {
            "density": {m.name: round(100 * m.density, 3) for m in self.modules if m.density},
            "rank": {name: space["alive"] for name, space in ranks.items() if space is not None},
            "parameters": {m.name: m.parameters for m in self.modules},
        }
        if of is not None and not values.get(of):
            held = [name for name, found in values.items() if found]
            raise ValueError(f"of={of!r} is nothing that this adapter has; choose one of {held}.")
        of = of or next(name for name, found in values.items() if found)
        label = {
            "density": "living units [% of the weight's entries]",
            "rank": "living components",
            "parameters": "trained numbers",
        }[of]
        title = f"{self.config.peft_type.value}: {self.parameters:,} parameters in {len(self.modules)} modules"
        return draw_modules(values[of], path, title, label)


def _summed(spaces: list[dict[str, Any]]) -> dict[str, Any]:
    return spaces[0] | {key: sum(space[key] for space in spaces) for key in ("alive", "capacity", "bytes")}


def _units(space: dict[str, Any] | None) -> str:
    if space is None:
        return "-"
    of = f" of {space['capacity']}" if space["capacity"] != space["alive"] else ""
    return f"{space['alive']}{of} {space['unit']}"
