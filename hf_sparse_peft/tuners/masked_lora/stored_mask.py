"""How a mask lies in memory and in files: a bit an entry, or codes of its N:M groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...sparsity import check_n_of_m, decode_n_of_m, encode_n_of_m, pack_bits
from ...sparsity.n_of_m_code import n_of_m_bytes
from ...utils.tensors import TensorSpec


@dataclass(frozen=True)
class StoredMask:
    """The form of one weight's mask."""

    numel: int
    """Entries of the weight."""
    n_of_m: Sequence[int] | None
    """`(kept, of)` of every group; None: bits."""

    @property
    def shape(self) -> tuple[int]:
        """Bytes."""
        return ((self.numel + 7) // 8,) if self.n_of_m is None else (n_of_m_bytes(self.numel, *self.n_of_m),)

    def spec(self, name: str) -> TensorSpec:
        """The declaration of the tensor."""
        return TensorSpec(name, self.shape, torch.uint8, "saved", check=None if self.n_of_m is None else self._check)

    def stored(self, kept: Tensor, name: str) -> Tensor:
        """`kept`, bool of any shape, as it is stored.

        Raises:
            ValueError: groups that keep another number; names the module. Or codes of 0 throughout, the first entries
                of every group: that stands for a mask which is not known.
        """
        if self.n_of_m is None:
            return pack_bits(kept)
        try:
            codes = encode_n_of_m(kept.reshape(-1), *self.n_of_m)
        except ValueError as error:
            raise ValueError(
                f"n_of_m={list(self.n_of_m)}: of '{name}' {error} Set n_of_m=None, or, where kept weights are 0 too, "
                "mask='given' with set_masks(model, report.masks)."
            ) from error
        if not bool(codes.any()):
            raise ValueError(
                f"n_of_m={list(self.n_of_m)}: '{name}' keeps the first entries of all groups, which no code says. Set "
                "n_of_m=None."
            )
        return codes

    def bits(self, held: Tensor, known: bool = True) -> Tensor:
        """The packed bits of what is stored; all 0 where it is not `known`."""
        if self.n_of_m is None:
            return held
        if held.is_meta or not known:
            return torch.zeros((self.numel + 7) // 8, dtype=torch.uint8, device=held.device)
        return pack_bits(decode_n_of_m(held, self.numel, *self.n_of_m))

    def _check(self, held: Tensor, key: str) -> None:
        try:
            check_n_of_m(held, self.numel, *self.n_of_m)
        except ValueError as error:
            raise ValueError(f"'{key}': {error}") from error
