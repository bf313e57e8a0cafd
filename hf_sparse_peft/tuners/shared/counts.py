"""How many numbers an adapter has: one count for cards, checked files and `print_trainable_parameters`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from .layer import AdapterLayer
from .tensors import AdapterTensors

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of the names of tensors in a head that are no parameters."""


@dataclass(frozen=True)
class LayerCounts:
    """One adapter in one layer."""

    spaces: tuple[dict[str, Any], ...] = ()
    """A dict for each kind of unit space: `kind`, `unit` (what one unit is), `alive` and `capacity`."""
    density: float = 0.0
    """Fraction of the weight's entries that living units are or contain."""
    allocated: int = 0
    """Numbers of its parameters, those of dead units included."""
    living: int = 0
    """Numbers of living units."""
    frozen: int = 0
    """Numbers of living units that are frozen: excluded from the update, still part of the weight."""


@dataclass(frozen=True)
class AdapterCounts:
    """One adapter in a whole model."""

    units: int
    """Numbers of living units of the adapted modules."""
    beside: int
    """Numbers of heads (`modules_to_save`) and biases that train with it."""
    frozen: int
    """Numbers of living units that are frozen."""

    @property
    def living(self) -> int:
        """All numbers of the adapter: what its file holds of parameters."""
        return self.units + self.beside

    @property
    def trained(self) -> int:
        """What an optimizer updates, as `print_trainable_parameters` says while this adapter alone trains."""
        return self.living - self.frozen


def layer_counts(layer: AdapterTensors, adapter_name: str) -> LayerCounts:
    """The counts of one layer's part of an adapter; zeros where it has none."""
    if not layer.holds(adapter_name):
        return LayerCounts()
    spaces, entries, allocated, dead = [], 0, 0, 0
    for space in layer.unit_spaces(adapter_name):
        if space.kind == "module":
            allocated += space.unit_numel
            continue
        alive = space.count
        spaces.append({"kind": space.kind, "unit": space.unit, "alive": alive, "capacity": space.capacity})
        entries += space.alive_entries
        dead += (space.capacity - alive) * space.unit_numel
    return LayerCounts(
        spaces=tuple(spaces),
        density=entries / max(layer.out_features * layer.in_features, 1),
        allocated=allocated,
        living=allocated - dead,
        frozen=layer.frozen_parameters(adapter_name),
    )


def adapter_counts(model: nn.Module, adapter_name: str = "default") -> AdapterCounts:
    """The counts of an adapter of this package in `model`."""
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer) and m.holds(adapter_name)]
    counts = [layer_counts(layer, adapter_name) for layer in layers]
    beside = {id(parameter): parameter.numel() for parameter in _beside(model, layers, adapter_name)}
    return AdapterCounts(sum(c.living for c in counts), sum(beside.values()), sum(c.frozen for c in counts))


def numbers_beside(tensors: Mapping[str, Tensor], layer_cls: type[AdapterTensors], of_base: list[str] | None) -> int:
    """Numbers of heads and biases among tensors of a file; `of_base` are the keys of weights of the base in it."""
    kept = (
        tensor.numel()
        for key, tensor in tensors.items()
        if key not in (of_base or ()) and not key.endswith(_BUFFERS)
        if not layer_cls.is_training_state(key.rpartition(".")[2])
    )
    return sum(kept)


def _beside(model: nn.Module, layers: list[AdapterLayer], adapter_name: str) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            if adapter_name in module.modules_to_save:
                yield from module.modules_to_save[adapter_name].parameters()
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._get_available_adapters():
            names = module.adapter_state_dict_load_map(adapter_name).values()
            yield from (module.get_parameter(name) for name in names)
    which = getattr(layers[0].adapter_configs[adapter_name], "bias", "none") if layers else "none"
    if which == "all":
        inside = {"modules_to_save", "original_module"}
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias" and not inside & set(name.split(".")):
                yield parameter
    elif which != "none":
        biases = (getattr(layer.get_base_layer(), "bias", None) for layer in layers)
        yield from (bias for bias in biases if bias is not None)
