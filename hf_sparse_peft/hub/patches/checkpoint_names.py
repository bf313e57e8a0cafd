"""Where the parameters of a model lie in its checkpoint: names without adapters, and transformers' own conversions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from ...tuners.shared.parameters import ParameterHost
from ...tuners.shared.wrapped_names import plain_name


class Placed(NamedTuple):
    """Where some entries of one tensor lie in another one."""

    name: str
    shape: tuple[int, ...]
    positions: Tensor
    """int64, strictly increasing."""
    order: Tensor | None
    """Which of the entries asked for lies at each of `positions`; None: all of them, in their order."""


class CheckpointNames:
    """Names and positions of a model's parameters in the files that `save_pretrained` writes of it, and back.

    Fused experts, split projections and renamed modules follow from the conversions that transformers loaded the model
    with: positions are numbers that its own operations carry to their place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.aliases: dict[str, str] = {}
        """First name of each parameter, by every name."""
        owners: dict[int, set[int]] = defaultdict(set)
        first: dict[int, str] = {}
        for name, parameter, shape, module in _walk(model, ""):
            owners[id(parameter)].add(id(module))
            self.aliases[name] = first.setdefault(id(parameter), name)
            if self.aliases[name] == name:
                self.parameters[name], self.shapes[name] = parameter, shape
        self.tied = {first[key] for key, found in owners.items() if len(found) > 1}
        """First names of parameters that several modules hold."""
        self._model = SimpleNamespace(config=getattr(model, "config", None), _weight_conversions=_conversions(model))
        reverse = [entry.reverse_transform() for entry in (self._model._weight_conversions or [])[::-1]]
        renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
        self._groups: dict[str, list[str]] = defaultdict(list)
        self._group_of: dict[str, str] = {}
        self.stored: dict[str, str] = {}
        """Name in the checkpoint, of parameters that are only renamed."""
        for name in self.shapes:
            key, pattern = apply_converters(name, converters)
            if pattern is None:
                self.stored[name] = apply_renamings(name, renamings)
            else:
                self._groups[key].append(name)
                self._group_of[name] = key
        self._held = {stored: name for name, stored in self.stored.items()}
        self._made_of: dict[str, str] | None = None

    def to_checkpoint(self, name: str, positions: Tensor) -> Iterator[Placed]:
        """Where `positions` (int64, strictly increasing) of the parameter `name` lie in the checkpoint's tensors."""
        if name in self.stored:
            yield Placed(self.stored[name], self.shapes[name], positions, None)
            return
        group = self._group_of[name]
        offset, numbers = self._offsets(group)[name], self._numbers(group)
        wanted = torch.zeros(sum(_numel(self.shapes[n]) for n in self._groups[group]), dtype=torch.bool)
        wanted[positions + offset] = True
        for stored, held in numbers.items():
            places = wanted[held.reshape(-1)].nonzero().view(-1)
            if places.numel():
                order = torch.searchsorted(positions, held.reshape(-1)[places] - offset)
                yield Placed(stored, tuple(held.shape), places, order)

    def to_memory(self, stored: str, indices: Tensor | None, shape: tuple[int, ...]) -> list[Placed]:
        """Where `indices` (None: all) of the checkpoint's tensor `stored` lie in the model's parameters.

        Raises:
            ValueError: the model has no such tensor, or another shape of it.
        """
        name = self.aliases.get(self._held.get(stored, stored))
        if name in self.stored:
            self._check_shape(stored, shape, self.shapes[name])
            every = torch.arange(_numel(shape)) if indices is None else indices.long()
            return [Placed(name, self.shapes[name], every, None)]
        group = self._groups_by_stored().get(stored)
        if group is None:
            raise ValueError(
                f"The model has no tensor '{stored}' in its checkpoint; it has {sorted(self._held)[:2]} and others. "
                "Apply the patch to the model that it was made for."
            )
        held = self._numbers(group)[stored]
        self._check_shape(stored, shape, tuple(held.shape))
        numbers = held.reshape(-1) if indices is None else held.reshape(-1)[indices.long()]
        found = []
        for name, offset in self._offsets(group).items():
            inside = ((numbers >= offset) & (numbers < offset + _numel(self.shapes[name]))).nonzero().view(-1)
            if inside.numel():
                places = (numbers[inside] - offset).sort()
                found.append(Placed(name, self.shapes[name], places.values, inside[places.indices]))
        return found

    def tensor(self, stored: str) -> Tensor:
        """The checkpoint's tensor `stored`, from the model's parameters.

        Raises:
            ValueError: the model has no such tensor, or holds it quantised.
        """
        name = self.aliases.get(self._held.get(stored, stored))
        if name in self.stored:
            return self.dense(name)
        group = self._groups_by_stored().get(stored)
        if group is None:
            raise ValueError(f"The model has no tensor '{stored}' in its checkpoint.")
        return revert_weight_conversion(self._model, {n: self.dense(n) for n in self._groups[group]})[stored]

    def dense(self, name: str) -> Tensor:
        """The parameter `name` as the model holds it.

        Raises:
            ValueError: it is quantised.
        """
        parameter = self.parameters[name]
        if tuple(parameter.shape) != self.shapes[name] or not parameter.dtype.is_floating_point:
            raise ValueError(
                f"'{name}' is quantised in this model, and a patch holds values of the checkpoint. Pass base=, the "
                "folder of the dense checkpoint or a plain model loaded from it."
            )
        return parameter.data

    def _offsets(self, group: str) -> dict[str, int]:
        found, total = {}, 0
        for name in self._groups[group]:
            found[name] = total
            total += _numel(self.shapes[name])
        return found

    def _numbers(self, group: str, device: str = "cpu") -> dict[str, Tensor]:
        """For each checkpoint tensor of a group: which entry of the group's parameters lies where."""
        numbers = {
            name: torch.arange(offset, offset + _numel(self.shapes[name]), device=device).view(self.shapes[name])
            for name, offset in self._offsets(group).items()
        }
        return revert_weight_conversion(self._model, numbers)

    def _groups_by_stored(self) -> dict[str, str]:
        if self._made_of is None:
            self._made_of = {stored: group for group in self._groups for stored in self._numbers(group, "meta")}
        return self._made_of

    @staticmethod
    def _check_shape(stored: str, shape: tuple[int, ...], own: tuple[int, ...]) -> None:
        if tuple(shape) != tuple(own):
            raise ValueError(f"'{stored}' is {tuple(own)} in the model's checkpoint and {tuple(shape)} in the patch.")


def _conversions(model: nn.Module) -> list | None:
    if not hasattr(model, "config"):
        return None
    found = getattr(model, "_weight_conversions", None)
    if found is None:
        # As transformers saves a model that no checkpoint was loaded into: no prefix comes or goes.
        found = [one for one in get_model_conversion_mapping(model, add_legacy=False) if type(one) is not PrefixChange]
    # What quantises while it loads has no reverse, and the dense checkpoint is what is meant.
    return [one for one in found if getattr(one, "quantization_operation", None) is None] or None


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...], nn.Module]]:
    """Name, tensor, shape in the checkpoint and owner of the base model's parameters, under every name."""
    if isinstance(module, BaseTunerLayer):
        yield from _walk(module.get_base_layer(), prefix)
        return
    if isinstance(module, ParameterHost):
        yield from _walk(module.base_layer, prefix)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _walk(module.original_module, prefix)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            shape = tuple(parameter.shape)
            if name == "weight" and isinstance(module, nn.Linear) and not isinstance(module, Conv1D):
                shape = (module.out_features, module.in_features)  # 4-bit weights are packed
            yield plain_name(f"{prefix}{name}"), parameter, shape, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.")


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
