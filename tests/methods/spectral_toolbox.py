"""Spectral adapters on single linear layers, and what their files hold."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from hf_sparse_peft import methods
from hf_sparse_peft.tuners.spectral_lora import spectral_layers


class Linears(nn.Module):
    """Linear layers without biases, `lin.0`, `lin.1`, ..., one after the other."""

    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        self.lin = nn.ModuleList()
        for weight in weights:
            self.lin.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
            self.lin[-1].weight.data.copy_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.lin:
            x = layer(x)
        return x


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(name: str, *weights: torch.Tensor, **options):
    """The method on linear layers with these weights: the model, and its layers."""
    torch.manual_seed(1)
    targets = {"target_modules": [f"lin.{at}" for at in range(len(weights))]}
    model = get_peft_model(Linears(*weights), methods.get(name, **{**targets, **options}).config)
    return model, spectral_layers(model)


def tensors(layer, name: str = "default") -> dict[str, torch.Tensor]:
    """The adapter's tensors in a layer, float64, without the prefix."""
    return {key.removeprefix("spectral_lora_"): t.detach().double() for key, t in layer.tensors(name).items()}


def weight_gradient(layer, gradient: torch.Tensor) -> None:
    r"""Run the layer backwards so that the gradient of its weight, and of its update, is `gradient` `[out, in]`: the
    input is the identity, and the loss :math:`\langle G, Y^\top\rangle`."""
    layer.zero_grad()
    (layer(torch.eye(layer.in_features)) * gradient.t()).sum().backward()


def trained(model) -> dict[str, torch.Tensor]:
    """What trains, by name without the place of the model."""
    return {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """`found` is `expected` up to fp32's rounding of its largest number."""
    scale = expected.abs().max().clamp_min(1e-30)
    torch.testing.assert_close(found.double() / scale, expected.double() / scale, rtol=0, atol=tolerance)
