"""Sums, means and decisions over the ranks of a distributed run; the identity where nothing is distributed."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..utils.checksums import raw_bytes

BUCKET = 1 << 24
"""Numbers that travel in one collective at most: 64 MiB of fp32."""


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


def all_reduce_sum(tensor: Tensor, group: Any = None) -> Tensor:
    """`tensor` added up over all ranks, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


def all_reduce_mean(tensor: Tensor, group: Any = None) -> Tensor:
    """`tensor` averaged over all ranks, in place; itself where nothing is distributed."""
    if is_distributed():
        torch.distributed.all_reduce(tensor, group=group)
        tensor /= torch.distributed.get_world_size()
    return tensor


def all_reduce_means(tensors: Iterable[Tensor]) -> None:
    """Average each of `tensors` over all ranks, in place: those of one device and dtype in one collective for
    `BUCKET` numbers, or for a larger one alone. Every rank gives tensors of the same shapes, in one order."""
    if not is_distributed():
        return
    for bucket in buckets(tensors):
        means = all_reduce_mean(torch.cat([one.flatten() for one in bucket]))
        for one, mean in zip(bucket, means.split([one.numel() for one in bucket]), strict=True):
            one.copy_(mean.view_as(one))


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` as they travel together: of one device and dtype, of `BUCKET` numbers at most, or a larger one."""
    alike: dict[tuple, list[Tensor]] = {}
    for one in tensors:
        alike.setdefault((one.device, one.dtype), []).append(one)
    for group in alike.values():
        bucket: list[Tensor] = []
        for one in group:
            if bucket and sum(other.numel() for other in bucket) + one.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(one)
        yield bucket


def own_group() -> Any:
    """A process group of all ranks for what is summed within backward passes, where DistributedDataParallel's own sums
    are under way in the default one; None where nothing is distributed. Every rank makes it, at the same place."""
    if world_size() == 1:
        return None
    default = torch.distributed.group.WORLD
    if default not in _OWN:
        _OWN[default] = torch.distributed.new_group(timeout=_timeout_of(default))
    return _OWN[default]


_OWN: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _timeout_of(group: Any) -> Any:
    """What the script gave to `init_process_group`; None, torch's default, where a backend does not tell."""
    for device in getattr(group, "_device_types", ()):
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if timeout is not None:
            return timeout
    return None


def same_on_every_rank(number: int, device: torch.device, group: Any = None) -> bool:
    """Whether all ranks give the same number."""
    return not _unlike([number], device, group)


def on_every_rank(condition: bool, device: torch.device) -> bool:
    """Whether `condition` holds on all ranks."""
    return int(all_reduce_sum(torch.tensor(int(condition), device=device))) == world_size()


@torch.no_grad()
def match_first_rank(tensors: Mapping[str, Tensor], group: Any = None) -> list[str]:
    """Give every rank of `group` the first one's content of `tensors`, in place; the names of those that were not alike
    everywhere. What is alike, by CRC-32, is not sent: two small collectives then.

    Raises:
        ValueError: ranks have tensors of other names, shapes or dtypes.
    """
    if not is_distributed() or not tensors or torch.distributed.get_world_size(group) == 1:
        return []
    device = next(iter(tensors.values())).device
    described = "".join(f"{name} {one.dtype} {tuple(one.shape)};" for name, one in tensors.items())
    if _unlike([zlib.crc32(described.encode())], device, group):
        raise ValueError(
            f"Ranks hold adapters of other tensors: this one has {len(tensors)}, '{next(iter(tensors))}' and on. Add "
            "the same adapters from the same config to the same base on every rank, or load one file on all of them."
        )
    names = list(tensors)
    found = [zlib.crc32(raw_bytes(one).numpy()) for one in tensors.values()]
    unlike = [names[at] for at in _unlike(found, device, group)]
    for name in unlike:
        sent = tensors[name].contiguous()
        torch.distributed.broadcast(sent, group=group, group_src=0)
        tensors[name].copy_(sent)
    return unlike


def _unlike(numbers: list[int], device: torch.device, group: Any) -> list[int]:
    """Places of the numbers that are not the same on all ranks."""
    both = torch.tensor([numbers, [-one for one in numbers]], device=device)
    torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=group)
    return (both[0] != -both[1]).nonzero().flatten().tolist()
