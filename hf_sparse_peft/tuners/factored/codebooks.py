"""`Codebooks`: a weight as frozen codes into small codebooks that train."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ...ops.codebook_product import codebook_product, coded_weight, pack_codes, unpack_codes
from ...sparsity import Statistic
from ...sparsity.codebooks import sketch
from ...utils.option_types import PositiveInt, Range
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Form, Tensors
from .input_statistics import InputMoments


@register_part("codebooks")
@dataclass(frozen=True)
class Codebooks(Form):
    r"""Learned codebooks, :math:`W_{ij} =` `codebooks[i, group(j), codes[i, j]]`: each row is cut into `groups` parts
    of neighbouring columns, each with :math:`2^b` values of its own. Codes are frozen, values train (SketchTune; Zhang
    et al., 2025), as fp32 masters: in bf16, as released, steps below a 256th of a value are rounded away.

    Codes and values start as the k-means of each part, weighted by the mean squares of the inputs where `inputs` is
    set. `rank_pattern` gives modules another number of groups.

    A base in NF4 has at most 16 values in each 64 numbers of a row, if 64 divides the columns: `group_size=64` takes
    them over exactly. That is not SketchTune's start, but as near to the base as can be.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("codebooks", "codes", "packed_codes")

    groups: PositiveInt = 4
    """Groups of a row (1, 2, 4 and 8 in the paper)."""
    group_size: PositiveInt | None = None
    """Columns of a group, in place of `groups`."""
    bits: Annotated[int, Range(least=1, most=8)] = 4
    """Bits of a code; up to 4, two codes share a byte where the columns are an even number."""
    inputs: bool = True
    """Whether the columns of large inputs are sketched more closely, for which data are read."""
    keep_zeros: bool = False
    """Whether the zeros of a pruned weight get a code of their own, which does not train."""
    examples: PositiveInt = 128
    """Examples that inputs are read from."""

    def own_rank(self, rows: int, cols: int) -> int:
        """Groups of a row.

        Raises:
            ValueError: they are not of equal size.
        """
        groups = self.groups if self.group_size is None else max(1, cols // self.group_size)
        if cols % groups or (self.group_size is not None and cols % self.group_size):
            option = f"groups={self.groups}" if self.group_size is None else f"group_size={self.group_size}"
            raise ValueError(
                f"Codebooks.{option} does not cut the {cols} columns of a {rows}x{cols} weight into equal parts. "
                "Take a divisor, or leave the module out with exclude_modules."
            )
        return groups

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """Codebooks and codes."""
        if cols % rank:
            raise ValueError(f"{rank} groups do not cut the {cols} columns of a row into equal parts. Take a divisor.")
        check = partial(_check_codes, cols=cols, size=2**self.bits)
        if self.bits <= 4 and cols % 2 == 0:
            codes = TensorSpec("packed_codes", (rows, cols // 2), torch.uint8, "saved", check=check)
        else:
            codes = TensorSpec("codes", (rows, cols), torch.uint8, "saved", check=check)
        return [TensorSpec("codebooks", (rows, rank, 2**self.bits)), codes]

    @property
    def statistic(self) -> Statistic | None:
        """Squares of the inputs."""
        return InputMoments(self.examples, full=False) if self.inputs else None

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
        """The k-means of each group."""
        found = sketch(weight, rank, self.bits, None if state is None else state["second"], self.keep_zeros)
        codes = found.codes
        packs = self.bits <= 4 and codes.shape[1] % 2 == 0
        return {"codebooks": found.codebooks} | ({"packed_codes": pack_codes(codes)} if packs else {"codes": codes})

    def product(self, x: Tensor, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        r""":math:`X W^\top`; the weight is gathered in each pass, and kept in none."""
        return codebook_product(x, tensors["codebooks"], _codes(tensors), dtype, self.keep_zeros)

    def weight(self, tensors: Tensors) -> Tensor:
        """What the codes stand for."""
        codes = _codes(tensors)
        return coded_weight(tensors["codebooks"], codes, codes.shape[1] * (2 if "packed_codes" in tensors else 1))


def _codes(tensors: Tensors) -> Tensor:
    return tensors["packed_codes"] if "packed_codes" in tensors else tensors["codes"]


def _check_codes(codes: Tensor, key: str, cols: int, size: int) -> None:
    most = int(unpack_codes(codes, cols).max())
    if most >= size:
        raise ValueError(f"'{key}' has a code of {most}, and a codebook has {size} values. The file is damaged.")
