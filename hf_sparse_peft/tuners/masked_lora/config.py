"""`MaskedLoraConfig`: an adapter whose update, and if need be the base too, is masked by what is kept of a weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...rules import check_schedule
from ...sparsity.n_of_m_code import n_of_m_bytes
from ...utils.option_types import PositiveInt
from ...utils.parts import UnknownPart, load_part_by_name
from ..shared.config import AdapterConfig
from .masking import HardMask, Masking
from .one_shot import MaskStart
from .updates import LowRankUpdate, MaskedUpdate


@dataclass
class MaskedLoraConfig(AdapterConfig):
    r"""Configuration of a masked adapter, :math:`W' = M \odot (W + D)`; by default a masked LoRA, :math:`D = s\,B A`,
    on a base that was pruned, :math:`W = M \odot W` (MaskLoRA of PERP; Zimmer et al., 2023).

    `M` is 1 where a weight is kept: a bit an entry, in memory and in the file, or less with `n_of_m`. So the adapter
    trains as it is merged, and merging keeps every zero. `update` says what is trained, `masking` how the mask enters
    the passes, and rules of `schedule` that act on units of kind "mask" (`Prune(space="mask")`) move it.

    Raises:
        ValueError: an option is out of range; the message names the option and the mend.
    """

    tuner: ClassVar[str] = "masked_lora"
    possible_kinds: ClassVar[frozenset[str]] = frozenset({"mask", "module"})

    r: PositiveInt = field(default=16, metadata={"help": "Rank of the product that is masked."})
    lora_alpha: float = field(default=32, metadata={"help": "Numerator of the scaling s = lora_alpha / r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) (Kalajdzievski, 2023)."})
    update: MaskedUpdate | UnknownPart = field(
        default_factory=LowRankUpdate,
        metadata={"help": "What is trained: LowRankUpdate(), ScaleUpdate(), DenseUpdate(), NoUpdate()."},
    )
    mask: Literal["zeros", "given", "all"] | MaskStart | UnknownPart = field(
        default="zeros",
        metadata={
            "help": "'zeros': what is 0 in the dense base stays 0. 'given': set_masks(model, report.masks) says what "
            "was removed; needed on quantised bases, where up to a tenth of the weights that were kept are 0. 'all': "
            "everything lives until a rule removes it. MagnitudeMask(0.5), WandaMask(0.5): what that criterion keeps."
        },
    )
    masks_base: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the base may hold weights where the mask has none: they count as 0, and merging zeroes "
            "them. None: where the mask moves, or starts with all. False: the base is 0 there, and is never read."
        },
    )
    n_of_m: list[PositiveInt] | None = field(
        default=None,
        metadata={
            "help": "[2, 4]: every group of 4 neighbours along the inputs keeps exactly 2, and masks are stored as "
            "codes of such groups, 2/3 of a bit an entry for 2:4. For masks that do not move."
        },
    )
    masking: Masking | UnknownPart = field(
        default_factory=HardMask,
        metadata={"help": "How the mask enters the passes: HardMask() in forward and backward alike."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True starts as the identity; False starts with random values (tests)."}
    )
    bias: Literal["none", "all", "masked_lora_only"] = field(
        default="none", metadata={"help": "Which biases train: none, all of the model's, or the adapted layers'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masks_base is False and self.mask_moves:
            raise ValueError(
                "masks_base=False takes the base for 0 wherever the mask is, and here the mask moves, or removes "
                "what the base has. Set masks_base=None."
            )
        if self.n_of_m is not None:
            self._check_n_of_m()
        check_schedule(self.schedule, self)
        for rule in self.rules:
            if rule.part_type == "sample_layers":
                raise ValueError(
                    "SampleLayers acts on units of kind 'module' by the scaling of their updates, and masked adapters "
                    "have none. Take SwitchLayers or AlternateModules."
                )
        moves = any("mask" in rule.acts_on and "units" in rule.writes for rule in self.rules)
        if self.masking.for_training and not moves and not any(isinstance(rule, UnknownPart) for rule in self.schedule):
            raise ValueError(
                f"masking={self.masking} trains scores, and no rule of schedule makes a mask of them. Add LearnMask(), "
                "or set masking=HardMask()."
            )

    def _check_n_of_m(self) -> None:
        if len(self.n_of_m) != 2 or self.n_of_m[0] >= self.n_of_m[1]:
            raise ValueError(f"n_of_m={self.n_of_m} takes [kept, of], fewer kept than there are: [2, 4].")
        n_of_m_bytes(0, *self.n_of_m)
        moves = any("mask" in rule.acts_on and "units" in rule.writes for rule in self.rules)
        if moves or self.mask == "all" or self.masking.computes_mask:
            raise ValueError(
                f"n_of_m={self.n_of_m} codes a mask that keeps so many of every group from the start to the end, and "
                "here it moves, or starts with all. Set n_of_m=None."
            )
        if isinstance(self.mask, MaskStart) and list(self.mask.n_of_m or ()) != list(self.n_of_m):
            raise ValueError(
                f"n_of_m={self.n_of_m} codes masks of such groups, and mask={self.mask} chooses others. Give both the "
                "same n_of_m."
            )

    def _make_nested(self) -> None:
        self.n_of_m = list(self.n_of_m) if isinstance(self.n_of_m, tuple) else self.n_of_m
        self.update = load_part_by_name(MaskedUpdate, self.update, "update")
        self.masking = load_part_by_name(Masking, self.masking, "masking")
        if self.mask not in ("zeros", "given", "all"):
            self.mask = load_part_by_name(MaskStart, self.mask, "mask")
        for name in ("update", "masking", "mask"):
            part = getattr(self, name)
            if isinstance(part, UnknownPart):
                raise ValueError(
                    f"{name}={part.data} cannot be used here: {part.reason}, and without it nobody knows what the "
                    "adapter's tensors mean. Import the package that registers it, or update hf-sparse-peft."
                )

    def meet_needs(self) -> None:
        """Say whether the base is masked too, as far as the options leave that open."""
        if self.masks_base is None:
            self.masks_base = self.mask_moves

    @property
    def mask_moves(self) -> bool:
        """Whether entries may be removed that the base holds."""
        writes = any("mask" in rule.acts_on and "units" in rule.writes for rule in self.rules)
        return writes or self.mask == "all" or isinstance(self.mask, MaskStart) or self.masking.computes_mask

    @property
    def needs_calibration(self) -> bool:
        """Whether the mask is chosen with data."""
        return isinstance(self.mask, MaskStart) and self.mask.statistic is not None

    @property
    def unit_kinds(self) -> frozenset[str]:
        """Kinds of units that an adapter has."""
        return frozenset({"mask", "module"})

    @property
    def has_support(self) -> bool:
        """False: the units of a mask are no support."""
        return False

    @property
    def known_pattern(self) -> Any:
        """The shape in which living entries lie; None: anywhere."""
        return None

    @property
    def scaling(self) -> float:
        """s."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
