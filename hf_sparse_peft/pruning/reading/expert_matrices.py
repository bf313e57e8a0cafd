"""Experts that transformers holds in 3-D parameters, as one linear layer each, and what reaches every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ...sparsity import UnitGrid
from ...tuners.shared import AdapterConfig
from ...tuners.shared.target_checks import expert_parameters
from .input_statistics import InputStatistics
from .one_shot import PrunableLayer

_UP, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"
_KNOWN = {*_UP, _DOWN, *(f"{name}_bias" for name in (*_UP, _DOWN))}


@dataclass(frozen=True)
class ExpertMatrix(PrunableLayer):
    """The matrix of one expert; its name is the parameter's and the expert's number."""

    parameter: str = ""
    """The parameter's own name, "gate_up_proj", "up_proj" or "down_proj"."""
    expert: int = 0

    @property
    def grid(self) -> UnitGrid:
        """See `PrunableLayer`."""
        return UnitGrid(*self.weight().shape, "entry")

    def weight(self) -> Tensor:
        """The matrix as `[out, in]`, the parameter's own memory."""
        found = getattr(self.module, self.parameter).data[self.expert]
        return found.t() if self.module.is_transposed else found


def expert_matrices(
    model: nn.Module, target_modules: Any = "all-linear", exclude_modules: Any = None
) -> list[ExpertMatrix]:
    """All experts of a model's 3-D parameters that are targets, by their parameters' names.

    Raises:
        ValueError: parameters of experts that are laid out in another way than transformers 5 does.
    """
    everything = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    config = AdapterConfig(target_modules=".*" if everything else target_modules, exclude_modules=exclude_modules)
    found = []
    for name, module in model.named_modules():
        own = dict(expert_parameters(name, module))
        targets = [key for key in own if BaseTuner._check_target_module_exists(config, f"{name}.{key}")]
        weights = [key for key in targets if key in (*_UP, _DOWN)]
        if not targets or (not weights and set(targets) <= _KNOWN):
            continue
        if not hasattr(module, "is_transposed") or set(own) - _KNOWN or any(own[key].ndim != 3 for key in weights):
            raise ValueError(
                f"Experts in parameters such as '{name}.{targets[0]}' ({type(module).__name__}) are not laid out as "
                "transformers 5 does, and a model of which most stays dense would be called sparse. Name them in "
                "exclude_modules, or prune a model whose experts are linear layers."
            )
        for key in weights:
            if not own[key].dtype.is_floating_point or own[key].element_size() < 2:
                raise ValueError(
                    f"'{name}.{key}' is quantised, and writing it would round it again. Prune the dense model, then "
                    "quantise."
                )
            found += [
                ExpertMatrix(f"{name}.{key}.{expert}", module, None, key, expert) for expert in range(len(own[key]))
            ]
    return found


def expert_hooks(
    layers: Iterable[PrunableLayer], found: dict[str, InputStatistics], current: dict[str, Any]
) -> list[Any]:
    """Hooks that count what reaches each expert into `found`, until they are removed.

    The tokens of an expert are those that the router sends there, one by one; what reaches its down projection is
    computed by the module's own gate, and the module's output is compared with what follows from it.
    """
    by_module: dict[int, list[ExpertMatrix]] = {}
    for layer in layers:
        if isinstance(layer, ExpertMatrix):
            by_module.setdefault(id(layer.module), []).append(layer)
    return [
        own[0].module.register_forward_hook(_reader(own, found, current), with_kwargs=True)
        for own in by_module.values()
    ]


def _reader(own: list[ExpertMatrix], found: dict[str, InputStatistics], current: dict[str, Any]) -> Callable[..., None]:
    name = own[0].name.rpartition(".")[0].rpartition(".")[0]
    by_expert: dict[int, dict[str, InputStatistics]] = {}
    for layer in own:
        by_expert.setdefault(layer.expert, {})[layer.parameter] = found[layer.name]

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *kwargs.values()]
        if len(given) != 3 or not all(isinstance(one, Tensor) for one in given):
            raise ValueError(_not_understood(name, module, "is not called with states, experts and weights"))
        states, chosen, weights = given
        states, shape = states.reshape(-1, states.shape[-1]), states.shape
        chosen = chosen.reshape(len(states), -1)
        weights = weights.reshape(len(states), -1)
        if weights.shape[1] != chosen.shape[1]:
            weights = weights.gather(1, chosen)  # one for every expert
        mask = current["mask"]
        counts = None if mask is None or mask.numel() != len(states) else mask.bool().flatten().to(states.device)
        made = torch.zeros_like(states, dtype=torch.float32)
        for expert in range(len(getattr(module, _DOWN))):
            tokens, place = torch.where(chosen == expert)
            if not len(tokens):
                continue
            x = states[tokens]
            inner = _inner(module, expert, x)
            out = _product(module, _DOWN, expert, inner)
            made.index_add_(0, tokens, (out * weights[tokens, place, None]).float())
            keep = slice(None) if counts is None else counts[tokens]
            for parameter, statistics in by_expert.get(expert, {}).items():
                statistics.add((inner if parameter == _DOWN else x)[keep], None)
        made = made.view(shape)
        if not torch.allclose(made, output.float(), rtol=0.05, atol=0.05 * float(output.float().abs().max())):
            raise ValueError(_not_understood(name, module, "does not compute what its parameters say"))

    return hook


def _inner(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What reaches an expert's down projection."""
    name = _UP[0] if hasattr(module, _UP[0]) else _UP[1]
    up = _product(module, name, expert, x)
    return module._apply_gate(up) if module.has_gate else module.act_fn(up)


def _product(module: nn.Module, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias", None) if module.has_bias else None
    weight = weight.t() if module.is_transposed else weight
    return nn.functional.linear(x, weight, None if bias is None else bias[expert])


def _not_understood(name: str, module: nn.Module, why: str) -> str:
    return (
        f"'{name}' ({type(module).__name__}) {why}, so what reaches its experts cannot be read. Prune with "
        "method='magnitude' or 'random', which ask for no inputs, or name it in exclude_modules."
    )
