"""Weight normalisation by rows: a matrix as magnitudes and directions, from the matrix itself."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class RowNorms:
    r"""A matrix :math:`W = g \odot V / \|V\|`, :math:`g` `[m]`, :math:`V` `[m, n]`, :math:`\|V\|` by rows."""

    magnitude: Tensor
    unit: Tensor
    r""":math:`V / \|V\|`."""
    norm: Tensor
    r""":math:`\|V\|`, `[m]`."""

    def gradients(self, gradient: Tensor, radial: bool) -> tuple[Tensor, Tensor]:
        r"""Those of :math:`g` and :math:`V`, of the matrix' own :math:`G`:

        .. math::
            \partial g_i = \langle G_i, \hat V_i \rangle, \qquad
            \partial V_i = \frac{g_i}{\|V_i\|}\,(G_i - \partial g_i \hat V_i)

        Args:
            gradient: G.
            radial: whether to leave the part along :math:`V` in, as the released class does.
        """
        along = (gradient * self.unit).sum(1)
        across = gradient if radial else gradient - along[:, None] * self.unit
        return along, across * (self.magnitude / self.norm)[:, None]


def split(state: dict[str, Any], weight: Tensor, keeps_direction: bool) -> RowNorms | None:
    """The magnitudes and directions of `weight`; None for one that has a row of zeros at the start, which has none.

    `magnitude` and `norm` `[m]` are kept in the state, and V follows from them and the weight, so that no copy of it
    is kept; with `keeps_direction` V itself is (`direction`), and its norm is the magnitude at every step, as in the
    released class.
    """
    if "unnormalised" in state:
        return None
    if "magnitude" not in state and "direction" not in state:
        norm = weight.norm(dim=1)
        if not weight.is_meta and bool((norm == 0).any()):
            state["unnormalised"] = torch.ones(())
            warnings.warn(
                f"weight_norm=True: a matrix of shape {tuple(weight.shape)} has rows of zeros, as LoRA's B at the "
                "start, and no direction there: it is trained as it is. Name others by target_modules, or take an "
                "adapter that starts otherwise.",
                stacklevel=2,
            )
            return None
        if keeps_direction:
            state["direction"] = weight.clone()
        else:
            state["magnitude"], state["norm"] = norm, norm.clone()
        for name in ("magnitude_avg", "magnitude_avg_sq"):
            state[name] = torch.zeros_like(norm)
    if keeps_direction:
        norm = state["direction"].norm(dim=1)
        return RowNorms(norm, state["direction"] / norm[:, None], norm)
    magnitude = state["magnitude"]
    return RowNorms(magnitude, weight / weight.norm(dim=1, keepdim=True) * magnitude.sign()[:, None], state["norm"])


def joined(state: dict[str, Any], magnitude: Tensor, direction: Tensor) -> Tensor:
    """The matrix of these; keeps what `split` needs. A magnitude of 0, which has no direction, becomes a tiny one."""
    norm = direction.norm(dim=1)
    if "direction" in state:
        state["direction"].copy_(direction)
    else:
        tiny = torch.finfo(magnitude.dtype).tiny ** 0.5
        magnitude = torch.where(magnitude.abs() < tiny, tiny, magnitude)
        state["magnitude"].copy_(magnitude)
        state["norm"].copy_(norm)
    return direction * (magnitude / norm)[:, None]
