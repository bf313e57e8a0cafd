"""How a budget is split over the layers: pure functions from `{module name: UnitGrid}` to `{module name: units}`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .selection import Source, count_selected, find_cut, rereadable, stream_seed, tie_priority
from .support import UnitGrid


def uniform_counts(grids: dict[str, UnitGrid], density: float) -> dict[str, int]:
    """`floor(density * num_units)` of every layer.

    Raises:
        ValueError: no layers, `density` outside (0, 1], or a layer left without a unit; names it.
    """
    _total_entries(grids)
    return {name: grid.count_for_density(density, name) for name, grid in grids.items()}


def counts_from_total(grids: dict[str, UnitGrid], num_entries: int) -> dict[str, int]:
    r""":math:`N_l = \lfloor N\,n_l / \sum n \rfloor` entries for a layer of :math:`n_l`, in whole units (SpIEL; Ansell
    et al., 2024).

    In integers, so no layer loses an entry to float error. The sum is at most `num_entries`.

    Raises:
        ValueError: no layers, a budget below 1 or above all entries, or a layer left without a unit; names it.
    """
    total = _total_entries(grids)
    if not 1 <= num_entries <= total:
        raise ValueError(
            f"A budget of {num_entries} entries is not between 1 and the {total} entries of the targeted weights."
        )
    counts = {name: num_entries * g.rows * g.cols // total // g.unit_numel for name, g in grids.items()}
    for name, count in counts.items():
        if count == 0:
            grid = grids[name]
            need = -(-grid.unit_numel * total // (grid.rows * grid.cols))
            raise ValueError(
                f"A budget of {num_entries} entries leaves no {grid.unit_name} in '{name}' "
                f"({grid.rows}x{grid.cols}). Raise it to at least {need}, or leave the module out of target_modules."
            )
    return counts


def proportional_counts(grids: dict[str, UnitGrid], num_entries: int, seed: int = 0) -> dict[str, int]:
    r"""`num_entries` entries over all layers, in proportion to their sizes: exactly as many where all units have one
    size, which entries do.

    :math:`\lfloor N\,n_l / \sum n \rfloor` entries for a layer of :math:`n_l`, in whole units, and what is left goes,
    one unit a layer, to the largest remainders (a draw from `seed` and the layers' names on a tie). A layer may get
    none.

    Raises:
        ValueError: no layers, or a budget below one unit or above all entries.
    """
    total = _total_entries(grids)
    smallest = min(grid.unit_numel for grid in grids.values())
    if not smallest <= num_entries <= total:
        raise ValueError(
            f"A budget of {num_entries} entries is not between {smallest}, the smallest unit, and the {total} entries "
            "of the targeted weights."
        )
    # In integers: n_l / total as a float would lose entries of large models.
    shares = {name: divmod(num_entries * g.rows * g.cols, total * g.unit_numel) for name, g in grids.items()}
    counts = {name: count for name, (count, _) in shares.items()}
    remainders = {name: rest // grids[name].unit_numel for name, (_, rest) in shares.items()}
    _check_room(counts, grids)
    return _filled_up(counts, remainders, grids, num_entries, seed)


def counts_from_rank(grids: dict[str, UnitGrid], rank: int) -> dict[str, int]:
    r"""As many entries as a LoRA of that rank has in each layer, :math:`\min(r(m+n), mn)` (LIFT; Liu et al., 2025), in
    whole units and at least one."""
    _total_entries(grids)
    return {
        name: max(1, min(rank * (grid.rows + grid.cols), grid.rows * grid.cols) // grid.unit_numel)
        for name, grid in grids.items()
    }


def erdos_renyi_densities(grids: dict[str, UnitGrid], density: float) -> dict[str, float]:
    r"""Density :math:`d_l = \min(1, \varepsilon\,(m+n)/(mn))` of each layer (Mocanu et al., 2018; Evci et al., 2020).

    :math:`\varepsilon = (\sum_{sparse} d\,n_l - \sum_{dense} (1-d)\,n_l) / \sum_{sparse} n_l (m+n)/(mn)` makes the
    whole keep `density`. While the largest raw value among the sparse layers would pass 1, its layers become dense and
    :math:`\varepsilon` is solved again.

    Raises:
        ValueError: no layers, or `density` outside (0, 1].
    """
    _total_entries(grids)
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density={density} must be in (0, 1]: it is the fraction of entries that live.")
    raw = {name: (g.rows + g.cols) / (g.rows * g.cols) for name, g in grids.items()}
    size = {name: g.rows * g.cols for name, g in grids.items()}
    dense: set[str] = set()
    while len(dense) < len(grids):
        sparse = [name for name in grids if name not in dense]
        budget = sum(density * size[n] for n in sparse) - sum((1.0 - density) * size[n] for n in dense)
        epsilon = budget / sum(raw[n] * size[n] for n in sparse)
        peak = max(raw[n] for n in sparse)
        if epsilon * peak <= 1.0:
            return {n: 1.0 if n in dense else epsilon * raw[n] for n in grids}
        dense.update(n for n in sparse if raw[n] == peak)
    return dict.fromkeys(grids, 1.0)


def erdos_renyi_counts(grids: dict[str, UnitGrid], density: float, seed: int = 0) -> dict[str, int]:
    """Units of each layer at its `erdos_renyi_densities`, rounded so that the whole stays on budget.

    Counts are rounded down, then the entries left of `floor(density * all entries)` go, one unit a layer, to the
    layers with the largest remainders (a draw from `seed` and the layers' names on a tie: among layers of one shape
    the first would win otherwise). With units of one size the total is exact.

    Raises:
        ValueError: no layers, `density` outside (0, 1], or a layer left without a unit; names it.
    """
    densities = erdos_renyi_densities(grids, density)
    total = _total_entries(grids)
    # floor with the guard against float error that the grids have
    entries = UnitGrid(1, total).count_for_density(density)
    exact = {name: densities[name] * _units_of_weight(grid) for name, grid in grids.items()}
    _check_room({name: math.floor(value + 1e-9) for name, value in exact.items()}, grids)
    counts = {name: min(grids[name].num_units, math.floor(value + 1e-9)) for name, value in exact.items()}
    remainders = {name: exact[name] - counts[name] for name in grids}
    counts = _filled_up(counts, remainders, grids, entries, seed)
    for name, count in counts.items():
        if count == 0:
            grid = grids[name]
            raise ValueError(
                f"density={density} with Erdos-Renyi allocation gives '{name}' ({grid.rows}x{grid.cols}) a density of "
                f"{densities[name]:.1e}, which leaves no {grid.unit_name}. Raise density, use uniform allocation, "
                f"or leave the module out of target_modules."
            )
    return counts


def global_counts(
    score_fns: dict[str, Callable[[], Iterable[Tensor]]], grids: dict[str, UnitGrid], total_units: int, seed: int = 0
) -> dict[str, int]:
    """How many of the `total_units` best units of all layers together fall into each layer.

    One threshold for all scores, and one draw for ties over all layers, so the counts sum to `total_units` exactly and
    `top_units(score_fns[name], counts[name], seed=stream_seed(seed, name))` are the chosen units. `score_fns`: per
    layer a callable (or list of chunks, or tensor) as `top_units` takes it, all of one dtype. Memory: one chunk. Scores
    of units of different sizes are compared as they are.

    Raises:
        ValueError: names that differ between the two, a layer whose scores are not `num_units`, a budget below 1 or
            above all units, scores that are not finite, or a layer left without a unit; names it.
    """
    _total_entries(grids)
    if set(score_fns) != set(grids):
        odd = ", ".join(sorted(set(score_fns) ^ set(grids)))
        raise ValueError(f"score_fns and grids must name the same modules; only one of them has: {odd}.")
    available = sum(grid.num_units for grid in grids.values())
    if not 1 <= total_units <= available:
        raise ValueError(f"total_units={total_units} must be between 1 and the {available} units of all modules.")
    sources = [Source(name, rereadable(score_fns[name]), stream_seed(seed, name)) for name in grids]
    cut = find_cut(sources, total_units, finite=True)
    counts = {}
    for source in sources:
        counts[source.name], seen = count_selected(source, cut)
        if seen != grids[source.name].num_units:
            raise ValueError(f"'{source.name}' has {grids[source.name].num_units} units, but its scores number {seen}.")
    for name, count in counts.items():
        if count == 0:
            raise ValueError(
                f"total_units={total_units} spread over all modules by score leaves none in '{name}' "
                f"({grids[name].rows}x{grids[name].cols}). Raise density, use uniform allocation, or leave the module "
                f"out of target_modules."
            )
    return counts


def competition_counts(
    scores: dict[str, float], capacities: dict[str, int], budget: int, seed: int = 0
) -> dict[str, int]:
    r"""Parts of `budget` in proportion to scores, none above its capacity (SNELLA's outer competition; Shen et al.,
    2025): :math:`k_l = \min(N_l, B z_l)` with :math:`z = scores / \sum scores`, the surplus of full layers split
    again over the others in proportion to their scores, until it is used up.

    Layers that are left with a surplus and no score split it in proportion to their capacities; that is all of them
    where all scores are 0. Fractions are rounded down and what is left goes to the largest remainders (a draw from
    `seed` and the layers' names on a tie): the counts sum to `budget` exactly, and a layer whose score rises never gets
    less.

    Raises:
        ValueError: no layers, names that differ, a score that is negative or not finite, or a budget below 0 or above
            all capacities.
    """
    if not scores or set(scores) != set(capacities):
        odd = ", ".join(sorted(set(scores) ^ set(capacities))) or "there are no layers at all"
        raise ValueError(f"scores and capacities must name the same layers, at least one; odd ones: {odd}.")
    for name, score in scores.items():
        if not (math.isfinite(score) and score >= 0):
            raise ValueError(f"The score of '{name}' is {score}; scores must be finite and >= 0.")
    if not 0 <= budget <= sum(capacities.values()):
        raise ValueError(f"budget={budget} must be between 0 and the {sum(capacities.values())} entries of all layers.")
    exact = _proportional_parts(scores, capacities, budget)
    counts = {name: min(capacities[name], math.floor(value)) for name, value in exact.items()}
    spare = budget - sum(counts.values())
    order = _largest_first({name: exact[name] - counts[name] for name in scores}, seed)
    while spare > 0:  # once round as a rule; float error of huge budgets may leave more than one each
        for name in order:
            if spare > 0 and counts[name] < capacities[name]:
                counts[name] += 1
                spare -= 1
    for name in reversed(order):
        taken = min(max(-spare, 0), counts[name])
        counts[name] -= taken
        spare += taken
    return counts


def affordable(scores: Tensor, costs: Tensor, total: int, seed: int) -> Tensor:
    """Bool `[k]`: the units that `total` pays for, taken in the order of their scores; one that costs more than what is
    left is passed over. Ties are broken by a draw from `seed`.

    With `s` the sum of the costs of the units taken, `total - s` is at least 0 and less than the cost of each unit that
    is not taken: with units of one cost `c` the nearest multiple of `c` not above `total`.
    """
    drawn = tie_priority(seed, torch.arange(scores.numel())).argsort(descending=True)
    order = drawn[scores[drawn].argsort(descending=True, stable=True)]
    taken, left = torch.zeros(scores.numel(), dtype=torch.bool), total
    while order.numel():
        order = order[costs[order] <= left]
        fits = costs[order].cumsum(0) <= left
        taken[order[fits]] = True
        left -= int(costs[order[fits]].sum())
        order = order[~fits]
    return taken


def _proportional_parts(scores: dict[str, float], capacities: dict[str, int], budget: int) -> dict[str, float]:
    parts: dict[str, float] = {}
    open_layers, left = list(scores), budget
    while open_layers:
        weights = {name: scores[name] for name in open_layers}
        largest = max(weights.values())
        if largest == 0:
            weights, largest = {name: float(capacities[name]) for name in open_layers}, 1.0
        total = sum(weight / largest for weight in weights.values())  # scores near the float range must not overflow
        offers = {name: left * (weights[name] / largest / total if total else 0.0) for name in open_layers}
        full = [name for name in open_layers if offers[name] >= capacities[name]]
        if not full:
            return parts | offers
        for name in full:
            parts[name] = float(capacities[name])
            left -= capacities[name]
        open_layers = [name for name in open_layers if name not in parts]
    return parts


def _filled_up(
    counts: dict[str, int], remainders: dict[str, float], grids: dict[str, UnitGrid], entries: int, seed: int
) -> dict[str, int]:
    """`counts` and, while the budget of `entries` has room, one unit more for the layers with the largest
    remainders."""
    counts = dict(counts)
    spare = entries - sum(counts[name] * grid.unit_numel for name, grid in grids.items())
    for name in _largest_first(remainders, seed):
        if grids[name].unit_numel <= spare and counts[name] < grids[name].num_units:
            counts[name] += 1
            spare -= grids[name].unit_numel
    return counts


def _units_of_weight(grid: UnitGrid) -> float:
    """How many units have as many numbers as the weight: all that there are, but of a diagonal more."""
    return grid.rows * grid.cols / grid.unit_numel if grid.granularity == "diagonal" else grid.num_units


def _check_room(counts: dict[str, int], grids: dict[str, UnitGrid]) -> None:
    """Raises `ValueError` where a share of the budget is more than a diagonal has; others cover the weight."""
    for name, count in counts.items():
        grid = grids[name]
        if grid.granularity == "diagonal" and count > grid.num_units:
            raise ValueError(
                f"The budget gives '{name}' {count} {grid.unit_name}s of {grid.unit_numel} numbers, and its diagonal "
                f"has {grid.num_units}. Lower the budget, or diagonal_blocks."
            )


def _largest_first(remainders: dict[str, float], seed: int) -> list[str]:
    """Names by falling remainder; equal ones in an order that `seed` draws, whatever the order of the layers."""
    return sorted(remainders, key=lambda name: (-remainders[name], stream_seed(seed, "remainder", name)))


def _total_entries(grids: dict[str, UnitGrid]) -> int:
    if not grids:
        raise ValueError("There are no modules to split a budget over: target_modules matched none.")
    return sum(grid.rows * grid.cols for grid in grids.values())
