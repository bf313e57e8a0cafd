"""`merge_adapters`: adapter folders -> one adapter, a LoRA or a dense model, one weight at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..tuners.shared.combination import weighted_pieces
from ..tuners.shared.pieces import Entries, LowRank, Piece, Subgrid
from ..utils.parts import UnknownPart, load_part_by_name
from .deltas import Deltas, Scan, stack_deltas
from .forms import Form, Merged, MergeReport, check_form, write_merged
from .heads import merged_others
from .row import Merge, MergeMethod, Update, warn_of_supports
from .sources import AdapterSource, check_alike, read_source
from .table import get_merge

Importance = Mapping[str, Tensor]
"""Module -> importance of its weight's entries, `[out, in]`, or `[k]` of the entries that the adapter has there."""


@torch.no_grad()
def merge_adapters(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    method: str | MergeMethod | Mapping[str, Any] = "ties",
    *,
    weights: Sequence[float] | None = None,
    form: Form = "adapter",
    rank: int | None = None,
    importance: Sequence[Importance] | None = None,
    heads_from: str | None = None,
    base: str | None = None,
    show_progress: bool = True,
    **options: Any,
) -> MergeReport:
    r"""Merge adapters of one base, in folders, into a new one in the folder `out`.

    Adapters may be of any tuner of this package whose update is known without the base, and LoRAs of upstream's; of
    other targets, ranks and supports too. Only their files are read, and of the whole update of a model no more than
    one weight's exists at a time: where all adapters of a weight have supports, their union; else n dense fp32 matrices
    of it. Whatever acts entry by entry acts on the update :math:`\Delta W`, never on factors.

    Args:
        paths: two adapter folders or more.
        out: folder to write.
        method: a name of `merge_names()`, a `MergeMethod`, or a dict as files have it.
        weights: one for each adapter; None: what the method says, else ones.
        form: "adapter": a sparse_lora adapter; "lora": a LoRA of upstream's; "dense": the base in full precision with
            the update in it, rounded once, exactly.
        rank: of what is fitted by SVD: updates that no support holds, and in a LoRA all that have no exact rank. None:
            the sum of the adapters' ranks in the module. The error is measured and returned.
        importance: for methods that go by it, a mapping for each adapter: module -> `[out, in]`, or the numbers at the
            adapter's own entries; see `fisher_importance`.
        heads_from: whose heads and biases are taken where they differ: the folder of an adapter, or "mean".
        base: name of the base, where the adapters' configs have several for one; with `form="dense"` what is loaded.
        show_progress: whether a bar over modules shows on stderr.
        options: of the method, where it is given by name.

    Raises:
        ValueError: fewer than two folders, an adapter that cannot be merged from its file, adapters of other bases or
            shapes, heads that differ, weights, options or an importance that do not fit, or `out` that holds something
            else. Nothing is written then.
    """
    method = _method(method, options)
    if len(paths) < 2:
        raise ValueError(f"paths={[str(path) for path in paths]} is one adapter or none; give two or more to merge.")
    check_form(out, form, rank)
    weights = _weights(method, weights, len(paths))
    if importance is not None and len(importance) != len(paths):
        raise ValueError(f"importance has {len(importance)} mappings for {len(paths)} adapters; give one each.")
    method.check(len(paths), weights, importance is not None)
    sources = [read_source(path) for path in paths]
    shapes = check_alike(sources, base)
    others, about = merged_others(sources, weights, heads_from)
    about |= _about(sources, base)
    if isinstance(method, Merge) and method.coefficients(weights) is not None:
        _check_supports(method, sources, shapes)
    found = _results(method, sources, shapes, weights, importance)
    ranks = partial(_rank_of, sources)
    like = max(sources, key=lambda source: len(source.others))  # rows and labels are those of an adapter's heads
    merged = Merged(found, shapes, others, about, _notes(method, sources, weights), ranks, like.path)
    return write_merged(merged, out, form, rank, "Merging", show_progress)


def _method(method: Any, options: Mapping[str, Any]) -> MergeMethod:
    if isinstance(method, str):
        return get_merge(method, **options)
    if options:
        raise ValueError(f"options {sorted(options)} go with a method's name; set them in the method that is given.")
    found = load_part_by_name(MergeMethod, method, "method")
    if isinstance(found, UnknownPart):
        raise ValueError(f"method={found.data} cannot be used here: {found.reason}.")
    return found


def _weights(method: MergeMethod, given: Sequence[float] | None, count: int) -> list[float]:
    own = getattr(method, "weights", None)
    if own is not None:
        if given is not None:
            raise ValueError(f"weights={list(given)}: this method has its own, {list(own)}; leave them out.")
        return list(own)
    weights = [1.0] * count if given is None else [float(weight) for weight in given]
    if len(weights) != count:
        raise ValueError(f"weights={weights} has {len(weights)} numbers for {count} adapters; give one each.")
    if not all(torch.isfinite(torch.tensor(weights))):
        raise ValueError(f"weights={weights} are not all finite.")
    return weights


