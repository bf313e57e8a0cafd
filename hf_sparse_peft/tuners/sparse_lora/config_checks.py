"""What a `SparseLoraConfig` refuses: values out of range, and options that contradict each other."""

from __future__ import annotations

from dataclasses import fields

from ...sparsity import Budget, Given
from ..shared.config import AdapterConfig
from ..shared.module_patterns import check_pattern

GRANULARITIES = ("entry", "block", "row", "column")


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
    if config.needs_calibration and config.support_init != "zeros":
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
    _check_budget(config)


def _check_budget(config: AdapterConfig) -> None:
    if not 0 <= config.density <= 1:
        raise ValueError(f"density={config.density} is not a fraction; give a number from 0 to 1 (0.005 is 0.5 %).")
    if not isinstance(config.budget, Budget):
        return
    if config.density != next(field.default for field in fields(config) if field.name == "density"):
        raise ValueError(
            f"density={config.density} and budget={config.budget} both say how large the support is. Set one of them."
        )
    config.budget.check(config)
    if config.structures and not config.budget.follows_from_module:
        raise ValueError(
            f"structures have densities and a scope of their own; budget={config.budget} would share the same units "
            "out again. Leave it out, or give a density to the other modules."
        )


def _check_patterns(config: AdapterConfig) -> None:
    patterns = {name: getattr(config, name) for name in ("rank_pattern", "alpha_pattern", "granularity_pattern")}
    for name, of_option in {**patterns, "budget": getattr(config.budget, "patterns", ())}.items():
        for pattern in of_option:
            check_pattern(pattern, name)
    for name, rank in config.rank_pattern.items():
        if rank < 0:
            raise ValueError(f"rank_pattern[{name!r}]={rank} is negative; give an integer >= 0.")
    for name, found in config.sizes.items():
        if len(found) != 3 or min(found) < 0 or found[0] > found[1]:
            raise ValueError(
                f"sizes[{name!r}]={found} is not [units, units allocated, rank], none negative and the second not "
                "below the first."
            )


def _check_numbers(config: AdapterConfig) -> None:
    if config.r < 0:
        raise ValueError(f"r={config.r} is negative; give a rank >= 1, or 0 to leave the low-rank half out.")
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(f"lora_dropout={config.lora_dropout} is not a share; give a number from 0 to below 1.")
    if config.block_size < 1:
        raise ValueError(f"block_size={config.block_size} is not a size; give an integer >= 1 (32 suits tensor cores).")
    if not (config.has_support or config.r or config.rank_pattern or config.sizes):
        raise ValueError("r=0 and density=0 leave nothing to train. Set r >= 1, density > 0, or both.")
    _check_compact_tolerance(config)
    _check_structures(config)
    _check_factors(config)


def _check_structures(config: AdapterConfig) -> None:
    named = [name for one in config.structures for name in one.modules]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise ValueError(f"structures name {twice} more than once; a module selects with one structure only.")


def _check_factors(config: AdapterConfig) -> None:
    for name in ("factor_masks", "scale_support"):
        if getattr(config, name) and config.r == 0 and not config.rank_pattern:
            raise ValueError(f"{name} concerns the low-rank half's factors and scaling, and r=0 leaves it out.")
        if getattr(config, name) and config.gated:
            raise ValueError(
                f"{name} cannot be combined with a gate (gate={config.gate!r}, or a rule that needs one): components "
                "that leave would take it. Leave one of them out."
            )


def _check_compact_tolerance(config: AdapterConfig) -> None:
    if config.compact_tolerance is not None and config.compact_tolerance < 0:
        raise ValueError(
            f"compact_tolerance={config.compact_tolerance} is negative; give a size >= 0 (LT-SFT: 1e-7), or None."
        )
