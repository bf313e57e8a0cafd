"""What a checked adapter folder is reported to hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..tuners import KernelLoraConfig, SparseLoraConfig


@dataclass(frozen=True)
class ModuleReport:
    """What one module of an adapter holds."""

    name: str
    """Module name in the base model."""
    rows: int
    """`out_features`."""
    cols: int
    """`in_features`."""
    granularity: str | None
    """What a unit is; None without a sparse half."""
    k: int
    """Living units."""
    capacity: int
    """Units that there is room for."""
    density: float
    """Share of the weight's entries in living units."""
    rank: int
    """Components that there is room for."""
    components: int
    """Living components."""
    bytes: int
    """Bytes of the module's tensors in the file."""
    bytes_per_entry: float
    """Bytes of values and support per living entry; 0 without a sparse half."""


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter folder holds; every tensor was checked."""

    path: Path
    """The folder."""
    config: SparseLoraConfig | KernelLoraConfig
    """Its adapter_config.json."""
    modules: tuple[ModuleReport, ...]
    """One report for each adapted module, by name."""
    file_bytes: int
    """Size of adapter_model.safetensors."""
    other_bytes: int
    """Bytes of tensors beside the adapted modules: biases, modules_to_save, state of running schedules."""

    @property
    def density(self) -> float:
        """Share of all adapted weights' entries in living units."""
        return sum(m.density * m.rows * m.cols for m in self.modules) / sum(m.rows * m.cols for m in self.modules)

    @property
    def parameters(self) -> int:
        """Living trained numbers of the adapted modules, gates left out."""
        return sum(round(m.density * m.rows * m.cols) + m.components * (m.rows + m.cols) for m in self.modules)

    def table(self) -> str:
        """The report as aligned text, a line for each module and one for the whole."""
        header = ("module", "shape", "units", "density", "rank", "bytes", "bytes/entry")
        lines = [header]
        for m in self.modules:
            of = f" of {m.capacity}" if m.capacity != m.k else ""
            living = f" of {m.rank}" if m.rank != m.components else ""
            lines.append(
                (
                    m.name,
                    f"{m.rows}x{m.cols}",
                    f"{m.k}{of} {m.granularity}" if m.granularity else "-",
                    f"{m.density:.4%}" if m.granularity else "-",
                    f"{m.components}{living}",
                    f"{m.bytes:,}",
                    f"{m.bytes_per_entry:.2f}" if m.k else "-",
                )
            )
        units, components = sum(m.k for m in self.modules), sum(m.components for m in self.modules)
        total = f"{self.file_bytes:,}"
        lines.append(
            (f"{len(self.modules)} modules", "", f"{units}", f"{self.density:.4%}", f"{components}", total, "")
        )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
