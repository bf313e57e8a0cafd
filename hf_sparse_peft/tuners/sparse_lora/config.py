"""`SparseLoraConfig`: everything an adapter is and everything that happens to it during training."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar, Literal

from ...rules import check_pairs, check_schedule
from ...sparsity import Budget, DeltaMagnitude, Density, Given, Granularity, Pattern, Random, Score
from ...utils.module_names import check_names
from ...utils.option_types import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Range,
)
from ...utils.parts import UnknownPart, load_options, load_part_by_name
from ..shared.config import AdapterConfig
from ..shared.module_patterns import check_pattern, pattern_key
from .factor_masks import FactorMaskConfig
from .starts import Start
from .structures import StructureConfig, check_structures, structure_of


def exact_pattern(by_module: dict[str, float]) -> dict[str, float]:
    """`by_module` as keys of `rank_pattern` or `alpha_pattern` that match these whole names only: "lin" would match
    "block.lin" too."""
    return {f"^{name}": value for name, value in by_module.items()}


@dataclass
class SparseLoraConfig(AdapterConfig):
    r"""Configuration of a sparse + low-rank adapter, :math:`\Delta W = s\,B\,\mathrm{diag}(g)\,A + S`.

    `S` has values on a support of `density` of each weight's units; `A`, `B` have rank `r`; either half may be absent
    (`density=0` or `r=0`). `s` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.

    Raises:
        ValueError: an option is out of range or both halves are absent; the message names the option and the mend.
    """

    tuner: ClassVar[str] = "sparse_lora"
    possible_kinds: ClassVar[frozenset[str]] = frozenset({"support", "rank", "subnet_row", "subnet_column", "module"})
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of parameters that belong to no linear layer, fused experts such as "
            "'experts.gate_up_proj': [experts, rows, cols], adapted as one matrix [experts * rows, cols]. With "
            "target_modules=[] nothing else is."
        },
    )
    r: NonNegativeInt = field(default=8, metadata={"help": "Rank of the low-rank half; 0 leaves it out."})
    lora_alpha: float = field(default=16, metadata={"help": "Numerator of the low-rank half's scaling."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) (Kalajdzievski, 2023)."})
    lora_dropout: Decay = field(
        default=0.0,
        metadata={"help": "Dropout on the low-rank half's input. Above 0 it keeps a second copy of the input."},
    )
    rank_pattern: dict[str, NonNegativeInt] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> rank, instead of `r`."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> alpha, instead of `lora_alpha`."}
    )
    factor_init: Literal["kaiming_uniform", "normal"] = field(
        default="kaiming_uniform", metadata={"help": "Start of A: Kaiming's uniform, or N(0, 0.02^2). B starts at 0."}
    )
    gate: Literal["zeros", "normal", "ones"] | None = field(
        default=None,
        metadata={
            "help": "Start of a trained number g a component, in B diag(g) A; None: none. 'zeros', with A and B from "
            "N(0, 0.02^2) (AdaLoRA); 'normal', N(0, 1) (SoRA), or 'ones', with B = 0. Set at injection where a rule "
            "asks for it."
        },
    )
    start: Start | UnknownPart | None = field(
        default=None,
        metadata={
            "help": "What ranks, factors and support start with, found in the gradient of the training data: "
            "GradientProjection() (GoRA), GradientSplit(); None: r, A drawn and B = 0. What was found is in `sizes`."
        },
    )
    factor_masks: FactorMaskConfig | None = field(
        default=None, metadata={"help": "Masks on the entries of A and B; None: both are dense."}
    )
    density: Annotated[float, Range(least=0, most=1)] = field(
        default=0.005, metadata={"help": "Fraction of each targeted weight's units in the support; 0: no support."}
    )
    budget: Budget | UnknownPart | None = field(
        default=None,
        metadata={
            "help": "Units of the supports where `density` cannot say it: Numbers(2_000_000), RankEquivalent(8), "
            "Global(0.01), ErdosRenyi(0.01), ByModule({...}), ...; None: `density`."
        },
    )
    granularity: Granularity | Literal["subnet"] = field(
        default="entry",
        metadata={
            "help": "What a unit of the support is; 'diagonal': one of `diagonal_blocks` blocks on the diagonal, which "
            "density=1.0 takes whole; 'subnet': some rows x some columns, trained as one dense matrix."
        },
    )
    granularity_pattern: dict[str, Granularity | Literal["subnet"]] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> granularity, instead of `granularity`."}
    )
    subnet_shares: tuple[PositiveFraction, PositiveFraction] | None = field(
        default=None,
        metadata={
            "help": "Shares of a weight's rows and columns in its subnet, e.g. (0.125, 0.125), instead of density or "
            "budget; None: about the square root of its density on both sides."
        },
    )
    accumulator: bool = field(
        default=False,
        metadata={
            "help": "Whether what subnets learned where they no longer are is kept, in a dense fp32 matrix a weight. "
            "Set at injection where a rule asks for it."
        },
    )
    structures: list[StructureConfig] = field(
        default_factory=list,
        metadata={"help": "Modules whose supports are whole channels, heads or matrices; others take `density`."},
    )
    scale_support: bool | PositiveFloat = field(
        default=False,
        metadata={
            "help": "What multiplies the sparse half: True: the low-rank half's scaling (DSEE); a number: that (PaCA)."
        },
    )
    support_init: Literal["zeros", "uniform"] = field(
        default="zeros",
        metadata={"help": "Start of the support's values: 0, the identity, or U(+-1/sqrt(columns)) (SLTrain)."},
    )
    block_size: PositiveInt = field(
        default=32, metadata={"help": "Side of a block; must divide both sides of each weight."}
    )
    diagonal_blocks: PositiveInt = field(
        default=64,
        metadata={
            "help": "Blocks N on the diagonal with granularity='diagonal', of ceil(rows/N) x ceil(columns/N): about "
            "rows * columns / N numbers in all. None may be left without a row or a column."
        },
    )
    criterion: Score | UnknownPart = field(
        default_factory=Random,
        metadata={"help": "How the first support is chosen: a score, e.g. LowRankMagnitude(rank=64), or its name."},
    )
    pattern: Pattern | UnknownPart | None = field(
        default=None,
        metadata={
            "help": "Shape in which supports lie, e.g. Grid(rows=0.25, columns=0.25): all units where a quarter of the "
            "rows and a quarter of the columns cross; None: anywhere."
        },
    )
    sizes: dict[str, list[NonNegativeInt]] = field(
        default_factory=dict,
        metadata={
            "help": "Module name -> [units, units allocated, rank], of a subnet [rows, columns, rank]. Written at "
            "injection where they do not follow from the module alone, and by compact()."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of every random draw of supports, mixed with module names."})
    compact_tolerance: NonNegativeFloat | None = field(
        default=None,
        metadata={"help": "compact() drops units whose numbers all lie within this of 0 (LT-SFT: 1e-7); None: none."},
    )
    values_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Dtype of adapter values in files; compact() sets it."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True starts as the identity; False starts with random values (tests)."}
    )
    bias: Literal["none", "all", "sparse_lora_only"] = field(
        default="none", metadata={"help": "Which biases train: none, all of the model's, or the adapted layers'."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether weights are stored [in, out]; set by itself for Conv1D."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pairs(self.schedule)
        self._check_by_module()
        if isinstance(self.start, Start):
            self._check_start()
            self.start.check(self)
        self._check_support()
        self._check_factors()
        self._check_parameters()
        check_schedule(self.schedule, self)

    def _make_nested(self) -> None:
        self.criterion = load_part_by_name(Score, self.criterion, "criterion")
        if self.pattern is not None:
            self.pattern = load_part_by_name(Pattern, self.pattern, "pattern")
        if self.budget is not None:
            self.budget = load_part_by_name(Budget, self.budget, "budget")
        if self.start is not None:
            self.start = load_part_by_name(Start, self.start, "start")
        if self.factor_masks is not None:
            self.factor_masks = load_options(FactorMaskConfig, self.factor_masks, "factor_masks")
        if isinstance(self.structures, (list, tuple)):
            self.structures = [load_options(StructureConfig, given, "structures") for given in self.structures]

    # What contradicts itself; each part checks its own options

    def _check_by_module(self) -> None:
        """Options that say something of modules by name."""
        patterns = {name: getattr(self, name) for name in ("rank_pattern", "alpha_pattern", "granularity_pattern")}
        for name, by_pattern in {**patterns, "budget": getattr(self.budget, "patterns", ())}.items():
            for pattern in by_pattern:
                check_pattern(pattern, name)
        for name, sizes in self.sizes.items():
            ordered = len(sizes) == 3 and (self.granularity_of(name) == "subnet" or sizes[0] <= sizes[1])
            if not ordered or bool(sizes[0]) != bool(sizes[1]):
                raise ValueError(
                    f"sizes[{name!r}]={sizes} is not [units, units allocated, rank]: at least as many are allocated as "
                    "there are, and none where there are none. Of a subnet it is [rows, columns, rank]."
                )

    def _check_start(self) -> None:
        """What a start from data has no answer to."""
        begin = f"start={self.start} writes the factors of every module, and "
        if not self.sizes and not (self.r and all(self.rank_pattern.values())):
            raise ValueError(f"{begin}r={self.r}, rank_pattern={self.rank_pattern} leaves them out. Set ranks >= 1.")
        if self.factor_masks is not None:
            raise ValueError(f"{begin}factor_masks cuts some of their entries off. Leave one of the two out.")
        gate = self.gate or next((rule.gate for rule in self.rules if "gate" in rule.all_needs), "ones")
        if gate != "ones":
            raise ValueError(
                f"{begin}a gate that starts at {gate!r} (the config's, or a rule's that needs one) multiplies them by "
                "other numbers. Set gate='ones'."
            )
        if self.has_subnets or self.structures:
            raise ValueError(f"{begin}subnets and structures have sizes of their own. Leave one of the two out.")

    def _check_support(self) -> None:
        """How large the support is, who chooses it, and what its values start with."""
        check_structures(self.structures)
        if not (self.has_support or self.r or self.rank_pattern or self.sizes):
            raise ValueError("r=0 and density=0 leave nothing to train. Set r >= 1, density > 0, or both.")
        if self.needs_calibration and self.support_init != "zeros":
            raise ValueError(
                f"criterion='{self.criterion.part_type}' chooses units after injection and starts them at zero, and "
                f"support_init='{self.support_init}' gives them values at injection. Set support_init='zeros', or a "
                "criterion without data, e.g. 'magnitude'."
            )
        if isinstance(self.criterion, Given) and self.structures:
            raise ValueError(
                "criterion='given' takes units from outside, and structures choose them. Set structures=[], or a "
                "criterion that ranks, e.g. 'magnitude' or 'activation'."
            )
        self._check_subnets()
        self._check_pattern()
        if not isinstance(self.budget, Budget):
            return
        if self.density != next(option.default for option in fields(self) if option.name == "density"):
            raise ValueError(
                f"density={self.density} and budget={self.budget} both say how large the support is. Set one of them."
            )
        self.budget.check_injection(self)
        if self.structures and not self.budget.follows_from_module:
            raise ValueError(
                f"structures have densities and a scope of their own; budget={self.budget} would split the same units "
                "again. Leave it out, or give a density to the other modules."
            )

    def _check_subnets(self) -> None:
        if self.subnet_shares is not None and not self.has_subnets:
            raise ValueError(
                f"subnet_shares={self.subnet_shares} says how large subnets are, and no module has one. Set "
                "granularity='subnet', or leave it out."
            )
        if self.accumulator and not self.has_subnets:
            raise ValueError(
                "accumulator=True keeps what subnets leave behind, and no module has one. Set granularity='subnet', or "
                "leave it out."
            )
        if not self.has_subnets:
            return
        if isinstance(self.criterion, (Given, DeltaMagnitude)):
            raise ValueError(
                f"criterion='{self.criterion.part_type}' chooses single units, and granularity='subnet' whole rows and "
                "columns by scores of all entries. Choose another criterion, e.g. 'magnitude' or 'fisher'."
            )
        for rule in self.rules:
            if not rule.acts_on & self.unit_kinds:
                raise ValueError(
                    f"{type(rule).__name__} acts on units of {sorted(rule.acts_on)}, and with granularity='subnet' an "
                    f"adapter has {sorted(self.unit_kinds)}. Leave it out of schedule, or choose another granularity."
                )
        if self.needs_calibration and getattr(self.budget, "ranks_units", False):
            raise ValueError(
                f"budget={self.budget} splits by scores that only data has, and a subnet's sides are fixed at "
                "injection. Set density or Numbers(...), or a criterion without data."
            )

    def _check_pattern(self) -> None:
        """What else would choose units in shapes of its own."""
        if self.pattern is None:
            return
        start = f"pattern={self.pattern} says where units may lie, and "
        if not self.has_support:
            raise ValueError(f"{start}density=0 leaves the support out. Set density > 0, or pattern=None.")
        if isinstance(self.criterion, Given):
            raise ValueError(f"{start}criterion='given' takes them from outside as they are. Set pattern=None.")
        if self.structures:
            raise ValueError(f"{start}structures choose whole rows and columns. Set structures=[], or pattern=None.")
        if self.has_subnets:
            raise ValueError(
                f"{start}granularity='subnet' trains every entry of its rows and columns. Set subnet_shares instead, "
                "or granularity='entry'."
            )
        ranked = getattr(self.budget, "ranks_units", False)
        if getattr(self.pattern, "reads_weight", False) and (self.criterion.part_type != "random" or ranked):
            raise ValueError(
                f"{start}reads that off the weight where units are drawn or moved. Set criterion='random' and a budget "
                "that does not rank units, or pattern=None."
            )
        room = next((type(rule).__name__ for rule in self.rules if rule.extra_capacity > 0), None)
        if room is not None:
            raise ValueError(
                f"{start}{room}.retired keeps units where they were when the pattern moves on. Set retired=0, or "
                "pattern=None."
            )

    def _check_factors(self) -> None:
        if self.lora_alpha == 0 and (self.r or self.rank_pattern) and not self.alpha_pattern:
            raise ValueError(
                "lora_alpha=0 multiplies the low-rank half by 0, so that it never trains. Set another lora_alpha, or "
                "r=0 for no low-rank half."
            )
        set_options = {"factor_masks": self.factor_masks is not None, "scale_support": self.scale_support is True}
        for name in (name for name, is_set in set_options.items() if is_set):
            if self.r == 0 and not self.rank_pattern:
                raise ValueError(f"{name} concerns the low-rank half's factors and scaling, and r=0 leaves it out.")
            if self.gated:
                raise ValueError(
                    f"{name} cannot be combined with a gate (gate={self.gate!r}, or a rule that needs one): components "
                    "that leave would take it. Leave one of them out."
                )

    def _check_parameters(self) -> None:
        """What has no meaning for parameters of modules that compute with them on their own."""
        check_names(self.target_parameters, "target_parameters")
        if not self.target_parameters:
            return
        set_options = {"lora_dropout": self.lora_dropout > 0, "structures": bool(self.structures)}
        for name in (name for name, is_set in set_options.items() if is_set):
            raise ValueError(
                f"{name}={getattr(self, name)} cannot be had with target_parameters={self.target_parameters}: their "
                f"modules compute with the adapted parameter as a whole. Leave {name} out, or train two adapters."
            )

    # What follows

    def meet_needs(self) -> None:
        """Give components a gate, and subnets an accumulator, where a rule needs one."""
        self.accumulator = self.accumulator or any("accumulator" in rule.all_needs for rule in self.rules)
        if self.gate is None:
            self.gate = next((rule.gate for rule in self.rules if "gate" in rule.all_needs), None)

    @property
    def gated(self) -> bool:
        """Whether components have a gate, or get one at injection."""
        return self.gate is not None or any("gate" in rule.all_needs for rule in self.rules)

    @property
    def unit_kinds(self) -> frozenset[str]:
        """Kinds of units that an adapter has."""
        kinds = {"module"}
        if self.r > 0 or any(self.rank_pattern.values()):
            kinds.add("rank")
        if self.has_support and self.has_subnets:
            kinds |= {"subnet_row", "subnet_column"}
        if self.has_support and (self.granularity != "subnet" or set(self.granularity_pattern.values()) - {"subnet"}):
            kinds.add("support")
        return frozenset(kinds)

    @property
    def known_pattern(self) -> Pattern | None:
        """`pattern`, as far as it is known here."""
        return self.pattern if isinstance(self.pattern, Pattern) else None

    @property
    def has_subnets(self) -> bool:
        """Whether some module may have a subnet."""
        return "subnet" in (self.granularity, *self.granularity_pattern.values())

    @property
    def support_budget(self) -> Budget | None:
        """`budget`, else the one that `density` stands for; None where there is none."""
        if self.budget is not None:
            return self.budget
        return Density(self.density) if self.density > 0 else None

    @property
    def has_support(self) -> bool:
        """Whether the sparse half is there."""
        if self.sizes:
            return any(units for units, _, _ in self.sizes.values())
        return self.support_budget is not None or bool(self.structures) or self.subnet_shares is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether the first support waits for data: gradients of the training data, or units given from outside; or
        both halves do (`start`)."""
        return isinstance(self.start, Start) or (isinstance(self.criterion, Score) and self.criterion.needs_data)

    @property
    def awaits_start(self) -> bool:
        """Whether `start` is still to be found in data."""
        return isinstance(self.start, Start) and not self.sizes

    @property
    def sizes_from_data(self) -> bool:
        """Whether the number of units of each module, or its rank, comes from data or from a file, found or not yet."""
        ranked = getattr(self.budget, "ranks_units", False) or any(group.scope == "model" for group in self.structures)
        return (
            isinstance(self.start, Start)
            or isinstance(self.criterion, Given)
            or bool(self.needs_calibration and ranked)
        )

    @property
    def calibrates_sizes(self) -> bool:
        """Whether even the number of units of each module, or its rank, is still to be found from data."""
        return self.awaits_start or (self.sizes_from_data and self.has_support and not self.sizes)

    def granularity_of(self, module_name: str) -> str:
        """What a unit is in the module of that name: `granularity_pattern`'s first match, else `granularity`."""
        key = pattern_key(self.granularity_pattern, module_name, "granularity_pattern")
        return self.granularity_pattern.get(key, self.granularity)

    def cut_size_of(self, granularity: str) -> int:
        """`UnitGrid.block_size` of that granularity: `diagonal_blocks` or `block_size`."""
        return self.diagonal_blocks if granularity == "diagonal" else self.block_size

    def rank_of(self, module_name: str) -> int:
        """Rank of the low-rank half in the module of that name: what `sizes` says, else `rank_pattern`'s first match,
        else `r`."""
        if module_name in self.sizes:
            return self.sizes[module_name][2]
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module_name, "rank_pattern"), self.r)

    def alpha_of(self, module_name: str) -> float:
        """Numerator of the scaling in the module of that name: `alpha_pattern`'s first match, else `lora_alpha`."""
        return self.alpha_pattern.get(pattern_key(self.alpha_pattern, module_name, "alpha_pattern"), self.lora_alpha)

    def structure_of(self, module_name: str) -> StructureConfig | None:
        """The structure that the module of that name selects with, if any."""
        return structure_of(self.structures, module_name)
