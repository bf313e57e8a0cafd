"""`BudgetCompetitionCallback`: matrices that compete for the entries that live, SNELLA's outer competition."""

from __future__ import annotations

import warnings

import torch

from ..rules.budgets import budget_of_training
from ..rules.collectives import all_reduce_mean
from ..rules.evidence import MissingEvidence, is_evidence
from ..rules.no_effect import report_idle
from ..sparsity import competition_counts, make_curve, whole_steps
from ..tuners.kernel_lora import KernelLoraConfig
from .base import AdaptedLayer, ScheduleCallback


def living_entries(config: KernelLoraConfig, sizes: list[int], update: int, total_steps: int) -> int:
    r"""Entries of all matrices that live after `update` steps: :math:`B_0 = \sum (1-s_0)\,mn` up to :math:`t_i`,
    :math:`B_T = \sum (1-s)\,mn` from :math:`T - t_f` on, between them
    :math:`B_T + (B_0 - B_T)(1 - \frac{t - t_i}{T - t_f - t_i})^3` rounded (Shen et al., 2025)."""
    start, target = (sum(n - round(s * n) for n in sizes) for s in (config.initial_sparsity, config.sparsity))
    first, last = _window(config, total_steps)
    progress = (update - first) / (last - first)
    return round(make_curve("cubic", start, target)(min(max(progress, 0.0), 1.0)))


def _window(config: KernelLoraConfig, total_steps: int) -> tuple[int, int]:
    budget = config.budget_competition
    first, final = (whole_steps(share, total_steps) for share in (budget.initial_warmup, budget.final_warmup))
    return first, total_steps - final


