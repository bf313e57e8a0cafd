"""ComPEFT: an adapter whose numbers are -a, 0 or a, in a file of Golomb codes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..sparsity import UnitGrid, pack_bits, unpack_bits
from ..sparsity.selection import Source, find_cut, selected, stream_seed
from ..tuners.shared.pieces import Entries, LowRank, Piece, Subgrid, summed_entries
from ..utils.option_types import PositiveFloat, Range, check_types
from .compact_files import Compact, about_of, as_folder, number, read_compact, scales_of, write_compact
from .forms import Form, Merged, MergeReport, check_form, write_merged
from .golomb import decode_positions, encode_positions
from .sources import AdapterSource, read_source

KIND = "compeft"
_MOST = 2**33
"""Numbers in the factors of one weight, at most."""


@dataclass(frozen=True)
class Ternary:
    r"""Options of ComPEFT (Yadav et al., 2023): of an adapter's numbers :math:`\tau` the fraction `density` of largest
    magnitude stay, as :math:`\alpha\,\sigma\,\mathrm{sign}(\tau)`, all others become 0; :math:`\sigma` is the standard
    deviation of all of them (n - 1 in the divisor).

    The numbers are those of the adapter's tensors: values of supports, A, and B with the gate in it."""

    density: Annotated[float, Range(above=0, below=1)] = 0.2
    """k as a fraction (the authors search 0.05 to 0.5)."""
    alpha: PositiveFloat = 1.0
    r""":math:`\alpha`, chosen by validation (the authors search 0.5 to 10)."""
    group: Literal["global", "factor", "tensor"] = "global"
    """What is ranked and scaled together: all numbers (the authors), all of one kind (values, A, B), or each tensor.
    A and B have other scales, so that together mostly one of them stays."""
    scale: Literal["deviation", "mean"] = "deviation"
    r"""`mean` takes the mean magnitude of what stays for :math:`\alpha\,\sigma` (sparse ternary compression)."""
    count: Literal["exact", "code"] = "exact"
    """`code` keeps one entry more and all that equal it, as the authors' code."""
    missing: Literal["absent", "zero"] = "absent"
    """Whether entries outside of a support are numbers too: zeros that count for `density` and the deviation, as in a
    dense vector."""
    seed: Annotated[int, Range(least=0)] = 0
    """Draws for equal magnitudes."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class CompactReport:
    """What `compress_adapter` or `binarise_adapter` wrote."""

    path: Path
    """The file."""
    file_bytes: int
    """Its size."""
    adapter_bytes: int
    """Size of the adapter's own file."""
    numbers: int
    """Numbers that were coded."""
    kept: int
    """How many of them are not 0 now."""
    bits: float
    """Bits of a number, of codes, signs and scales."""
    errors: dict[str, float]
    """Relative Frobenius error of each module's update."""


@dataclass(frozen=True)
class _Coded:
    """One tensor of an adapter as a vector."""

    module: str
    part: str
    """"entries", "A" or "B"."""
    values: Tensor
    """`[n]`."""
    positions: Tensor | None
    """Of a support; None: all entries of the tensor."""
    size: int
    """Entries of the tensor that it is a part of."""


@torch.no_grad()
def compress_adapter(
    path: str | os.PathLike, out: str | os.PathLike, *, show_progress: bool = True, **options: Any
) -> CompactReport:
    """Write the adapter in the folder `path` as a ComPEFT file `out`, whole or not at all; heads and biases come along
    as they are. `options` are those of `Ternary`.

    Positions are Golomb-coded gaps, signs one bit each: at a density of 5 % about 0.34 bits a number in all.

    Raises:
        ValueError: no adapter that can be read without its base, or an option out of range.
    """
    how = Ternary(**options)
    source = read_source(path)
    others, about = about_of(source)
    parts = [coded for name in sorted(source.shapes) for coded in _parts(source, name)]
    scales: dict[tuple[str, str], float] = {}
    kept: dict[tuple[str, str], Tensor] = {}
    for group in _groups(parts, how.group):
        scale, chosen = _ternary(group, how)
        for coded, units in zip(group, chosen, strict=True):
            scales[coded.module, coded.part], kept[coded.module, coded.part] = scale, units
    modules: dict[str, dict[str, Any]] = {name: {} for name in source.shapes}
    tensors: dict[str, Tensor] = {}
    for coded in parts:
        units, key = kept[coded.module, coded.part], f"{coded.module}:{coded.part}"
        positions = units if coded.positions is None else coded.positions[units]
        tensors[f"{key}:gaps"], tensors[f"{key}:low"] = encode_positions(positions, coded.size)
        tensors[f"{key}:signs"] = pack_bits(coded.values[units] > 0)
        tensors[f"{key}:scale"] = torch.tensor([scales[coded.module, coded.part]])
        modules[coded.module][coded.part] = {"count": units.numel(), "size": coded.size}
    for name in source.shapes:
        modules[name]["scaling"] = next((p.scale for p in source.pieces(name) if isinstance(p, LowRank)), 1.0)
    compact = Compact(KIND, dict(source.shapes), modules, tensors, others, about)
    size = write_compact(compact, out)
    errors = {}
    for name, pieces in tqdm(_restored(compact), total=len(modules), desc="Comparing", disable=not show_progress):
        errors[name] = relative_error(source.pieces(name), pieces, source.shapes[name])
    numbers = sum(coded.size if how.missing == "zero" else coded.values.numel() for coded in parts)
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / max(numbers, 1)
    return CompactReport(
        Path(out), size, (source.path / "adapter_model.safetensors").stat().st_size, numbers,
        sum(one.numel() for one in kept.values()), bits, errors,
    )  # fmt: skip


