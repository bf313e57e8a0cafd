"""Two-layer models whose weights a test can write down, and local runs of a few steps."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from hf_sparse_peft import Controller
from hf_sparse_peft.federated import FedDIP, feddip_config
from hf_sparse_peft.tuners import adapter_layers


class Two(nn.Module):
    """`second(tanh(first(x)))`, fp64."""

    def __init__(self, seed: int = 0, sizes: tuple[int, int, int] = (6, 5, 3)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        inputs, hidden, outputs = sizes
        self.first, self.second = nn.Linear(inputs, hidden, bias=False), nn.Linear(hidden, outputs, bias=False)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
        self.double()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def masked_model(seed: int = 0, **options):
    """`Two` under FedDIP's adapter, all of it in fp64."""
    return get_peft_model(Two(seed), feddip_config(**{"target_modules": ["first", "second"], **options})).double()


def weights(model) -> dict[str, torch.Tensor]:
    """V of each module."""
    return {layer.module_name: layer.masked_weight("default").dense.clone() for layer in adapter_layers(model)}


def masks(model) -> dict[str, torch.Tensor]:
    """M of each module."""
    return {layer.module_name: layer.kept("default").clone() for layer in adapter_layers(model)}


def batch(seed: int, count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of `Two`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((count, 6), (count, 3))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def train_locally(model, options: FedDIP, number: int, seeds: list[int], lr: float | None = None) -> None:
    """A client's steps, one batch each."""
    optimizer = options.local_optimizer(model, number)
    if lr is not None:
        optimizer.param_groups[0]["lr"] = lr
    with Controller(model, optimizer, len(seeds), rule=options.local_rule(number)) as rules:
        for seed in seeds:
            x, y = batch(seed)
            rules.before_step()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()
