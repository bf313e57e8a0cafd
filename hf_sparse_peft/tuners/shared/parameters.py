"""Adapters on parameters that belong to no linear layer, such as the fused experts of a mixture (`target_parameters`).

    experts                            Host                           in place of the module that holds the parameters
    experts.base_layer.gate_up_proj    [experts, rows, cols]          the parameter, only read
    experts.gate_up_proj               AdapterLayer                   over the matrix [experts * rows, cols]

A host computes each adapted parameter and runs its module once more with it in place of the parameter, so that whatever
the module does with it (a loop over experts, grouped or batched products) stays the module's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

_LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)


class ParameterWeight:
    """A parameter of a module as the weight of a layer: the matrices of a 3-D one below each other.

    Stands where adapters know the base layer otherwise. It is no module, so that the parameter stays where it is.
    """

    bias = None

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself, in its own shape."""
        return getattr(self.module, self.name)

    @weight.setter
    def weight(self, parameter: nn.Parameter) -> None:
        setattr(self.module, self.name, parameter)

    @property
    def matrix(self) -> torch.Tensor:
        """`[rows, cols]`: the parameter's own memory; gathered where `fully_shard` has sharded it, which every rank
        must ask for at the same time."""
        weight = self.weight.detach()
        return (weight.full_tensor() if isinstance(weight, DTensor) else weight).flatten(0, -2)

    @property
    def rows_of_one(self) -> int:
        """Rows of the matrix that belong to one expert."""
        return self.weight.shape[-2]

    # Where peft looks for the sides of layers that it does not know.

    @property
    def input_size(self) -> int:
        """Columns of the matrix."""
        return self.weight.shape[-1]

    @property
    def output_size(self) -> int:
        """Rows of the matrix."""
        return self.weight.numel() // self.weight.shape[-1]

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight} if self.name in self.module._parameters else {}

    @property
    def _hf_hook(self) -> Any:
        return getattr(self.module, "_hf_hook", None)


class ParameterHost(nn.Module):
    """In place of a module of which parameters are adapted; has a layer for each, under the parameter's name."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def parameter_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Names of adapted parameters, and their layers."""
        return ((name, child) for name, child in self._modules.items() if isinstance(child, BaseTunerLayer))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with adapted parameters."""
        adapted, again = {}, {}
        for name, layer in self.parameter_layers():
            weight = layer()
            if weight is not getattr(self.base_layer, name):
                adapted[name], again[name] = weight, layer.recompute()
        with copies_recomputed(adapted, again):
            return run_with(self.base_layer, adapted, args, kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module, with the adapters merged into its parameters if asked for."""
        if merge:
            for _, layer in self.parameter_layers():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def run_with(module: nn.Module, parameters: Mapping[str, torch.Tensor], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Run `module` with other tensors in place of some of its parameters."""
    if not parameters:
        return module(*args, **kwargs)
    if torch.compiler.is_compiling() or "forward" in module.__dict__:
        # accelerate's hooks put a forward into the module that is bound to that very object.
        return torch.func.functional_call(module, dict(parameters), args, dict(kwargs))
    # A copy that shares everything else, as DataParallel makes them: no thread, saver or interrupt finds other weights
    # in the module itself.
    replica = module.__new__(type(module))
    replica.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, **parameters}}
    return replica(*args, **kwargs)


# What is kept for the backward pass


@contextmanager
def copies_recomputed(
    copies: Mapping[str, torch.Tensor], recompute: Mapping[str, Callable[[], torch.Tensor]]
) -> Iterator[None]:
    """Let what runs in the block keep none of `copies` for its backward pass, which gets them by `recompute` again.

    An adapted copy of every layer's experts would double the model otherwise. Where somebody else decides what is kept,
    as activation checkpointing does, they do so here too.
    """
    made = {w.untyped_storage().data_ptr(): _Copy(recompute[n]) for n, w in copies.items() if w.requires_grad}
    if not made or torch.compiler.is_compiling() or _others_keep():
        yield
        return
    for weight in copies.values():
        if weight.requires_grad:  # its gradient is there when all of its uses have had theirs
            weight.register_hook(made[weight.untyped_storage().data_ptr()].forget)

    def pack(tensor: torch.Tensor) -> Any:
        plain = tensor.layout is torch.strided and not tensor.is_meta
        copy = made.get(tensor.untyped_storage().data_ptr()) if plain else None
        return tensor if copy is None else (copy, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> torch.Tensor:
        return packed[0].get().as_strided(*packed[1:]) if isinstance(packed, tuple) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Copy:
    """One adapted copy, made when it is first asked for and forgotten when it has a gradient."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self.make, self.made = make, None

    def get(self) -> torch.Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        return self.made

    def forget(self, gradient: torch.Tensor) -> None:
        self.made = None


def _others_keep() -> bool:
    # Hooks do not nest: the innermost are asked alone.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


# Which parameters


def target_parameters(
    config: PeftConfig, model: nn.Module, matches: Callable[[PeftConfig, str], Any]
) -> dict[str, ParameterWeight]:
    """The parameters that `config.target_parameters` names, by their full names without adapters, in model order.

    `matches` decides by name with `target_modules` in place of it, so that `exclude_modules` and `layers_to_transform`
    hold for parameters too.

    Raises:
        ValueError: one of them is the weight of a linear layer, no matrix, or computed from others.
    """
    asked = getattr(config, "target_parameters", None)
    if not asked:
        return {}
    found = {}
    for module_name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, nn.ParameterDict, ParameterHost)):
            continue
        plain = module_name.removesuffix(".base_layer")
        for name in _parameter_names(module):
            full = f"{plain}.{name}".lstrip(".")
            if matches(config, full):
                found[full] = _checked(module, plain, name)
    return found


def _parameter_names(module: nn.Module) -> list[str]:
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return own + list(getattr(module, "parametrizations", ()))


def _checked(module: nn.Module, module_name: str, name: str) -> ParameterWeight:
    full = f"{module_name}.{name}".lstrip(".")
    start = f"target_parameters matches '{full}', "
    if not module_name:
        raise ValueError(f"{start}a parameter of the model itself, in whose place nothing can stand. Leave it out.")
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"{start}which is computed at each forward (a parametrization; so bitsandbytes keeps 4-bit experts). Load "
            "the experts dense, in bf16, or leave it out of target_parameters."
        )
    if isinstance(module, _LAYERS):
        raise ValueError(
            f"{start}a parameter of a {type(module).__name__}. Linear layers are named in target_modules; leave other "
            "layers out."
        )
    parameter = getattr(module, name)
    if parameter.ndim not in (2, 3) or not parameter.dtype.is_floating_point:
        raise ValueError(
            f"{start}{parameter.dtype} of shape {tuple(parameter.shape)}: adapters work on matrices of floating-point "
            "numbers, [rows, cols] or [experts, rows, cols]. Leave it out."
        )
    return ParameterWeight(module, name)


def host_of(model: nn.Module, weight: ParameterWeight, full_name: str) -> ParameterHost:
    """The host of the module that holds `weight`, put in its place if there is none."""
    parent_name, _, child = full_name.rpartition(".")[0].rpartition(".")
    parent = model.get_submodule(parent_name)
    held = getattr(parent, child)
    if isinstance(held, ParameterHost):
        return held
    host = ParameterHost(held)
    setattr(parent, child, host)
    return host
