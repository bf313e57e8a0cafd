"""`FactoredConfig`: weights replaced by low-rank and other compressed forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...rules import check_schedule
from ...utils.option_types import PositiveInt
from ...utils.parts import UnknownPart, load_part_by_name
from ..shared.config import AdapterConfig
from ..shared.form_config import FormConfig
from ..shared.module_patterns import check_pattern
from .form import Form
from .low_rank import LowRank
from .ranks import ParameterRatio, RankChoice


@dataclass
class FactoredConfig(FormConfig, AdapterConfig):
    r"""Configuration of a factored base: the weights of the targets are replaced by a form of fewer numbers,
    :math:`W \approx F(\theta)`, by default two factors B A from the weight's SVD, which train.

    The form stands in the weight's place and is not added to it:

    * **Memory.** The weight is released as soon as its form is there, unless `keep_base`. Injection holds both.
    * **Dense targets.** A weight whose form would store no fewer numbers stays as it is, dense and frozen
      (`left_dense`, and a warning); the rank rule may leave out others (WeLore's N-LRCs), which keep their dtype, NF4
      too.
    * **Adapters.** Over a kept base an adapter's update is :math:`F - W`: disabling it gives the base, and several add
      up, as in peft. Over a released base one factored adapter acts at a time, and `disable_adapter()`, `unload()` and
      deleting the last one are refused: there is nothing to go back to.
    * **Files.** `save_pretrained` writes the form's tensors. They load onto any base of that architecture: the targets'
      own weights are not read, and released.
    * **Leaving.** `merge_and_unload()` gives the dense model, F in each weight (in the dtype of the computation where
      the base was quantised); `export_modules()` a model of plain linear layers, two in the place of one.

    Raises:
        ValueError: an option is out of range; the message names the option and the mend.
    """

    tuner: ClassVar[str] = "factored"

    form: Form | UnknownPart = field(
        default_factory=LowRank, metadata={"help": "What stands in the place of a weight: LowRank(), ..."}
    )
    rank: RankChoice | UnknownPart = field(
        default_factory=ParameterRatio,
        metadata={"help": "The rank of each form: FixedRank(), ParameterRatio(), SingularValueThreshold(), ..."},
    )
    rank_pattern: dict[str, PositiveInt] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> rank of the modules that match."}
    )
    keep_base: bool = field(
        default=False,
        metadata={"help": "Whether the weights are kept beside their forms: to disable the adapter, and to unload it."},
    )
    sizes: dict[str, list[int]] = field(
        default_factory=dict,
        metadata={"help": "Module name -> [rows, columns, rank] of what is factored. Written at injection."},
    )
    left_dense: list[str] = field(
        default_factory=list,
        metadata={"help": "Targets whose form would save nothing, and that stay dense. Written at injection."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of what forms draw at their start."})
    bias: Literal["none", "all", "factored_only"] = field(
        default="none", metadata={"help": "Which biases train: none, all of the model's, or the adapted layers'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in self.rank_pattern:
            check_pattern(pattern, "rank_pattern")
        for name, found in self.sizes.items():
            if len(found) != 3 or min(found) < 1:
                raise ValueError(
                    f"sizes[{name!r}]={found} is not [rows, columns, rank]. It is written at injection: leave it out."
                )
        check_schedule(self.schedule, self)
        for rule in self.rules:
            if rule.part_type == "sample_layers":
                raise ValueError(
                    "SampleLayers acts on units of kind 'module' by the scaling of their updates, and a form has none. "
                    "Take SwitchLayers or AlternateModules."
                )

    def _make_nested(self) -> None:
        self._make_form(Form)
        self.rank = load_part_by_name(RankChoice, self.rank, "rank")

    @property
    def needs_calibration(self) -> bool:
        """Whether forms start from data."""
        return self.form.statistic is not None
