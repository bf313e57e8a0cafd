"""The one way a support changes: new units in, values and optimizer state along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainingArguments

from ..optim import adam_seeds, innermost, move_optimizer_state, move_rows
from .base import AdaptedLayer


@torch.no_grad()
def replace_units(
    part: AdaptedLayer,
    new_units: torch.Tensor,
    optimizer: Any,
    seeds: dict[str, torch.Tensor] | None = None,
    restarted: torch.Tensor | None = None,
) -> int:
    """Make `new_units` (sorted, distinct, at most the capacity) the support of `part`; returns how many entered.

    Units that stay keep value and optimizer state bit for bit, wherever they now stand; units that enter start with
    value 0 and zero state, or with `seeds`: `units` (sorted), `grad_mean`, `grad_sq_mean` and `age`, from which the
    moments of those that entered are set (`optim.adam_seeds`). Units in `restarted` keep their value where they have
    one and start with zero optimizer state all the same.
    """
    old_units = part.units
    place = torch.searchsorted(new_units, old_units).clamp_max(max(new_units.numel() - 1, 0))
    kept = new_units[place] == old_units if new_units.numel() else torch.zeros_like(old_units, dtype=torch.bool)
    kept_old, kept_new = kept.nonzero().squeeze(1), place[kept]
    entered = torch.ones(new_units.numel(), dtype=torch.bool, device=new_units.device)
    entered[kept_new] = False
    at = entered.nonzero().squeeze(1)
    goes_on = slice(None) if restarted is None else ~torch.isin(new_units[kept_new], restarted)
    seeded = _seeds_for(part, new_units[at], optimizer, seeds) if seeds is not None and at.numel() else None
    with _whole_or_not(part, old_units) as moving:
        move_optimizer_state(
            optimizer,
            part.values,
            kept_old[goes_on],
            kept_new[goes_on],
            seeded=seeded,
            seeded_new=at if seeded is not None else None,
        )
        for tensor in moving:
            move_rows(tensor, kept_old, kept_new)
        part.layer.write_support(part.adapter, new_units)
    return int(at.numel())


@contextmanager
def _whole_or_not(part: AdaptedLayer, units: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The tensors with one row a unit; values and support go back where an exception, Ctrl-C included, comes between:
    values under the units of others would be another adapter."""
    state = [getattr(part.layer, name) for name in part.layer.unit_state_names]
    tensors = [part.values.data, *(held[part.adapter] for held in state if part.adapter in held)]
    before = [tensor.clone() for tensor in tensors]
    try:
        yield tensors
    except BaseException:
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        part.layer.write_support(part.adapter, units)
        raise


def leave_update_out(parts: list[AdaptedLayer]) -> None:
    """Let the coming `optimizer.step()` pass by the supports of `parts`: values without a gradient are not touched, by
    momentum and weight decay neither. Everything else that trains takes its step."""
    for part in parts:
        part.values.grad = None


def refuse_unskippable(args: TrainingArguments, option: str, parts: list[AdaptedLayer], optimizer: Any) -> None:
    """Raises `ValueError` where the update of `parts` cannot be left out."""
    if not getattr(args, "fp16", False) or args.max_grad_norm:
        return
    left_out = {id(part.values) for part in parts}
    groups = innermost(optimizer).param_groups if optimizer is not None else []
    if all(id(parameter) in left_out for group in groups for parameter in group["params"]):
        raise ValueError(
            f"{option}.skip_step leaves out an update, which fp16's gradient scaler refuses without clipping where "
            "nothing else trains. Set max_grad_norm above 0, train in bf16, or set skip_step=False."
        )


def _seeds_for(
    part: AdaptedLayer, entered: torch.Tensor, optimizer: Any, seeds: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    optimizer = innermost(optimizer)
    group = next((group for group in optimizer.param_groups if any(p is part.values for p in group["params"])), None)
    state = optimizer.state.get(part.values, {})
    if group is None or "betas" not in group or not {"exp_avg", "exp_avg_sq"} <= set(state):
        return None  # not an Adam: its state has no means to seed
    where = torch.searchsorted(seeds["units"], entered)
    return adam_seeds(seeds["grad_mean"][where], seeds["grad_sq_mean"][where], seeds["age"], group["betas"])
