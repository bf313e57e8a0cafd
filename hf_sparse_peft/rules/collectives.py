"""Sums, means and decisions over the ranks of a distributed run; the identity where nothing is distributed."""

from __future__ import annotations

import torch
from torch import Tensor


def is_distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world_size() -> int:
    """Ranks that take part, 1 where nothing is distributed."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's number among them, 0 where nothing is distributed."""
    return torch.distributed.get_rank() if is_distributed() else 0


def from_first_rank(tensor: Tensor) -> Tensor:
    """The first rank's `tensor` on all ranks, of one shape everywhere; itself where nothing is distributed."""
    if is_distributed():
        tensor = tensor.contiguous()
        torch.distributed.broadcast(tensor, 0)
    return tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """`tensor` added up over all ranks, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """`tensor` averaged over all ranks, in place; itself where nothing is distributed."""
    if is_distributed():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor


def on_every_rank(condition: bool, device: torch.device) -> bool:
    """Whether `condition` holds on all ranks."""
    return int(all_reduce_sum(torch.tensor(int(condition), device=device))) == world_size()
