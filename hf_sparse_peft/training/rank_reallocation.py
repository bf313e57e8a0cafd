"""`RankReallocationCallback`: ranks that move between layers, AdaLoRA's rule on the gate."""

from __future__ import annotations

import warnings

import torch

from ..rules.budgets import budget_of_training
from ..rules.evidence import MissingEvidence, is_evidence
from ..rules.no_effect import report_idle
from ..sparsity import stream_seed, top_units, whole_steps
from ..tuners.sparse_lora import RankAllocationConfig, SparseLoraConfig, SparseLoraLayer
from .base import AdaptedLayer, ScheduleCallback


def rank_budget(config: RankAllocationConfig, start: int, target: int, step: int, total_steps: int) -> int:
    r"""Components that live from step `t` on: `start` up to :math:`t_i`, `target` after
    :math:`T - t_f`, between them :math:`b_T + (b_0 - b_T)(1 - \frac{t - t_i}{T - t_i - t_f})^3` truncated (Zhang et
    al., 2023)."""
    first, last = _window(config, total_steps)
    if step <= first:
        return start
    if step > last:
        return target
    return int(target + (start - target) * (1 - (step - first) / (last - first)) ** 3)


def _window(config: RankAllocationConfig, total_steps: int) -> tuple[int, int]:
    final = whole_steps(config.final_warmup, total_steps)
    return whole_steps(config.initial_warmup, total_steps), total_steps - final


def _fixed(config: RankAllocationConfig, total_steps: int) -> int:
    """The step at which the mask is taken for the last time."""
    return min(_window(config, total_steps)[1], total_steps - 1 + config.count_from)