class BudgetCompetitionCallback(ScheduleCallback):
    r"""Shares the entries that live out between the matrices of adapters that set `budget_competition` (SNELLA; Shen et
    al., 2025).

    After every optimizer step each number w of P and Q updates its sensitivity
    :math:`I = |w\,\partial L/\partial w|`, :math:`\bar I \leftarrow \beta_1 \bar I + (1-\beta_1) I`, and uncertainty
    :math:`\bar U \leftarrow \beta_2 \bar U + (1-\beta_2)|I - \bar I|`. A matrix is worth
    :math:`\mathrm{mean}(\bar I_P \bar U_P) + \mathrm{mean}(\bar I_Q \bar U_Q)`, and gets its part of the budget
    (`living_entries`, `sparsity.competition_counts`). Up to :math:`t_i` importances are only collected, and every
    matrix keeps the `1 - initial_sparsity` of its entries that it started with, as in the official code. The gradients
    are those that the optimizer used: averaged over ranks, unscaled and clipped; the weights are those after its step,
    as in AdaLoRA.

    A step whose gradients are not finite is left out. A matrix that never had a gradient keeps its entries and is named
    in a warning; the others share the budget of their own sizes.
    """

    option = "budget_competition"

    def __init__(self) -> None:
        super().__init__()
        self.missing = MissingEvidence("the budget was not shared out")

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Find the layers."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.missing.start(state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Say if no layer could ever be judged."""
        self.missing.finish()
        super().on_train_end(args, state, control, **kwargs)

    def wants(self, layer, adapter: str) -> bool:
        """Layers whose points train."""
        return layer.holds(adapter) and layer.kernel_lora_P[adapter].requires_grad

    def check_length(self, config: KernelLoraConfig) -> None:
        """The run must hold one allocation at least."""
        if config.budget_competition.interval > self.total_steps:
            raise ValueError(
                f"budget_competition.interval={config.budget_competition.interval} is longer than the run of "
                f"{self.total_steps} steps: matrices would be compared once at most. Train longer or shorten it."
            )

    def check_effect(self, config: KernelLoraConfig) -> None:
        """Say that nothing can move between matrices."""
        parts = self.parts_of(config)
        cause = None
        if len(parts) == 1:
            cause = "budget_competition has one matrix, which has nothing to compete with: 0 entries ever move"
        elif config.sparsity == 0 and config.initial_sparsity == 0:
            cause = "budget_competition with sparsity=0: every entry lives, and 0 entries ever move"
        if cause:
            mend = "Adapt more modules, raise sparsity, or set budget_competition=None."
            report_idle([part.name for part in parts], len(parts), cause, mend)
            return
        first, last = _window(config, self.total_steps)
        interval = config.budget_competition.interval
        if config.sparsity != config.initial_sparsity and not any(u % interval == 0 for u in range(first + 1, last)):
            warnings.warn(
                f"budget_competition.interval={interval} leaves no allocation while the budget moves (steps "
                f"{first + 1} to {last} of {self.total_steps}): it jumps to sparsity={config.sparsity} at step {last}. "
                "Lower interval, shorten initial_warmup and final_warmup, or train longer.",
                stacklevel=3,
            )

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Update importances, then share the budget out where that is due."""
        update = state.global_step + 1
        for config in self.configs():
            parts = self.parts_of(config)
            for part in parts:
                update_sensitivity(part)
            first, last = _window(config, self.total_steps)
            if update > first and (update % config.budget_competition.interval == 0 or update == last):
                train = [part for part in parts if part.trains]
                judged = [part for part in train if is_evidence(part.layer.kernel_lora_sensitivity[part.adapter])]
                self.missing.record(update, [part.name for part in train if part not in judged], len(judged))
                counted = [part for part in parts if part in judged or not part.trains]
                sizes = [part.layer.numel for part in counted]
                alive = [part.layer.survivors(part.adapter) for part in counted]
                if judged:
                    budget = living_entries(config, sizes, update, self.total_steps)
                    share_out(judged, budget_of_training(budget, counted, alive, sizes))


@torch.no_grad()
def update_sensitivity(part: AdaptedLayer) -> None:
    """One step of both moving averages; nothing changes where a gradient is missing (a layer that did not run) or not
    finite (an fp16 overflow, whose step is skipped)."""
    config, factors = part.config.budget_competition, _factors(part)
    if any(factor.grad is None for factor in factors):
        return
    current = torch.cat([(factor * factor.grad).float().abs().reshape(-1) for factor in factors])
    if not torch.isfinite(current).all():
        return
    sensitivity = part.layer.kernel_lora_sensitivity[part.adapter]
    uncertainty = part.layer.kernel_lora_uncertainty[part.adapter]
    sensitivity.mul_(config.beta1).add_(current, alpha=1 - config.beta1)
    uncertainty.mul_(config.beta2).add_((current - sensitivity).abs_(), alpha=1 - config.beta2)


@torch.no_grad()
def matrix_score(part: AdaptedLayer) -> torch.Tensor:
    """Worth of one layer's matrix, fp64 `[]`: products of two small averages leave fp32's range."""
    product = part.layer.kernel_lora_sensitivity[part.adapter].double() * (
        part.layer.kernel_lora_uncertainty[part.adapter].double()
    )
    return sum(piece.mean() for piece in product.split([factor.numel() for factor in _factors(part)]))


def share_out(parts: list[AdaptedLayer], budget: int) -> None:
    """Give every matrix its part of `budget`, the same on all ranks."""
    if not parts:
        return
    device = parts[0].layer.kernel_lora_P[parts[0].adapter].device
    scores = all_reduce_mean(torch.stack([matrix_score(part).to(device) for part in parts])).tolist()
    names = [f"{part.name}.{number}" for number, part in enumerate(parts)]
    capacities = {name: part.layer.numel for name, part in zip(names, parts, strict=True)}
    counts = competition_counts(dict(zip(names, scores, strict=True)), capacities, budget)
    for name, part in zip(names, parts, strict=True):
        part.layer.write_survivors(part.adapter, counts[name])


def _factors(part: AdaptedLayer) -> list[torch.nn.Parameter]:
    return [part.layer.kernel_lora_P[part.adapter], part.layer.kernel_lora_Q[part.adapter]]
