"""Light-PEFT: a short run that tells which heads, channels, adapted modules and ranks matter, and a smaller second
one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ...hub.export import rank_pattern_of
from ...rules import Rule, Run
from ...rules.penalties import add_l1_gradient
from ...training import RuleRunner
from ...tuners.upstream import UpstreamRankSpace, configs_of, upstream_layers
from ...utils.option_types import NonNegativeFloat, PositiveFloat, Range
from ...utils.parts import register_part
from ..units.kept_units import KeptUnits
from ..units.structure import CHANNELS, HEADS, BlockStructure, Kind
from ..units.unit_masks import masked_spaces, unit_masks_of

Ratio = Annotated[float, Range(least=0, below=1)]
Scope = Literal["block", "model"]


@dataclass(frozen=True)
class SecondStage:
    """What is left for the second run."""

    kept: KeptUnits
    """For `slice_model`."""
    ranks: dict[str, int]
    """Components that each adapted module keeps; modules without any are left out."""

    def config(self, r: int = 8, lora_alpha: float = 16, **options: Any) -> LoraConfig:
        """A LoRA of these ranks on these modules alone, scaled by `lora_alpha / r` everywhere, as it was estimated:
        `alpha_pattern` has `lora_alpha * rank / r`."""
        pattern = rank_pattern_of(self.ranks, r)
        return LoraConfig(
            **{
                "r": r, "lora_alpha": lora_alpha, "target_modules": sorted(self.ranks), "rank_pattern": pattern,
                "alpha_pattern": {key: lora_alpha * rank / r for key, rank in pattern.items()}, **options,
            }
        )  # fmt: skip


@dataclass(frozen=True)
class Importance:
    """What `LightPEFTCallback` measured."""

    structures: list[BlockStructure]
    units: dict[str, dict[Kind, Tensor]]
    """|factor| of every head and channel, `[units]` fp32, by block."""
    modules: dict[str, float]
    r""":math:`\|\Delta W x\| / \|W x\|` of every adapted module, averaged over tokens and steps."""
    ranks: dict[str, Tensor]
    """Of every component of its LoRA, `[r]` fp32."""

    def second_stage(
        self,
        *,
        heads: Ratio = 1 / 3,
        channels: Ratio = 1 / 3,
        modules: Ratio = 0.75,
        ranks: Ratio = 0.5,
        heads_by: Scope = "block",
        channels_by: Scope = "model",
    ) -> SecondStage:
        """Keep what lies above the quantile of its ratio (numpy's linear one): heads among those of their block,
        channels among all, modules among all, and components among those of the modules that are kept.

        A block in which nothing lies above it keeps its best unit; so do modules, or components, where all are equal.

        Raises:
            ValueError: a ratio outside [0, 1).
        """
        given = {"heads": heads, "channels": channels, "modules": modules, "ranks": ranks}
        wrong = next((name for name, ratio in given.items() if not 0 <= ratio < 1), None)
        if wrong is not None:
            raise ValueError(f"{wrong}={given[wrong]} is no fraction in [0, 1): it is how much goes.")
        kept = KeptUnits.all_of(self.structures)
        for kind, ratio, scope in ((HEADS, heads, heads_by), (CHANNELS, channels, channels_by)):
            scores = {block: kinds[kind] for block, kinds in self.units.items() if kind in kinds}
            for block, units in _above(scores, ratio, scope == "model").items():
                kept.keep(block, kind, units)
        chosen = _above({"": torch.tensor(list(self.modules.values()))}, modules, True)[""].tolist()
        names = [list(self.modules)[at] for at in chosen]
        left = _above({name: self.ranks[name] for name in names}, ranks, True, at_least=0)
        if not any(map(len, left.values())):
            left[names[0]] = self.ranks[names[0]].argmax().view(1)
        return SecondStage(kept, {name: len(components) for name, components in left.items() if len(components)})


def _above(scores: dict[str, Tensor], ratio: float, together: bool, at_least: int = 1) -> dict[str, Tensor]:
    """Sorted units above the quantile `ratio` of their own scores or of all `together`; at ratio 0 all."""
    everything, found = torch.cat([s.double() for s in scores.values()]), {}
    for name, own in scores.items():
        own = own.double()
        above = own > torch.quantile(everything if together else own, ratio) if ratio else torch.ones_like(own).bool()
        if int(above.sum()) < at_least:
            above[own.argmax()] = True
        found[name] = above.nonzero().flatten()
    return found


@register_part("light_peft")
@dataclass(frozen=True)
class EstimateImportance(Rule):
    r"""Light-PEFT's first stage (Gu et al., 2024): factors on all heads and channels train beside a LoRA, from 1, under
    :math:`\lambda \sum |m|`, and what the LoRA does is measured. Run it by `LightPEFTCallback`.

    Over the second half of the steps it averages, for every adapted module, :math:`\|\Delta W x\|_2 / \|W x\|_2` over
    the tokens that `attention_mask` shows, and for each component k of its LoRA

    .. math:: |\mathrm{mean}(A_k \odot g_{A,k})| + |\mathrm{mean}(B_k \odot g_{B,k})|

    (as the official code has it), on unscaled gradients of optimizer steps. What is not finite counts as 0.
    """

    l1: NonNegativeFloat = 1e-4
    r"""Pull on the factors, :math:`\lambda`."""
    head_rate: PositiveFloat = 100.0
    """Learning rate of heads' factors, as a multiple of the run's."""
    channel_rate: PositiveFloat = 50.0
    """And of channels'."""

    acts_on: ClassVar[frozenset[str]] = frozenset({HEADS, CHANNELS})
    writes: ClassVar[frozenset[str]] = frozenset({"trains", "gradient", "forward"})
    undecayed: ClassVar[frozenset[str]] = frozenset({"factors"})

    def begin(self, run: Run) -> None:
        """Set the rates, and watch the adapted modules.

        Raises:
            ValueError: a run that goes on, or nothing but other adapters than plain LoRA.
        """
        if run.resumed:
            raise ValueError("The estimate of Light-PEFT is in no checkpoint. It is short: begin it anew.")
        rates = {HEADS: self.head_rate, CHANNELS: self.channel_rate}
        run.scale_updates(lambda space, factors: torch.full_like(factors, rates[space.kind]))
        layers = {
            name: layer
            for name, layer in upstream_layers(run.model)
            if isinstance(layer, LoraLayer) and run.adapter in layer.lora_B and run.adapter not in layer.lora_variant
        }
        if not layers:
            raise ValueError(
                "The model has no plain LoRA of peft's whose importance could be measured. Use LoraConfig."
            )
        run.memory = SimpleNamespace(watch=_Watch(run.model, run.adapter, layers), ranks={}, steps=0)

    def before_step(self, run: Run) -> None:
        """Watch the second half."""
        run.memory.watch.open = run.step >= run.total_steps // 2

    def gradients(self, run: Run) -> None:
        """Pull the factors, and score the components."""
        for space in run.spaces():
            factors = space.layer.factors
            add_l1_gradient(factors, factors.detach(), run.gradient_scale * self.l1)
        if not run.memory.watch.open:
            return
        run.memory.watch.open = False
        run.memory.steps += 1
        for name, layer in run.memory.watch.layers.items():
            scores = component_scores(UpstreamRankSpace(layer, run.adapter, name), run.gradient_scale)
            run.memory.ranks[name] = run.memory.ranks.get(name, 0) + scores

    def finish(self, run: Run) -> None:
        """Take the averages."""
        memory = run.memory
        masks = unit_masks_of(run.model)
        units: dict[str, dict[Kind, Tensor]] = {}
        for mask in masks.masks:
            units.setdefault(mask.block, {})[mask.kind] = mask.factors.detach().abs().cpu()
        memory.importance = Importance(
            list(masks.structures.values()), units, memory.watch.averages(),
            {name: (total / max(memory.steps, 1)).cpu() for name, total in memory.ranks.items()},
        )  # fmt: skip

    def release(self, run: Run) -> None:
        """Take the hooks off."""
        if hasattr(run.memory, "watch"):
            run.memory.watch.hooks.close()


@torch.no_grad()
def component_scores(components: UpstreamRankSpace, scale: float = 1.0) -> Tensor:
    """Of each component of a LoRA at this step, fp32 `[r]`; 0 where it has no gradient or that is not finite."""
    total = torch.zeros(components.size, device=components.A.device)
    for half, axis in ((components.A, 1), (components.B, 0)):
        if half.grad is not None:
            total += (half.float() * half.grad.float() / scale).mean(axis).abs()
    return torch.nan_to_num(total, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass
class _Watch:
    """Norms of what a LoRA adds to each module's output, over the norms of this, while `open`."""

    model: nn.Module
    adapter: str
    layers: dict[str, LoraLayer]
    open: bool = False
    hooks: ExitStack = field(default_factory=ExitStack)
    sums: dict[str, list[float]] = field(default_factory=dict)
    _base: dict[str, Tensor] = field(default_factory=dict)
    _mask: Tensor | None = None

    def __post_init__(self) -> None:
        self._add(self.model.register_forward_pre_hook(self._note_mask, with_kwargs=True))
        for name, layer in self.layers.items():
            self._add(layer.base_layer.register_forward_hook(lambda *a, n=name: self._note_base(n, a[-1])))
            self._add(layer.lora_B[self.adapter].register_forward_hook(lambda *a, n=name: self._take(n, a[-1])))

    def _add(self, handle: Any) -> None:
        self.hooks.callback(handle.remove)

    def _note_mask(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _note_base(self, name: str, output: Tensor) -> None:
        if self.open and self.model.training:
            self._base[name] = output.detach()

    @torch.no_grad()
    def _take(self, name: str, output: Tensor) -> None:
        base = self._base.pop(name, None)
        if base is None or not self.open:
            return
        scale = self.layers[name].scaling[self.adapter]
        ratio = scale * output.float().norm(dim=-1) / base.float().norm(dim=-1)
        if self._mask is not None and self._mask.shape == ratio.shape:
            ratio = ratio[self._mask.bool()]
        mean = float(ratio.mean()) if ratio.numel() else 0.0
        self.sums.setdefault(name, []).append(mean if mean == mean and abs(mean) != float("inf") else 0.0)

    def averages(self) -> dict[str, float]:
        """By module; 0 for one that never ran."""
        seen = {name: self.sums.get(name, []) for name in self.layers}
        return {name: sum(ratios) / max(len(ratios), 1) for name, ratios in seen.items()}


class LightPEFTCallback(RuleRunner):
    """Runs `EstimateImportance` in a `Trainer`, on a model that `mask_units(model, trained=True)` has given factors
    after it had got its LoRA; the Trainer's optimizer trains both. `importance` is there when the last step is done."""

    def __init__(self, rule: EstimateImportance | dict | None = None) -> None:
        super().__init__(EstimateImportance() if rule is None else rule)

    @property
    def importance(self) -> Importance:
        """What was measured.

        Raises:
            ValueError: no run is done.
        """
        found = [run.memory.importance for run in self.runs if hasattr(run.memory, "importance")]
        if not found:
            raise ValueError("No run of this callback is done, so that nothing is known yet. Train to the last step.")
        return found[0]

    def _make_runs(self) -> Iterator[Run]:
        model = self.training.model
        masks = unit_masks_of(model)
        if masks is None or not all(isinstance(mask.factors, nn.Parameter) for mask in masks.masks):
            raise ValueError(
                "LightPEFTCallback trains factors of heads and channels, and the model has none. Call "
                "method.prepare(model), or mask_units(model, trained=True), between get_peft_model and the Trainer."
            )
        spaces = masked_spaces(model, masks)
        adapter = next((space.adapter for space in spaces if space.adapter), None)
        if adapter is not None:
            self._take_charge(self.rule, configs_of(model)[adapter])
            yield Run(self.training, self.rule, adapter, None, spaces)
