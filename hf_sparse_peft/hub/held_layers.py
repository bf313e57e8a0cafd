"""The layers of an adapter file without the base model that they belong to."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import nn

from ..tuners import AdapterLayer, adapter_layers
from ..tuners.shared.file_check import AdapterFile, check_tensors, loading, tensor_key


def layers_without_base(file: AdapterFile) -> dict[str, AdapterLayer]:
    """The adapted layers of a file that was read, by module name, over weights of zeros that take no memory: for what
    an adapter says without its base. The adapter is called "default"; heads and biases are left out."""
    config = copy.deepcopy(file.config)
    config.task_type = config.modules_to_save = config.saved_base_weights = None
    config.bias, config.inference_mode, config.target_modules = "none", True, list(file.modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    root = weights_of_zeros({name: file.sizes[name][:2] for name in file.modules})
    own = {tensor_key(name, kind): t for name, held in file.modules.items() for kind, t in held.items()}
    with loading(check_tensors(own, config, file.path)):
        model = PeftModel(root, config)
        set_peft_model_state_dict(model, own)
    return {layer.module_name: layer for layer in adapter_layers(model)}


def weights_of_zeros(shapes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """A module with a linear layer of each name, `(out, in)`, whose weights are zeros that take no memory."""
    root = nn.Module()
    for name, (rows, cols) in shapes.items():
        _put(root, name, _linear(rows, cols))
    return root


def _linear(rows: int, cols: int) -> nn.Linear:
    linear = nn.Linear(cols, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.zeros(1).expand(rows, cols), requires_grad=False)
    return linear


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)