class RankReallocationCallback(ScheduleCallback):
    r"""Moves rank between the layers of adapters that set `rank_allocation` (AdaLoRA; Zhang et al., 2023).

    After every optimizer step each entry w of A, B and gate updates its sensitivity
    :math:`I = |w\,\partial L/\partial w|`, :math:`\bar I \leftarrow \beta_1 \bar I + (1-\beta_1) I` and uncertainty
    :math:`\bar U \leftarrow \beta_2 \bar U + (1-\beta_2)|I - \bar I|`. A component is worth
    :math:`s(g_i) + \mathrm{mean}_j\,s(A_{ij}) + \mathrm{mean}_j\,s(B_{ji})` with :math:`s = \bar I \bar U`; the
    budget's best over the whole model live, exactly as many as the budget says, and the others' gates are zeroed. While
    the budget falls a zeroed gate may come back.

    At step t, which is what peft's `RankAllocator` takes as `global_step`, importances are updated if
    :math:`t < T - t_f`; masks are due at multiples of the interval with :math:`t_i < t < T - t_f`, and the last one,
    at the target, at :math:`t = T - t_f` (or the run's last step). From there on it is fixed and applied at every step.
    `count_from` says whether t runs from 1 to T, as in the paper's algorithm, or from 0 to T - 1, as in the official
    training loop.

    A layer whose gates never had a gradient keeps its components and is named in a warning; the others share the budget
    of their own number.
    """

    option = "rank_allocation"

    def __init__(self) -> None:
        super().__init__()
        self.missing = MissingEvidence("components were not compared")

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Find the layers."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.missing.start(state.global_step)

    def wants(self, layer: SparseLoraLayer, adapter: str) -> bool:
        """Layers with a trained gate."""
        return adapter in layer.sparse_lora_gate and layer.sparse_lora_gate[adapter].requires_grad

    def check_length(self, config: SparseLoraConfig) -> None:
        """The budget must have a step to fall in."""
        first, last = _window(config.rank_allocation, self.total_steps)
        if last <= first:
            raise ValueError(
                f"rank_allocation.initial_warmup={config.rank_allocation.initial_warmup} and final_warmup="
                f"{config.rank_allocation.final_warmup} leave no step of {self.total_steps} for the budget to fall in. "
                "Train longer or shorten them."
            )

    def check_effect(self, config: SparseLoraConfig) -> None:
        """Say that no rank leaves, or that all of it leaves at one step."""
        allocation, parts = config.rank_allocation, self.parts_of(config)
        start, target = self._budgets(parts)
        first, last = _window(allocation, self.total_steps)
        if target >= start:
            report_idle(
                [part.name for part in parts],
                len(parts),
                f"rank_allocation.target_r={allocation.target_r} a layer is no less than the {start} components that "
                f"{len(parts)} layers start with: 0 components ever leave",
                "Raise r (AdaLoRA: 1.5 x target_r), lower target_r, or set rank_allocation=None.",
            )
        elif not any(
            step % allocation.interval == 0 for step in range(first + 1, _fixed(allocation, self.total_steps))
        ):
            warnings.warn(
                f"rank_allocation.interval={allocation.interval} leaves no allocation while the budget falls (steps "
                f"{first + 1} to {last} of {self.total_steps}): all rank leaves at once at step {last}. Lower "
                "interval, shorten initial_warmup and final_warmup, or train longer.",
                stacklevel=3,
            )

    @staticmethod
    def _budgets(parts: list[AdaptedLayer]) -> tuple[int, int]:
        """Components of one adapter at the start and at the end."""
        start = sum(part.layer.sizes[part.adapter].rank for part in parts)
        return start, min(parts[0].config.rank_allocation.target_r * len(parts), start)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Add the penalty's gradient, in the units that the loss's gradient has at this point."""
        scaler = getattr(optimizer, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None and not args.max_grad_norm else 1.0
        for config in self.configs():
            self.add_gradient(config, state.global_step + 1, scale)

    def add_gradient(self, config: SparseLoraConfig, update: int, scale: float) -> None:
        """Add the orthogonality regulariser's gradient."""
        if config.rank_allocation.orthogonality:
            add_orthogonality_gradient(self.parts_of(config), scale * config.rank_allocation.orthogonality)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Update importances from the weights after the step and the gradients before it, then mask what is due."""
        for config in self.configs():
            parts = self.parts_of(config)
            first, last = _window(config.rank_allocation, self.total_steps)
            step = state.global_step + config.rank_allocation.count_from
            fixed = _fixed(config.rank_allocation, self.total_steps)
            if step < last:
                for part in parts:
                    update_importance(part)
            due = first < step < fixed and step % config.rank_allocation.interval == 0
            train = [part for part in parts if part.trains]
            # What rested at the last allocation follows when it trains again.
            late = step > fixed and len(train) < len(parts)
            if due or step == fixed or late:
                self.missed = self.missed or len(train) < len(parts)
                judged = [part for part in train if has_evidence(part)]
                self.missing.record(
                    state.global_step + 1, [part.name for part in train if part not in judged], len(judged)
                )
                if judged:
                    counted = [part for part in parts if part in judged or not part.trains]
                    start, target = self._budgets(counted)
                    budget = rank_budget(config.rank_allocation, start, target, step, self.total_steps)
                    alive = [part.layer.alive_components(part.adapter) for part in counted]
                    sizes = [part.layer.sizes[part.adapter].rank for part in counted]
                    budget = budget_of_training(budget if due else target, counted, alive, sizes)
                    living = sum(part.layer.alive_components(part.adapter) for part in judged)
                    if not late or budget < living:
                        allocate(judged, budget, step)
            if due or step >= fixed:
                for part in train:
                    apply_mask(part)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Say if no layer could ever be judged, or if layers at rest kept the budget from being reached."""
        self.missing.finish()
        if self.missed and state.global_step >= state.max_steps:
            for config in self.configs():
                parts = self.parts_of(config)
                alive = sum(part.layer.alive_components(part.adapter) for part in parts)
                target = config.rank_allocation.target_r * len(parts)
                if alive > target:
                    warnings.warn(
                        f"rank_allocation.target_r={config.rank_allocation.target_r} was not reached: {alive} "
                        f"components live instead of {target}, because layers rested when they were due. Shorten the "
                        "rounds, or raise final_warmup.",
                        stacklevel=2,
                    )
        super().on_train_end(args, state, control, **kwargs)


