"""`GroupBits`: the groups that a pruned weight keeps, trained through a quantiser with a scale and a zero point each;
and `PackedGroups`, their integers, beside which scales and zero points train on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ...ops.codebook_product import pack_codes, unpack_codes
from ...ops.group_product import group_codes, group_product, group_weight
from ...sparsity import pack_bits, unpack_bits
from ...utils.option_types import PositiveInt, Range
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Form, PackedForm, Tensors, check_columns


@dataclass(frozen=True)
class _Groups(Form):
    """What both have: which groups are kept, a scale and a zero point of each."""

    size: PositiveInt = 16
    """Neighbours along the inputs of a group, aligned to it: those of `pruning.Groups`."""
    bits: Annotated[int, Range(least=2, most=8)] = 4
    """Bits of an integer; up to 4, two share a byte where the size is an even number."""

    def check(self, cols: int) -> None:
        """Raises `ValueError` where groups run over the end of a row."""
        if cols % self.size:
            raise ValueError(
                f"{type(self).__name__}.size={self.size} does not divide the {cols} columns of a weight. Take the size "
                "of the groups that were pruned, or leave the module out with exclude_modules."
            )

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """Of `rank` groups."""
        self.check(cols)
        groups = cols // self.size
        check = partial(_check_kept, groups=groups, count=rank)
        return [
            TensorSpec("scales", (rank,)),
            TensorSpec("zeros", (rank,)),
            TensorSpec("kept", (rows, -(-groups // 8)), torch.uint8, "saved", check=check),
            TensorSpec("columns", (1,), torch.int32, "saved", check=partial(check_columns, cols=cols)),
        ]

    def product(self, x: Tensor, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        r""":math:`X \hat W^\top`; the weight is built in each pass, and kept in none."""
        kept = _unpacked(tensors["kept"], x.shape[-1] // self.size)
        return group_product(x, self._held(tensors), tensors["scales"], tensors["zeros"], kept, self.bits, dtype)

    def weight(self, tensors: Tensors) -> Tensor:
        """What the integers stand for."""
        kept = _unpacked(tensors["kept"], int(tensors["columns"]) // self.size)
        return group_weight(self._held(tensors), tensors["scales"], tensors["zeros"], kept, self.bits)

    def _held(self, tensors: Tensors) -> Tensor:
        raise NotImplementedError


@register_part("group_bits")
@dataclass(frozen=True)
class GroupBits(_Groups):
    r"""GQSA's first stage (BQPO; Zeng et al., 2025): the groups that pruning left are rounded to b bits, each with a
    scale and a zero point of its own, and weights, scales and zero points train through the rounding,

    :math:`\hat w = s (q - z)`, :math:`q = \mathrm{clip}(\mathrm{round}(w / s + z), 0, 2^b - 1)`,

    in fp32, with a straight-through gradient (`ops.group_product`). Groups that are 0 throughout in the base have
    nothing: no weight, no scale, and stay exactly 0. The paper trains block by block to the dense blocks' outputs:
    `pruning.reconstruct(model, dense, data)` with `keep_base=True`. Then `model.base_model.pack_groups()` freezes the
    integers, and what is left to train are scales and zero points (`PackedGroups`).

    The start spans each group's range, :math:`s = (\max w - \min w) / (2^b - 1)`, :math:`z = -\min w / s`. Zero points
    are real numbers and are not rounded, which the paper leaves open.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("W", "scales", "zeros", "kept", "columns")
    exact: ClassVar[bool] = True
    reads_size: ClassVar[bool] = True

    def size_of(self, weight: Tensor) -> int:
        """Groups that are kept: all, of a weight on the meta device.

        Raises:
            ValueError: none is, or the size does not divide the columns.
        """
        self.check(weight.shape[1])
        count = weight.numel() // self.size if weight.is_meta else int(_kept_groups(weight, self.size).sum())
        if not count:
            raise ValueError("a weight is 0 throughout, and has no group to train. Leave it out with exclude_modules.")
        return count

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """Weights of the groups, and what both forms have."""
        return [TensorSpec("W", (rank, self.size)), *super().specs(rows, cols, rank)]

    @torch.no_grad()
    def start(
        self,
        weight: Tensor,
        rank: int,
        *,
        state: Tensors | None = None,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensors:
        """The weights themselves, and quantisers that span them."""
        kept = _kept_groups(weight, self.size)
        W = weight.reshape(*kept.shape, self.size)[kept]
        low, high = W.amin(1), W.amax(1)
        scales = (high - low) / (2**self.bits - 1)
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))  # one value: its code is 0
        columns = torch.tensor([weight.shape[1]], dtype=torch.int32, device=weight.device)
        return {"W": W, "scales": scales, "zeros": -low / scales, "kept": _packed(kept), "columns": columns}

    def _held(self, tensors: Tensors) -> Tensor:
        return tensors["W"]

    @torch.no_grad()
    def packed(self, tensors: Tensors) -> tuple[PackedGroups, Tensors]:
        """The next stage's form, of the same weight to the bit, and what tensors it has beside those that stay."""
        codes = group_codes(tensors["W"], tensors["scales"], tensors["zeros"], self.bits).to(torch.uint8)
        form = PackedGroups(self.size, self.bits)
        return form, {"codes": pack_codes(codes) if form.two_a_byte else codes}


