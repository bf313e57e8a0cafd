"""Whole structures as units, masked factors: what `SparseLoraConfig`
says of them, as plain data that survives the round trip of `adapter_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from ...utils.module_names import ends_with
from ...utils.option_types import check_types

ConfigT = TypeVar("ConfigT")


def nested(cls: type[ConfigT], value: Any, option: str) -> ConfigT | None:
    """`value` (None, a dict from JSON, or an instance) as an instance of `cls`.

    Raises:
        ValueError: `value` is none of these, or names an option that `cls` does not have.
    """
    if value is None or isinstance(value, cls):
        return value
    known = {f.name for f in fields(cls)}
    if not isinstance(value, dict):
        raise ValueError(f"{option}={value!r} is not understood: pass None, a {cls.__name__} or a dict of its options.")
    unknown = sorted(set(value) - known, key=str)
    if unknown:
        raise ValueError(f"{option} has no option {unknown}; it takes {sorted(known)}.")
    try:
        return cls(**value)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def require(condition: bool, owner: str, field: str, value: Any, accepted: str) -> None:
    """Raise `ValueError` naming `owner.field`, its value and what it accepts, unless `condition`."""
    if not condition:
        raise ValueError(f"{owner}.{field}={value!r} is out of range: it takes {accepted}.")


@dataclass
class StructureConfig:
    """Units that enter a support together in several matrices of one transformer block (S2FT; Yang et al., 2024).

    Structure j of a block is the j-th of `count` equal stretches of units in every matrix named: FFN channel j is row j
    of the gate and up projections and column j of the down projection; key/value head j is its rows of `k_proj` and
    `v_proj`, the rows of all its query heads in `q_proj`, and the columns of these in `o_proj`. Where only `q_proj` and
    `o_proj` select together, or one of them alone, head j is one query head. The granularity of the
    matrices (`granularity`, `granularity_pattern`) must be `row` or `column`. A structure scores the sum of the
    criterion over all of its entries.
    """

    modules: list[str] = field(default_factory=list)
    """Endings of the names of the matrices that select together, e.g. `["gate_proj", "up_proj", "down_proj"]`."""
    unit: Literal["channel", "head", "matrix"] = "channel"
    """What is chosen: one unit of each matrix, one head (a key/value head takes its query heads along), or the matrices
    as a whole."""
    density: float = 0.03
    """Share of the structures that is chosen."""
    scope: Literal["model", "block"] = "model"
    """Whether the structures of all blocks are ranked (or drawn) together, so that counts vary by block and may be zero
    (S2FT), or every block has its share."""

    def __post_init__(self) -> None:
        check_types(self)
        name = "StructureConfig"
        ok = isinstance(self.modules, (list, tuple)) and len(self.modules) > 0
        require(ok, name, "modules", self.modules, "a list of endings of module names, at least one")
        self.modules = list(self.modules)
        units = ("channel", "head", "matrix")
        require(self.unit in units, name, "unit", self.unit, f"one of {units}")
        require(0 < self.density <= 1, name, "density", self.density, "a share in (0, 1]")
        require(self.scope in ("model", "block"), name, "scope", self.scope, "'model' or 'block'")

    def covers(self, module_name: str) -> bool:
        """Whether the module of that name belongs to the structure."""
        return any(ends_with(module_name, ending) for ending in self.modules)


@dataclass
class FactorMaskConfig:
    r"""Masks on the entries of the low-rank factors; drawn from `seed` and the module's name, saved with the adapter.

    `parallel` (CapaBoost; Song et al., 2024): :math:`\Delta W = s \sum_{i=1}^{d} (B \odot M^B_i)(A \odot M^A_i)` with
    `d = copies` fixed random mask pairs of exactly `int(density * numel)` ones: rank up to `d * r` from one pair of
    factors. `stochastic` (MoSA; Zhang et al., 2023): the entries are split over `experts` at random, in equal parts; a
    training forward uses one expert of each factor where the rule `FactorExperts` trains them, and the merge of all is
    used everywhere else.
    """

    kind: Literal["parallel", "stochastic"] = "parallel"
    """`parallel` masks (CapaBoost) or a `stochastic` split (MoSA)."""
    copies: int = 2
    """`parallel`: mask pairs, at most 8 (CapaBoost: 2)."""
    density: float = 0.5
    """`parallel`: share of ones in every mask (CapaBoost: 0.5, so that copies * density = 1 keeps the cost)."""
    experts: int = 4
    """`stochastic`: parts of a factor (MoSA: 4)."""
    split: Literal["both", "B"] = "both"
    """`stochastic`: whether both factors are split, or `B` alone beside one dense, shared `A` (MoSA's hierarchical
    form)."""
    merge: Literal["add", "joint"] = "add"
    """`stochastic`: what evaluation uses: `add`, the mean of the experts (a trained entry of `B` divided by `experts`),
    or `joint`, each entry as its owner has it."""

    def __post_init__(self) -> None:
        check_types(self)
        name = "FactorMaskConfig"
        require(self.kind in ("parallel", "stochastic"), name, "kind", self.kind, "'parallel' or 'stochastic'")
        require(1 <= self.copies <= 8, name, "copies", self.copies, "an integer from 1 to 8")
        require(0 < self.density <= 1, name, "density", self.density, "a share in (0, 1]")
        require(1 <= self.experts <= 255, name, "experts", self.experts, "an integer from 1 to 255")
        require(self.split in ("both", "B"), name, "split", self.split, "'both' or 'B'")
        require(self.merge in ("add", "joint"), name, "merge", self.merge, "'add' or 'joint'")
