"""`GroupEnvelope`: at most k groups are to be left, by the convex envelope of that constraint (WGSEF)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..sparsity import envelope_prox
from ..utils.option_types import Decay, PositiveFloat, Range
from ..utils.parts import register_part
from .evidence import with_gradient
from .groups import groups_held, scale_groups
from .mask_sparsity import switch_of
from .moves import move_units
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("group_envelope")
@dataclass(frozen=True)
class GroupEnvelope(Rule):
    r"""Proximal gradient with the envelope of :math:`\tfrac12\|w\|^2` on vectors with at most k groups that are not 0
    (WGSEF; Refael et al., 2022): after every update

    .. math:: w_i \leftarrow w_i\,\frac{u_i}{u_i + \lambda}, \quad u_i = \mathrm{clip}\big(\tfrac{\|w_i\|}{\tau} -
        \lambda, 0, 1\big), \quad \sum_i u_i = k

    with :math:`\lambda` the weight times the learning rate. Groups with :math:`\|w_i\| \leq \lambda\tau` are 0 and die:
    units of a support for good, components of low rank, whose group is their gate, until a step takes the gate beyond
    the threshold again. Where k groups or fewer are left, all that happens is the decay :math:`w / (1 + \lambda)`.
    `weighted` counts a group by its trained numbers, so that k is a share of these; the paper's own weights and step
    rule were not available.

    Layers without a gradient, or held still, and steps that fp16's scaler skips change nothing; a support keeps its
    largest unit. Of each kind of units k is a share of its own.
    """

    weight: PositiveFloat = 1.0
    r""":math:`\lambda` over the learning rate; the default is this project's."""
    kept: Annotated[float, Range(above=0, below=1)] = 0.5
    """k, as a fraction of the groups that the adapter starts with (with `weighted`, of their numbers)."""
    start: Decay = 0.1
    """Where it begins, as a fraction of the run: at the start of most adapters all groups are 0."""
    scope: Literal["layer", "global"] = "global"
    """Whether k is for each layer, or groups of all layers share it."""
    weighted: bool = False
    r""":math:`\sum_i d_i u_i = k` and :math:`u_i = \mathrm{clip}(\|w_i\| / (\tau\sqrt{d_i}) - \lambda, 0, 1)`."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"support", "rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "values"})
    needs: ClassVar[frozenset[str]] = frozenset({"gate"})
    undecayed: ClassVar[frozenset[str]] = frozenset({"gate"})
    gate: ClassVar[str] = "normal"

    def begin(self, run: Run) -> None:
        """Nothing is to be done yet."""
        run.memory.fallen = {}

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        """The proximal step."""
        run.memory.fallen = {}
        if run.step_skipped or run.step < round(self.start * run.total_steps):
            return
        judged = [space for space in with_gradient(run.spaces()) if run.lr(switch_of(space))]
        together = [[space] for space in judged]
        if self.scope == "global":
            together = [[s for s in judged if s.kind == kind] for kind in sorted({s.kind for s in judged})]
        for spaces in together:
            self._step(run, spaces)

    def _step(self, run: Run, spaces: list[UnitSpace]) -> None:
        places = [self._places(space) for space in spaces]
        norms = [_norms(space, at) for space, at in zip(spaces, places, strict=True)]
        numbers = [one.numel() for one in norms]
        device = norms[0].device
        steps = [torch.full((n,), self.weight * run.lr(switch_of(s))) for n, s in zip(numbers, spaces, strict=True)]
        cost = [float(space.unit_numel) if self.weighted else 1.0 for space in spaces]
        k = self.kept * sum(c * space.initial for c, space in zip(cost, spaces, strict=True))
        sizes = torch.cat([torch.full((n,), c) for n, c in zip(numbers, cost, strict=True)])
        every = torch.cat([one.to(device) for one in norms])
        factors = envelope_prox(every, k, torch.cat(steps).to(device), sizes.to(device) if self.weighted else None)
        for space, at, mine in zip(spaces, places, factors.split(numbers), strict=True):
            self._shrink(run, space, at, mine.to(at.device))

    @staticmethod
    def _places(space: UnitSpace) -> Tensor:
        """Of components all gates count: one that is 0 may have been moved by the update, and lives again."""
        parameter = switch_of(space)
        return torch.arange(space.count if space.packed else space.capacity, device=parameter.device)

    def _shrink(self, run: Run, space: UnitSpace, at: Tensor, factors: Tensor) -> None:
        parameter = switch_of(space)
        if space.packed:
            if not factors.any():
                factors[_norms(space, at).argmax()] = 1.0
            factors[groups_held(run, space)] = 1.0
            scale_groups(space, factors, [parameter])
            if bool((factors == 0).any()):
                run.memory.fallen[space] = factors == 0
            return
        held = run.updates.held_numbers(parameter)
        if held is not None:
            factors[held.flatten()] = 1.0
        parameter.mul_(factors.to(parameter.dtype).view_as(parameter))
        space.write(parameter.flatten().nonzero().squeeze(1))

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Units of supports that are 0 leave."""
        for space, gone in run.memory.fallen.items():
            move_units(space, space.alive()[~gone.to(space.alive().device)], run.optimizer)
        run.memory.fallen = {}
        run.record_change(alive=sum(space.count for space in run.spaces(training=False)))


def _norms(space: UnitSpace, at: Tensor) -> Tensor:
    numbers = switch_of(space).detach()[at].float()
    return torch.linalg.vector_norm(numbers.unsqueeze(1).flatten(1), dim=1)
