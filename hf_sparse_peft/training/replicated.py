"""Adapters that every rank of an FSDP2 run holds whole: kept out of its shards, their gradients averaged over ranks."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..rules import Rule
from ..rules.collectives import all_reduce_means, all_reduce_sum, is_distributed
from ..tuners import adapter_layers
from ..tuners.shared.base_weight import is_bnb_4bit
from ..tuners.shared.ranks import adapter_buffers, match_ranks

_AVERAGED: weakref.WeakKeyDictionary[nn.Module, ReplicatedGradients] = weakref.WeakKeyDictionary()


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Everything that trains in `model`, and all of its adapters: what `fully_shard` is to leave whole on every rank,
    so that units can move.

        for layer in model.model.layers:
            fully_shard(layer, ignored_params=adapter_parameters(model))

    An `accelerate` loop calls `leave_adapters_whole(model)`; a Trainer with the callbacks of `callbacks_for` does.
    """
    held = (layer.trained_parameters(name) for layer in adapter_layers(model) for name in layer.adapter_configs)
    return {p for p in model.parameters() if p.requires_grad} | {parameter for found in held for parameter in found}


def trains_adapters_alone(model: nn.Module) -> bool:
    """Whether nothing trains in `model` but parameters of its adapters of this package."""
    layers = adapter_layers(model)
    held = {p for layer in layers for name in layer.adapter_configs for p in layer.trained_parameters(name)}
    return bool(layers) and all(p in held for p in model.parameters() if p.requires_grad)


class _LeftWhole:
    """Stands among accelerate's `ignored_modules`: what is to stay whole when the model is sharded, and not before."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def parameters(self) -> Iterable[nn.Parameter]:
        """As a module's."""
        model = self.model()
        return () if model is None else adapter_parameters(model)


def leave_adapters_whole(model: nn.Module, device: torch.device | str | None = None) -> None:
    """Let accelerate's FSDP2 shard the base of `model` alone. Call it after the accelerator was made and before its
    `prepare`; nothing to do where FSDP2 is off.

    Args:
        model: with its adapters, not yet prepared.
        device: where the run computes; None: the accelerator's. FSDP2 moves what it shards, and no more.

    Raises:
        ValueError: the plugin loads weights on the first rank alone, or would cast packed 4-bit weights.
    """
    plugin = fsdp_plugin()
    if plugin is None or plugin.fsdp_version != 2:
        return
    _check_plugin(plugin, model)
    ignored = plugin.ignored_modules or []
    if isinstance(ignored, str):
        pattern = re.compile(ignored)
        ignored = [module for name, module in model.named_modules() if pattern.fullmatch(name)]
    ignored = [one for one in ignored if not (isinstance(one, _LeftWhole) and one.model() in (model, None))]
    plugin.ignored_modules = [*ignored, _LeftWhole(model)]
    device = AcceleratorState._shared_state.get("device") if device is None else device
    for parameter in adapter_parameters(model) if device is not None else ():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)


def _check_plugin(plugin: Any, model: nn.Module) -> None:
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading=true fills the shards alone from the first rank, and leaves adapters, "
            "which stay whole, on the meta device. Set it to false (fsdp_config={'cpu_ram_efficient_loading': False})."
        )
    computed_in = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    packed = {base.weight.dtype for base in model.modules() if is_bnb_4bit(base) and base.weight.is_floating_point()}
    if computed_in is not None and packed - {computed_in}:
        stored = (packed - {computed_in}).pop()
        raise ValueError(
            f"bnb_4bit_quant_storage={stored} and mixed precision in {computed_in}: FSDP2 would cast the packed codes, "
            f"which are no numbers. Load the base with bnb_4bit_quant_storage={computed_in}."
        )


def fsdp_plugin() -> Any:
    """The FSDP plugin of this process's accelerator; None where there is none."""
    return AcceleratorState._shared_state.get("fsdp_plugin")


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to `model` or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def sharded_names(model: nn.Module) -> list[str]:
    """Names of what trains in `model` and is sharded."""
    return [n for n, p in model.named_parameters() if p.requires_grad and isinstance(p.data, DTensor)]


class ReplicatedGradients:
    r"""Averages the gradients of what `fully_shard` left whole, :math:`\frac{1}{R}\sum_r g_r` over `R` ranks, at the
    end of each backward pass in which FSDP2 reduces its own (`set_requires_gradient_sync`): before clipping, as DDP
    does.

    One collective for 16 million numbers, and one for which of them have a gradient anywhere: a parameter that a rank's
    batch did not reach gets the others' average, one that none reached keeps none. Every rank must run a backward pass,
    which FSDP2 asks for anyhow.

    Args:
        model: to which `fully_shard` was applied; its outputs lead to the loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self._queued = False
        model.register_forward_hook(self._watch)

    def _watch(self, model: nn.Module, args: Any, output: Any) -> None:
        self._queued = False  # a backward pass that was broken off has left it set
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._queue)

    def _queue(self, gradient: Tensor) -> None:
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._queued, model = False, self.model()
        if model is None or not is_distributed() or not _syncs(model):
            return
        groups: dict[tuple, list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad and not isinstance(parameter.data, DTensor):
                groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        for parameters in groups.values():
            average_gradients(parameters)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace the gradients of `parameters`, of one device and dtype and in one order on all ranks, by their means over
    ranks; where a rank has none it counts as 0, and where none has it stays None."""
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    reached = all_reduce_sum(reached).tolist()
    for parameter in [p for p, ranks in zip(parameters, reached, strict=True) if ranks and p.grad is None]:
        parameter.grad = torch.zeros_like(parameter)
    all_reduce_means([p.grad for p, ranks in zip(parameters, reached, strict=True) if ranks])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple, dict)):
        for one in output.values() if isinstance(output, dict) else output:
            yield from _tensors(one)


def _syncs(model: nn.Module) -> bool:
    """Whether FSDP2 reduces gradients in this backward pass; `set_requires_gradient_sync` has no getter."""
    states = (module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule))
    return all(group.reduce_grads for state in states for group in state._fsdp_param_groups)


def average_replicated(model: nn.Module, rules: Iterable[Rule] = (), waits: bool = False) -> None:
    """Average the gradients of what is whole in a fully sharded `model` from now on, and begin with the first rank's
    values everywhere, as DDP does; nothing to do in any other.

    Raises:
        ValueError: something that trains is sharded, and one of the `rules` that are to run takes no shards, or data is
            to decide first (`waits`); ranks have other adapters.
    """
    if not is_fully_sharded(model):
        return
    found = [type(rule).__name__ for rule in rules if not rule.takes_shards]
    if (found or waits) and (names := sharded_names(model)):
        raise ValueError(
            f"FSDP2 has sharded '{names[0]}' and {len(names) - 1} more that train, which "
            f"{found[0] if found else 'a start from data'} does not take. (Regrow takes them by magnitude, age or "
            "sensitivity and gradients or chance, without retired units, and so does Prune of supports.) Keep "
            "adapters whole: make the Trainer with callbacks=callbacks_for(model), call "
            "hf_sparse_peft.leave_adapters_whole(model) before accelerator.prepare, or pass "
            "fully_shard(..., ignored_params=hf_sparse_peft.adapter_parameters(model))."
        )
    if model not in _AVERAGED:
        whole = {name: one for name, one in model.named_parameters() if one.requires_grad}
        whole = {name: one for name, one in whole.items() if not isinstance(one.data, DTensor)}
        match_ranks(model, {**whole, **dict(adapter_buffers(model))})
        _AVERAGED[model] = ReplicatedGradients(model)
