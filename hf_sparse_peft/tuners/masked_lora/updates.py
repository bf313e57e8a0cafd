r"""What is trained under a mask: the D of :math:`W' = M \odot (W + D)`.

An update is a part; anybody may register one, in one file, from outside too:

    @register_part("rows")
    @dataclass(frozen=True)
    class RowShift(MaskedUpdate):
        '''D adds a trained number to every row.'''

        trained: ClassVar[tuple[str, ...]] = ("rows",)

        def specs(self, config, rows, cols):
            return [TensorSpec("rows", (rows,))]

        def delta(self, of):
            return of.tensors["rows"][:, None].expand(of.shape)

Gradients follow from `delta` by autograd, inside of the layer's own backward pass: nothing of the weight's size is kept
for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...utils.option_types import NonNegativeFloat
from ...utils.parts import Part, register_part
from ...utils.tensors import TensorSpec
from .weight import MaskedWeight

PREFIX = "masked_lora_"
_DECLARED: dict[str, str] = {}
_LISTENERS: list[Callable[[Mapping[str, str]], None]] = []


def tell_of_tensors(listener: Callable[[Mapping[str, str]], None]) -> None:
    """Call `listener` with the containers that parts bring, those that are known and those that come later."""
    _LISTENERS.append(listener)
    listener(dict(_DECLARED))


class BringsTensors(Part):
    """Base of the parts of a masked adapter that have tensors of their own."""

    trained: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that train, without the tuner's prefix."""
    saved: ClassVar[tuple[str, ...]] = ()
    """Names of those that are saved beside them."""
    for_training: ClassVar[tuple[str, ...]] = ()
    """Names of those that the trained adapter is shipped without (`MaskSpace.drop_scores`)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        kinds = {**dict.fromkeys(cls.trained, "ParameterDict"), **dict.fromkeys(cls.saved, "BufferDict")}
        found = {PREFIX + name: kind for name, kind in kinds.items()}
        _DECLARED.update(found)
        for listener in _LISTENERS:
            listener(found)

    def check_weight(self, rows: int, cols: int, name: str) -> None:
        """Raises `ValueError` where the module `name` has a weight that the part is not for."""

    def specs(self, config: Any, rows: int, cols: int) -> list[TensorSpec]:
        """The tensors on a weight `[rows, cols]`, under the names of `trained` and `saved`."""
        return []


@dataclass(frozen=True)
class MaskedUpdate(BringsTensors):
    """Base of the updates."""

    part_kind: ClassVar[str] = "masked_update"
    needs_base: ClassVar[bool] = False
    """Whether D depends on the base weight's values."""

    def delta(self, of: MaskedWeight) -> Tensor | None:
        """D `[out, in]`, differentiable in `of.tensors`; None where nothing is ever added."""
        raise NotImplementedError

    def gradients(self, of: MaskedWeight, gradient: Tensor) -> dict[str, Tensor]:
        """The gradients of the trained tensors, by name, from that of D `[out, in]`."""
        own = {name: of.tensors[name].detach().requires_grad_() for name in self.trained if name in of.tensors}
        if not own:
            return {}
        with torch.enable_grad():
            delta = self.delta(of.having(own))
            found = torch.autograd.grad(delta, list(own.values()), gradient.to(delta.dtype))
        return dict(zip(own, found, strict=True))


def _normal(*shape: int) -> Callable[[torch.Generator | None], Tensor]:
    return lambda generator: torch.randn(shape, generator=generator)


def _drawn(*shape: int) -> Callable[[torch.Generator | None], Tensor]:
    return lambda generator: nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


