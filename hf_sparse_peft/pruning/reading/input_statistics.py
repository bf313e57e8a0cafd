"""What calibration data says about a linear layer's inputs."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ...ops import autocast_off

SQUARES, MEANS, HESSIAN = "squares", "means", "hessian"


class InputStatistics:
    """Sums over the tokens that reach one linear layer, fp32. Tokens that an attention mask hides do not count.

    `N` below is the number of sequences, as Wanda and DSnoT count.

    Args:
        cols: the layer's inputs.
        kinds: of "squares" (`[cols]`), "means" (two times `[cols]`) and "hessian" (`[cols, cols]`).
        device: of the sums.
    """

    def __init__(self, cols: int, kinds: Collection[str], device: torch.device | str) -> None:
        self.sequences = self.tokens = 0
        self._squares = torch.zeros(cols, device=device) if SQUARES in kinds else None
        self._sums = torch.zeros(cols, device=device) if MEANS in kinds else None
        self._spread = torch.zeros(cols, device=device) if MEANS in kinds else None
        self._hessian = torch.zeros(cols, cols, device=device) if HESSIAN in kinds else None

    def add(self, inputs: Tensor, mask: Tensor | None) -> None:
        """Count one batch in.

        Args:
            inputs: `[sequences, tokens, cols]`, or flattened `[sequences * tokens, cols]`, any float dtype.
            mask: `[sequences, tokens]`, true for tokens that count; None: all.
        """
        if inputs.dim() == 2 and mask is not None and mask.numel() == inputs.shape[0]:
            inputs = inputs.view(*mask.shape, inputs.shape[1])
        inputs = inputs.reshape(-1, *inputs.shape[-2:]) if inputs.dim() > 2 else inputs[None]
        fits = mask is not None and mask.shape == inputs.shape[:2]
        for at, sequence in enumerate(inputs):
            x = sequence[mask[at].bool().to(sequence.device)] if fits else sequence
            if not len(x):
                continue
            x = x.float()
            self.sequences += 1
            self.tokens += len(x)
            if self._squares is not None:
                self._squares += x.square().sum(0)
            if self._sums is not None:
                self._sums += x.sum(0)
                self._spread += len(x) * x.var(0, correction=0)
            if self._hessian is not None:
                with autocast_off(x.device.type):
                    self._hessian += x.T @ x

    def scale(self, factor: float) -> None:
        """Multiply every sum by `factor`; the counts of sequences and tokens stay."""
        for sums in (self._squares, self._sums, self._spread, self._hessian):
            if sums is not None:
                sums *= factor

    def is_finite(self) -> bool:
        """Whether every sum is finite."""
        sums = (self._squares, self._sums, self._spread, self._hessian)
        return all(bool(found.isfinite().all()) for found in sums if found is not None)

    def mean_square(self) -> Tensor:
        r""":math:`a_j = \frac1N \sum_t x_{tj}^2`, `[cols]`."""
        return self._squares / self.sequences

    def mean(self) -> Tensor:
        r""":math:`m_j = \frac1N \sum_t x_{tj}`, `[cols]`: the tokens of a sequence times their mean."""
        return self._sums / self.sequences

    def variance(self) -> Tensor:
        """Mean over tokens of each sequence's own variance (biased), `[cols]`; shifts between sequences are left out,
        as in DSnoT's code."""
        return self._spread / self.tokens

    def hessian(self) -> Tensor:
        r""":math:`\frac2N \sum_t x_t x_t^\top`, a fresh `[cols, cols]`."""
        return self._hessian * (2 / self.sequences)
