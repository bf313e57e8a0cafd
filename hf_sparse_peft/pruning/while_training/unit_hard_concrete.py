"""Hard-concrete gates over the units of masks, and how many weights they are expected to keep (CoFi)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...sparsity import stream_seed
from ..units.structure import CHANNELS
from ..units.unit_masks import MaskedUnits
from .hard_concrete import BOUND, drawn_gates, likely_open, open_probability, uniform_noise


@dataclass(frozen=True)
class Noise:
    """`u` of one step for one mask."""

    units: Tensor
    part: Tensor


@dataclass(eq=False)
class UnitGates:
    r"""A gate on each unit of a mask, and one on the whole attention or feed-forward part that they make up: unit j's
    factor is :math:`z_{part} z_j`.

    A unit that was masked before stays so, whatever its gate; it counts as gone.
    """

    space: MaskedUnits
    entries: int
    """Weights that a unit owns."""
    alive: Tensor
    """Bool `[units]`: which units there were at the start."""
    units: Tensor
    r""":math:`\log\alpha`, fp32 `[units]`, a leaf."""
    part: Tensor
    r""":math:`\log\alpha` of the part, fp32 `[1]`, a leaf."""

    @classmethod
    def fresh(cls, space: MaskedUnits, entries: int, drop_rate: float, seed: int) -> UnitGates:
        r"""Gates of channels start around :math:`\log((1 - d)/d)`, with a standard deviation of 0.01; those of heads
        and of parts at the bound, almost surely open."""
        factors = space.layer.factors.detach()
        units = torch.full((space.size,), BOUND)
        if space.kind == CHANNELS:
            generator = torch.Generator().manual_seed(stream_seed(seed, "gates", space.name, space.kind))
            start = math.log(1 - drop_rate) - math.log(drop_rate)
            units = torch.randn(space.size, generator=generator) * 0.01 + start
        leaves = [t.clamp(-BOUND, BOUND).to(factors.device).requires_grad_() for t in (units, torch.full((1,), BOUND))]
        return cls(space, entries, factors != 0, *leaves)

    @property
    def key(self) -> str:
        """Names it in a checkpoint."""
        return f"{self.space.name}.{self.space.kind}"

    @property
    def leaves(self) -> list[Tensor]:
        """What trains."""
        return [self.units, self.part]

    def noise(self, seed: int, step: int) -> Noise:
        """Of one step: the same on every rank and in a resumed run."""
        generator = torch.Generator().manual_seed(stream_seed(seed, "hard concrete", self.key, step))
        device = self.units.device
        return Noise(uniform_noise(len(self.units), generator, device), uniform_noise(1, generator, device))

    def factors(self, noise: Noise, temperature: float) -> Tensor:
        """Of the units, as drawn by `noise`, fp32 `[units]`."""
        part = drawn_gates(self.part, noise.part, temperature)
        return part * drawn_gates(self.units, noise.units, temperature) * self.alive

    def expected_entries(self, temperature: float) -> Tensor:
        r"""Weights that are expected to stay: :math:`n P(z_{part} \ne 0) \sum_j P(z_j \ne 0)`, `n` weights a unit."""
        units = open_probability(self.units, temperature) * self.alive
        return self.entries * open_probability(self.part, temperature).squeeze(0) * units.sum()

    @torch.no_grad()
    def likely(self, temperature: float, seed: int) -> Tensor:
        """Factors without noise, 0 or 1, fp32 `[units]`: none where the part is closed more likely than not, else as
        many units as are expected to be open, those with the highest gates."""
        found = torch.zeros_like(self.units)
        if float(open_probability(self.part, temperature)) >= 0.5:
            living = self.alive.nonzero().flatten()
            seed = stream_seed(seed, "likely gates", self.key)
            found[living] = likely_open(self.units.detach()[living], temperature, seed).float()
        return found

    @torch.no_grad()
    def bound(self) -> None:
        r"""Keep :math:`|\log\alpha| \le \log 100`."""
        for leaf in self.leaves:
            leaf.clamp_(-BOUND, BOUND)


def expected_sparsity(gates: list[UnitGates], temperature: float) -> Tensor:
    r""":math:`\bar s`, a scalar: the fraction of the weights of all parts that is expected to be gone, :math:`1 -
    \frac1N \sum n P(z_{part} \ne 0) \sum_j P(z_j \ne 0)`; a unit counts only as far as its part lives (CoFi; Xia et
    al., 2022)."""
    total = sum(one.entries * one.space.size for one in gates)
    device = gates[0].units.device
    return 1 - sum(one.expected_entries(temperature).to(device) for one in gates) / total
