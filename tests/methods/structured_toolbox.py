"""Structured adapters on single linear layers."""

from __future__ import annotations

import torch
from peft import get_peft_model
from spectral_toolbox import Linears, random

from hf_sparse_peft import methods
from hf_sparse_peft.tuners.structured import structured_layers


def on(name: str, *weights: torch.Tensor, fill: float = 0.0, **options):
    """The method on linear layers with these weights, its tensors moved by noise of size `fill`: model and layers."""
    torch.manual_seed(1)
    targets = {"target_modules": [f"lin.{at}" for at in range(len(weights))]}
    model = get_peft_model(Linears(*weights), methods.get(name, **{**targets, **options}).config)
    if fill:
        for at, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.data += fill * random(*parameter.shape, seed=at + 1)
    return model, structured_layers(model)


def held(layer, name: str = "default") -> dict[str, torch.Tensor]:
    """The form's tensors in a layer, shared ones too, in float64."""
    return {key: tensor.detach().double() for key, tensor in layer.form_tensors(name).items()}


def grads(model) -> dict[str, torch.Tensor | None]:
    """Gradients of what trains, by the last part of its name before the adapter's."""
    return {
        n.split(".")[-2].removeprefix("structured_"): p.grad for n, p in model.named_parameters() if p.requires_grad
    }
