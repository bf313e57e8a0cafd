"""Moving optimizer state together with the units of a parameter.

    before   unit 0  1  2  3        kept_old = [0, 2, 3]
             m    a  b  c  d        kept_new = [1, 0, 2]
    after    m    c  a  d  0        unit 3 is new: it starts from nothing, or from `seeded`

This is the only place in the package that writes into an optimizer. Everything is rewritten in place with constant
shapes, so checkpoints, `load_state_dict` and references held by fused or captured steps stay valid.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..utils.tensors import whole, write_whole
from .optimizer_kinds import innermost, locate, refuse_partitioned, unit_views

_BNB_SEED_NAMES = {"adam": {"exp_avg": "state1", "exp_avg_sq": "state2"}, "lion": {"exp_avg": "state1"}}


def move_rows(tensor: Tensor, kept_old: Tensor, kept_new: Tensor, fill: float = 0) -> None:
    r"""Permute rows in place: `tensor[kept_new] = old tensor[kept_old]`, every other row becomes `fill`.

    Correct for any overlap of the two ranges, since the kept rows are gathered before the first one is written; the
    gathered copy (`len(kept_old)` rows) is the only memory it takes.

    Args:
        tensor: `[k, ...]`, any dtype; a parameter that requires grad is fine (no graph is recorded). One that ranks
            hold a shard of each (`fully_shard`) is gathered, and each keeps its part: all must call it together.
        kept_old, kept_new: `[n]`, integer, `n <= k`, each without repetition.
        fill: what the rows that are not in `kept_new` receive.

    Raises:
        ValueError: a tensor without rows, or indices of unequal length, out of range or repeated.
    """
    if tensor.dim() == 0:
        raise ValueError("tensor is a scalar and has no rows to move. Pass a tensor with its units along dim 0.")
    old, new = _check_kept(kept_old, kept_new, tensor.shape[0])
    full = whole(tensor)
    _move(full, old, new, fill)
    if full is not tensor:
        write_whole(tensor, full)


def move_optimizer_state(
    optimizer: Any,
    parameter: Tensor,
    kept_old: Tensor,
    kept_new: Tensor,
    *,
    seeded: dict[str, Tensor] | None = None,
    seeded_new: Tensor | None = None,
    axis: int = 0,
) -> None:
    r"""Let the state of `parameter` follow its units: :math:`s'_{new_i} = s_{old_i}`, and 0 wherever nothing arrives.

    Moved bit for bit: every state tensor of the parameter's shape (`exp_avg`, `exp_avg_sq`, `max_exp_avg_sq`,
    `momentum_buffer`, schedule-free's `z`, bitsandbytes' 32-bit `state1`/`state2`, ...), a per-unit `step` (`[k]` or
    `[k, 1, ...]`), and the row half of a factored second moment. Untouched: scalars, the column half of a factored
    matrix, and names the optimizer lists in `state_not_per_unit` (`SparseSM3`). The values of `parameter` itself are
    the caller's: `move_rows(parameter, kept_old, kept_new)`. A no-op as long as the parameter has no state.

    What a new unit meets depends on the optimizer. `AgedAdamW` restarts its bias correction. With a scalar `step`
    (torch's AdamW, Trainer's default) the zeroed moments are no longer corrected, and the first update of a new unit
    is :math:`(1-\beta_1)/\sqrt{1-\beta_2}` of the learning rate (3.2 with the usual betas) instead of 1.

    Args:
        optimizer: any torch-like optimizer, also inside Accelerate's wrapper.
        parameter: `[k]` or `[k, ...]`, one of the optimizer's parameters.
        kept_old, kept_new: `[n]`, integer: the unit that was at `kept_old[i]` is now at `kept_new[i]`.
        seeded: start values of new units, `{"exp_avg": [s, ...], "exp_avg_sq": [s, ...], "step": [s]}`, cast to the
            dtype of the state (see `adam_seeds`). `step` is left out, with one warning, if the optimizer has only a
            scalar one.
        seeded_new: `[s]`, integer, positions of the seeds; none of them in `kept_new`.
        axis: the dimension of `parameter` that its units lie along; 1 for the columns of `B` `[out, r]`.

    Raises:
        ValueError: bad indices or seeds; a parameter the optimizer does not hold; state that cannot be edited unit by
            unit (8-bit blocks, DeepSpeed, ZeRO, FSDP1 flat parameters, tensor subclasses but for shards of
            `fully_shard`); a state tensor whose shape says nothing about units. Raised before anything is written.

    Source: SpIEL's handling of moments (Ansell et al., 2024).
    """
    optimizer = innermost(optimizer)
    where = locate(optimizer, parameter)
    refuse_partitioned(parameter, where)
    if parameter.dim() == 0:
        raise ValueError(f"{where} is a scalar and has no units. Only parameters with an axis of units can move.")
    units = parameter.shape[axis]
    old, new = _check_kept(kept_old, kept_new, units)
    if (seeded is None) != (seeded_new is None):
        raise ValueError(f"seeded and seeded_new go together: got only one of them for {where}. Pass both or neither.")

    state = optimizer.state.get(parameter)  # indexing the defaultdict would create an empty entry
    if not state:
        if seeded:
            _warn_once("Seeds were dropped: the optimizer has no state before its first step. Move after a step.")
        return
    views = unit_views(optimizer, parameter, state, where, axis)
    seeds, at = _check_seeds(optimizer, views, seeded, seeded_new, new, units, where)

    for name, view in views.items():
        full = whole(view)
        _move(full, old, new, 0)
        if name in seeds:
            value = seeds[name].to(device=view.device, dtype=view.dtype)
            with torch.no_grad():
                full.index_copy_(0, at.to(view.device), value)
        if full is not view:
            write_whole(view, full)


def restart_optimizer_state(optimizer: Any, parameter: Tensor) -> None:
    """Forget everything the optimizer knows of `parameter`, steps included: it starts at the next step as if new.

    Raises:
        ValueError: a parameter the optimizer does not hold, or state partitioned by DeepSpeed, ZeRO or FSDP.
    """
    optimizer = innermost(optimizer)
    refuse_partitioned(parameter, locate(optimizer, parameter))
    optimizer.state.pop(parameter, None)


def adam_seeds(
    grad_mean: Tensor, grad_sq_mean: Tensor, age: float | Tensor, betas: tuple[float, float] = (0.9, 0.999)
) -> dict[str, Tensor]:
    r"""SpIEL's start values: :math:`m = \bar g (1-\beta_1^a),\; v = \overline{g^2} (1-\beta_2^a),\; age = a`.

    Adam's bias correction divides the brackets out again, so a grown unit continues as if its `a` candidate gradients
    had been ordinary steps. Under gradient accumulation the means are those of whole optimizer steps: the sum of the
    micro-gradients over the number of steps, not over the number of micro-batches.

    Args:
        grad_mean, grad_sq_mean: `[s]` or `[s, ...]`, any float dtype, computed in fp32.
        age: optimizer steps behind the means, a number or `[s]`.

    Returns: `{"exp_avg": [s, ...], "exp_avg_sq": [s, ...], "step": [s]}` in fp32, for
        `move_optimizer_state(seeded=...)`.

    Raises:
        ValueError: means of different shapes, or an age below 0.

    Source: Ansell et al., 2024.
    """
    if grad_mean.shape != grad_sq_mean.shape or grad_mean.dim() == 0:
        raise ValueError(
            f"grad_mean {tuple(grad_mean.shape)} and grad_sq_mean {tuple(grad_sq_mean.shape)} must be [s, ...] both."
        )
    s = grad_mean.shape[0]
    ages = torch.as_tensor(age, dtype=torch.float32, device=grad_mean.device).expand(s).clone()
    if bool((ages < 0).any()):
        raise ValueError(f"age={ages.min().item()} is negative. Pass the number of optimizer steps behind the means.")
    wide = ages.view(s, *[1] * (grad_mean.dim() - 1))
    return {
        "exp_avg": grad_mean.float() * bias_correction(betas[0], wide),
        "exp_avg_sq": grad_sq_mean.float() * bias_correction(betas[1], wide),
        "step": ages,
    }


def bias_correction(beta: float, age: Tensor) -> Tensor:
    r""":math:`1-\beta^{age}` as :math:`-\mathrm{expm1}(age \ln\beta)`. `age` fp32, any shape; returns the same shape.

    The direct difference loses 10 bits in fp32 at `beta=0.999, age=1`.
    """
    if beta == 0:
        return (age > 0).to(age.dtype)
    return torch.expm1(age * math.log(beta)).neg_()


def _move(tensor: Tensor, old: Tensor, new: Tensor, fill: float) -> None:
    with torch.no_grad():
        kept = tensor.index_select(0, old.to(tensor.device))
        tensor.fill_(fill)
        tensor.index_copy_(0, new.to(tensor.device), kept)


def _check_positions(name: str, positions: Tensor, units: int) -> Tensor:
    if not isinstance(positions, Tensor) or positions.dim() != 1 or positions.dtype not in (torch.int32, torch.int64):
        got = (
            f"{positions.dtype} {tuple(positions.shape)}" if isinstance(positions, Tensor) else type(positions).__name__
        )
        raise ValueError(f"{name} must be a 1-D int64 tensor of unit positions, got {got}.")
    positions = positions.long()
    if positions.numel():
        low, high = (int(x) for x in positions.aminmax())
        if low < 0 or high >= units:
            raise ValueError(
                f"{name} holds {low if low < 0 else high}, outside 0..{units - 1}: there are {units} units."
            )
        hit = torch.zeros(units, dtype=torch.bool, device=positions.device).index_fill_(0, positions, True)
        if int(hit.sum()) != positions.numel():
            raise ValueError(f"{name} names a unit twice. Every unit may leave or arrive at one position only.")
    return positions


def _check_kept(kept_old: Tensor, kept_new: Tensor, units: int) -> tuple[Tensor, Tensor]:
    old, new = _check_positions("kept_old", kept_old, units), _check_positions("kept_new", kept_new, units)
    if old.numel() != new.numel():
        raise ValueError(
            f"kept_old has {old.numel()} positions and kept_new has {new.numel()}. They are pairs: pass equal lengths."
        )
    return old, new


def _check_seeds(
    optimizer: Any,
    views: dict[str, Tensor],
    seeded: dict[str, Tensor] | None,
    seeded_new: Tensor | None,
    new: Tensor,
    units: int,
    where: str,
) -> tuple[dict[str, Tensor], Tensor]:
    if seeded is None or seeded_new is None:
        return {}, new
    at = _check_positions("seeded_new", seeded_new, units)
    taken = torch.zeros(units, dtype=torch.bool, device=new.device).index_fill_(0, new, True)
    if bool(taken[at.to(new.device)].any()):
        raise ValueError(f"seeded_new and kept_new of {where} share a position. A unit is either kept or new.")
    alias = _BNB_SEED_NAMES.get(getattr(optimizer, "optimizer_name", ""), {}) if "state1" in views else {}
    seeds: dict[str, Tensor] = {}
    for given, seed in seeded.items():
        name = alias.get(given, given)
        if name not in views:
            if given == "step":
                _warn_once(
                    f"{type(optimizer).__name__} has one scalar step: the ages of seeded units are dropped and their "
                    "moments are not bias-corrected from here on. Use AgedAdamW with per_unit_age=True for ages per "
                    "unit."
                )
                continue
            raise ValueError(
                f"seeded names '{given}', but {type(optimizer).__name__} keeps {sorted(views)} for {where}. Seed "
                "those only."
            )
        want = (at.numel(), *views[name].shape[1:])
        if given == "step" and seed.dim() == 1:
            seed = seed.view(-1, *[1] * (len(want) - 1))
        if tuple(seed.shape) != want:
            raise ValueError(f"seeded['{given}'] has shape {tuple(seed.shape)}; {where} takes {want}.")
        seeds[name] = seed
    return seeds, at


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
