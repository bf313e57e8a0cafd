"""Adapters that rotate or reflect: orthogonal and nearly orthogonal maps of a layer's input or output."""

from __future__ import annotations

from typing import Any, Literal

from ..rules import PairOrthogonality
from ..tuners import StructuredConfig
from ..tuners.structured import Form, Givens, QuasiGivens, Reflections
from .registry import Method, register


def _row(overrides: dict[str, Any], form: Form, **options: Any) -> Method:
    return Method(StructuredConfig(**{"form": form, "target_modules": "all-linear", **options, **overrides}))


@register(
    "goft",
    paper="Ma et al., 2024",
    moves="nothing",
    use_when="what the base knows is to be kept: norms and angles of its weights stay, an angle an input trains",
    cost="two rounds of small maps of each input, in fp32",
)
def goft(
    bounded: bool = False,
    lengths: bool = False,
    wiring: Literal["paper", "released"] = "paper",
    **overrides: Any,
) -> Method:
    """GOFT: a product of d - 1 Givens rotations of each layer's input, in log2(d) rounds, on all linears. The published
    code trains p with angles pi tanh(p) (`bounded`) and, by default, d lengths beside (`lengths`), and has another
    wiring, which is no rotation beyond two inputs (`wiring="released"`). The authors train at 8e-4 (SQuAD) and 1e-3
    (VTAB-1K)."""
    return _row(overrides, Givens(wiring, bounded, lengths))


@register(
    "qgoft",
    paper="Ma et al., 2024",
    moves="nothing; pairs are pulled to right angles",
    use_when="as goft, where norms may change and angles slightly",
    cost="as goft",
)
def qgoft(weight: float = 1e-3, wiring: Literal["paper", "released"] = "paper", **overrides: Any) -> Method:
    """qGOFT: GOFT with free 2 x 2 maps in the place of rotations, whose two vectors `PairOrthogonality` pulls to a
    right angle (`weight=0`: nothing does, as in the published code)."""
    schedule = {"schedule": [PairOrthogonality(weight)]} if weight else {}
    return _row(overrides, QuasiGivens(wiring), **schedule)


@register(
    "ether",
    paper="Bini et al., 2024",
    moves="nothing",
    use_when="a rate that cannot be too high is wanted: weights stay within a fixed distance of the base's",
    cost="two products a number of each input",
)
def ether(
    blocks: int = 32,
    side: Literal["input", "output", "both"] = "input",
    grouping: Literal["blocks", "released"] = "blocks",
    **overrides: Any,
) -> Method:
    """ETHER: a hyperplane reflection of each block of a layer's input, on all linears; the model starts reflected. The
    published code maps the output instead where asked (`side="output"`), and groups rows of W where the paper has
    blocks of inputs (`grouping="released"`). Rates are of the order of 1e-2, without weight decay."""
    return _row(overrides, Reflections(False, side, blocks, grouping))


@register(
    "ether+",
    paper="Bini et al., 2024",
    moves="nothing",
    use_when="as ether, from the base itself on and with finer changes",
    cost="four products a number of each input and output",
)
def ether_plus(
    blocks: int = 32,
    side: Literal["input", "output", "both"] = "both",
    grouping: Literal["blocks", "released"] = "blocks",
    **overrides: Any,
) -> Method:
    """ETHER+: two hyperplanes a block that cancel each other at the start, on both sides of every linear layer; options
    as `ether`."""
    return _row(overrides, Reflections(True, side, blocks, grouping))
