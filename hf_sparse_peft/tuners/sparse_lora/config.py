"""`SparseLoraConfig`: everything an adapter is and everything that happens to it during training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType

from ...sparsity import CRITERIA, make_score, needs_data
from .file_length import check_file_length
from .freezing_config import FreezingConfig, NuclearNormConfig
from .schedule_config import PruningConfig, RankAllocationConfig, RegrowthConfig, nested
from .structure_config import FactorMaskConfig, HalfRoundsConfig, LayerSamplingConfig, StructureConfig

GRANULARITIES = ("entry", "block", "row", "column")
ALLOCATIONS = ("uniform", "erdos_renyi", "global", "threshold")
SCHEDULES = {
    "regrowth": RegrowthConfig,
    "pruning": PruningConfig,
    "rank_allocation": RankAllocationConfig,
    "rounds": HalfRoundsConfig,
    "layer_sampling": LayerSamplingConfig,
    "factor_masks": FactorMaskConfig,
    "freezing": FreezingConfig,
    "nuclear_norm": NuclearNormConfig,
}
"""Fields that hold a config of their own; most of them need a callback."""
INSTALL_HINT = "pip install hf-sparse-peft, then `import hf_sparse_peft` before peft loads this adapter"


def exact_pattern(by_module: dict[str, float]) -> dict[str, float]:
    """`by_module` as keys of `rank_pattern` or `alpha_pattern` that match these whole names only: "lin" would match
    "block.lin" too."""
    return {f"^{name}": value for name, value in by_module.items()}


@dataclass
class SparseLoraConfig(PeftConfig):
    r"""Configuration of a sparse + low-rank adapter, :math:`\Delta W = s\,B\,\mathrm{diag}(g)\,A + S`.

    `S` has values on a support of `density` of each weight's units; `A`, `B` have rank `r`; either half may be absent
    (`density=0` or `r=0`). `s` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.

    Raises:
        ValueError: an option is out of range or both halves are absent; the message names the option and the mend.
    """

    r: int = field(default=8, metadata={"help": "Rank of the low-rank half; 0 leaves it out."})
    lora_alpha: float = field(default=16, metadata={"help": "Numerator of the low-rank half's scaling."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) (Kalajdzievski, 2023)."})
    lora_dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout on the low-rank half's input. Above 0 it keeps a second copy of the input."},
    )
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "Module name or regex -> rank, instead of `r`."})
    alpha_pattern: dict = field(
        default_factory=dict, metadata={"help": "Module name or regex -> alpha, instead of `lora_alpha`."}
    )
    factor_init: Literal["kaiming_uniform", "normal"] = field(
        default="kaiming_uniform", metadata={"help": "Start of A: Kaiming's uniform, or N(0, 0.02^2). B starts at 0."}
    )
    factor_masks: FactorMaskConfig | None = field(
        default=None, metadata={"help": "Masks on the entries of A and B; None: both are dense."}
    )
    density: float = field(
        default=0.005, metadata={"help": "Share of each targeted weight's units in the support; 0 leaves it out."}
    )
    num_entries: int | None = field(
        default=None,
        metadata={
            "help": "Weight entries in all supports together, instead of `density`; split as the weights' sizes."
        },
    )
    budget_rank: int | None = field(
        default=None,
        metadata={
            "help": "Instead of `density`: as many entries in each weight as a LoRA of this rank, min(r(m+n), mn)."
        },
    )
    units_per_module: int | None = field(
        default=None, metadata={"help": "Units in every targeted module's support, instead of `density`."}
    )
    granularity: Literal["entry", "block", "row", "column"] = field(
        default="entry", metadata={"help": "What a unit of the support is."}
    )
    granularity_pattern: dict = field(
        default_factory=dict, metadata={"help": "Module name or regex -> granularity, instead of `granularity`."}
    )
    structures: list[StructureConfig] = field(
        default_factory=list,
        metadata={"help": "Modules whose supports are whole channels, heads or matrices; others take `density`."},
    )
    scale_support: bool = field(
        default=False, metadata={"help": "Whether the low-rank half's scaling multiplies the sparse half too (DSEE)."}
    )
    support_init: Literal["zeros", "uniform"] = field(
        default="zeros",
        metadata={"help": "Start of the support's values: 0, the identity, or U(+-1/sqrt(columns)) (SLTrain)."},
    )
    block_size: int = field(default=32, metadata={"help": "Side of a block; must divide both sides of each weight."})
    criterion: str = field(
        default="random", metadata={"help": f"How the first support is chosen: one of {sorted(CRITERIA)}."}
    )
    criterion_options: dict = field(
        default_factory=dict, metadata={"help": "Options of the criterion, e.g. {'rank': 64} for low_rank_magnitude."}
    )
    allocation: Literal["uniform", "erdos_renyi", "global", "threshold"] = field(
        default="uniform",
        metadata={
            "help": "How the units are shared out: the same density everywhere, Erdos-Renyi (Evci et al., 2020), or "
            "one ranking of all units by the criterion, or every entry with |w| < freezing.threshold (SaRA)."
        },
    )
    density_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "Module name or regex -> density, instead of `density`; 0 leaves the support out there."},
    )
    support_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "Module name -> units in its support. Written at injection where sizes depend on the model."},
    )
    capacity_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "Module name -> units allocated, retired ones included. Written at injection."},
    )
    regrowth: RegrowthConfig | None = field(default=None, metadata={"help": "Moves of the support; None: it stays."})
    pruning: PruningConfig | None = field(default=None, metadata={"help": "Thinning of the support; None: it stays."})
    rank_allocation: RankAllocationConfig | None = field(
        default=None, metadata={"help": "Moves of rank between layers; None: ranks stay."}
    )
    rounds: HalfRoundsConfig | None = field(
        default=None, metadata={"help": "Half of the matrices trains at a time; None: all do."}
    )
    layer_sampling: LayerSamplingConfig | None = field(
        default=None, metadata={"help": "Sampled transformer layers train at a step; None: all do."}
    )
    head_in_budget: bool = field(
        default=False,
        metadata={"help": "Pay for the numbers of modules_to_save out of the budget (FISH); needs a ranking by data."},
    )
    freezing: FreezingConfig | None = field(
        default=None, metadata={"help": "Entries that grew past a threshold stop training once; None: none does."}
    )
    nuclear_norm: NuclearNormConfig | None = field(
        default=None, metadata={"help": "A nuclear norm on the trained entries of one random matrix a step."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every random draw of supports, mixed with module names."})
    values_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Dtype of adapter values in files; compact() sets it."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True starts as the identity; False starts with random values (tests)."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names, a regex, or 'all-linear'; None: the architecture's default."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regex to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer numbers to adapt; needs target_modules as a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list, if it is not in the common places."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter."}
    )
    bias: Literal["none", "all", "sparse_lora_only"] = field(
        default="none", metadata={"help": "Which biases train: none, all of the model's, or the adapted layers'."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether weights are stored [in, out]; set by itself for Conv1D."}
    )
    training_finished: bool = field(
        default=False, metadata={"help": "Written when training ends: schedules are over, their state is dropped."}
    )
    unattended: ClassVar[str] = "support and ranks will NOT move, nothing is sampled or frozen in turns."
    """What training without the callbacks means, for the warning."""
    install_hint: str = field(default=INSTALL_HINT, metadata={"help": "For whoever reads adapter_config.json."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SPARSE_LORA
        for name, cls in SCHEDULES.items():
            setattr(self, name, nested(cls, getattr(self, name), name))
        self.structures = [nested(StructureConfig, one, "structures") for one in self.structures]
        self.target_modules = set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, list) else self.exclude_modules
        )
        self.install_hint = INSTALL_HINT
        self._check_choices()
        self._check_numbers()
        self._check_targets()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read `adapter_config.json`; a cut weights file beside it is found now, before any layer is changed for it.

        Raises:
            ValueError: no config there, an option out of range, or a truncated `adapter_model.safetensors`.
        """
        file = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if file.is_file():
            check_file_length(file)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @property
    def has_support(self) -> bool:
        """Whether the sparse half is there."""
        given = (self.num_entries, self.budget_rank, self.units_per_module, self.structures, self.support_pattern)
        return self.density > 0 or any(bool(one) for one in given) or any(self.density_pattern.values())

    @property
    def freezes_units(self) -> bool:
        """Whether units may be frozen while others train."""
        return self.freezing is not None or (self.regrowth is not None and self.regrowth.retired_share > 0)

    @property
    def data_driven(self) -> bool:
        """Whether the first support waits for data: gradients of the training data, or units given from outside."""
        return needs_data(self.criterion)

    @property
    def sizes_from_data(self) -> bool:
        """Whether even the number of units of each module is still to be found from data."""
        by_data = self.criterion == "given" or (self.data_driven and self.allocation == "global")
        return by_data and self.has_support and not self.support_pattern

    @property
    def has_schedule(self) -> bool:
        """Whether something happens during training that a callback has to do."""
        return not self.training_finished and bool(self.asked_schedules)

    @property
    def asked_schedules(self) -> list[str]:
        """Names of the fields that a callback has to carry out."""
        asked = [name for name in SCHEDULES if getattr(self, name) is not None]
        return [name for name in asked if name != "factor_masks" or self.factor_masks.kind == "stochastic"]

    def granularity_of(self, module_name: str) -> str:
        """What a unit is in the module of that name: `granularity_pattern`'s first match, else `granularity`."""
        key = get_pattern_key(self.granularity_pattern.keys(), module_name)
        return self.granularity_pattern.get(key, self.granularity)

    def structure_of(self, module_name: str) -> StructureConfig | None:
        """The structure that the module of that name selects with, if any."""
        found = [one for one in self.structures if one.covers(module_name)]
        return found[0] if found else None

    def _check_choices(self) -> None:
        choices = {
            "granularity": GRANULARITIES,
            "allocation": ALLOCATIONS,
            "criterion": tuple(sorted(CRITERIA)),
            "values_dtype": ("float32", "bfloat16"),
            "bias": ("none", "all", "sparse_lora_only"),
            "factor_init": ("kaiming_uniform", "normal"),
            "support_init": ("zeros", "uniform"),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {list(accepted)}.")
        for pattern, granularity in self.granularity_pattern.items():
            if granularity not in GRANULARITIES:
                raise ValueError(
                    f"granularity_pattern[{pattern!r}]={granularity!r} is unknown; choose one of {list(GRANULARITIES)}."
                )
        make_score(self.criterion, **self.criterion_options)  # refuses unknown options and bad values by name
        if self.allocation == "global" and self.criterion == "random":
            raise ValueError(
                "allocation='global' ranks units by the criterion, and criterion='random' ranks nothing. "
                "Choose criterion='magnitude', or allocation='uniform' or 'erdos_renyi'."
            )

        if self.data_driven and (self.structures or self.support_init != "zeros"):
            raise ValueError(
                f"criterion='{self.criterion}' chooses units after injection and starts them at zero, and structures "
                "or support_init='uniform' need them at injection. Choose a criterion without data, e.g. 'magnitude'."
            )
        entries = self.granularity == "entry" and not self.granularity_pattern
        fits = self.data_driven and self.allocation == "global" and entries
        if self.head_in_budget and not fits:
            raise ValueError(
                "head_in_budget=True takes the head's numbers out of one budget for the whole model. It needs "
                "allocation='global', granularity='entry' and a criterion that is estimated from data, e.g. 'fisher'."
            )
        if self.density_pattern and (
            self.allocation != "uniform" or self.num_entries or self.budget_rank or self.units_per_module
        ):
            raise ValueError(
                "density_pattern gives densities module by module, and num_entries, budget_rank, units_per_module, "
                "allocation='erdos_renyi' and 'global' share one budget out. Keep one of the two."
            )

    def _check_numbers(self) -> None:
        for name, share in self.density_pattern.items():
            if not 0 <= share <= 1:
                raise ValueError(f"density_pattern[{name!r}]={share} is not a share; give a number from 0 to 1.")
        if self.r < 0:
            raise ValueError(f"r={self.r} is negative; give a rank >= 1, or 0 to leave the low-rank half out.")
        if not 0 <= self.density <= 1:
            raise ValueError(f"density={self.density} is not a share; give a number from 0 to 1 (0.005 is 0.5 %).")
        if self.num_entries is not None and self.num_entries < 1:
            raise ValueError(
                f"num_entries={self.num_entries} leaves no entry; give at least 1, or None to use density."
            )
        if self.budget_rank is not None and self.budget_rank < 1:
            raise ValueError(f"budget_rank={self.budget_rank} leaves no entry; give a rank >= 1, or None.")
        if self.budget_rank is not None and (self.num_entries is not None or self.allocation != "uniform"):
            raise ValueError(
                f"budget_rank={self.budget_rank} says how many entries each weight gets, and so does "
                f"num_entries={self.num_entries} or allocation={self.allocation!r}. Set one of them."
            )
        other = {"num_entries": self.num_entries, "budget_rank": self.budget_rank}
        if self.units_per_module is not None and (self.units_per_module < 1 or any(other.values())):
            raise ValueError(
                f"units_per_module={self.units_per_module} with {other}: give one of them, at least 1, or None for all "
                "to use density."
            )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} is not a share; give a number from 0 to below 1.")
        if self.block_size < 1:
            raise ValueError(
                f"block_size={self.block_size} is not a size; give an integer >= 1 (32 suits tensor cores)."
            )
        if not self.has_support and self.r == 0 and not self.rank_pattern:
            raise ValueError("r=0 and density=0 leave nothing to train. Set r >= 1, density > 0, or both.")
        if (self.regrowth or self.pruning) and not self.has_support:
            raise ValueError("regrowth and pruning move the sparse half, and density=0 leaves it out. Set density > 0.")
        self._check_entries_only()
        self._check_freezing()
        if self.regrowth and self.regrowth.retired_share and self.sizes_from_data:
            raise ValueError(
                "regrowth.retired_share allocates room by each support's size, and allocation='global' leaves the "
                f"sizes to criterion='{self.criterion}'. Set allocation='uniform' or 'erdos_renyi'."
            )
        if self.rank_allocation and self.rank_allocation.target_r > self.r:
            raise ValueError(
                f"rank_allocation.target_r={self.rank_allocation.target_r} is above r={self.r}, the rank every layer "
                f"starts with. Set r to at least {self.rank_allocation.target_r} (AdaLoRA: 1.5 x target_r)."
            )

        self._check_structures()
        self._check_factors()

    def _check_structures(self) -> None:
        named = [name for one in self.structures for name in one.modules]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise ValueError(f"structures name {twice} more than once; a module selects with one structure only.")
        if self.structures and (self.allocation != "uniform" or self.num_entries is not None):
            raise ValueError(
                f"structures have densities and a scope of their own; allocation={self.allocation!r} and num_entries="
                f"{self.num_entries} would share the same units out again. Set allocation='uniform', num_entries=None."
            )

    def _check_factors(self) -> None:
        for name in ("factor_masks", "scale_support"):
            if getattr(self, name) and self.r == 0 and not self.rank_pattern:
                raise ValueError(f"{name} concerns the low-rank half's factors and scaling, and r=0 leaves it out.")
            if getattr(self, name) and self.rank_allocation:
                raise ValueError(f"{name} and rank_allocation cannot be combined: components that leave would take it.")

    def _check_freezing(self) -> None:
        known = self.freezing is not None and self.freezing.threshold is not None
        if self.allocation == "threshold" and not (known and self.criterion == "smallest_magnitude"):
            raise ValueError(
                "allocation='threshold' takes every entry with |w| below freezing.threshold, so it needs that and "
                f"criterion='smallest_magnitude'; got freezing={self.freezing} and criterion={self.criterion!r}."
            )
        if self.freezes_units and self.pruning:
            raise ValueError(
                "regrowth.retired_share and freezing keep units that stopped training, and pruning takes units away. "
                "Set pruning=None or leave them out."
            )
        if self.freezing and self.regrowth:
            raise ValueError("freezing needs the support that training began with, and regrowth moves it. Set one.")

    def _check_entries_only(self) -> None:
        other = [g for g in (self.granularity, *self.granularity_pattern.values()) if g != "entry"]
        named = [name for name in ("freezing", "nuclear_norm") if getattr(self, name)]
        named += ["regrowth.grow='sm3'"] if self.regrowth and self.regrowth.grow == "sm3" else []
        for name in named:
            if other or not self.has_support:
                raise ValueError(
                    f"{name} looks at single entries of the support, and granularity={(other or ['entry'])[0]!r} with "
                    f"density={self.density}. Set granularity='entry' and density > 0, or leave it out."
                )

    def _check_targets(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} cannot be used when target_modules is a str; pass a list of names.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: give the layer numbers to adapt.")
