"""Weights of the dense model that a compressed one was made of, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...hub.analysis.checkpoints import Checkpoint, CheckpointTensors
from ...hub.patches.checkpoint_names import CheckpointNames
from ...tuners.shared.quantised import backend_of
from .one_shot import PrunableLayer


class ReferenceWeights:
    """The weights that `reference`, a model, folder, safetensors file or state dict, has for layers of `model`.

    Raises:
        ValueError: one of `layers` is not in it, or has another shape there.
        FileNotFoundError: no safetensors file lies there.
    """

    def __init__(self, reference: Checkpoint, model: nn.Module, layers: list[PrunableLayer]) -> None:
        if reference is model:
            raise ValueError("reference is the model itself. Pass the dense model that it was made of, or its folder.")
        if isinstance(reference, nn.Module):
            self._modules = self._of_module(reference, layers)
        else:
            self._tensors = CheckpointTensors(reference)
            self._names = self._of_checkpoint(model, layers)
        self._reference = reference
        for layer in layers:
            shape = self._shape(layer)
            if shape != (layer.grid.rows, layer.grid.cols):
                raise ValueError(
                    f"'{layer.name}' is {layer.grid.rows} x {layer.grid.cols} in the model and "
                    f"{' x '.join(map(str, shape))} in the reference: they are of two models."
                )

    def get(self, layer: PrunableLayer) -> Tensor:
        """The weight `[out, in]` of a layer, on the layer's device, in the reference's dtype.

        Raises:
            ValueError: it is not finite, or quantised without a way to read it.
        """
        weight = self._modules[layer.name].weight() if self._held else self._stored(layer)
        if not weight.is_floating_point():
            raise ValueError(
                f"'{layer.name}' is stored as {weight.dtype} in the reference. Pass the dense model, or its folder."
            )
        if not weight.isfinite().all():
            raise ValueError(f"The reference's weight of '{layer.name}' is not finite: load it again.")
        return weight.to(layer.module.weight.device)

    @property
    def _held(self) -> bool:
        return isinstance(self._reference, nn.Module)

    def _stored(self, layer: PrunableLayer) -> Tensor:
        weight = self._tensors.get(self._names[layer.name])
        return weight.t() if isinstance(layer.module, Conv1D) else weight

    def _shape(self, layer: PrunableLayer) -> tuple[int, ...]:
        if self._held:
            grid = self._modules[layer.name].grid
            return grid.rows, grid.cols
        return tuple(self._stored(layer).shape)

    @staticmethod
    def _of_module(reference: nn.Module, layers: list[PrunableLayer]) -> dict[str, PrunableLayer]:
        if hasattr(reference, "peft_config"):
            raise ValueError("The reference has adapters. Pass the dense model without them, or its folder.")
        quantisation, modules = get_quantization_kwargs(reference), dict(reference.named_modules())
        found = {}
        for layer in layers:
            module = modules.get(layer.name)
            if module is None or getattr(module, "weight", None) is None:
                raise _absent(layer)
            if module.weight.is_meta:
                raise ValueError(
                    f"The reference's weight of '{layer.name}' is on the meta device: pass its folder instead."
                )
            found[layer.name] = PrunableLayer(layer.name, module, backend_of(module, **quantisation))
        return found

    def _of_checkpoint(self, model: nn.Module, layers: list[PrunableLayer]) -> dict[str, str]:
        stored, prefix = CheckpointNames(model).stored, f"{getattr(model, 'base_model_prefix', '')}."
        names, found = {*self._tensors.names, *self._tensors.tied}, {}
        for layer in layers:
            own = f"{layer.name}.weight"
            candidates = (stored.get(own, own), own, own.removeprefix(prefix), f"{prefix}{own}")
            name = next((one for one in candidates if one in names), None)
            if name is None:
                raise _absent(layer)
            found[layer.name] = name
        return found


def _absent(layer: PrunableLayer) -> ValueError:
    return ValueError(
        f"The reference has no weight of '{layer.name}'. Pass the dense model that this one was made of, of the same "
        "class, or its folder; or name the module in exclude_modules."
    )


@contextmanager
def with_weights(layers: list[PrunableLayer], weights: dict[str, Tensor]) -> Iterator[None]:
    """The layers compute with `weights`, `[out, in]`, inside; nothing is written to them."""
    held = {layer.name: layer.module.__dict__.get("forward") for layer in layers}
    try:
        for layer in layers:
            layer.module.forward = partial(_linear, layer.module, weights[layer.name])
        yield
    finally:
        for layer in layers:
            if held[layer.name] is None:
                layer.module.__dict__.pop("forward", None)
            else:
                layer.module.forward = held[layer.name]


def _linear(module: nn.Module, weight: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return nn.functional.linear(x, weight.to(x.dtype), bias)
