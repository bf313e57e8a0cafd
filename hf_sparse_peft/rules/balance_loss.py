"""`BalanceLoss`: experts are pulled to take equally many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..utils.option_types import PositiveFloat
from ..utils.parts import register_part
from .forward_terms import share_of_step
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("balance_loss")
@dataclass(frozen=True)
class BalanceLoss(Rule):
    r"""Load balancing of routed experts: in training passes the loss has
    :math:`\lambda \sum_\mathrm{layers} E \sum_e f_e P_e` more, with :math:`f_e` the part of a layer's assignments of
    tokens that expert e was chosen for, before capacity, and :math:`P_e` the mean of its probability (Switch; Fedus et
    al., 2022; SiRA; Zhu et al., 2023). E are the experts that live. It is 1 a layer where routing is uniform, E where
    one expert has all of it, and has no gradient through f.

    Both are over all tokens that a layer is given in a pass of the model, however often it runs there; tokens that the
    mask hides do not count. Micro-batches count by their labels, as in the loss, in which it shows; each process of a
    distributed run balances the tokens of its own passes, and gradients are averaged. Evaluation is without it.
    """

    weight: PositiveFloat = 0.01
    r""":math:`\lambda`."""
    of: Literal["chosen", "first"] = "chosen"
    r"""What :math:`f_e` counts: all assignments, or each token's most likely expert alone (GShard; Lepikhin et al.,
    2021; MPOE; Gao et al., 2022, whose code takes the mean of the sequences' sums)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"expert"})
    writes: ClassVar[frozenset[str]] = frozenset({"forward"})

    def check(self, config: Any) -> None:
        """Refuse a router that gives every token to all experts: the sum is 1, whatever it does."""
        super().check(config)
        if not config.form.routes:
            raise ValueError(
                f"BalanceLoss is 1 where all experts take every token, and form has top_k={config.form.top_k}. Set "
                "top_k, or leave it out of schedule."
            )

    def begin(self, run: Run) -> None:
        """Nothing is known of the labels yet."""
        run.memory.shifted = None

    def before_step(self, run: Run) -> None:
        """Add to the loss of the step's passes."""
        run.for_this_step([self._added_loss(run)])

    @contextmanager
    def _added_loss(self, run: Run) -> Iterator[None]:
        seen: dict[UnitSpace, list[Tensor]] = {space: [] for space in run.spaces()}
        with ExitStack() as stack:
            for space, routings in seen.items():
                stack.enter_context(space.reading(routings.append))
            for handle in (
                run.model.register_forward_pre_hook(lambda *_: _forget(seen)),
                run.model.register_forward_hook(partial(self._add, run, seen), with_kwargs=True),
            ):
                stack.callback(handle.remove)
            stack.callback(_forget, seen)
            yield

    def _add(
        self, run: Run, seen: dict[UnitSpace, list[Tensor]], model: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> Any:
        if not model.training or not torch.is_grad_enabled():
            return None
        if not isinstance(output, ModelOutput) or getattr(output, "loss", None) is None:
            raise ValueError(
                "BalanceLoss adds to the model's own loss, and its output has none. Give batches labels, and train "
                "without compute_loss_func and return_dict=False."
            )
        found = [balance(routings, space.count, self.of) for space, routings in seen.items() if routings]
        if found and not any(one.requires_grad for one in found):
            raise ValueError(
                "BalanceLoss saw no router in the graph of a training pass. Set gradient_checkpointing_kwargs="
                "{'use_reentrant': False}."
            )
        _forget(seen)
        if found:
            added = self.weight * torch.stack([one.to(output.loss.device) for one in found]).sum()
            output.loss = output.loss + (share_of_step(run, output, kwargs) * added).to(output.loss)
        return output


def balance(routings: list[Tensor], experts: int, of: str = "chosen") -> Tensor:
    r""":math:`E \sum_e f_e P_e` of what a layer's passes noted, `[3, n, E]` each; 0 without a token."""
    both = torch.cat(routings, 1)
    chosen = both[1].detach()
    if of == "first":
        chosen = torch.zeros_like(chosen).scatter_(-1, both[0].detach().argmax(-1, keepdim=True), 1)
    chosen = chosen.sum(0)
    return experts * (chosen / chosen.sum().clamp_min(1) * both[0].sum(0)).sum() / max(both.shape[1], 1)


def _forget(seen: dict[UnitSpace, list[Tensor]]) -> None:
    for routings in seen.values():
        routings.clear()
