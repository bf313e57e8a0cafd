"""Batches whose samples go through different adapters, `adapter_names`."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


class MixedBatches:
    """The part of `AdapterModel` that hands `adapter_names` to the layers; beside `BaseTuner`, before it."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self.adapted_layers() for name in layer.adapter_configs}
        unknown = sorted({name for name in adapter_names if name != "__base__"} - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        repeated = adapter_names
        if isinstance(beams, int) and beams > 1:
            repeated = [name for name in adapter_names for _ in range(beams)]
        # Beam search repeats the decoder's inputs only: an encoder keeps one name a sample.
        encoder = (
            self.model.get_encoder()
            if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
            else None
        )
        in_encoder = set(encoder.modules()) if encoder is not None else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, adapter_names=adapter_names if module in in_encoder else repeated),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs
