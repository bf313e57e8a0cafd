"""Bases of which single entries of B are trained: those that a first run made largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...sparsity import UnitGrid, codes_length, decode_support, encode_support
from ...sparsity.ranking import GlobalRanking
from ...utils.module_names import block_of
from ...utils.option_types import NonNegativeInt, Range
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from ..shared.file_check import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from .bases import Bases, Site
from .factors import RandomA
from .names import B_ENTRIES, B_VALUES, FIXED_A, PLACES, TRAINED_B

_GROUPS = {
    "model": lambda name: "",
    "type": lambda name: name.rpartition(".")[2],
    "block": block_of,
    "matrix": lambda name: name,
}


@register_part("masked_b")
@dataclass(frozen=True)
class MaskedB(RandomA):
    r"""`RandomA` of which B is trained where a first run with `RandomA` made it largest, and 0 elsewhere:
    :math:`M_{ij} = 1` for the k largest :math:`|B_{ij}|` of a group of modules, k = (1 - sparsity) of its entries
    (LoRI-S; Zhang et al., 2025; official code juzhengz/LoRI).

    B starts at 0 again, with the first run's A. Only its entries under the mask exist: k values, and a byte of
    place for each. Ties are drawn for; the official code takes all entries at the threshold.

    Raises:
        ValueError: at injection, where `mask_from` is no first run of such an adapter: other modules, ranks or seed,
            or a B that never trained.
    """

    mask_from: str | None = None
    """Folder of the first run's adapter. Read at injection, and in no file afterwards."""
    sparsity: Annotated[float, Range(above=0, below=1)] = 0.9
    """Share of B's entries that stay 0."""
    scope: Literal["model", "type", "block", "matrix"] = "model"
    """Which entries compete: of all modules, of those with one last name ("q_proj"), of a transformer block, of each
    matrix alone."""
    rounding: Literal["round", "int"] = "round"
    """How (1 - sparsity) * N becomes a number: `int` is the official code's, 99 of 1000 at sparsity 0.9."""
    entries: dict[str, NonNegativeInt] = field(default_factory=dict)
    """Module name -> trained entries of its B. Written at injection."""

    def specs(self, site: Site) -> list[TensorSpec]:
        """The k values, the units of kind "basis", and their coded places; neither where k is 0."""
        count, grid = self.entries.get(site.name, 0), _grid(site)

        def check(codes: Tensor, key: str) -> None:
            if decode_support(codes, grid, count, key).numel() != count:
                raise ValueError(f"'{key}' has fewer entries than the {count} that have values.")

        if not count:
            return []
        codes = (codes_length(grid, count),)
        return [
            TensorSpec(B_VALUES, (count,), space="basis"),
            TensorSpec(B_ENTRIES, codes, torch.uint8, "saved", space="basis", axis=None, check=check),
        ]

    def planned(self, sites: Mapping[str, Site]) -> tuple[Bases, dict[str, Tensor]]:
        """Itself with `entries`, and the coded mask of each module."""
        if self.entries:
            return self, {}  # a file, or the adapter that it is a copy of, is about to bring the mask
        if self.mask_from is None:
            raise ValueError(
                "MaskedB.mask_from=None: it trains the entries of B that a first run made largest. Train an adapter "
                "with bases=RandomA() first, methods.get('lori'), and name the folder that it was saved to."
            )
        trained = _first_run(Path(self.mask_from), sites)
        found = largest_entries(trained, self.sparsity, self.scope, self.rounding, next(iter(sites.values())).seed)
        codes = {name: encode_support(units, _grid(sites[name]), units.numel()) for name, units in found.items()}
        counts = {name: units.numel() for name, units in found.items()}
        return replace(self, mask_from=None, entries=counts), {
            name: {B_ENTRIES: one} for name, one in codes.items() if counts[name]
        }

    def decode(self, codes: Tensor, site: Site) -> Tensor:
        """Flat places in B, sorted, `[k]`.

        Raises:
            ValueError: the buffer is damaged, or was never written.
        """
        return decode_support(codes, _grid(site), self.entries[site.name], f"{site.name}.{B_ENTRIES}")

    def factors(self, tensors: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor]:
        """B, with gradients in its values, and A."""
        A = tensors[FIXED_A]
        values = tensors.get(B_VALUES)
        B = (A if values is None else values).new_zeros(site.rows * site.r)
        B = B if values is None else B.index_add(0, tensors[PLACES], values)
        return B.view(site.rows, site.r), A


def _grid(site: Site) -> UnitGrid:
    return UnitGrid(site.rows, site.r, "entry")


def largest_entries(
    trained: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "model",
    rounding: str = "round",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Flat places of the largest entries of the matrices `trained` by absolute value, sorted, by name: of those of a
    group (`MaskedB.scope`) together, (1 - `sparsity`) of them. A matrix may be left with none.

    Raises:
        ValueError: a group keeps no entry, or has none that is not 0.
    """
    groups: dict[str, list[str]] = {}
    for name in trained:
        groups.setdefault(_GROUPS[scope](name), []).append(name)
    found: dict[str, Tensor] = {}
    for group, names in groups.items():
        total = sum(trained[name].numel() for name in names)
        kept = (round if rounding == "round" else int)((1 - sparsity) * total)
        where = f"of the {total} entries of B in '{group or names[0]}'" + ("" if group else ", ...")
        if not kept:
            raise ValueError(f"sparsity={sparsity} keeps none {where}. Lower it, or take scope='model'.")
        if not any(bool(trained[name].any()) for name in names):
            raise ValueError(f"None {where} is other than 0: the first run has not trained them. Train it first.")
        ranking = GlobalRanking(kept, seed, least=0)
        ranking.add({name: lambda B=trained[name]: iter((B.float().abs().reshape(-1),)) for name in names})
        found |= ranking.units()
    return {name: found[name] for name in trained}


def _first_run(folder: Path, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """B of each module of `sites`, as the adapter in `folder` has it.

    Raises:
        ValueError: it is no whole adapter with `RandomA`, or one of other modules, ranks or seed.
    """
    if not folder.is_dir():
        raise ValueError(f"mask_from='{folder}' is no folder. Name the one that the first run's adapter was saved to.")
    file = read_adapter(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
    start, bases = f"mask_from='{folder}' holds", getattr(file.config, "bases", None)
    if type(bases) is not RandomA or file.config.core is not None:
        kind = file.config.peft_type.value if bases is None else f"bases={bases} and core={file.config.core}"
        raise ValueError(
            f"{start} an adapter with {kind}, and a mask is made from one with bases=RandomA() and core=None, as "
            "methods.get('lori') makes it."
        )
    seed = next(iter(sites.values())).seed
    if file.config.seed != seed:
        raise ValueError(
            f"{start} an adapter of seed={file.config.seed}, and this one has seed={seed}, which draws another A: a "
            f"mask of B means nothing for it. Set seed={file.config.seed}."
        )
    odd = sorted(set(file.modules) ^ set(sites))
    if odd:
        raise ValueError(
            f"{start} an adapter of other modules than this one: {odd[:3]} ({len(odd)}). Set target_modules to the "
            "first run's."
        )
    trained = {name: file.modules[name][TRAINED_B] for name in sites}
    for name, site in sites.items():
        if tuple(trained[name].shape) != (site.rows, site.r):
            raise ValueError(
                f"{start} a B of {trained[name].shape[0]}x{trained[name].shape[1]} for '{name}', and here it is "
                f"{site.rows}x{site.r}. Set r to the first run's, on the same base."
            )
    return trained
