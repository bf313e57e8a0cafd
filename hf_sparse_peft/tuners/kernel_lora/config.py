"""`KernelLoraConfig`: an update that is a kernel of two small point sets, thinned by competition."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from ...rules import check_schedule
from ...utils.option_types import PositiveFloat, PositiveInt, Range
from ..shared.config import AdapterConfig


@dataclass
class KernelLoraConfig(AdapterConfig):
    r"""Configuration of a kernel adapter, :math:`\Delta W = \mathrm{compete}(K(P, Q))` (SNELL: Shen et al., 2024).

    `P` `[2, in, r/2]` and `Q` `[2, out, r/2]` are points, :math:`D^\top_{ij} = c\,(\|P_{1i} - Q_{1j}\| - \|P_{2i} -
    Q_{2j}\|)`. The kernel `"distance"` is :math:`K = D`; `"mixed"` is :math:`D + a\,\mathrm{softmax}_{out}(D/g) + b`
    with learned numbers that start at `a = g = 1, b = 0` (SNELLA: Shen et al., 2025).

    The fraction `sparsity` of the entries of each matrix, those smallest in size, is zero; :math:`\tau` is the largest
    of them. `mode="paper"` keeps :math:`w \max(|w| - \tau, 0)`, `mode="code"` what the official code computes,
    :math:`w\,|w|` where :math:`|w| > \tau`, with the second factor cut from the gradient. :math:`\tau` has no gradient.
    `sparsity=0` without `own_counts` is the kernel itself, not squared. The update is not zero at the start.

    Raises:
        ValueError: an option is out of range; the message names the option and the mend.
    """

    tuner: ClassVar[str] = "kernel_lora"
    possible_kinds: ClassVar[frozenset[str]] = frozenset({"kernel", "module"})

    r: Annotated[int, Range(least=2)] = field(
        default=32, metadata={"help": "Numbers trained for each input and each output; even."}
    )
    kernel: Literal["distance", "mixed"] = field(
        default="distance", metadata={"help": "Difference of distances (SNELL), or with a softmax beside it (SNELLA)."}
    )
    sparsity: Annotated[float, Range(least=0, below=1)] = field(
        default=0.3, metadata={"help": "Fraction of zeros in each matrix; with own_counts at injection."}
    )
    mode: Literal["paper", "code"] = field(
        default="paper", metadata={"help": "What winners keep: w max(|w| - tau, 0), or the official code's w |w|."}
    )
    scale: PositiveFloat = field(default=0.1, metadata={"help": "The fixed factor c of the distances."})
    drop_path: Annotated[float, Range(least=0, below=1)] = field(
        default=0.0, metadata={"help": "Fraction of samples trained without the update (the paper's ViT recipe: 0.1)."}
    )
    own_counts: bool = field(
        default=False,
        metadata={
            "help": "Whether each matrix has a number of nonzero entries of its own, saved with it, which a rule may "
            "change. Set at injection where a rule asks for it."
        },
    )
    tile_entries: PositiveInt = field(
        default=1 << 22,
        metadata={"help": "Entries of the update that exist at once; a larger update is built again for every pass."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True is the paper's start; False starts with larger points (tests)."}
    )
    bias: Literal["none", "all", "kernel_lora_only"] = field(
        default="none", metadata={"help": "Which biases train: none, all of the model's, or the adapted layers'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % 2:
            raise ValueError(f"r={self.r} cannot be split over two point sets; give an even number >= 2, such as 32.")
        check_schedule(self.schedule, self)

    def meet_needs(self) -> None:
        """Give matrices counts of their own where a rule changes them."""
        self.own_counts = self.own_counts or any("counts" in rule.all_needs for rule in self.rules)

    @property
    def unit_kinds(self) -> frozenset[str]:
        """Kinds of units that an adapter has."""
        return frozenset({"kernel", "module"})

    @property
    def competes(self) -> bool:
        """Whether entries compete at all; without that the update is the kernel itself."""
        return self.sparsity > 0 or self.own_counts
