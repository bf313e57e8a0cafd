"""Calibration data as batches that several passes read, and losses of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .block_inputs import digest


@dataclass
class CalibrationBatches:
    """Batches on the model's device."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    """`[sequences, tokens]` of each batch, true for tokens that count; None: all."""
    digest: str = ""
    """The same for the same data in the same order."""
    progress: Any = None
    """A bar that moves by one after each batch."""

    def losses(self, model: nn.Module) -> Iterator[Tensor]:
        """The model's own loss of each batch, with its graph.

        Raises:
            ValueError: no labels where the model does not predict its own inputs, or a loss that is not finite.
        """
        for at in range(len(self.inputs)):
            loss = model(**self._with_labels(model, at), **no_cache(model)).loss
            if loss is None or not bool(loss.isfinite()):
                found = None if loss is None else float(loss.detach())
                raise ValueError(
                    f"The loss of batch {at} is {found}, so nothing can be scored by its gradients. Under fp16 use "
                    "bf16 or fp32; check that labels are not all masked (-100)."
                )
            yield loss
            if self.progress is not None:
                self.progress.update()

    def _with_labels(self, model: nn.Module, at: int) -> dict[str, Any]:
        inputs = {key: value for key, value in self.inputs[at].items() if key != "use_cache"}
        if inputs.get("labels") is not None:
            return inputs
        if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) or "input_ids" not in inputs:
            raise ValueError(
                f"A batch has no labels, and gradients of {type(model).__name__} are those of a loss: put 'labels' "
                "into the batches."
            )
        labels, mask = inputs["input_ids"], self.masks[at]
        return {**inputs, "labels": labels if mask is None else labels.masked_fill(~mask.bool(), -100)}


def read_batches(batches: Iterable[Mapping[str, Any]], device: Any) -> CalibrationBatches:
    """All batches, moved to `device`.

    Raises:
        ValueError: no batch.
        TypeError: a batch is no mapping.
    """
    found, digests = CalibrationBatches(), []
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"dataloader gives a {type(batch).__name__}, and the model takes mappings such as {{'input_ids': ..., "
                "'attention_mask': ...}. Pass an iterable of those."
            )
        found.inputs.append({key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()})
        mask = found.inputs[-1].get("attention_mask")
        found.masks.append(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
        digests += [f"{key} {digest(batch[key])}" for key in sorted(batch) if isinstance(batch[key], Tensor)]
    if not found.inputs:
        raise ValueError("dataloader gave no batch: pruning by inputs needs some, 128 sequences in the papers.")
    found.digest = digest(torch.frombuffer(bytearray("\n".join(digests).encode()), dtype=torch.uint8))
    return found


def no_cache(model: nn.Module) -> dict[str, Any]:
    """`use_cache=False` where the model knows of it."""
    return {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) is not None else {}


@contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter asks for its gradient inside; the flags are back afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
