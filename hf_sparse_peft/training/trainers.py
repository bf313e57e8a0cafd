"""`TwoPassTrainer`: two forward passes a batch, whose outputs should agree (MoSA)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import Trainer

from ..rules import ExpertDraw
from ..tuners import adapter_layers
from ..utils.label_shift import at_labels, measured_shift, shift_by_class


class TwoPassTrainer(Trainer):
    r"""Trainer that evaluates every training batch twice, with draws of its own for each pass, on
    :math:`L = CE(y_1) + \lambda\,\frac{1}{2}(KL(y_1 \| y_2) + KL(y_2 \| y_1))`, `lambda` being
    `FactorExperts.consistency` (MoSA; Zhang et al., 2023). Both passes get gradients; evaluation is Trainer's own.

    Each target is detached, as in the released code: without that the divergence would pull twice as hard. It is
    averaged as the loss is: over the tokens (or samples) with a label. Whether the loss shifts labels by one token is
    measured on the batch, and read from the model's class where that does not tell; the config's `task_type` has no
    part in it. Works with gradient checkpointing: recomputation finds the draws of its own pass.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"two_passes"})
    """What rules may rely on (`Rule.needs`)."""
    _shifts: bool | None = None
    """Whether the loss compares logits with the next token's label; None until a batch has told."""

    def _draws(self) -> list[ExpertDraw]:
        found = {}
        for layer in adapter_layers(self.model):
            draws = getattr(layer, "expert_draws", {})
            found |= {id(draws[name]): draws[name] for name in layer.active_adapters if name in draws}
        return [draw for draw in found.values() if draw.consistency]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of two passes in training, of one otherwise.

        Raises:
            ValueError: the model gives no logits.
        """
        draws = self._draws() if model.training else []
        if not draws:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        passes, labels = [], inputs.get("labels")
        for number in (0, 1):
            _set_pass(draws, number)
            loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
            logits = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
            if logits is None:
                raise ValueError("TwoPassTrainer compares logits, and the model's output has none.")
            if labels is not None and self._shifts is None:
                self._shifts = self._measured_shift(logits, labels, loss, num_items_in_batch)
            # These nodes are the last of the pass, so that backward goes through them first.
            back = _Before.apply(draws, number, loss, logits)
            passes.append((*back, outputs))
        (loss, first, outputs), (_, second, _) = passes
        weight = max(draw.consistency for draw in draws)
        total = loss + weight * self._divergence(first, second, labels, num_items_in_batch)
        return (total, outputs) if return_outputs else total

    def _measured_shift(self, logits, labels, loss, num_items_in_batch) -> bool | None:
        counted = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        if counted and self.args.average_tokens_across_devices:  # Trainer has multiplied the loss
            loss = loss / self.accelerator.num_processes
        return measured_shift(logits, labels, loss, num_items_in_batch)

    def _divergence(self, first, second, labels, num_items_in_batch) -> torch.Tensor:
        each = symmetric_divergence(first, second)
        if labels is not None and each.ndim > 1 and labels.shape == each.shape:
            shifted = self._shifts
            if shifted is None:
                base = getattr(self.model, "get_base_model", lambda: self.model)()
                shifted = shift_by_class(base)
            each = at_labels(each, labels, shifted)
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs or each.ndim == 0:
            return each.mean()
        total = each.sum() / num_items_in_batch
        # As Trainer does with the loss itself.
        return total * self.accelerator.num_processes if self.args.average_tokens_across_devices else total


def symmetric_divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    r""":math:`\frac{1}{2}(KL(\bar q \| p) + KL(\bar p \| q))` of the softmax over the last axis, in fp32; exactly 0 for
    equal logits. The bars are detached: each pass is pulled to the other, which stands still."""
    p, q = first.float().log_softmax(-1), second.float().log_softmax(-1)
    fixed_p, fixed_q = p.detach(), q.detach()
    return 0.5 * (fixed_q.exp() * (fixed_q - p) + fixed_p.exp() * (fixed_p - q)).sum(-1)


def _set_pass(draws: list[ExpertDraw], number: int) -> None:
    for draw in draws:
        draw.number = number


class _Before(torch.autograd.Function):
    """The identity; in the backward pass it sets the pass whose gradient comes through."""

    @staticmethod
    def forward(ctx: Any, draws: list[ExpertDraw], number: int, loss: torch.Tensor, logits: torch.Tensor):
        ctx.draws, ctx.number = draws, number
        return loss.view_as(loss), logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, loss: torch.Tensor, logits: torch.Tensor):
        _set_pass(ctx.draws, ctx.number)
        return None, None, loss, logits