@torch.no_grad()
def decompress_adapter(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    form: Form = "adapter",
    rank: int | None = None,
    base: str | None = None,
    show_progress: bool = True,
) -> MergeReport:
    """Write the adapter in a ComPEFT file into the folder `out`: as an adapter of this package, as a LoRA or in a dense
    model (`merge_adapters` describes forms and `rank`).

    Raises:
        ValueError: no such file, one that is damaged, or `out` that holds something else. Nothing is written then.
    """
    check_form(out, form, rank)
    compact, pieces = read_ternary(path)
    about = {**compact.about, "base_model_name_or_path": base or compact.about["base_model_name_or_path"]}
    with as_folder(compact) as like:
        merged = Merged(
            pieces.items(), compact.shapes, compact.others, about, f"From a {KIND} file.", lambda name: 16, like
        )
        return write_merged(merged, out, form, rank, "Writing", show_progress)


def read_ternary(path: str | os.PathLike) -> tuple[Compact, dict[str, list[Piece]]]:
    """A ComPEFT file, found whole, and the pieces of each module.

    Raises:
        ValueError: no such file, or one that is damaged.
    """
    compact = read_compact(path, KIND)
    try:
        return compact, dict(_restored(compact))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged: {error}. Fetch or write it again.") from error


def _parts(source: AdapterSource, name: str) -> Iterator[_Coded]:
    rows, cols = source.shapes[name]
    pieces = source.pieces(name)
    supports = [piece for piece in pieces if isinstance(piece, (Entries, Subgrid))]
    odd = [piece for piece in pieces if not isinstance(piece, (Entries, Subgrid, LowRank))]
    factors = [piece for piece in pieces if isinstance(piece, LowRank)]
    if odd or len(factors) > 1:
        kind = type(odd[0]).__name__ if odd else "several low-rank halves"
        raise ValueError(
            f"'{name}' in '{source.path}' has {kind}, which this codec does not know; export it as a LoRA."
        )
    found = summed_entries(supports)
    if found is not None:
        yield _Coded(name, "entries", found[1].float(), found[0].long(), rows * cols)
    for piece in factors:
        B = piece.B.detach().float()
        B = B if piece.gate is None else B * piece.gate.detach().float()
        for part, factor in (("A", piece.A.detach().float()), ("B", B)):
            yield _Coded(name, part, factor.reshape(-1), None, factor.numel())


def _groups(parts: list[_Coded], kind: str) -> list[list[_Coded]]:
    keys: dict[str, Callable[[_Coded], Any]] = {
        "global": lambda coded: None,
        "factor": lambda coded: coded.part,
        "tensor": lambda coded: (coded.module, coded.part),
    }
    found: dict[Any, list[_Coded]] = {}
    for coded in parts:
        found.setdefault(keys[kind](coded), []).append(coded)
    return list(found.values())


def _ternary(group: list[_Coded], how: Ternary) -> tuple[float, list[Tensor]]:
    """The magnitude, and of each tensor which of its values stay."""
    stored = sum(coded.values.numel() for coded in group)
    total = sum(coded.size for coded in group) if how.missing == "zero" else stored
    sources = [
        Source(
            f"{coded.module}:{coded.part}",
            lambda coded=coded: iter((coded.values.abs(),)),
            stream_seed(how.seed, coded.module, coded.part),
        )
        for coded in group
    ]
    wanted = int(total * how.density)
    wanted = min(wanted + 1, stored) if how.count == "code" else min(max(wanted, 1), stored)
    cut = find_cut(sources, wanted, draw=how.count == "exact")
    chosen = [selected(source, cut).long() for source in sources]
    chosen = [units[coded.values[units] != 0] for units, coded in zip(chosen, group, strict=True)]
    if how.scale == "mean":
        kept = torch.cat([coded.values[units].double().abs() for units, coded in zip(chosen, group, strict=True)])
        return float(kept.mean()) * how.alpha if kept.numel() else 0.0, chosen
    sums = sum(float(coded.values.double().sum()) for coded in group)
    mean = sums / total
    squares = sum(float((coded.values.double() - mean).square().sum()) for coded in group)
    squares += (total - stored) * mean**2
    return how.alpha * math.sqrt(squares / max(total - 1, 1)), chosen