def _tensors(part: AdaptedLayer) -> list[torch.nn.Parameter]:
    layer, name = part.layer, part.adapter
    return [layer.sparse_lora_gate[name], layer.sparse_lora_A[name], layer.sparse_lora_B[name]]


@torch.no_grad()
def update_importance(part: AdaptedLayer) -> None:
    """One step of both moving averages; nothing changes where a gradient is missing (a skipped step)."""
    config, tensors = part.config.rank_allocation, _tensors(part)
    if any(tensor.grad is None for tensor in tensors):
        return
    current = torch.cat([(tensor * tensor.grad).abs().float().reshape(-1) for tensor in tensors])
    if not torch.isfinite(current).all():
        return
    sensitivity = part.layer.sparse_lora_sensitivity[part.adapter]
    uncertainty = part.layer.sparse_lora_uncertainty[part.adapter]
    sensitivity.mul_(config.beta1).add_(current, alpha=1 - config.beta1)
    uncertainty.mul_(config.beta2).add_((current - sensitivity).abs_(), alpha=1 - config.beta2)


@torch.no_grad()
def component_scores(part: AdaptedLayer) -> torch.Tensor:
    """`[r]` fp32 worth of each component of one layer."""
    entry = part.layer.sparse_lora_sensitivity[part.adapter] * part.layer.sparse_lora_uncertainty[part.adapter]
    gate, A, B = _tensors(part)
    of_gate, of_A, of_B = entry.split([gate.numel(), A.numel(), B.numel()])
    return of_gate + of_A.view_as(A).mean(1) + of_B.view_as(B).mean(0)


@torch.no_grad()
def has_evidence(part: AdaptedLayer) -> bool:
    """Whether the layer's gates had a gradient so far. The factors have one from the regulariser alone."""
    gates = part.layer.sparse_lora_sensitivity[part.adapter][: part.layer.sparse_lora_gate[part.adapter].numel()]
    return is_evidence(gates) and bool(torch.isfinite(component_scores(part)).all())


@torch.no_grad()
def allocate(parts: list[AdaptedLayer], budget: int, step: int = 0) -> None:
    """Let the `budget` best components of all layers live; ties are drawn for from the config's seed and `step`."""
    scores = [component_scores(part) for part in parts]
    alive = torch.zeros(sum(score.numel() for score in scores), dtype=torch.uint8)
    seed = stream_seed(parts[0].config.seed, "rank allocation", step)
    alive[top_units(torch.cat([score.cpu() for score in scores]), budget, seed=seed).long()] = 1
    for part, mask in zip(parts, alive.split([score.numel() for score in scores]), strict=True):
        part.layer.sparse_lora_rank_mask[part.adapter].copy_(mask)


@torch.no_grad()
def apply_mask(part: AdaptedLayer) -> None:
    """Zero the gates of components that do not live."""
    part.layer.sparse_lora_gate[part.adapter].data.mul_(part.layer.sparse_lora_rank_mask[part.adapter])


@torch.no_grad()
def add_orthogonality_gradient(parts: list[AdaptedLayer], weight: float) -> None:
    r"""Add the gradient of :math:`\frac{\gamma}{2M}\sum \|AA^\top - I\|_F + \|B^\top B - I\|_F` to the factors'.

    :math:`\partial\|AA^\top - I\|_F / \partial A = 2(AA^\top - I)A / \|AA^\top - I\|_F`; B likewise, transposed.
    """
    share = weight / (2 * len(parts))
    for part in parts:
        _, A, B = _tensors(part)
        for factor, rows in ((A, A), (B, B.t())):
            if factor.grad is None:
                continue
            gap = rows @ rows.t() - torch.eye(rows.shape[0], device=rows.device, dtype=rows.dtype)
            direction = (2 * share / gap.norm().clamp_min(1e-12)) * (gap @ rows)
            factor.grad.add_(direction if factor is A else direction.t())
