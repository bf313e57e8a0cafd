"""`Distil`: the loss is mixed with the divergence from the base without its adapter."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..utils.label_shift import at_labels, measured_shift, shift_by_class
from ..utils.option_types import PositiveFloat, PositiveFraction
from ..utils.parts import register_part
from .probing import modes_kept
from .rule import Rule
from .run import Run

_DISTILLED: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
"""Models whose loss a running rule mixes."""


@register_part("distil")
@dataclass(frozen=True)
class Distil(Rule):
    r"""Self-distillation: :math:`L = \eta\,\tau^2\,KL(P_0 \| P) + (1-\eta)\,CE` in training passes, where :math:`P_0`
    are the probabilities of the base without adapters, unmasked and in evaluation mode, :math:`P` the model's, both at
    temperature :math:`\tau` (CAST; Huang et al., 2025).

    The divergence is taken in fp32 and averaged as the loss is: over positions with a label, by `num_items_in_batch`
    where that is given. It shows in the loss. Costs one more forward pass, and the logits of it. Works where the model
    itself computes the loss: not with `compute_loss_func` or label smoothing, which the first step says.
    """

    weight: PositiveFraction = 1 / 3
    r""":math:`\eta` (CAST: 1/3)."""
    temperature: PositiveFloat = 1.0
    r""":math:`\tau` (CAST: 1; its predecessor, AST: 2)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"module"})
    writes: ClassVar[frozenset[str]] = frozenset({"forward"})

    def check(self, config: Any) -> None:
        """Refuse an adapter that trains what the teacher is made of."""
        super().check(config)
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"Distil's teacher is the base, and bias={config.bias!r} trains the base's own biases. Set bias='none'."
            )

    def begin(self, run: Run) -> None:
        """One adapter distils.

        Raises:
            ValueError: another active adapter asks for it too.
        """
        other = _DISTILLED.get(run.model)
        if other is not None and other.adapter != run.adapter:
            raise ValueError(
                f"Distil mixes the loss of the whole model, and adapters '{other.adapter}' and '{run.adapter}' both "
                "ask for it. Take it out of the schedule of one."
            )
        _DISTILLED[run.model] = run
        run.memory.shifted = None

    def before_step(self, run: Run) -> None:
        """Mix the loss of the step's passes."""
        run.for_this_step([self._mixed_loss(run)])

    def release(self, run: Run) -> None:
        """Let others distil."""
        if _DISTILLED.get(run.model) is run:
            del _DISTILLED[run.model]

    @contextmanager
    def _mixed_loss(self, run: Run) -> Iterator[None]:
        handle = run.model.register_forward_hook(partial(self._mix, run), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _mix(self, run: Run, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training or not torch.is_grad_enabled():
            return None
        loss, logits = (getattr(output, name, None) for name in ("loss", "logits"))
        if not isinstance(output, ModelOutput) or loss is None or logits is None:
            raise ValueError(
                "Distil needs the model's own loss and logits, and its output has not both. Give batches labels, and "
                "train without compute_loss_func, label_smoothing_factor and return_dict=False."
            )
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        if run.memory.shifted is None and labels is not None:
            run.memory.shifted = measured_shift(logits, labels, loss, items)
        with adapters_left_out(model), modes_kept(model, training=False), torch.no_grad():
            passed = {name: value for name, value in kwargs.items() if name not in ("labels", "num_items_in_batch")}
            if hasattr(getattr(model, "config", None), "use_cache"):
                passed["use_cache"] = False
            teacher = model.forward(*args, **passed).logits
        each = divergence(teacher, logits, self.temperature)
        if labels is not None and labels.shape == each.shape and each.ndim > 1:
            base = getattr(model, "get_base_model", lambda: model)()
            shifted = shift_by_class(base) if run.memory.shifted is None else run.memory.shifted
            each = at_labels(each, labels, shifted)
        pulled = each.mean() if items is None or each.ndim == 0 else each.sum() / items
        output.loss = self.weight * pulled.to(loss) + (1 - self.weight) * loss
        return output


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    r""":math:`\tau^2 KL(P_0 \| P)` of the softmax over the last axis of logits over :math:`\tau`, in fp32, of the shape
    of the other axes."""
    p = (teacher.float() / temperature).log_softmax(-1)
    q = (student.float() / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


@contextmanager
def adapters_left_out(model: nn.Module) -> Iterator[None]:
    """Inside, passes go through the base alone, heads of `modules_to_save` included. Unlike peft's `disable_adapter`
    it leaves alone what trains: a pass may lie between a forward and its backward."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
