"""`MaskedLoraConfig`: a LoRA on a pruned base whose zeros stay zeros."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...rules import check_schedule
from ...utils.option_types import PositiveInt
from ..shared.config import AdapterConfig


@dataclass
class MaskedLoraConfig(AdapterConfig):
    r"""Configuration of a masked LoRA, :math:`\Delta W = s\,M \odot (B A)` on a pruned base, :math:`W = M \odot W`
    (MaskLoRA of PERP; Zimmer et al., 2023).

    `M` is 1 where the base keeps a weight: a bit an entry, in memory and in the file. So the update trains as it is
    merged, and merging keeps every zero. `A` is Kaiming-uniform, `B` starts at 0.

    Raises:
        ValueError: an option is out of range; the message names the option and the mend.
    """

    tuner: ClassVar[str] = "masked_lora"

    r: PositiveInt = field(default=16, metadata={"help": "Rank of the product that is masked."})
    lora_alpha: float = field(default=32, metadata={"help": "Numerator of the scaling s = lora_alpha / r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) (Kalajdzievski, 2023)."})
    mask: Literal["zeros", "given"] = field(
        default="zeros",
        metadata={
            "help": "'zeros': what is 0 in the dense base stays 0. 'given': set_masks(model, report.masks) says what "
            "was removed; needed on quantised bases, where up to a tenth of the weights that were kept are 0."
        },
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True starts as the identity; False starts with random values (tests)."}
    )
    bias: Literal["none", "all", "masked_lora_only"] = field(
        default="none", metadata={"help": "Which biases train: none, all of the model's, or the adapted layers'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule(self.schedule, self)

    @property
    def scaling(self) -> float:
        """s."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