@register_part("packed_groups")
@dataclass(frozen=True)
class PackedGroups(PackedForm, _Groups):
    r"""GQSA's second stage (E2E-OQP): the integers of `GroupBits` are frozen, and the scales and zero points of the
    groups that are kept train on the loss of the whole model. It is what is shipped: b bits a kept weight, two numbers
    a kept group, a bit a group.

    It is made by `FactoredModel.pack_groups`, not at injection. The weight is unpacked in each pass: merge it where
    time counts; its zeros stay.
    """

    made_of: ClassVar[str] = "GroupBits"
    made_by: ClassVar[str] = "pack_groups"
    tensor_names: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros", "kept", "columns")

    @property
    def two_a_byte(self) -> bool:
        """Whether two integers share a byte."""
        return self.bits <= 4 and self.size % 2 == 0

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """Integers, and what both forms have."""
        width = self.size // 2 if self.two_a_byte else self.size
        check = partial(_check_codes, size=self.size, most=2**self.bits - 1)
        return [
            TensorSpec("codes", (rank, width), torch.uint8, "saved", check=check),
            *super().specs(rows, cols, rank),
        ]

    def _held(self, tensors: Tensors) -> Tensor:
        return unpack_codes(tensors["codes"], self.size)


def _kept_groups(weight: Tensor, size: int) -> Tensor:
    """bool `[rows, groups]`: groups with an entry that is not 0."""
    return (weight.reshape(len(weight), -1, size) != 0).any(2)


def _packed(kept: Tensor) -> Tensor:
    """uint8 `[rows, ceil(groups / 8)]`, each row in bytes of its own."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8))
    return pack_bits(padded).view(len(kept), -1)


def _unpacked(kept: Tensor, groups: int) -> Tensor:
    return unpack_bits(kept.flatten(), kept.numel() * 8).view(len(kept), -1)[:, :groups]


def _check_kept(kept: Tensor, key: str, groups: int, count: int) -> None:
    bits = unpack_bits(kept.flatten(), kept.numel() * 8).view(len(kept), -1)
    if bool(bits[:, groups:].any()):
        raise ValueError(f"'{key}' has bits behind the {groups} groups of a row. The file is damaged.")
    if int(bits.sum()) != count:
        raise ValueError(
            f"'{key}' keeps {int(bits.sum())} groups, and the config's sizes and the other tensors have {count}. Load "
            "the adapter_config.json that was saved with the file."
        )


def _check_codes(codes: Tensor, key: str, size: int, most: int) -> None:
    found = int(unpack_codes(codes, size).max())
    if found > most:
        raise ValueError(f"'{key}' has an integer of {found}, and {most} is the most. The file is damaged.")
