"""Whether a model's loss compares the logits of a position with its own label or with the next one's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_CAUSAL_CLASSES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_SHIFTING_LOSSES = ("ForCausalLM", "ForConditionalGeneration")
# Cross-entropies recomputed from 16-bit logits differ from the model's by less.
_CLOSE = 1e-2


@torch.no_grad()
def measured_shift(logits: Tensor, labels: Tensor, loss: Tensor, items: Tensor | int | None = None) -> bool | None:
    """Whether `loss` is the cross-entropy of `logits` `[batch, tokens, classes]` with the labels `[batch, tokens]` of
    the next position (True) or of the same one (False); None where it is neither, or both to 1 %.

    The loss may be a mean over the labels that are not -100 or, with `items`, their sum over that many.
    """
    logits, labels, loss = logits.detach().float(), labels.to(logits.device), float(loss.mean())
    if logits.ndim != 3 or logits.shape[:2] != labels.shape or int(labels.max()) >= logits.shape[-1]:
        return None
    norm, gaps = logits.logsumexp(-1), {}
    divisors = [] if items is None else [float(torch.as_tensor(items).flatten()[0])]
    for shift in (True, False):
        last = logits.shape[1] - shift
        target = labels[:, int(shift) :]
        counts = target != -100
        own = logits[:, :last].gather(-1, target.clamp_min(0)[..., None])[..., 0]
        total, number = float((norm[:, :last] - own)[counts].sum()), int(counts.sum())
        if not number:
            return None
        gaps[shift] = min(abs(total / n - loss) for n in (number, *divisors)) / max(abs(loss), 1e-12)
    nearer = gaps[True] < gaps[False]
    return nearer if gaps[nearer] < _CLOSE and gaps[not nearer] > 2 * gaps[nearer] + 1e-6 else None


def shift_by_class(model: nn.Module) -> bool:
    """What the model's class says: decoders that are trained on the next token shift, encoder-decoders do not."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    names = {cls.__name__ for cls in type(model).__mro__}
    if names & _CAUSAL_CLASSES or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return True
    return getattr(model, "loss_type", None) in _SHIFTING_LOSSES


def at_labels(each: Tensor, labels: Tensor, shifted: bool) -> Tensor:
    """What `each` `[batch, tokens]` holds at positions with a label, `[n]`; a label is that of its own position, or
    `shifted` of the one before."""
    each, labels = (each[:, :-1], labels[:, 1:]) if shifted else (each, labels)
    return each[labels.to(each.device) != -100]
