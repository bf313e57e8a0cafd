"""`SplitFactorsCallback` and `TwoPassTrainer`: experts of split low-rank factors, drawn for every pass (MoSA)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from ..optim import innermost
from ..tuners import adapter_layers
from ..tuners.shared.layer import AdapterLayer
from ..tuners.sparse_lora import SparseLoraConfig
from ..tuners.sparse_lora.factors import drawn_expert
from ..utils.label_shift import measured_shift, shift_by_class
from .base import AdaptedLayer, ScheduleCallback


class SplitFactorsCallback(ScheduleCallback):
    """Draws the experts of adapters whose `factor_masks` split their factors (MoSA; Zhang et al., 2023).

    Every forward pass of training uses one expert of each factor and layer; the draw is a hash of seed, module, step,
    micro-batch and pass: the same on every rank, in recomputation and after a resume. Entries of experts that a step
    did not draw keep value and optimizer moments bit for bit, weight decay included, as if they had no gradient. One
    thing differs from experts with parameters of their own: a scalar `step` of the optimizer counts all steps, so the
    first steps of an expert that was drawn late are smaller than bias correction would make them.
    """

    option = "factor_masks"

    def __init__(self) -> None:
        super().__init__()
        self._draws: list[tuple[int, int]] = []
        self._kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def wants(self, layer: AdapterLayer, adapter: str) -> bool:
        """Layers with trained, split factors."""
        held = layer.sparse_lora_B
        split = adapter in held and layer.adapter_configs[adapter].factor_masks.kind == "stochastic"
        return split and held[adapter].requires_grad

    def check_length(self, config: SparseLoraConfig) -> None:
        """Two passes need the trainer that makes them."""
        trainer = self.run.trainer() if self.run.trainer is not None else None
        if config.factor_masks.consistency and not isinstance(trainer, TwoPassTrainer):
            raise ValueError(
                f"factor_masks.consistency={config.factor_masks.consistency} compares two passes of a batch, and this "
                "Trainer makes one. Use hf_sparse_peft.training.TwoPassTrainer (methods.get('mosa').trainer_class), "
                "or set consistency=0."
            )

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """The first micro-batch's draw."""
        self._draws = []
        self._set(state.global_step, 0)

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        """The next micro-batch's draw."""
        self._set(state.global_step, len(self._draws))

    def _set(self, step: int, micro: int) -> None:
        self._draws.append((step, micro))
        for config in self.configs():
            config._draw = (step, micro, 0)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Keep what the step must not move."""
        states = innermost(optimizer).state
        self._kept = []
        for part in self.parts:
            for factor in ("A", "B"):
                owners = getattr(part.layer, f"sparse_lora_{factor}_map")
                if part.adapter not in owners:
                    continue
                parameter = getattr(part.layer, f"sparse_lora_{factor}")[part.adapter]
                idle = ~torch.isin(owners[part.adapter], self._drawn(part, factor).to(parameter.device))
                tensors = [parameter.data, *_entry_states(states.get(parameter, {}), parameter)]
                self._kept += [(tensor, idle, tensor[idle].clone()) for tensor in tensors]

    def _drawn(self, part: AdaptedLayer, factor: str) -> torch.Tensor:
        passes = range(2 if part.config.factor_masks.consistency else 1)
        found = {drawn_expert(part.layer, part.adapter, factor, (*draw, p)) for draw in self._draws for p in passes}
        return torch.tensor(sorted(found), dtype=torch.uint8)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Put it back."""
        self._put_back()

    @torch.no_grad()
    def _put_back(self) -> None:
        for tensor, idle, values in self._kept:
            tensor[idle] = values
        self._kept = []

    def release(self) -> None:
        """From here on every forward pass uses the merge; what a broken-off step may have moved is put back."""
        self._put_back()
        for config in self.configs():
            config._draw = None


def _entry_states(state: dict[str, Any], parameter: torch.Tensor) -> list[torch.Tensor]:
    found = [v for v in state.values() if isinstance(v, torch.Tensor) and v.shape == parameter.shape]
    if any(not tensor.is_floating_point() for tensor in found):
        raise ValueError(
            "factor_masks split factors into experts whose optimizer state rests while they are not drawn, and 8-bit "
            "state cannot be edited entry by entry. Use a 32-bit optimizer, or hf_sparse_peft.optim.use_32bit_states."
        )
    return found


class TwoPassTrainer(Trainer):
    r"""Trainer that evaluates every training batch twice, with draws of its own for each pass, on
    :math:`L = CE(y_1) + \lambda\,\frac{1}{2}(KL(y_1 \| y_2) + KL(y_2 \| y_1))`, `lambda` being
    `factor_masks.consistency` (MoSA; Zhang et al., 2023). Both passes get gradients; evaluation is Trainer's own.

    Each target is detached, as in the released code: without that the divergence would pull twice as hard. It is
    averaged as the loss is: over the tokens (or samples) with a label. Whether the loss shifts labels by one token is
    measured on the batch, and read from the model's class where that does not tell; the config's `task_type` has no
    part in it. Works with gradient checkpointing: recomputation finds the draws of its own pass.
    """

    _shifts: bool | None = None
    """Whether the loss compares logits with the next token's label; None until a batch has told."""

    def _configs(self) -> list[SparseLoraConfig]:
        found = {}
        for layer in adapter_layers(self.model):
            for name in layer.active_adapters:
                config = layer.adapter_configs.get(name)
                masks = getattr(config, "factor_masks", None)
                if masks is not None and masks.kind == "stochastic" and masks.consistency:
                    found[id(config)] = config
        return [config for config in found.values() if getattr(config, "_draw", None) is not None]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of two passes in training, of one otherwise.

        Raises:
            ValueError: the model gives no logits.
        """
        configs = self._configs() if model.training else []
        if not configs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        passes, labels = [], inputs.get("labels")
        for number in (0, 1):
            draws = [(config, (*config._draw[:2], number)) for config in configs]
            _set_draws(draws)
            loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
            logits = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
            if logits is None:
                raise ValueError("TwoPassTrainer compares logits, and the model's output has none.")
            if labels is not None and self._shifts is None:
                self._shifts = self._measured_shift(logits, labels, loss, num_items_in_batch)
            # These nodes are the last of the pass, so that backward goes through them first.
            back = _Before.apply(draws, loss, logits)
            passes.append((*back, outputs))
        (loss, first, outputs), (_, second, _) = passes
        weight = max(config.factor_masks.consistency for config in configs)
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
            each, labels = (each[:, :-1], labels[:, 1:]) if shifted else (each, labels)
            each = each[labels != -100]
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


def _set_draws(draws: list[tuple[SparseLoraConfig, tuple[int, ...]]]) -> None:
    for config, draw in draws:
        config._draw = draw


class _Before(torch.autograd.Function):
    """The identity; in the backward pass it sets the draws of the pass whose gradient comes through."""

    @staticmethod
    def forward(ctx: Any, draws: list, loss: torch.Tensor, logits: torch.Tensor):
        ctx.draws = draws
        return loss.view_as(loss), logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, loss: torch.Tensor, logits: torch.Tensor):
        _set_draws(ctx.draws)
        return None, loss, logits
