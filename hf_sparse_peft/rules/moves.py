"""The one way a unit space changes: new units in; values, optimizer state and the state of rules along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..optim import adam_seeds, innermost, move_optimizer_state, move_rows
from .space import Follower, UnitSpace


class MoveResult(NamedTuple):
    """What a move did."""

    entered: int
    """Units that live now and did not before."""
    left: int
    """Units that lived before and do not now."""


@torch.no_grad()
def move_units(
    space: UnitSpace,
    new_units: Tensor,
    optimizer: Any,
    *,
    seeds: dict[str, Tensor] | None = None,
    restarted: Tensor | None = None,
) -> MoveResult:
    """Make `new_units` (sorted, distinct, at most the capacity) the living units of `space`.

    Along each follower's axis, units that stay keep value and optimizer state bit for bit, wherever they now stand;
    units that enter start with value 0 and zero state, or with `seeds`: `units` (sorted), `grad_mean`, `grad_sq_mean`
    and `age`, from which the moments of those that entered are set (`optim.adam_seeds`; spaces with one parameter).
    Units in `restarted` keep their value where they have one and start with zero optimizer state all the same.

    Where every unit has its own slice (`space.packed` is False), units only begin and cease to count: values and
    optimizer state stay. An exception, Ctrl-C included, leaves values and units as they were.

    Raises:
        ValueError: optimizer state that cannot be edited unit by unit (`optim.move_optimizer_state`).
    """
    old_units = space.alive()
    if not space.packed:
        space.write(new_units)
        stayed = int(torch.isin(new_units, old_units.to(new_units.device)).sum())
        return MoveResult(new_units.numel() - stayed, old_units.numel() - stayed)
    place = torch.searchsorted(new_units, old_units).clamp_max(max(new_units.numel() - 1, 0))
    stays = new_units[place] == old_units if new_units.numel() else torch.zeros_like(old_units, dtype=torch.bool)
    kept_old, kept_new = stays.nonzero().squeeze(1), place[stays]
    entered = torch.ones(new_units.numel(), dtype=torch.bool, device=new_units.device)
    entered[kept_new] = False
    at = entered.nonzero().squeeze(1)
    goes_on = slice(None) if restarted is None else ~torch.isin(new_units[kept_new], restarted)
    followers = space.followers()
    with _whole_or_not(space, old_units, followers):
        for follower in followers:
            if isinstance(follower.tensor, nn.Parameter):
                parameter, seeded = follower.tensor, None
                if seeds is not None and at.numel():
                    seeded = _seeds_for(parameter, new_units[at], optimizer, seeds)
                move_optimizer_state(
                    optimizer,
                    parameter,
                    kept_old[goes_on],
                    kept_new[goes_on],
                    seeded=seeded,
                    seeded_new=at if seeded is not None else None,
                    axis=follower.axis,
                )
        for follower in followers:
            move_rows(follower.tensor.data.movedim(follower.axis, 0), kept_old, kept_new, follower.fill)
        space.write(new_units)
    return MoveResult(int(at.numel()), int(old_units.numel() - kept_old.numel()))


@torch.no_grad()
def restart_units(parameter: nn.Parameter, units: Tensor, optimizer: Any, axis: int = 0) -> None:
    """Let the optimizer forget units (bool, one for each along `axis`) of a parameter: their state is zero, and an age
    of their own (`AgedAdamW`) begins anew; values and everybody else's state stay. A parameter that was frozen before
    the optimizer was built has none.
    """
    groups = innermost(optimizer).param_groups
    if not parameter.requires_grad and not any(one is parameter for group in groups for one in group["params"]):
        return
    others = (~units).nonzero().squeeze(1)
    move_optimizer_state(optimizer, parameter, others, others, axis=axis)


@contextmanager
def _whole_or_not(space: UnitSpace, units: Tensor, followers: list[Follower]) -> Iterator[None]:
    """Values under the units of others would be another adapter."""
    before = [follower.tensor.detach().clone() for follower in followers]
    try:
        yield
    except BaseException:
        for follower, old in zip(followers, before, strict=True):
            follower.tensor.data.copy_(old)
        space.write(units)
        raise


def _seeds_for(
    parameter: nn.Parameter, entered: Tensor, optimizer: Any, seeds: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    optimizer = innermost(optimizer)
    group = next((group for group in optimizer.param_groups if any(p is parameter for p in group["params"])), None)
    state = optimizer.state.get(parameter, {})
    if group is None or "betas" not in group or not {"exp_avg", "exp_avg_sq"} <= set(state):
        return None  # not an Adam: its state has no means to seed
    where = torch.searchsorted(seeds["units"], entered)
    return adam_seeds(seeds["grad_mean"][where], seeds["grad_sq_mean"][where], seeds["age"], group["betas"])
