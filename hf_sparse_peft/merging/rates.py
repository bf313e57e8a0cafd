"""What DAREx-q divides the kept values by: found by a measure, or by the inputs of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def find_q(
    measure: Callable[[float], float],
    rate: float,
    *,
    low: float | None = None,
    high: float = 0.95,
    step: float = 0.05,
    patience: int = 3,
    digits: int = 2,
) -> float:
    """The q of the smallest measure on a grid from `low`, then around the best on a grid of a tenth of the step
    (DAREx-q; Deng et al., 2025).

    Args:
        measure: a number for a q, the lower the better: the loss on labelled data, or how far the outputs on unlabelled
            data are from those of the adapter without dropping, as the mean over a few seeds of the draw.
        rate: p, the probability of being dropped; q begins at 1 - p, which is DARE.
        low: the first q; None: 1 - `rate`.
        high: the last q.
        step: of the first grid.
        patience: values in turn without improvement after which a grid ends.
        digits: grids; each is ten times finer than the one before.

    Raises:
        ValueError: an option out of range, or a measure that is no number.
    """
    low = 1 - rate if low is None else low
    if not 0 < low < high <= 1:
        raise ValueError(f"low={low}, high={high}: 0 < low < high <= 1 is due.")
    if not 0 < step <= high - low or patience < 1 or digits < 1:
        raise ValueError(f"step={step}, patience={patience}, digits={digits}: a grid of at least two values is due.")
    best, least = low, None
    begin, end = low, high
    for _ in range(digits):
        waited, count = 0, round((end - begin) / step) + 1
        for number in range(count):
            q = min(begin + number * step, 1.0)
            found = float(measure(q))
            if found != found:
                raise ValueError(f"measure({q:g}) is {found}, and values of q are compared by it.")
            if least is None or found < least:
                best, least, waited = q, found, 0
            else:
                waited += 1
                if waited > patience:
                    break
        begin, end, step = max(best - step, low), min(best + step, high), step / 10
    return best


@torch.no_grad()
def analytic_q(
    delta: Tensor, inputs: Tensor, rate: float, *, h: float = 0.45, gamma: float = 0.95, passed: float = 0.8
) -> float:
    r"""q of one weight from its inputs, without a measure (DAREx-q, per layer; Deng et al., 2025).

    For each output i with :math:`c_j = \Delta W_{ij} x_j` the first q in {1 - p, ..., 0.998}, in steps of 0.001, after
    which this does not fall:

    .. math::
        \Big| h\,\big(1 - \tfrac{1-p}{q}\big) \sum_j c_j + \frac{h^2\,\Phi(p) \sum_j c_j^2}{4 q^2} +
        \log\frac{2}{1-\gamma} \Big|, \qquad \Phi(p) = \frac{1 - 2p}{\log((1-p)/p)}

    The scan ends when the share `passed` of the outputs are past their best, and the mean over outputs is returned.
    Computed in fp64; :math:`\Phi(1/2) = 1/2`, its limit.

    Args:
        delta: `[out, in]`.
        inputs: `[tokens, in]`; the mean input is taken.
        rate: p.
        h: of the bound (the authors: 0.45; by task 0.27 to 1.01).
        gamma: its confidence.
        passed: share of outputs at which the scan ends.

    Raises:
        ValueError: shapes that do not fit, or a number out of range.
    """
    if delta.ndim != 2 or inputs.ndim != 2 or delta.shape[1] != inputs.shape[1]:
        raise ValueError(
            f"delta has shape {tuple(delta.shape)} and inputs {tuple(inputs.shape)}; they take [out, in] and "
            "[tokens, in]."
        )
    if not 0 < rate < 1 or not 0 < gamma < 1 or not 0 < passed <= 1 or not h > 0:
        raise ValueError(f"rate={rate}, gamma={gamma}, passed={passed} lie in (0, 1), and h={h} above 0.")
    c = delta.double() * inputs.double().mean(0)
    total, squares = c.sum(1), c.square().sum(1)
    phi = 0.5 if rate == 0.5 else (1 - 2 * rate) / math.log((1 - rate) / rate)
    best = torch.full_like(total, 1 - rate)
    least = torch.full_like(total, torch.inf)
    scanned = torch.ones_like(total, dtype=torch.bool)
    first = round((1 - rate) * 1000)
    for thousandths in range(first, 999):
        q = thousandths / 1000
        bound = h * (1 - (1 - rate) / q) * total + h**2 * phi * squares / (4 * q**2) + math.log(2 / (1 - gamma))
        better = scanned & (bound.abs() < least)
        best, least = torch.where(better, q, best), torch.where(better, bound.abs(), least)
        scanned = better  # an output is past its best at the first step that does not improve
        if float((~scanned).double().mean()) >= passed:
            break
    return float(best.mean())