def _results(
    method: MergeMethod,
    sources: Sequence[AdapterSource],
    shapes: Mapping[str, tuple[int, int]],
    weights: Sequence[float],
    importance: Sequence[Importance] | None,
) -> Iterator[tuple[str, list[Piece] | Update]]:
    """Module after module: pieces that are exact, or an update."""
    if not isinstance(method, Merge):
        yield from method.results({name: [s.pieces(name) for s in sources] for name in shapes}, shapes, weights)
        return
    coefficients = method.coefficients(weights)
    if coefficients is not None and all(_adds_up(source) for source in sources):
        terms = {
            name: [(w, source.pieces(name)) for w, source in zip(coefficients, sources, strict=True)] for name in shapes
        }
        yield from weighted_pieces(terms).items()
        return

    def read(name: str) -> Deltas:
        deltas = stack_deltas(name, shapes[name], [source.pieces(name) for source in sources])
        return deltas if importance is None else _with_importance(deltas, importance)

    def own(name: str, adapter: int) -> Tensor:
        return stack_deltas(name, shapes[name], [sources[adapter].pieces(name)]).own(0)

    for update in method.updates(Scan(list(shapes), len(sources), read, own), weights):
        yield update.name, update


def _adds_up(source: AdapterSource) -> bool:
    def kinds(name: str) -> list[type]:
        return [Entries if isinstance(piece, Subgrid) else type(piece) for piece in source.pieces(name)]

    found = [kinds(name) for name in source.shapes]
    return all(set(one) <= {LowRank, Entries} and len(set(one)) == len(one) for one in found)


def _check_supports(method: Merge, sources: Sequence[AdapterSource], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Of a mean: refuse other supports or tell of them."""
    if not (method.same_support or method.normalise.part_type == "all_weights"):
        return
    for name in shapes:
        own = [[p for p in source.pieces(name) if isinstance(p, (Entries, Subgrid))] for source in sources]
        supports = [torch.cat([p.entries()[0] for p in found]) if found else torch.zeros(0) for found in own]
        odd = next((at for at, one in enumerate(supports) if not torch.equal(one.long(), supports[0].long())), None)
        if odd is None:
            continue
        if method.same_support:
            raise ValueError(
                f"same_support=True: '{sources[odd].path}' holds other entries of '{name}' than '{sources[0].path}', "
                "and a mean of other supports is denser than each. Train all from one support "
                "(save_support, load_support), or leave same_support out."
            )
        warn_of_supports(name)
        return


def _with_importance(deltas: Deltas, importance: Sequence[Importance]) -> Deltas:
    numbers = torch.zeros_like(deltas.values)
    for adapter, given in enumerate(importance):
        if deltas.name not in given:
            continue
        tensor, held = given[deltas.name].detach().to("cpu", numbers.dtype), deltas.held[adapter]
        if tuple(tensor.shape) == deltas.shape:
            tensor = tensor.reshape(-1) if deltas.positions is None else tensor.reshape(-1)[deltas.positions]
            numbers[adapter] = tensor * held
        elif tensor.ndim == 1 and tensor.numel() == int(held.sum()):
            numbers[adapter, held] = tensor
        else:
            raise ValueError(
                f"importance[{adapter}]['{deltas.name}'] has shape {tuple(tensor.shape)}; it takes "
                f"{deltas.shape}, or ({int(held.sum())},) for the entries that the adapter has."
            )
        if not bool(torch.isfinite(numbers[adapter]).all()) or bool((numbers[adapter] < 0).any()):
            raise ValueError(f"importance[{adapter}]['{deltas.name}'] has numbers below 0 or not finite.")
    return replace(deltas, importance=numbers)


def _rank_of(sources: Sequence[AdapterSource], name: str) -> int:
    """The sum of the adapters' ranks in a module; 16 for each piece that has none."""
    found = [piece for source in sources for piece in source.pieces(name)]
    return max(sum(16 if piece.exact_rank is None else piece.exact_rank for piece in found), 1)


def _about(sources: Sequence[AdapterSource], base: str | None) -> dict[str, Any]:
    """Options of the merged adapter that do not depend on what was merged."""
    configs = [source.config for source in sources]
    shared = {}
    for name in ("revision", "task_type", "auto_mapping"):
        values = [config.get(name) for config in configs if config.get(name) is not None]
        shared[name] = values[0] if values else None
    overrides = [config.get("base_overrides") or {} for config in configs]
    shared["base_overrides"] = next((one for one in overrides if one), {})
    shared["base_model_name_or_path"] = base or configs[0].get("base_model_name_or_path")
    return shared


def _notes(method: MergeMethod, sources: Sequence[AdapterSource], weights: Sequence[float]) -> str:
    shown = ", ".join(f"{weight:g} x {source.path.name}" for weight, source in zip(weights, sources, strict=True))
    return f"Merged of {shown}, by {method.to_dict()}."
