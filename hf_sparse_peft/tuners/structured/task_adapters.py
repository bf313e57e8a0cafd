"""Adapters of single tasks, made of a hypernetwork."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from peft import PeftModel

from ..shared.copies import copy_heads
from .bottleneck import Bottleneck
from .hypernetwork import Hypernetwork
from .layer import TRAINED, StructuredLayer
from .matrices import DenseMatrix

NAMES_THERE = {
    "down": "down_matrix",
    "down_bias": "down_bias",
    "up": "up_matrix",
    "up_bias": "up_bias",
    "norm_scale": "layernorm_scale",
    "norm_shift": "layernorm_shift",
}
"""What a bottleneck calls what a hypernetwork makes."""


@torch.no_grad()
def add_task_adapter(model: PeftModel, task: str, name: str | None = None, adapter_name: str | None = None) -> str:
    """Add to `model` the adapter that a hypernetwork makes for one task, as a `Bottleneck` with a norm: it gives what
    the hypernetwork gives for that task, and needs neither it nor the task's name. Heads and norms that train along
    (`modules_to_save`) are copied.

    Args:
        model: with an adapter whose form is `Hypernetwork`.
        task: one of its tasks.
        name: of the new adapter; None: the task's.
        adapter_name: of the hypernetwork; None: the active adapter.

    Returns:
        The new adapter's name. It is not active: `model.set_adapter(name)`, `model.save_pretrained(..., [name])`.

    Raises:
        ValueError: the adapter is no hypernetwork, has no such task, or `name` is taken.
    """
    source, name = adapter_name or model.active_adapter, name or task
    config = model.peft_config[source]
    form = getattr(config, "form", None)
    if not isinstance(form, Hypernetwork):
        raise ValueError(f"adapter_name={source!r} is of form {type(form).__name__}, and Hypernetwork makes adapters.")
    form.task_number(task)
    if name in model.peft_config:
        raise ValueError(f"name={name!r} is an adapter of this model already. Choose another, or delete that one.")
    new = replace(
        copy.deepcopy(config),
        form=Bottleneck(None, form.reduction, form.activation, DenseMatrix("zeros"), norm=True),
        sizes={},
        schedule=[],
        inference_mode=False,
    )
    model.add_adapter(name, new)
    copy_heads(model, source, name)
    for layer in (module for module in model.modules() if isinstance(module, StructuredLayer)):
        if not layer.holds(source):
            continue
        made = form.generate(layer.form_tensors(source), layer.site(source), task)
        for made_as, held_as in NAMES_THERE.items():
            getattr(layer, f"{TRAINED}{held_as}")[name].data.copy_(made[made_as])
    return name
