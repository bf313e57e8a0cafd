"""Units as groups of numbers: what the rules read and write that pull whole groups to 0."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .run import Run
from .space import UnitSpace


def places(space: UnitSpace) -> Tensor:
    """`[a]`: where the living units lie along their axis of each parameter."""
    device = space.parameters()[0].device
    return torch.arange(space.count, device=device) if space.packed else space.alive().long().to(device)


def members(space: UnitSpace, gradient: bool = False) -> Iterator[Tensor]:
    """Copies of what living groups have of each parameter, or of its gradient, `[a, n]` fp32."""
    at = places(space)
    for parameter, axis in space.parameter_axes():
        tensor = parameter.grad if gradient else parameter.detach()
        if tensor is None:
            tensor = torch.zeros_like(parameter)
        yield tensor.movedim(axis, 0)[at].float().unsqueeze(1).flatten(1)


def group_norms(space: UnitSpace) -> Tensor:
    """`[a]` fp32: the Euclidean norm of each living group over all of its parameters."""
    return sum(part.square().sum(1) for part in members(space)).sqrt()


@torch.no_grad()
def scale_groups(space: UnitSpace, factors: Tensor, parameters: list[nn.Parameter] | None = None) -> None:
    """Multiply living groups by `factors` `[a]`, in all parameters or in these; a factor of 1 keeps every bit."""
    at, moved = places(space), (factors != 1).nonzero().squeeze(1)
    for parameter, axis in space.parameter_axes():
        if parameters is None or any(parameter is one for one in parameters):
            slices, wide = parameter.data.movedim(axis, 0), [-1, *[1] * (parameter.dim() - 1)]
            slices[at[moved]] *= factors[moved].to(parameter.dtype).view(wide)


def groups_held(run: Run, space: UnitSpace) -> Tensor:
    """Bool `[a]`: living groups of which another rule holds some number still."""
    at = places(space)
    held = torch.zeros_like(at, dtype=torch.bool)
    for parameter, axis in space.parameter_axes():
        numbers = run.updates.held_numbers(parameter)
        if numbers is not None:
            held |= numbers.movedim(axis, 0)[at].unsqueeze(1).flatten(1).any(1)
    return held


@torch.no_grad()
def keep_dead_at_zero(space: UnitSpace) -> None:
    """Zero all numbers of units that do not live, which momentum and weight decay go on moving."""
    if space.packed:
        return
    dead = torch.ones(space.capacity, dtype=torch.bool)
    dead[space.alive().long().cpu()] = False
    dead = dead.nonzero().squeeze(1)
    for parameter, axis in space.parameter_axes() if dead.numel() else ():
        parameter.data.movedim(axis, 0)[dead.to(parameter.device)] = 0
