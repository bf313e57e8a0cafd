"""MOS: while an adapter learns its task, a part of the mean of earlier tasks' adapters is merged into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from ..tuners import AdapterLayer, adapter_layers
from ..tuners.upstream import upstream_low_rank
from ..utils.option_types import Fraction, check_value


class PullToEarlier:
    r"""Pulls an adapter towards the mean of earlier ones, :math:`A_b \leftarrow (1 - a)\,A_b + a\,\frac{1}{b}
    \sum_{i<b} A_i`, once at each call: after every optimizer step (adapter merging of MOS; Sun et al., 2025).

    It acts on each trained tensor by itself: values of supports, A and B. Optimizer state is left alone. Without
    earlier adapters (the first task) a call does nothing. The authors' code does the same in every layer of every
    forward pass too, in evaluation as well; here it is the paper's, once a step.

    In a Trainer it is `EarlierAdaptersCallback`; in a loop of your own call it behind `optimizer.step()`.

    Args:
        model: has all adapters; the earlier ones as they were at the end of their tasks.
        earlier: their names, in any order.
        adapter_name: the adapter that trains; None: the active one.
        rate: a (the authors: 0.1).

    Raises:
        ValueError: an unknown adapter, a rate outside of [0, 1], or an earlier adapter whose tensors in some layer have
            other shapes, or hold other units or bases: means of these are of no one form. Names the module.
    """

    def __init__(
        self, model: PeftModel, earlier: Sequence[str], adapter_name: str | None = None, rate: float = 0.1
    ) -> None:
        check_value(rate, Fraction, "rate")
        name = adapter_name or model.active_adapter
        unknown = [one for one in (name, *earlier) if one not in model.peft_config]
        if unknown or name in earlier or len(set(earlier)) < len(earlier):
            raise ValueError(
                f"earlier={list(earlier)} of adapter {name!r}: {unknown or 'each other one, once, is due'}; this model "
                f"has {sorted(model.peft_config)}."
            )
        self.rate, self.earlier = rate, list(earlier)
        self._pairs = [(own, _mean(others)) for own, others in _aligned(model, name, self.earlier)] if earlier else []

    @torch.no_grad()
    def __call__(self) -> None:
        """Pull once."""
        for parameter, mean in self._pairs:
            parameter.lerp_(mean.to(parameter.device, parameter.dtype), self.rate)


class EarlierAdaptersCallback(TrainerCallback):
    """`PullToEarlier` in a Trainer: made when training begins, called after every optimizer step that was not skipped.

    A resumed run needs the earlier adapters in the model again; nothing else is kept.
    """

    def __init__(self, earlier: Sequence[str], adapter_name: str | None = None, rate: float = 0.1) -> None:
        check_value(rate, Fraction, "rate")
        self.earlier, self.adapter_name, self.rate = list(earlier), adapter_name, rate
        self.pull: PullToEarlier | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module = None, **kwargs: Any) -> None:
        """Find the adapters."""
        peft_model = next(module for module in model.modules() if isinstance(module, PeftModel))
        self.pull = PullToEarlier(peft_model, self.earlier, self.adapter_name, self.rate)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Pull, unless a gradient scaler has left the update out."""
        if not getattr(optimizer, "step_was_skipped", False):
            self.pull()


def _aligned(model: PeftModel, name: str, earlier: Sequence[str]) -> Iterator[tuple[nn.Parameter, list[Tensor]]]:
    """Trained tensors of an adapter, each with those of the earlier ones."""
    layers = upstream_low_rank(model, name) or adapter_layers(model, adapter_name=name)
    for layer in layers:
        where = layer.module_name
        trained, kept = _tensors(layer, name)
        others = [_tensors(layer, one) for one in earlier]
        for one, (other, fixed) in zip(earlier, others, strict=True):
            if {key: t.shape for key, t in other.items()} != {key: t.shape for key, t in trained.items()}:
                raise ValueError(
                    f"Adapter '{one}' has other tensors in '{where}' than '{name}': the same ranks and numbers of "
                    "units are needed. Train all tasks with one config."
                )
            odd = [
                key for key in kept if key not in fixed or not torch.equal(kept[key], fixed[key].to(kept[key].device))
            ]
            if odd:
                raise ValueError(
                    f"Adapters '{one}' and '{name}' have other '{odd[0]}' in '{where}': their numbers belong to other "
                    "units or bases. Train all tasks on one support (the same seed, or save_support and load_support)."
                )
        for key, parameter in trained.items():
            yield parameter, [other[key] for other, _ in others]


def _tensors(layer: Any, name: str) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """What an adapter trains in a layer, and what says what these numbers are."""
    if not isinstance(layer, AdapterLayer):
        inner = layer.layer
        if name not in inner.scaling:
            return {}, {}
        halves = {part: getattr(inner, part)[name].weight for part in ("lora_A", "lora_B")}
        return halves, {"scaling": torch.tensor(float(inner.scaling[name]))}
    if not layer.holds(name):
        return {}, {}
    specs, held = layer.specs(name), layer.tensors(name)
    trained = {key: held[key] for key, spec in specs.items() if spec.role == "trained" and key in held}
    return trained, {key: held[key] for key, spec in specs.items() if spec.role == "saved" and key in held}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().float() for tensor in tensors]).mean(0)
