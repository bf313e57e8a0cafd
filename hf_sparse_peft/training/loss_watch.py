"""A loss that is not finite, found at its step and traced to the layer that it comes from, before it is lost among
weights that are all NaN."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ..tuners import adapter_layers
from ..tuners.shared.live_run import LiveRun
from .replicated import is_fully_sharded

logger = logging.getLogger(__name__)


class LossWatch:
    """Looks at the loss of every micro-batch of a run; those that the model itself computes, which `outputs.loss` has.

    A loss that is not finite is traced at once: to trained values that were not finite before, or, by repeating the
    forward pass of that batch, to the first layer whose output is not. It becomes an error where trained values are not
    finite after the update, which nothing mends. A step that a gradient scaler or the optimizer leaves out, or whose
    gradients are all 0, goes on with a line in the log.

    Costs one synchronisation with the device a micro-batch, as `TrainingArguments.logging_nan_inf_filter` does, and
    keeps the inputs of the micro-batch under way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._inputs: tuple[tuple, dict[str, Any]] | None = None
        self._loss: Tensor | None = None
        self._found: str | None = None
        self._told = self._tracing = False
        self._hooks = [
            model.register_forward_pre_hook(self._take_inputs, with_kwargs=True),
            model.register_forward_hook(self._take_loss),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._inputs, self._loss = [], None, None

    def close_micro_batch(self, step: int) -> None:
        """After the backward pass of a micro-batch of update `step`, counted from 1.

        Raises:
            ValueError: the loss is not finite because trained values are not; names step and layer.
        """
        loss, self._loss = self._loss, None
        inputs, self._inputs = self._inputs, None
        if loss is None or self._found is not None or bool(torch.isfinite(loss).all()):
            return
        said = f"Step {step}: the loss is {float(loss.flatten()[0])}. "
        if (spoiled := _spoiled_values(self.model)) is not None:
            raise ValueError(
                f"{said}Trained values of '{spoiled}', the first such layer, are not finite since an earlier step: its "
                "gradient was not, or they were loaded so. Lower the learning rate, clip gradients (max_grad_norm), or "
                "start again from an earlier checkpoint."
            )
        if is_fully_sharded(self.model):
            # A forward pass of one rank alone would wait for the others' shards for ever.
            self._found = f"{said}FSDP2 shards the base, so that the layer it comes from is not looked for."
            return
        self._tracing = True
        try:
            self._found = said + _traced(self.model, *inputs)
        finally:
            self._tracing = False

    def close_step(self) -> None:
        """After the update.

        Raises:
            ValueError: a loss of this step was not finite, and now trained values are not; names step and layer.
        """
        found, self._found = self._found, None
        if found is None:
            return
        if _spoiled_values(self.model) is not None:
            raise ValueError(f"{found} The update has made trained values that are not finite.")
        if not self._told:
            self._told = True
            logger.warning(f"{found} The update has left trained values finite, and the run goes on.")

    def _take_inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled() and not self._tracing:
            self._inputs = (args, kwargs)

    def _take_loss(self, module: nn.Module, args: tuple, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if self._inputs is not None and not self._tracing and isinstance(loss, Tensor):
            self._loss = loss.detach()


def watch_losses(run: LiveRun, model: nn.Module, args: TrainingArguments) -> LossWatch | None:
    """The watch of this run, one for all callbacks that take part; None for compiled models, which hooks would cut."""
    if args.torch_compile:
        return None
    return run.shared(LossWatch, lambda: LossWatch(model), LossWatch.remove)


def _spoiled_values(model: nn.Module) -> str | None:
    """The first layer, in the model's order, with trained values that are not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
            owner = next((m for m in adapter_layers(model) if any(p is parameter for p in m.parameters())), None)
            return name.removeprefix("base_model.model.") if owner is None else owner.module_name
    return None


def _traced(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str:
    """Where a forward pass stops being finite, found by doing it once more."""
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not found and not _is_finite(output):
                kind = "its input is finite" if _is_finite(inputs) else "its input is not finite either"
                found.append(f"'{name}' is the first layer whose output is not finite ({kind}).")

        return hook

    inner = [(name, module) for name, module in model.named_modules() if module is not model]
    hooks = [module.register_forward_hook(look(_layer_name(name))) for name, module in inner]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"{found[0]} Lower the learning rate, or train in bf16 where it is fp16; look at this batch too."
    labels = kwargs.get("labels")
    if isinstance(labels, Tensor) and labels.numel() and bool((labels == -100).all()):
        return "All labels of the batch are masked (-100), so that the mean is one of nothing: look at the collator."
    return "The output of every layer is finite, so it is the loss itself: look at the labels and at its terms."


def _layer_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _is_finite(content: Any) -> bool:
    if isinstance(content, Tensor):
        return not content.is_floating_point() or bool(torch.isfinite(content).all())
    if isinstance(content, dict):
        return all(_is_finite(value) for key, value in content.items() if key != "loss")
    if isinstance(content, (list, tuple)):
        return all(map(_is_finite, content))
    return True
