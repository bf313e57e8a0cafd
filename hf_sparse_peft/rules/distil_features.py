"""`DistilFeatures`: hidden states, and logits, are pulled to those of the base without its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..utils.option_types import NonNegativeFloat
from ..utils.parts import register_part, require
from .distil import adapters_left_out
from .forward_terms import share_of_step
from .probing import modes_kept
from .rule import Rule
from .run import Run


@register_part("distil_features")
@dataclass(frozen=True)
class DistilFeatures(Rule):
    r"""Feature distillation: in training passes
    :math:`L + \alpha\,\frac{1}{L} \sum_l \mathrm{MSE}(h_l, h_l^0) + \beta\,\mathrm{MSE}(z, z^0)` with the hidden states
    h of all layers and the logits z, of the model and of the base without adapters in evaluation mode (PELA; Guo et
    al., 2024).

    Positions that a batch's attention mask hides are left out of the means, which are fp32; micro-batches count by
    their labels, as in the loss, in which it shows. Costs one more forward pass, and the hidden states of both. A
    factored adapter keeps its base for it (`keep_base=True`).
    """

    features: NonNegativeFloat = 1.0
    r""":math:`\alpha` (DeiT, Swin: 1; ALBEF: 0.1)."""
    logits: NonNegativeFloat = 0.0
    r""":math:`\beta` (0, as published)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"module"})
    writes: ClassVar[frozenset[str]] = frozenset({"forward"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.features + self.logits > 0, self, "features", "more than 0 where logits=0: nothing is distilled")

    def check(self, config: Any) -> None:
        """Refuse an adapter whose base is gone, or trains."""
        super().check(config)
        if getattr(config, "keep_base", True) is False:
            raise ValueError("DistilFeatures' teacher is the base, and keep_base=False. Set keep_base=True.")
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"DistilFeatures' teacher is the base, and bias={config.bias!r} trains its biases. Set bias='none'."
            )

    def begin(self, run: Run) -> None:
        """Nothing is known of the labels yet."""
        run.memory.shifted = None

    def before_step(self, run: Run) -> None:
        """Add to the loss of the step's passes."""
        run.for_this_step([self._added_loss(run)])

    @contextmanager
    def _added_loss(self, run: Run) -> Iterator[None]:
        handles = [
            run.model.register_forward_pre_hook(_with_hidden_states, with_kwargs=True),
            run.model.register_forward_hook(partial(self._add, run), with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, run: Run, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training or not torch.is_grad_enabled():
            return None
        wanted = ("loss", "logits", "hidden_states")
        if not isinstance(output, ModelOutput) or any(getattr(output, name, None) is None for name in wanted):
            raise ValueError(
                "DistilFeatures needs the model's own loss, logits and hidden states, and its output has not all. Give "
                "batches labels, and train without compute_loss_func and return_dict=False."
            )
        passed = {name: value for name, value in kwargs.items() if name not in ("labels", "num_items_in_batch")}
        if hasattr(getattr(model, "config", None), "use_cache"):
            passed["use_cache"] = False
        with adapters_left_out(model), modes_kept(model, training=False), torch.no_grad():
            teacher = model.forward(*args, **passed)
        mask, added = kwargs.get("attention_mask"), output.loss.new_zeros((), dtype=torch.float32)
        if self.features:
            pairs = list(zip(output.hidden_states[1:], teacher.hidden_states[1:], strict=True))
            added = added + self.features * sum(mean_squared(*pair, mask) for pair in pairs) / len(pairs)
        if self.logits:
            added = added + self.logits * mean_squared(output.logits, teacher.logits, mask)
        output.loss = output.loss + share_of_step(run, output, kwargs) * added.to(output.loss)
        return output


def mean_squared(one: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean squared difference in fp32; `mask` `[batch, tokens]`, where tensors have these axes, says which tokens
    count."""
    squared = (one.float() - other.float()).square()
    if mask is None or mask.ndim != 2 or squared.shape[:2] != mask.shape or squared.ndim != 3:
        return squared.mean()
    mask = mask.to(squared)[..., None]
    return (squared * mask).sum() / (mask.sum() * squared.shape[-1]).clamp_min(1)


def _with_hidden_states(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "output_hidden_states": True} if model.training else kwargs
