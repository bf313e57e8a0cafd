"""A base's parameters in the groups in which they are sharded and gathered."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class BaseGroup:
    """Parameters of the base that are gathered together: a layer (`_no_split_modules`), or all that is in none."""

    root: bool
    tensors: tuple[tuple[int, int], ...]
    """Of each parameter, slices along its first axis and the bytes of one."""
    largest_module: int
    """Bytes of the parameters of its largest single module."""
    modules: int
    """Modules that have parameters of their own."""

    @property
    def bytes(self) -> int:
        """Of all of it."""
        return sum(rows * size for rows, size in self.tensors)

    def shard(self, processes: int) -> int:
        r"""Bytes of a shard: :math:`\lceil n/R \rceil` slices of each parameter, as every rank pads to."""
        return sum(math.ceil(rows / processes) * size for rows, size in self.tensors)


def base_groups(base: PreTrainedModel) -> tuple[BaseGroup, ...]:
    """The groups in which a frozen model is sharded by layers, the root's last."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    seen: set[int] = set()
    groups = [_group(layer, seen, root=False) for layer in layers]
    return (*[group for group in groups if group.tensors], _group(base, seen, root=True))


def _group(module: nn.Module, seen: set[int], root: bool) -> BaseGroup:
    tensors, largest, modules = [], 0, 0
    for part in module.modules():
        own = [parameter for parameter in part.parameters(recurse=False) if id(parameter) not in seen]
        seen.update(map(id, own))
        largest, modules = max(largest, sum(one.nbytes for one in own)), modules + bool(own)
        tensors += [_slices(parameter) for parameter in own]
    return BaseGroup(root, tuple(tensors), largest, modules)


def _slices(parameter: torch.Tensor) -> tuple[int, int]:
    if parameter.dtype == torch.uint8:  # packed codes, which are sharded where they are stored as bf16
        return math.ceil(parameter.nbytes / 2), 2
    return (parameter.shape[0], parameter.nbytes // parameter.shape[0]) if parameter.ndim else (1, parameter.nbytes)