@register_part("low_rank")
@dataclass(frozen=True)
class LowRankUpdate(MaskedUpdate):
    r""":math:`D = s\,B A`, with `A` `[r, in]` and `B` `[out, r]` of the config's `r` and :math:`s` (MaskLoRA of PERP;
    Zimmer et al., 2023). `A` is Kaiming-uniform, `B` starts at 0."""

    start: Literal["lora", "normal"] = "lora"
    """"normal": `B` is drawn from N(0, 1), and `A` starts at 0 (PST)."""

    trained: ClassVar[tuple[str, ...]] = ("A", "B")

    def specs(self, config: Any, rows: int, cols: int) -> list[TensorSpec]:
        """`A` and `B`."""
        if self.start == "normal":
            return [
                TensorSpec("A", (config.r, cols), start=None if config.init_weights else _drawn(config.r, cols)),
                TensorSpec("B", (rows, config.r), start=_normal(rows, config.r)),
            ]
        return [
            TensorSpec("A", (config.r, cols), start=_drawn(config.r, cols)),
            TensorSpec("B", (rows, config.r), start=None if config.init_weights else _drawn(rows, config.r)),
        ]

    def delta(self, of: MaskedWeight) -> Tensor:
        r""":math:`s\,B A`."""
        return (of.tensors["B"] * of.config.scaling) @ of.tensors["A"]


@register_part("scale")
@dataclass(frozen=True)
class ScaleUpdate(MaskedUpdate):
    r""":math:`W + D = W \odot (B A)`: every weight is scaled (ScaleLoRA of PERP, MultLoRA in its later versions; Zimmer
    et al., 2023). `lora_alpha` plays no part.

    The official start, all entries of both factors :math:`1/\sqrt r`, makes the `r` components equal, and their
    gradients too, so that :math:`BA` keeps rank 1 for any `r`. Here component 1 is ones in both factors, and the others
    are those of a LoRA (`A` Kaiming-uniform, `B` 0): :math:`BA = 1` exactly, and every component learns another thing.
    """

    official_start: bool = False
    r"""Start at :math:`1/\sqrt r` everywhere, as the official code does."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of what is added to the first content of `A`; 0 leaves the layer exactly at `W`."""

    trained: ClassVar[tuple[str, ...]] = ("A", "B")
    needs_base: ClassVar[bool] = True

    def specs(self, config: Any, rows: int, cols: int) -> list[TensorSpec]:
        """`A` and `B`."""

        def start(rows: int, cols: int, axis: int, drawn: bool) -> Callable[[torch.Generator | None], Tensor]:
            def first(generator: torch.Generator | None) -> Tensor:
                if self.official_start:
                    found = torch.full((rows, cols), config.r**-0.5)
                else:
                    found = _drawn(rows, cols)(generator) if drawn else torch.zeros(rows, cols)
                    found.select(axis, 0).fill_(1.0)
                if axis == 0 and self.noise:
                    found += self.noise * torch.randn(rows, cols, generator=generator)
                return found

            return first

        return [
            TensorSpec("A", (config.r, cols), start=start(config.r, cols, 0, True)),
            TensorSpec("B", (rows, config.r), start=start(rows, config.r, 1, not config.init_weights)),
        ]

    def delta(self, of: MaskedWeight) -> Tensor:
        r""":math:`W \odot (B A - 1)`."""
        return of.base * (of.tensors["B"] @ of.tensors["A"] - 1)


@register_part("dense")
@dataclass(frozen=True)
class DenseUpdate(MaskedUpdate):
    """D is a trained matrix `[out, in]`, fp32, that starts at 0: full fine-tuning of masked weights, beside a base that
    stays as it is, quantised or not. Takes the memory of full fine-tuning: with Adam 16 bytes an entry."""

    trained: ClassVar[tuple[str, ...]] = ("delta",)

    def specs(self, config: Any, rows: int, cols: int) -> list[TensorSpec]:
        """`delta`."""
        return [TensorSpec("delta", (rows, cols), start=None if config.init_weights else _drawn(rows, cols))]

    def delta(self, of: MaskedWeight) -> Tensor:
        """The matrix."""
        return of.tensors["delta"]


@register_part("none")
@dataclass(frozen=True)
class NoUpdate(MaskedUpdate):
    """D = 0: the kept weights stay as they are, and only the mask changes; with biases, norms (`modules_to_save`) or
    the masking's scores as what trains."""

    saved: ClassVar[tuple[str, ...]] = ("shape",)

    def specs(self, config: Any, rows: int, cols: int) -> list[TensorSpec]:
        """`shape`, int64 `[2]`: what a file tells of the weight's, which no other tensor does."""
        return [TensorSpec("shape", (2,), torch.int64, "saved", start=lambda _: torch.tensor([rows, cols]))]

    def delta(self, of: MaskedWeight) -> None:
        """None."""
        return None
