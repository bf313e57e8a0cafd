"""What each kind of optimizer keeps of a parameter, and whether its units can be told apart there."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..utils.tensors import is_sharded

# Factored second moments (transformers and torch Adafactor, CAME, the dense half of SparseSM3). The row factor runs
# over dim 0; the column factor of a matrix averages over the units and belongs to none of them.
_ROW_FACTORS = frozenset({"exp_avg_sq_row", "exp_avg_res_row", "row_var", "sm3_dim0"})
_COLUMN_FACTORS = frozenset({"exp_avg_sq_col", "exp_avg_res_col", "col_var"})


def innermost(optimizer: Any) -> Any:
    """The innermost optimizer; Accelerate and others keep it under `.optimizer`.

    Raises:
        ValueError: DeepSpeed's or ZeRO's, whose state cannot be edited.
    """
    while True:
        kind = type(optimizer)
        if kind.__module__.split(".")[0] == "deepspeed" or kind.__name__ == "DeepSpeedOptimizerWrapper":
            raise ValueError(
                f"{kind.__name__} keeps its state in fused partitions that belong to several parameters at once, so "
                "single units cannot move. Train moving supports with DDP or on one device, or freeze the support "
                "under DeepSpeed."
            )
        if kind.__name__ == "ZeroRedundancyOptimizer":
            raise ValueError(
                "ZeroRedundancyOptimizer partitions state over ranks, so most ranks cannot move it. Use the plain "
                "optimizer: sparse parameters have little state to save."
            )
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or not hasattr(inner, "param_groups"):
            return optimizer
        optimizer = inner


def locate(optimizer: Any, parameter: Tensor) -> str:
    """Name and place of `parameter` in the optimizer, for messages.

    Raises:
        ValueError: the optimizer does not hold it.
    """
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if p is parameter:
                name = f" '{group['param_names'][i]}'" if group.get("param_names") else ""
                return f"parameter{name} (group {g}, position {i}, shape {tuple(p.shape)})"
    raise ValueError(
        f"{type(optimizer).__name__} does not hold this parameter of shape {tuple(parameter.shape)}. Either the "
        "parameter was frozen or replaced after the optimizer was built (change values in place instead), or the "
        "optimizer holds flattened parameters (FSDP1: wrap with FSDP2 and leave adapters out, or use DDP) or updates "
        "during backward (LOMO, layer-wise optimizers: use another `optim`)."
    )


def refuse_partitioned(parameter: Tensor, where: str) -> None:
    """Refuse parameters that several ranks hold together.

    Raises:
        ValueError: a parameter of DeepSpeed ZeRO or FSDP1.
    """
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        raise ValueError(
            f"{where} is partitioned by DeepSpeed ZeRO, and so is its state. Train moving supports with DDP or on one "
            "device, or freeze the support under DeepSpeed."
        )
    if getattr(parameter, "_fsdp_flattened", False) or type(parameter).__name__ == "FlatParameter":
        raise ValueError(
            f"{where} is a part of an FSDP1 flat parameter: unit positions do not line up with its shards. Use DDP, "
            "or FSDP2 with the adapter's parameters passed as `ignored_params`."
        )


def unit_views(
    optimizer: Any, parameter: Tensor, state: dict[str, Any], where: str, axis: int = 0
) -> dict[str, Tensor]:
    """State name -> a view with the parameter's units, which lie along its `axis`, along dim 0, for all state that
    follows units."""
    kind, shape, k = type(optimizer).__name__, tuple(parameter.shape), parameter.shape[axis]
    free = frozenset(getattr(optimizer, "state_not_per_unit", ()))
    if (projects := getattr(optimizer, "projects", None)) is not None and projects(parameter):
        raise ValueError(
            f"{where} cannot move its units in {kind}: its moments are those of a subspace of the whole gradient. "
            "Leave it out by the optimizer's target_modules, or take AgedAdamW."
        )
    _refuse_quantised(parameter, state, where, kind)
    views: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in free:
            continue
        if isinstance(value, (dict, list, tuple)) and any(isinstance(t, Tensor) for t in _leaves(value)):
            raise ValueError(
                f"State '{name}' of {where} in {kind} is a {type(value).__name__} of tensors, and nothing says how "
                "its units lie. Use an optimizer with one state tensor per parameter, such as AdamW."
            )
        if not isinstance(value, Tensor):
            continue
        got = tuple(value.shape)
        if len(shape) > 1 and name in _ROW_FACTORS | _COLUMN_FACTORS:
            view = _factor_view(name, value, shape, axis)
            if view is not None:
                views[name] = view
        elif got == shape:
            views[name] = value.movedim(axis, 0)
        elif name == "step" and (got == (k,) or (axis == 0 and got == (k, *[1] * (len(shape) - 1)))):
            views[name] = value
        elif name == "state1" and got == (2, *shape):  # bitsandbytes' AdEMAMix stacks its two first moments
            views[name] = value.movedim(1 + axis, 0)
        elif value.numel() > 1:
            raise ValueError(
                f"State '{name}' of {where} in {kind} has shape {got}, which is neither the parameter's nor a known "
                "factor of it, so it is unknown which part belongs to which unit. Use an optimizer with per-element "
                "state (AdamW, SGD, Adafactor, Lion), or list the name in the optimizer's `state_not_per_unit` if it "
                "follows no unit."
            )
    return views


def _factor_view(name: str, value: Tensor, shape: tuple[int, ...], axis: int) -> Tensor | None:
    """The half of a factored second moment that has one slice a unit; None for the half that averages over units."""
    if axis == 0:
        # The leading dims of a stack of matrices are batch dims of both halves.
        return value if value.shape[:1] == shape[:1] and (name in _ROW_FACTORS or len(shape) > 2) else None
    if value.dim() == len(shape):  # torch keeps the averaged dimension, of size 1
        return value.movedim(axis, 0) if value.shape[axis] == shape[axis] else None
    averaged = len(shape) - 1 if name in _ROW_FACTORS else len(shape) - 2
    return None if axis == averaged else value.movedim(axis - (axis > averaged), 0)


def _refuse_quantised(parameter: Tensor, state: dict[str, Any], where: str, kind: str) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if name.startswith("state") and value.dtype == torch.uint8:
            raise ValueError(
                f"State '{name}' of {where} in {kind} is 8-bit: blocks of 256 elements share one `absmax`, so a unit "
                "cannot move without rounding its neighbours. Call "
                "`hf_sparse_peft.optim.use_32bit_states([parameter])` before the first step (bitsandbytes' "
                "GlobalOptimManager override; it keeps tensors below 4096 elements in 32 bits anyway), or use a "
                "32-bit optimizer."
            )
        value = value.to_local() if is_sharded(value) else value
        low_bit = value.dtype in (torch.uint8, torch.int8) and value.numel() > 1 and parameter.is_floating_point()
        if type(value) not in (Tensor, torch.nn.Parameter) or low_bit:
            form = value.dtype if low_bit else type(value).__name__
            raise ValueError(
                f"State '{name}' of {where} in {kind} is stored as {form}, a quantised form whose elements cannot be "
                "edited one by one. Use a 32-bit optimizer for this parameter."
            )


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def use_32bit_states(parameters: Tensor | Iterable[Tensor]) -> None:
    """Ask bitsandbytes for 32-bit optimizer state for these parameters, so that their units can move.

    Goes through bitsandbytes' own `GlobalOptimManager.override_config(p, "optim_bits", 32)`. Call it **before the
    first step**: state that exists already keeps its form. The override is keyed by the identity of the parameter, so
    call it after anything that replaces parameters. Parameters with fewer than 4096 elements have 32-bit state in any
    case, and optimizers outside bitsandbytes never read the override. Costs 4 bytes instead of about 1 per element and
    state.

    Raises:
        ValueError: something that is not a tensor.
    """
    from bitsandbytes.optim import GlobalOptimManager

    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for p in parameters:
        if not isinstance(p, Tensor):
            raise ValueError(
                f"parameters holds a {type(p).__name__}, not a tensor. Pass parameters, not names or modules."
            )
    manager = GlobalOptimManager.get_instance()
    for p in parameters:  # one by one: override_config stores one shared dict for all the parameters of a call
        manager.override_config(p, "optim_bits", 32)
        # The override is keyed by id(): without this, a later parameter that gets the freed one's id would inherit it.
        weakref.finalize(p, manager.pid2config.pop, id(p), None).atexit = False
