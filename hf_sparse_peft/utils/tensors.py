"""`TensorSpec`: what an adapter declares of each of its tensors, and the checks and allocation that follow from it."""

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
