"""`TensorSpec`: what an adapter declares of each of its tensors, and the checks and allocation that follow from it; and
tensors that ranks hold a shard of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class TensorSpec:
    """Declaration of one tensor of an adapter in one layer.

    Allocation at injection, moves between devices, deletion, copies, state dicts, the checks of a loaded tensor, the
    checks of a file without a model and compaction follow from it.
    """

    name: str
    """Name of the layer's container of this tensor, which is keyed by adapter; `{name}.{adapter}` in state dicts."""

    shape: tuple[int, ...]
    """Shape at injection, fixed while the adapter trains."""

    dtype: torch.dtype = torch.float32
    """Dtype in memory. A file may hold a floating-point tensor in another floating-point dtype."""

    role: Literal["trained", "saved", "rule"] = "trained"
    """`"trained"`: a parameter. `"saved"`: a buffer without which the parameters mean nothing, in every file.
    `"rule"`: a buffer that only a running rule needs, in checkpoints and not in a finished adapter."""

    space: str | None = None
    """Kind of the units along `axis` ("support", "rank"): moving or dropping units moves or drops these slices."""

    axis: int | None = 0
    """Axis along which the units of `space` lie; None: the tensor codes all of them and is written anew."""

    start: Callable[[torch.Generator | None], torch.Tensor] | None = None
    """Returns the first content, drawn from the generator (None: torch's own); absent = zeros."""

    passing: bool = False
    """With the role `"rule"`: there only while a rule asks for it (`UnitSpace.allocate_state`), and where a checkpoint
    from such a step is loaded; for dense state of a few layers at a time."""

    check: Callable[[torch.Tensor, str], None] | None = None
    """Called with a tensor and its key in a file; raises ValueError, naming the key, where the content is not valid:
    codes, ranges. Shape, dtype and finiteness are checked without it."""

    def allocate(
        self, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """A new tensor of this shape and dtype with the first content, on `device`."""
        if self.start is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=device)
        return self.start(generator).to(device=device, dtype=self.dtype)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ranks hold a part of it each (a DTensor)."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered where ranks hold a shard of it each, which all of them must ask for at the same time;
    without a gradient then. Itself otherwise."""
    if not is_sharded(tensor):
        return tensor
    if tensor.dtype == torch.int16:  # ages of units; collectives have no int16
        return tensor.detach().to(torch.int32).full_tensor().to(torch.int16)
    return tensor.detach().full_tensor()


@torch.no_grad()
def write_whole(tensor: torch.Tensor, full: torch.Tensor) -> None:
    """Put this rank's part of `full`, the same on all ranks, into the sharded `tensor`, in place."""
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.detach().to_local().copy_(part.to_local())
