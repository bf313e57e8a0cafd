"""How far the first optimizer step of a candidate moves the outputs of the adapted layers, per unit of learning rate.

It is what `training.values_rate` estimates from shapes alone. Here it is measured, with the gradients and inputs of the
task: an adapter of the candidate takes one step of `BATCH` examples at a rate so small that the model stays linear, and
each layer is asked before and after for its outputs at inputs that it had in the base.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import harness
import torch
from learning_runs import adapted
from torch import Tensor, nn

BATCH, TOKENS, RATE = 128, 512, 1e-5


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that an adapter, ours or upstream's, has wrapped."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_base_layer")}
    return {name: layer for name, layer in layers.items() if isinstance(layer.get_base_layer(), nn.Linear)}


@torch.no_grad()
def inputs_of(layers: dict[str, nn.Module], model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Inputs of each layer in one forward pass, `TOKENS` of them [tokens, in_features]."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].flatten(0, -2)}))
        for name, layer in layers.items()
    ]
    model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    drawn = torch.Generator().manual_seed(0)
    return {name: x[torch.randperm(len(x), generator=drawn)[:TOKENS]] for name, x in found.items()}


@torch.no_grad()
def outputs_of(layers: dict[str, nn.Module], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each layer makes of its inputs."""
    return {name: layer(inputs[name]).double() for name, layer in layers.items()}


def first_step(text: str, task: Any, options: Any, numbers: dict[str, float], seed: int = 0) -> dict[str, float]:
    """Layer -> root mean square, over inputs and outputs, of what one step changes, over the learning rate."""
    options = copy.copy(options)
    options.steps = 1
    method, model = adapted(text, task, numbers, seed)
    data = task.training_data(seed)
    layers = adapter_layers(model)
    rows = data["train_dataset"]
    inputs = inputs_of(layers, model, data["data_collator"]([rows[i] for i in range(min(len(rows), 16))]))
    args = harness.training_arguments(
        options, (options.output or Path("runs/learning")) / "first_step", RATE, seed,
        per_device_train_batch_size=BATCH, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    before = outputs_of(layers, inputs)
    harness.make_trainer(method, model, args, **data).train()
    model.eval()
    after = outputs_of(layers, inputs)
    return {name: ((after[name] - before[name]).square().mean().sqrt() / RATE).item() for name in layers}
