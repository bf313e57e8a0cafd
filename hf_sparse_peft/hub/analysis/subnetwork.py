"""What changed between two checkpoints: how sparse an update was, and a support made of exactly those entries."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ...sparsity import UnitGrid
from ...sparsity.scores import chunks_of
from ...training.calibration import layers_with_support, write_supports
from .checkpoints import (
    SLAB,
    Checkpoint,
    CheckpointTensors,
    check_names,
    differs,
    pair,
)

TOLERANCE = 1e-5


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
        """Fraction of numbers that are exactly what they were."""
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
        fractions = [u.rank / u.full_rank for u in self.tensors.values() if u.rank is not None and u.changed]
        return sum(fractions) / len(fractions) if fractions else None


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
    first, second = CheckpointTensors(before), CheckpointTensors(after)
    check_names(first, second)
    found = {}
    for name in first.names:
        old, new = pair(first, second, name, dtype)
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
    numbers of units are written to the config's `sizes`. Needs `criterion="given"`, and no optimizer yet.

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
    layers, _ = layers_with_support(model, adapter_name)
    first, second = CheckpointTensors(before), CheckpointTensors(after)
    units = {}
    for layer in layers:
        key = layer.weight_name
        for tensors in (first, second):
            if key not in tensors.names:
                raise ValueError(
                    f"'{key}' is not in the checkpoint, which has {tensors.names[:3]}, ... Pass checkpoints of the "
                    "base model, saved without an adapter."
                )
        old, new = pair(first, second, key, dtype)
        old, new = (old.t(), new.t()) if layer.fan_in_fan_out else (old, new)
        units[layer.module_name] = _changed_units(old, new, layer.sizes[adapter_name].grid, atol, key)
    write_supports(model, units, adapter_name)


def _changed_units(old: torch.Tensor, new: torch.Tensor, grid: UnitGrid, atol: float, key: str) -> torch.Tensor:
    if tuple(old.shape) != (grid.rows, grid.cols):
        raise ValueError(
            f"'{key}' has shape {tuple(old.shape)} in the checkpoints; the model's is {grid.rows}x{grid.cols}."
        )
    counts = chunks_of(lambda begin, end: differs(old[begin:end], new[begin:end], atol).float(), grid, SLAB)
    start, found = 0, []
    for chunk in counts():
        found.append(chunk.nonzero().squeeze(1) + start)
        start += chunk.numel()
    return torch.cat(found).to(grid.index_dtype)


def _compare(old: torch.Tensor, new: torch.Tensor, atol: float, ranks: bool) -> TensorUpdate:
    rank = full = None
    if ranks and old.ndim == 2:
        rank = int(torch.linalg.matrix_rank(new.float() - old.float()))
        full = min(old.shape)
    pieces = list(zip(old.reshape(-1).split(SLAB), new.reshape(-1).split(SLAB), strict=True))
    changed, beyond = (sum(int(differs(a, b, limit).sum()) for a, b in pieces) for limit in (0.0, atol))
    return TensorUpdate(old.numel(), changed, beyond, old.dtype, rank, full)
