"""What changed between two checkpoints: how sparse an update was, and a support made of exactly those entries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ...sparsity import UnitGrid
from ...sparsity.scores import chunks_of
from .initial_support import _layers_of, write_supports

Checkpoint = str | Path | Mapping[str, torch.Tensor] | nn.Module
TOLERANCE = 1e-5
_SLAB = 1 << 22


@dataclass(frozen=True)
class TensorUpdate:
    """What changed in one tensor."""

    numel: int
    """Its numbers."""
    changed: int
    """Numbers with `after != before`."""
    changed_beyond: int
    """Numbers with `|after - before| > atol`."""
    dtype: torch.dtype
    """Dtype that both were compared in."""
    rank: int | None = None
    """`matrix_rank` of the update in fp32, of 2-D tensors, where asked for."""
    full_rank: int | None = None
    """`min(shape)` of such a tensor."""

    @property
    def sparsity(self) -> float:
        """Share of numbers that are exactly what they were."""
        return 1.0 - self.changed / self.numel


@dataclass(frozen=True)
class UpdateSparsity:
    r"""Update sparsity :math:`1 - \|\theta_{after} - \theta_{before}\|_0 / n` (Mukherjee et al., 2025).

    Dtype decides: bf16 neighbours lie 0.4 to 0.8 % apart, so a smaller update never shows in a bf16 checkpoint. Figures
    of bf16 files say what is stored, those of fp32 masters what was learned.
    """

    tensors: dict[str, TensorUpdate] = field(repr=False)
    """By name; tensors that share memory are counted once."""
    atol: float = TOLERANCE
    """Tolerance of the second count."""

    @property
    def numel(self) -> int:
        """Numbers in all tensors."""
        return sum(update.numel for update in self.tensors.values())

    @property
    def sparsity(self) -> float:
        """Pooled over all numbers, exact."""
        return 1.0 - sum(update.changed for update in self.tensors.values()) / self.numel

    @property
    def sparsity_within(self) -> float:
        """Pooled over all numbers, `|d| <= atol` counts as unchanged."""
        return 1.0 - sum(update.changed_beyond for update in self.tensors.values()) / self.numel

    @property
    def mean_sparsity(self) -> float:
        """Unweighted mean of the tensors' exact sparsities (one minus what the paper's script prints per layer)."""
        return sum(update.sparsity for update in self.tensors.values()) / len(self.tensors)

    @property
    def mean_rank(self) -> float | None:
        """Mean of rank over full rank of the changed 2-D tensors; None where ranks were not asked for."""
        shares = [u.rank / u.full_rank for u in self.tensors.values() if u.rank is not None and u.changed]
        return sum(shares) / len(shares) if shares else None


def measure_update_sparsity(
    before: Checkpoint,
    after: Checkpoint,
    *,
    atol: float = TOLERANCE,
    dtype: torch.dtype | None = None,
    ranks: bool = False,
) -> UpdateSparsity:
    """Compare two checkpoints tensor by tensor; one pair of tensors is in memory at a time.

    Args:
        before: folder or file of safetensors, a state dict, or a model.
        after: the same model later.
        atol: `|d| <= atol` counts as unchanged in `sparsity_within`.
        dtype: compare both in this dtype; None: in their own, which must be the same.
        ranks: also compute the rank of each 2-D update, by an SVD of it in fp32.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: tensors that only one of them has, other shapes or dtypes, or nothing to compare; names the tensor.
    """
    first, second = _Tensors(before), _Tensors(after)
    _check_names(first, second)
    found = {}
    for name in first.names:
        old, new = _pair(first, second, name, dtype)
        if old.is_floating_point() and old.numel():
            found[name] = _compare(old, new, atol, ranks)
    if not found:
        raise ValueError("There is no floating-point tensor to compare in these checkpoints.")
    return UpdateSparsity(found, atol)


def support_from_checkpoints(
    model: nn.Module,
    before: Checkpoint,
    after: Checkpoint,
    *,
    adapter_name: str = "default",
    atol: float = 0.0,
    dtype: torch.dtype | None = None,
) -> None:
    r"""Make the support of an adapter the units that changed between two checkpoints of its base,
    :math:`m = 1[|\theta_{after} - \theta_{before}| > atol]` (Mukherjee et al., 2025); values start at zero.

    A unit of several entries is in where one of them changed. Modules without a change lose their support, and the
    numbers of units are written to the config's `support_pattern`. Needs `criterion="given"`, and no optimizer yet.

    Args:
        model: has the adapter; its base should hold the weights of `before`.
        before: folder or file of safetensors, a state dict, or a model; tensors named as in the base model.
        after: the same model later.
        adapter_name: which adapter.
        atol: 0 takes every entry that differs at all.
        dtype: compare both in this dtype; None: in their own, which must be the same.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: a targeted weight is missing or has another shape or dtype, nothing changed, or the config fixes the
            sizes; names the module.
    """
    layers, _ = _layers_of(model, adapter_name)
    first, second = _Tensors(before), _Tensors(after)
    units = {}
    for layer in layers:
        key = f"{layer.module_name}.weight"
        for tensors in (first, second):
            if key not in tensors.names:
                raise ValueError(
                    f"'{key}' is not in the checkpoint, which has {tensors.names[:3]}, ... Pass checkpoints of the "
                    "base model, saved without an adapter."
                )
        old, new = _pair(first, second, key, dtype)
        old, new = (old.t(), new.t()) if layer.fan_in_fan_out else (old, new)
        units[layer.module_name] = _changed_units(old, new, layer.sparse_lora_grid[adapter_name], atol, key)
    write_supports(model, units, adapter_name)


def _changed_units(old: torch.Tensor, new: torch.Tensor, grid: UnitGrid, atol: float, key: str) -> torch.Tensor:
    if tuple(old.shape) != (grid.rows, grid.cols):
        raise ValueError(
            f"'{key}' has shape {tuple(old.shape)} in the checkpoints; the model's is {grid.rows}x{grid.cols}."
        )
    counts = chunks_of(lambda begin, end: _differs(old[begin:end], new[begin:end], atol).float(), grid, _SLAB)
    start, found = 0, []
    for chunk in counts():
        found.append(chunk.nonzero().squeeze(1) + start)
        start += chunk.numel()
    return torch.cat(found).to(grid.index_dtype)


def _differs(old: torch.Tensor, new: torch.Tensor, atol: float) -> torch.Tensor:
    if atol == 0:
        return old != new
    wide = torch.promote_types(old.dtype, torch.float32)
    return ~((new.to(wide) - old.to(wide)).abs() <= atol)


def _compare(old: torch.Tensor, new: torch.Tensor, atol: float, ranks: bool) -> TensorUpdate:
    rank = full = None
    if ranks and old.ndim == 2:
        rank = int(torch.linalg.matrix_rank(new.float() - old.float()))
        full = min(old.shape)
    pieces = list(zip(old.reshape(-1).split(_SLAB), new.reshape(-1).split(_SLAB), strict=True))
    changed, beyond = (sum(int(_differs(a, b, limit).sum()) for a, b in pieces) for limit in (0.0, atol))
    return TensorUpdate(old.numel(), changed, beyond, old.dtype, rank, full)


def _pair(first: _Tensors, second: _Tensors, name: str, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    old, new = first.get(name), second.get(name)
    if old.shape != new.shape:
        raise ValueError(f"'{name}' has shape {tuple(old.shape)} before and {tuple(new.shape)} after.")
    if dtype is not None and old.is_floating_point():
        return old.to(dtype), new.to(dtype)
    if old.dtype != new.dtype:
        raise ValueError(
            f"'{name}' is {old.dtype} before and {new.dtype} after; rounding alone would count as change. Pass "
            "dtype=torch.bfloat16 to compare both in one dtype."
        )
    return old, new


def _check_names(first: _Tensors, second: _Tensors) -> None:
    for this, other, label in ((first, second, "before"), (second, first, "after")):
        odd = [name for name in this.names if name not in other.names and name not in other.tied]
        if odd:
            raise ValueError(f"Only the checkpoint {label} has {odd[:3]} ({len(odd)} tensors): they are of two models.")
    # A tensor that one of them stores twice is counted where the other counts it.
    shared = set(first.names) & set(second.names)
    first.names = [name for name in first.names if name in shared]


class _Tensors:
    """A checkpoint's tensors by name, one at a time; of those that share memory, the first."""

    def __init__(self, source: Checkpoint) -> None:
        self.files: dict[str, Path] = {}
        self.held: Mapping[str, torch.Tensor] = {}
        self.tied: set[str] = set()
        if isinstance(source, (str, Path)):
            self.files = dict(_files(Path(source)))
            self.names = list(self.files)
            return
        self.held = source.state_dict() if isinstance(source, nn.Module) else source
        seen: set[tuple] = set()
        self.names = []
        for name, tensor in self.held.items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
            if tensor.numel() and place in seen:
                self.tied.add(name)
            else:
                self.names.append(name)
            seen.add(place)

    def get(self, name: str) -> torch.Tensor:
        """One tensor."""
        if name not in self.files:
            return self.held[name].detach()
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        for name, file in sorted(json.loads(index.read_text())["weight_map"].items()):
            yield name, path / file
        return
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There is no model.safetensors (or its index) at '{path}'.")
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, file
