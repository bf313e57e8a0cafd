"""`ChannelBits`: a weight that trains through its own quantiser, whose bit depth of each row trains too; and
`PackedChannels`, what it is shipped as."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ...ops.channel_product import channel_codes, channel_product, channel_quantised
from ...rules import UnitSpace
from ...sparsity.bit_planes import MOST_BITS, pack_planes, unpack_planes
from ...utils.option_types import Range
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Form, PackedForm, Tensors, check_columns


@register_part("channel_bits")
@dataclass(frozen=True)
class ChannelBits(Form):
    r"""Self-compression (Csefalvay and Imber, 2023): row i of the weight (output channel) is rounded to the integers of
    a bit depth :math:`b_i` times :math:`2^{e_i}`,

    :math:`q(w) = 2^e\,\mathrm{round}(\mathrm{clip}(2^{-e} w, -2^{b' - 1}, 2^{b' - 1} - 1))`, :math:`b' = \max(b, 0)`,

    and W, b and e train, all in fp32, with a straight-through rounding (`ops.channel_quantised`). The rule `BitPenalty`
    pulls b down. A row that reaches 0 bits is exactly 0 and never returns; its bias stays. Between 0 and about 1.6 bits
    a row takes the values 0 and :math:`-2^e` alone.

    The start has each row's largest |entry| as its largest code, :math:`2^e (2^{b - 1} - 1) = \max |w|`; rows of 0
    start at 0 bits. The paper trains from scratch, and so does the reproduction of it on MNIST in tinygrad
    (`ChannelBits(bits=2, exponent=-8)`). `rank_pattern` gives modules another bit depth to start with.

    While it trains, memory and files hold W in fp32. `model.base_model.pack_channels()` gives the adapter the form
    `PackedChannels`: integers at :math:`\lceil b \rceil` bits, of the same weight to the bit, which trains no more.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("W", "bits", "exponents")
    exact: ClassVar[bool] = True
    unit_kinds: ClassVar[frozenset[str]] = frozenset({"channel"})

    bits: Annotated[int, Range(least=2, most=MOST_BITS)] = 8
    """b of all rows at the start."""
    exponent: float | None = None
    """e of all rows at the start; None: that of the row's largest |entry|."""

    def own_rank(self, rows: int, cols: int) -> int:
        """Bits at the start."""
        return self.bits

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """The weight, and a bit depth and exponent a row."""
        return [TensorSpec("W", (rows, cols)), TensorSpec("bits", (rows,)), TensorSpec("exponents", (rows,))]

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
        """The weight itself, and a quantiser that its rows fit into."""
        bits = torch.full_like(weight[:, 0], float(rank))
        if self.exponent is not None:
            return {"W": weight, "bits": bits, "exponents": torch.full_like(bits, self.exponent)}
        largest = weight.abs().amax(1)
        steps = largest / max(2.0 ** (rank - 1) - 1, 0.5)
        exponents = torch.where(largest > 0, steps, torch.ones_like(steps)).log2()
        return {"W": weight, "bits": bits.masked_fill_(largest == 0, 0), "exponents": exponents}

    def product(self, x: Tensor, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        r""":math:`X q(W)^\top`; the weight is rounded in each pass, and kept in none."""
        return channel_product(x, tensors["W"], tensors["bits"], tensors["exponents"], dtype)

    def weight(self, tensors: Tensors) -> Tensor:
        """q(W)."""
        return channel_quantised(tensors["W"], tensors["bits"], tensors["exponents"])

    def spaces(self, layer: Any, adapter: str) -> list[UnitSpace]:
        """The rows."""
        return [ChannelSpace(layer, adapter)]

    @torch.no_grad()
    def packed(self, tensors: Tensors) -> tuple[int, Tensors]:
        """Rank and tensors of `PackedChannels`, of the same weight to the bit.

        Raises:
            ValueError: a row has more bits than can be packed.
        """
        bits = tensors["bits"].clamp_min(0).ceil()
        if float(bits.max()) > MOST_BITS:
            raise ValueError(
                f"a row has {float(tensors['bits'].max()):.2f} bits, and {MOST_BITS} can be packed. Raise "
                "BitPenalty.weight, or export the dense weight: merge_and_unload()."
            )
        codes = channel_codes(tensors["W"], tensors["bits"], tensors["exponents"])
        planes = pack_planes(codes, bits)
        if not len(planes):  # no row is left
            planes = planes.new_zeros(1, planes.shape[1])
        found = {"planes": planes, "bits": bits.to(torch.uint8), "exponents": tensors["exponents"].detach().clone()}
        return len(planes), found | {"columns": torch.tensor([codes.shape[1]], dtype=torch.int32, device=planes.device)}


@register_part("packed_channels")
@dataclass(frozen=True)
class PackedChannels(PackedForm):
    r"""What `ChannelBits` is shipped as: integers, row i at `bits[i]` bits in two's complement
    (`sparsity.pack_planes`), times :math:`2^{e_i}`. Nothing of it trains. The size (`rank`) is the sum of `bits`, at
    least 1; a file takes `rank * ceil(cols / 8)` bytes of codes, 5 bytes a row, and 4 for the number of columns.

    It is made by `FactoredModel.pack_channels`, not at injection. The weight is unpacked in each pass: merge it where
    time counts.
    """

    made_of: ClassVar[str] = "ChannelBits"
    made_by: ClassVar[str] = "pack_channels"
    tensor_names: ClassVar[tuple[str, ...]] = ("planes", "bits", "exponents", "columns")
    full_precision: ClassVar[frozenset[str]] = frozenset({"exponents"})

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """Bits of the codes, and a bit depth and exponent a row."""
        width = -(-cols // 8)
        return [
            TensorSpec("planes", (rank, width), torch.uint8, "saved", check=partial(_check_planes, cols=cols)),
            TensorSpec("bits", (rows,), torch.uint8, "saved", check=partial(_check_bits, lines=rank)),
            TensorSpec("exponents", (rows,), torch.float32, "saved", check=_check_exponents),
            TensorSpec("columns", (1,), torch.int32, "saved", check=partial(check_columns, cols=cols)),
        ]

    def weight(self, tensors: Tensors) -> Tensor:
        """What the codes stand for, in the exponents' dtype."""
        codes = unpack_planes(tensors["planes"], tensors["bits"], int(tensors["columns"]))
        exponents = tensors["exponents"]
        return codes.to(exponents.dtype) * torch.exp2(exponents)[:, None]


def _check_planes(planes: Tensor, key: str, cols: int) -> None:
    if cols % 8 and bool((planes[:, -1] >> (cols % 8)).any()):
        raise ValueError(f"'{key}' has bits behind the {cols} columns of a row. The file is damaged.")


def _check_bits(bits: Tensor, key: str, lines: int) -> None:
    if int(bits.max()) > MOST_BITS:
        raise ValueError(f"'{key}' has a row of {int(bits.max())} bits, and {MOST_BITS} is the most. It is damaged.")
    if max(int(bits.sum()), 1) != lines:
        raise ValueError(
            f"'{key}' has {int(bits.sum())} bits in all rows, and the config's sizes and the codes have {lines}. Load "
            "the adapter_config.json that was saved with the file."
        )


def _check_exponents(exponents: Tensor, key: str) -> None:
    if float(exponents.abs().max()) > 126:
        raise ValueError(f"'{key}' has the exponent {float(exponents.abs().max()):g} (in size), and 126 is the most.")


@dataclass(frozen=True)
class ChannelSpace(UnitSpace):
    """Rows of a weight that is rounded to bit depths; those above 0 bits live."""

    kind: ClassVar[str] = "channel"
    unit: ClassVar[str] = "channel"
    packed: ClassVar[bool] = False

    def _held(self, name: str) -> nn.Parameter:
        return self.layer.form_tensors(self.adapter)[name]

    @property
    def bits(self) -> nn.Parameter:
        """`[rows]`, real numbers."""
        return self._held("bits")

    @property
    def size(self) -> int:
        """Rows."""
        return self.bits.numel()

    capacity = size

    @property
    def unit_entries(self) -> int:
        """Numbers of a row."""
        return self.weight_shape[1]

    @property
    def unit_numel(self) -> int:
        """Those, its bit depth and its exponent."""
        return self.unit_entries + 2

    def alive(self) -> Tensor:
        """Rows above 0 bits, sorted."""
        return (self.bits.detach() > 0).nonzero().squeeze(1)

    def parameters(self) -> list[nn.Parameter]:
        """Bit depths, exponents, weight."""
        return [parameter for parameter, _ in self.scored_parameters().values()]

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """Bit depths, exponents, weight."""
        return {name: (self._held(name), 0) for name in ("bits", "exponents", "W")}

    @torch.no_grad()
    def write(self, units: Tensor) -> None:
        """Let no rows but `units` live, in place: others get 0 bits.

        Raises:
            ValueError: one of them has 0 bits already, which no gradient leaves.
        """
        living = torch.zeros(self.size, dtype=torch.bool, device=self.bits.device)
        living[units.long().to(living.device)] = True
        if bool((living & (self.bits <= 0)).any()):
            raise ValueError(f"Channels of '{self.name}' at 0 bits cannot return. Choose among those that live.")
        self.bits.data.masked_fill_(~living, 0)
