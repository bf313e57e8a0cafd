r"""`Reflections`: hyperplane reflections of a layer's input, output or both, and their relaxation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...utils.option_types import PositiveInt
from ...utils.parts import register_part, require
from ...utils.tensors import TensorSpec
from ..shared.pieces import OutputMap, Piece, Tiles
from .form import Call, Mapped, Product, Site, Tensors, Weight

INPUT, OUTPUT = "input_normals", "output_normals"


@register_part("reflections")
@dataclass(frozen=True)
class Reflections(Mapped):
    r""":math:`W H x` with H a block-diagonal reflection, :math:`H_i = I - 2 \hat u_i \hat u_i^\top` with the unit
    vector :math:`\hat u_i = u_i / \|u_i\|` of each block (ETHER; Bini et al., 2024), or, `relaxed`,
    :math:`H_i = I - \hat u_i \hat u_i^\top + \hat v_i \hat v_i^\top` (ETHER+).

    A reflection is never the identity, :math:`\|H_i - I\|_F = 2` whatever u is; the relaxed map starts as it, with v =
    -u, and stays within 2 of it. Biases are not mapped. The vectors count by their direction alone; they are drawn from
    :math:`U(-1, 1) \sqrt{n / d}`, as in the published code, and computed with in fp32. H is never built in a pass: it
    costs two products a number.
    """

    relaxed: bool = False
    """Whether H is the relaxed map."""
    side: Literal["input", "output", "both"] = "input"
    """What is mapped: the paper has ETHER on the input and ETHER+ on both. `output` may be the shorter side."""
    blocks: PositiveInt = 32
    """n, which must divide every mapped side into blocks of two numbers or more: of one, a reflection is -1, whatever u
    is. The number of vectors' entries, d, does not depend on it."""
    grouping: Literal["blocks", "released"] = "blocks"
    r"""`released`: block i of the input's map maps not the i-th part of the inputs but all parts, for the i-th part of
    the outputs, as the published code's reshape of W `[out, in]` to `[n, out, in / n]` has it. A pass then has n
    products with W, and n must divide the outputs too."""
    tensor_names: ClassVar[tuple[str, ...]] = (INPUT, OUTPUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.grouping == "blocks" or self.side != "output"
        require(fits, self, "grouping", f"'blocks' with side={self.side!r}: the published code groups inputs otherwise")

    @property
    def maps_input(self) -> bool:
        """Whether the input is mapped, of all outputs alike."""
        return self.side != "output" and self.grouping == "blocks"

    @property
    def maps_output(self) -> bool:
        """Whether the output is mapped."""
        return self.side != "input"

    def specs(self, site: Site) -> list[TensorSpec]:
        """u, and v where relaxed, of each mapped side: `[1 or 2, n, side / n]`."""
        sides = {INPUT: ("inputs", site.cols), OUTPUT: ("outputs", site.rows)}
        if self.side != "both":
            del sides[OUTPUT if self.side == "input" else INPUT]
        divided = [*sides.values(), *([("outputs", site.rows)] if self.grouping == "released" else [])]
        for side, length in divided:
            if length % self.blocks:
                raise ValueError(
                    f"Reflections.blocks={self.blocks} does not divide the {length} {side} of '{site.name}'. Choose a "
                    "divisor, or leave the module out with exclude_modules."
                )
        for side, length in sides.values():
            if length == self.blocks:
                raise ValueError(
                    f"Reflections.blocks={self.blocks} leaves blocks of one of the {length} {side} of '{site.name}', "
                    "whose reflections depend on no trained number. Lower it."
                )
        return [self._spec(name, length) for name, (_, length) in sides.items()]

    def _spec(self, name: str, length: int) -> TensorSpec:
        width = length // self.blocks

        def start(generator: torch.Generator | None) -> Tensor:
            u = (2 * torch.rand(self.blocks, width, generator=generator) - 1) / width**0.5
            return torch.stack((u, -u)) if self.relaxed else u[None]

        return TensorSpec(name, (1 + self.relaxed, self.blocks, width), start=start)

    def map_input(self, x: Tensor, tensors: Tensors, site: Site) -> Tensor:
        """X H, which is symmetric."""
        return _reflected(x, tensors[INPUT])

    def map_output(self, y: Tensor, tensors: Tensors, site: Site) -> Tensor:
        """Y H."""
        return _reflected(y, tensors[OUTPUT])

    # The published grouping: an input of its own for each part of the outputs

    def output(self, x: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """The mapped output."""
        if self.grouping == "blocks":
            return super().output(x, base, tensors, call)
        parts = call.site.rows // self.blocks
        mapped = (self._for_part(x, tensors[INPUT], at) for at in range(self.blocks))
        found = [base(one)[..., at * parts : (at + 1) * parts] for at, one in enumerate(mapped)]
        return self._finish(torch.cat(found, -1), tensors, call)

    def change(self, x: Tensor, y: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """The mapped output less the base's."""
        if self.grouping == "blocks":
            return super().change(x, y, base, tensors, call)
        return self.output(x, base, tensors, call) - y

    def pieces(self, tensors: Tensors, site: Site, weight: Weight) -> list[Piece]:
        """The maps."""
        if self.grouping == "blocks":
            return super().pieces(tensors, site, weight)
        held = {name: tensor.detach() for name, tensor in tensors.items()}
        parts = site.rows // self.blocks

        @torch.no_grad()
        def mapped() -> Tensor:
            rows = weight().float().split(parts)
            return torch.cat([self._for_part(one, held[INPUT], at) for at, one in enumerate(rows)])

        def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
            yield slice(None), slice(None), mapped() - weight().float()

        found: list[Piece] = [Tiles((site.rows, site.cols), tiles, dense=True)]
        if self.maps_output:
            found.append(OutputMap(lambda y: self.map_output(y, held, site), mapped))
        return found

    def _for_part(self, x: Tensor, normals: Tensor, at: int) -> Tensor:
        return _reflected(x, normals[:, at : at + 1].expand_as(normals))


def _reflected(x: Tensor, normals: Tensor) -> Tensor:
    r"""X H of the block-diagonal map of `normals` `[1 or 2, n, k]`, for `x` `[..., n k]`, in its dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, normals.shape[1:])
    unit = F.normalize(normals.to(wide.dtype), dim=-1)
    removed = (wide * unit[0]).sum(-1, keepdim=True) * unit[0]
    if len(unit) == 1:
        return (wide - 2 * removed).flatten(-2).to(x.dtype)
    # One sum of both, which is exactly 0 where v = -u.
    return (wide + ((wide * unit[1]).sum(-1, keepdim=True) * unit[1] - removed)).flatten(-2).to(x.dtype)
