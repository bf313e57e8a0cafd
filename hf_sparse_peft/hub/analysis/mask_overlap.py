"""How far two runs changed the same numbers, against what chance would give."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .checkpoints import (
    SLAB,
    Checkpoint,
    CheckpointTensors,
    check_names,
    differs,
    pair,
)


@dataclass(frozen=True)
class TensorOverlap:
    """Counts of one tensor."""

    numel: int
    """Its numbers."""
    first: int
    """Numbers that the first run changed."""
    second: int
    """Numbers that the second run changed."""
    both: int
    """Numbers that both changed."""


@dataclass(frozen=True)
class MaskOverlap:
    r"""Overlap of the masks :math:`m_1, m_2` of what two runs changed, over all numbers (Mukherjee et al., 2025)."""

    tensors: dict[str, TensorOverlap] = field(repr=False)
    """By name; tensors that share memory are counted once."""

    @property
    def repeated(self) -> float:
        r""":math:`|m_1 \wedge m_2| / |m_1|`: how much of the first run's mask the second repeats."""
        return self._sum("both") / self._sum("first")

    @property
    def chance(self) -> float:
        r""":math:`|m_2| / n`: the `repeated` to expect of a mask of that size at random places."""
        return self._sum("second") / self._sum("numel")

    @property
    def over_chance(self) -> float:
        """`repeated / chance`: 1 is chance."""
        return self.repeated / self.chance

    def _sum(self, count: str) -> int:
        return sum(getattr(overlap, count) for overlap in self.tensors.values())


def measure_mask_overlap(
    before: Checkpoint,
    first: Checkpoint,
    second: Checkpoint,
    *,
    atol: float = 0.0,
    dtype: torch.dtype | None = None,
) -> MaskOverlap:
    """Compare what two runs from the same start changed, tensor by tensor.

    Args:
        before: folder or file of safetensors, a state dict, or a model.
        first: the same model after one run.
        second: the same model after another run.
        atol: 0 counts every number that differs at all.
        dtype: compare all in this dtype; None: in their own, which must be the same.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: tensors that only one of them has, other shapes or dtypes, or a run that changed nothing.
    """
    start, one, two = (CheckpointTensors(source) for source in (before, first, second))
    check_names(start, one)
    check_names(start, two)
    found = {}
    for name in start.names:
        old, new = pair(start, one, name, dtype)
        _, other = pair(start, two, name, dtype)
        if old.is_floating_point() and old.numel():
            found[name] = _overlap(old, new, other, atol)
    for run in ("first", "second"):
        if not any(getattr(overlap, run) for overlap in found.values()):
            raise ValueError(f"The {run} run changed no number, so its mask is empty and overlaps with nothing.")
    return MaskOverlap(found)


def _overlap(old: torch.Tensor, new: torch.Tensor, other: torch.Tensor, atol: float) -> TensorOverlap:
    counts = torch.zeros(3, dtype=torch.int64)
    for a, b, c in zip(*(tensor.reshape(-1).split(SLAB) for tensor in (old, new, other)), strict=True):
        one, two = differs(a, b, atol), differs(a, c, atol)
        counts += torch.stack([one.sum(), two.sum(), (one & two).sum()]).cpu()
    return TensorOverlap(old.numel(), *counts.tolist())
