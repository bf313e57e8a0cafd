"""`MaskedWeight`: one weight under one masked adapter, as the parts of the adapter see it in a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...sparsity import unpack_bits


@dataclass(frozen=True)
class MaskedWeight:
    r"""The base weight `W`, what is trained, and the mask, in one pass through one layer. Made anew in every pass and
    kept in none, so that what it caches lives for one layer at a time; its tensors are only read."""

    config: Any
    """The adapter's."""
    name: str
    """The module's."""
    shape: tuple[int, int]
    """`(out, in)`."""
    tensors: Mapping[str, Tensor]
    """What the adapter's update and masking declare, by their own names."""
    bits: Tensor | None
    """The bits of M, uint8; None where the masking computes it."""
    input_bits: Tensor | None
    """Bits of another mask, for the gradient of the input alone (`MaskSpace.write_input_bits`); None: M."""
    read: Callable[[torch.dtype], Tensor]
    """The base weight `[out, in]` in that dtype, possibly the layer's own memory."""
    count: int | None
    """How many entries live, where the masking computes its mask."""
    numbers: Mapping[str, float]
    """Numbers that rules set for a step (`MaskSpace.numbers`)."""

    @property
    def dtype(self) -> torch.dtype:
        """fp32, or what the trained tensors have, if that is wider."""
        found = torch.float32
        for tensor in self.tensors.values():
            found = torch.promote_types(found, tensor.dtype) if tensor.is_floating_point() else found
        return found

    @cached_property
    def base(self) -> Tensor:
        """W `[out, in]` in `dtype`, without what the mask does."""
        return self.read(self.dtype)

    @cached_property
    def delta(self) -> Tensor | None:
        """D `[out, in]`, what the update adds before anything is masked; None for an update that adds nothing."""
        with torch.no_grad():
            return self.config.update.delta(self)

    @cached_property
    def dense(self) -> Tensor:
        """V = W + D `[out, in]`."""
        return self.base if self.delta is None else self.base + self.delta

    @cached_property
    def kept(self) -> Tensor:
        """The stored mask, bool `[out, in]`: True is kept.

        Raises:
            ValueError: the masking computes its own.
        """
        if self.bits is None:
            raise ValueError(f"{type(self.config.masking).__name__} stores no mask; it has to compute one.")
        return self.unpacked(self.bits)

    def unpacked(self, bits: Tensor) -> Tensor:
        """Bits as bool `[out, in]`."""
        return unpack_bits(bits, self.shape[0] * self.shape[1]).view(self.shape)

    def having(self, tensors: Mapping[str, Tensor]) -> MaskedWeight:
        """The same with other tensors in the place of those that `tensors` names."""
        return replace(self, tensors={**self.tensors, **tensors})


def masked(dense: Tensor, mask: Tensor) -> Tensor:
    """`dense` where a bool `mask` is True, 0 elsewhere, whatever stood there; the product with a mask of numbers."""
    return torch.where(mask, dense, 0) if mask.dtype == torch.bool else dense * mask.to(dense.dtype)
