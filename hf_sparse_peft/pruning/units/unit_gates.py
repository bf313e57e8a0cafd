"""Gates at 1 on the heads and channels of a model: derivatives by a gate are sums over the weights that a unit owns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn

from .structure import BlockStructure, Kind, Member


@dataclass
class Gate:
    r"""Factors on the weights that the units of a block own in one layer.

    With :math:`z` the factor of a unit S in this layer, :math:`\partial L / \partial z = \sum_{i \in S} g_i w_i`, and
    second derivatives are :math:`\sum_{i \in S, j \in T} w_i H_{ij} w_j`.
    """

    block: str
    kind: Kind
    member: Member
    value: Tensor
    """fp32 `[units]`, ones, a leaf that asks for its gradient."""


@contextmanager
def unit_gates(
    model: nn.Module,
    structures: list[BlockStructure],
    kinds: frozenset[Kind],
    others: Iterable[str] = (),
    *,
    biases: bool,
) -> Iterator[list[Gate]]:
    """Inside, forwards of `model` are multiplied by gates, one of each member of each kind in each block; no weight is
    touched. With `biases`, a unit's entries of the bias are gated with its rows, as they go with them.

    Layers among `others` that no unit owns get one factor each, as if they were a unit: their gates, of kind "", come
    last.
    """
    gates, by_module = [], {}
    for structure in structures:
        for kind in sorted(kinds):
            for member in structure.members(kind):
                device = model.get_submodule(member.module).weight.device
                value = torch.ones(structure.units(kind), device=device, requires_grad=True)
                gates.append(Gate(structure.name, kind, member, value))
                by_module.setdefault((member.module, member.axis), []).append(gates[-1])
    owned = {name for name, _ in by_module}
    for name in others:
        if name not in owned:
            module = model.get_submodule(name)
            value = torch.ones(1, device=module.weight.device, requires_grad=True)
            gates.append(Gate("", "", Member("", name, 0, 0, _get_in_out_features(module)[1]), value))
            by_module[name, 0] = [gates[-1]]
    hooks = []
    try:
        for (name, axis), own in by_module.items():
            module = model.get_submodule(name)
            if axis:
                hooks.append(module.register_forward_pre_hook(_on_inputs(own)))
            else:
                hooks.append(module.register_forward_hook(_on_outputs(own, None if biases else module.bias)))
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def _on_inputs(gates: list[Gate]):
    return lambda _, args: (args[0] * _factors(gates, args[0]), *args[1:])


def _on_outputs(gates: list[Gate], bias: Tensor | None):
    def gated(_, __, output: Tensor) -> Tensor:
        factors = _factors(gates, output)
        return output * factors if bias is None else (output - bias) * factors + bias

    return gated


def _factors(gates: list[Gate], values: Tensor) -> Tensor:
    """A factor for each of the layer's rows or columns, in the order of their places."""
    factors = []
    for gate in sorted(gates, key=lambda gate: gate.member.start):
        factors.append(gate.value.repeat_interleave(gate.member.span))
    return torch.cat(factors).to(values.dtype)
