r"""LT-SFT's pull to the start, :math:`\lambda \sum |p - p_0| / P` (Ansell et al., 2022): its gradient, and its `P`."""

from __future__ import annotations

import torch
from torch import nn

from .layer import SparseLoraLayer


@torch.no_grad()
def add_l1_gradient(parameter: torch.Tensor, distance: torch.Tensor, weight: float) -> None:
    r"""Add :math:`w\,\mathrm{sign}(p - p_0)` to the gradient of `parameter`, if it has one; 0 at the start itself.

    `distance` is :math:`p - p_0`, of the parameter's shape; `weight` :math:`\lambda / P`.
    """
    if parameter.grad is not None:
        parameter.grad.add_(distance.sign(), alpha=weight)


def model_numbers(model: nn.Module) -> int:
    """`P`: numbers of the model itself, adapters aside; a packed weight counts as what it stands for."""
    layers = [module for module in model.modules() if isinstance(module, SparseLoraLayer)]
    bases = {id(layer.get_base_layer().weight): layer for layer in layers}
    numel = 0
    for name, parameter in model.named_parameters():
        if "sparse_lora_" in name or ".modules_to_save." in name:
            continue
        layer = bases.get(id(parameter))
        numel += parameter.numel() if layer is None else layer.out_features * layer.in_features
    return numel
