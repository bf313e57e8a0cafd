"""What a `SparseLoraConfig` refuses: values out of range, and options that contradict each other."""

from __future__ import annotations

from ...rules import Freeze
from ...sparsity import Given, Random, SmallestMagnitude
from ..shared.config import AdapterConfig
from ..shared.module_patterns import check_pattern

GRANULARITIES = ("entry", "block", "row", "column")
ALLOCATIONS = ("uniform", "proportional", "erdos_renyi", "global", "threshold", "tensors")


def check_config(config: AdapterConfig) -> None:
    """Refuse what cannot be.

    Raises:
        ValueError: names the option, its value and the mend.
    """
    _check_choices(config)
    _check_patterns(config)
    _check_numbers(config)


def _check_choices(config: AdapterConfig) -> None:
    choices = {
        "granularity": GRANULARITIES,
        "allocation": ALLOCATIONS,
        "values_dtype": ("float32", "bfloat16"),
        "bias": ("none", "all", "sparse_lora_only"),
        "factor_init": ("kaiming_uniform", "normal"),
        "gate": (None, "zeros", "normal", "ones"),
        "support_init": ("zeros", "uniform"),
    }
    for name, accepted in choices.items():
        if getattr(config, name) not in accepted:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown; choose one of {list(accepted)}.")
    for pattern, granularity in config.granularity_pattern.items():
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity_pattern[{pattern!r}]={granularity!r} is unknown; choose one of {list(GRANULARITIES)}."
            )
    if config.allocation == "global" and isinstance(config.criterion, Random):
        raise ValueError(
            "allocation='global' ranks units by the criterion, and criterion='random' ranks nothing. "
            "Choose criterion='magnitude', or allocation='uniform' or 'erdos_renyi'."
        )

    if config.allocation == "tensors" and (config.granularity not in ("row", "column") or config.granularity_pattern):
        raise ValueError(
            f"allocation='tensors' trains whole matrices, and granularity={config.granularity!r} with "
            f"granularity_pattern={config.granularity_pattern} would keep an index for each of their parts. Set "
            "granularity='row' and granularity_pattern={}."
        )
    if config.data_driven and config.support_init != "zeros":
        raise ValueError(
            f"criterion='{config.criterion.part_type}' chooses units after injection and starts them at zero, and "
            f"support_init='{config.support_init}' gives them values at injection. Set support_init='zeros', or a "
            "criterion without data, e.g. 'magnitude'."
        )
    if isinstance(config.criterion, Given) and config.structures:
        raise ValueError(
            "criterion='given' takes units from outside, and structures choose them. Set structures=[], or a criterion "
            "that ranks, e.g. 'magnitude' or 'activation'."
        )
    entries = config.granularity == "entry" and not config.granularity_pattern
    fits = config.data_driven and config.allocation == "global" and entries
    if config.head_in_budget and not fits:
        raise ValueError(
            "head_in_budget=True takes the head's numbers out of one budget for the whole model. It needs "
            "allocation='global', granularity='entry' and a criterion that is estimated from data, e.g. 'fisher'."
        )
    if config.density_pattern and (
        config.allocation != "uniform" or config.num_entries or config.budget_rank or config.units_per_module
    ):
        raise ValueError(
            "density_pattern gives densities module by module, and num_entries, budget_rank, units_per_module, "
            f"allocation={config.allocation!r} share one budget out. Keep one of the two."
        )


def _check_patterns(config: AdapterConfig) -> None:
    for field in ("rank_pattern", "alpha_pattern", "granularity_pattern", "density_pattern"):
        for pattern in getattr(config, field):
            check_pattern(pattern, field)
    for field in ("rank_pattern", "support_pattern", "capacity_pattern"):
        for name, number in getattr(config, field).items():
            if number < 0:
                raise ValueError(f"{field}[{name!r}]={number} is negative; give an integer >= 0.")


def _check_numbers(config: AdapterConfig) -> None:
    for name, share in config.density_pattern.items():
        if not 0 <= share <= 1:
            raise ValueError(f"density_pattern[{name!r}]={share} is not a share; give a number from 0 to 1.")
    if config.r < 0:
        raise ValueError(f"r={config.r} is negative; give a rank >= 1, or 0 to leave the low-rank half out.")
    if not 0 <= config.density <= 1:
        raise ValueError(f"density={config.density} is not a share; give a number from 0 to 1 (0.005 is 0.5 %).")
    if config.num_entries is not None and config.num_entries < 1:
        raise ValueError(f"num_entries={config.num_entries} leaves no entry; give at least 1, or None to use density.")
    if config.budget_rank is not None and config.budget_rank < 1:
        raise ValueError(f"budget_rank={config.budget_rank} leaves no entry; give a rank >= 1, or None.")
    shared = config.allocation not in ("uniform", "tensors")
    if config.budget_rank is not None and (config.num_entries is not None or shared):
        raise ValueError(
            f"budget_rank={config.budget_rank} says how many entries each weight gets, and so does "
            f"num_entries={config.num_entries} or allocation={config.allocation!r}. Set one of them."
        )
    other = {"num_entries": config.num_entries, "budget_rank": config.budget_rank}
    if config.units_per_module is not None and (config.units_per_module < 1 or any(other.values())):
        raise ValueError(
            f"units_per_module={config.units_per_module} with {other}: give one of them, at least 1, or None for all "
            "to use density."
        )
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(f"lora_dropout={config.lora_dropout} is not a share; give a number from 0 to below 1.")
    if config.block_size < 1:
        raise ValueError(f"block_size={config.block_size} is not a size; give an integer >= 1 (32 suits tensor cores).")
    if not config.has_support and config.r == 0 and not config.rank_pattern:
        raise ValueError("r=0 and density=0 leave nothing to train. Set r >= 1, density > 0, or both.")
    _check_freezing(config)
    _check_structures(config)
    _check_factors(config)
    _check_drop_within(config)


def _check_structures(config: AdapterConfig) -> None:
    named = [name for one in config.structures for name in one.modules]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise ValueError(f"structures name {twice} more than once; a module selects with one structure only.")
    if config.structures and (config.allocation != "uniform" or config.num_entries is not None):
        raise ValueError(
            f"structures have densities and a scope of their own; allocation={config.allocation!r} and num_entries="
            f"{config.num_entries} would share the same units out again. Set allocation='uniform', num_entries=None."
        )


def _check_factors(config: AdapterConfig) -> None:
    for name in ("factor_masks", "scale_support"):
        if getattr(config, name) and config.r == 0 and not config.rank_pattern:
            raise ValueError(f"{name} concerns the low-rank half's factors and scaling, and r=0 leaves it out.")
        if getattr(config, name) and config.gated:
            raise ValueError(
                f"{name} cannot be combined with a gate (gate={config.gate!r}, or a rule that needs one): components "
                "that leave would take it. Leave one of them out."
            )


def _check_freezing(config: AdapterConfig) -> None:
    known = any(isinstance(rule, Freeze) and rule.threshold is not None for rule in config.rules)
    if config.allocation == "threshold" and not (known and isinstance(config.criterion, SmallestMagnitude)):
        raise ValueError(
            "allocation='threshold' takes every entry with |w| below Freeze.threshold, so it needs schedule=["
            f"Freeze(threshold=...)] and criterion='smallest_magnitude'; got schedule={config.schedule} and criterion="
            f"'{config.criterion.part_type}'."
        )


def _check_drop_within(config: AdapterConfig) -> None:
    if config.drop_within is not None and config.drop_within < 0:
        raise ValueError(f"drop_within={config.drop_within} is negative; give a size >= 0 (LT-SFT: 1e-7), or None.")