def _restored(compact: Compact) -> Iterator[tuple[str, list[Piece]]]:
    for name, described in compact.modules.items():
        rows, cols = compact.shapes[name]
        pieces: list[Piece] = []
        unknown = set(described) - {"entries", "A", "B", "scaling"}
        if unknown or ("A" in described) != ("B" in described):
            raise ValueError(f"'{name}' is described by {sorted(described)}")
        if "entries" in described:
            positions, values = _vector(compact, name, "entries", rows * cols)
            pieces += [Entries(positions, values, UnitGrid(rows, cols))] if positions.numel() else []
        if "A" in described:
            pieces += _factors(compact, name, described, rows, cols)
        yield name, pieces


def _factors(compact: Compact, name: str, described: dict[str, Any], rows: int, cols: int) -> list[Piece]:
    sizes = {part: number(described[part], "size") for part in ("A", "B")}
    rank, scaling = sizes["A"] // cols, described.get("scaling")
    if sizes != {"A": rank * cols, "B": rank * rows}:
        raise ValueError(f"the factors of '{name}' have {sizes} numbers, of a weight of {rows}x{cols}")
    if type(scaling) not in (int, float) or not math.isfinite(scaling):
        raise ValueError(f"'{name}' has scaling={scaling!r}")
    (at_A, values_A), (at_B, values_B) = (_vector(compact, name, part, sizes[part]) for part in ("A", "B"))
    values_B = values_B * scaling
    if not bool(torch.isfinite(values_B).all()):
        raise ValueError(f"'{name}' has scaling={scaling!r}, with which its numbers are not finite")
    # Only components of which both halves are there: what is built is not more than the codes have entries.
    row_A, column_B = at_A // cols, at_B % max(rank, 1)
    alive = torch.unique(row_A)
    alive = alive[torch.isin(alive, column_B)]
    if not alive.numel():
        return []
    if alive.numel() * (rows + cols) > _MOST:
        raise ValueError(f"'{name}' says that it has {alive.numel()} components of {rows}x{cols}")
    A, B = torch.zeros(alive.numel(), cols), torch.zeros(rows, alive.numel())
    inside_A, inside_B = torch.isin(row_A, alive), torch.isin(column_B, alive)
    A[torch.searchsorted(alive, row_A[inside_A]), at_A[inside_A] % cols] = values_A[inside_A]
    B[at_B[inside_B] // rank, torch.searchsorted(alive, column_B[inside_B])] = values_B[inside_B]
    return [LowRank(B, A)]


def _vector(compact: Compact, name: str, part: str, size: int) -> tuple[Tensor, Tensor]:
    described, key = compact.modules[name][part], f"{name}:{part}"
    if number(described, "size") != size:
        raise ValueError(f"'{key}' is described as a part of {described['size']} entries, and the weight has {size}")
    count = number(described, "count", size)
    positions = decode_positions(compact.tensor(f"{key}:gaps"), compact.tensor(f"{key}:low"), count, size, key)
    signs = compact.tensor(f"{key}:signs")
    if signs.dtype != torch.uint8 or tuple(signs.shape) != (-(-count // 8),):
        raise ValueError(f"'{key}:signs' has shape {tuple(signs.shape)} where {count} signs are due")
    scale = scales_of(compact.tensor(f"{key}:scale"), 1, f"{key}:scale")
    return positions, torch.where(unpack_bits(signs, count), scale, -scale)


def relative_error(before: list[Piece], after: list[Piece], shape: tuple[int, int]) -> float:
    r""":math:`\|\Delta W - \Delta W'\|_F / \|\Delta W\|_F` of one weight; 0 where both are 0. Of supports their union
    is looked at, else a dense matrix."""
    if all(isinstance(piece, (Entries, Subgrid)) for piece in (*before, *after)):
        one = summed_entries(before)
        if one is None:
            return 0.0
        two = summed_entries([*before, *[_negative(piece) for piece in after]])
        return float(two[1].norm() / one[1].norm()) if one[1].any() else 0.0
    dense, other = torch.zeros(shape), torch.zeros(shape)
    for target, pieces in ((dense, before), (other, after)):
        for piece in pieces:
            piece.add_(target)
    return float((dense - other).norm() / dense.norm()) if dense.any() else 0.0


def _negative(piece: Entries) -> Entries:
    return Entries(piece.units, -piece.values, piece.grid)
