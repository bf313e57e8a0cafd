r"""The hard concrete distribution: gates between 0 and 1, of which both ends have a probability that trains (Louizos et
al., 2018).

The concrete variable :math:`\sigma((\log u - \log(1-u) + \log\alpha) / \beta)`, `u` uniform, is stretched from (0, 1)
to :math:`(\gamma, \zeta)`, and what lies outside [0, 1] becomes its nearest end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...sparsity import top_units

GAMMA, ZETA = -0.1, 1.1
r""":math:`\gamma` and :math:`\zeta`."""
BOUND = math.log(100)
r"""What :math:`|\log\alpha|` is kept below (CoFi's code)."""
EDGE = 1e-6
"""How far `u` stays from 0 and 1."""


def open_probability(log_alpha: Tensor, temperature: float) -> Tensor:
    r""":math:`P(z \ne 0) = \sigma(\log\alpha - \beta \log(-\gamma/\zeta))`, of the shape of `log_alpha`."""
    return torch.sigmoid(log_alpha - temperature * math.log(-GAMMA / ZETA))


def drawn_gates(log_alpha: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    r""":math:`z = \min(1, \max(0, \bar s))`, :math:`\bar s = \gamma + (\zeta - \gamma)\,\sigma((\log u - \log(1-u) +
    \log\alpha) / \beta)`."""
    concrete = torch.sigmoid((uniform.logit() + log_alpha) / temperature)
    return (GAMMA + (ZETA - GAMMA) * concrete).clamp(0, 1)


def uniform_noise(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """`u`, fp32 `[count]`, drawn on the CPU, so that every device has the same."""
    return torch.rand(count, generator=generator).clamp(EDGE, 1 - EDGE).to(device)


def likely_open(log_alpha: Tensor, temperature: float, seed: int) -> Tensor:
    """Which gates are open without noise, bool: as many as are expected to be, those of the highest `log_alpha`
    (`[count]`); equal ones are drawn for."""
    closed = round(len(log_alpha) - float(open_probability(log_alpha, temperature).sum()))
    is_open = torch.zeros(len(log_alpha), dtype=torch.bool, device=log_alpha.device)
    is_open[top_units([log_alpha], len(log_alpha) - closed, seed=seed).long()] = True
    return is_open
