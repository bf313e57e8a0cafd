"""Which transformer layers `SwitchLayers` lets train: drawn alike or by outliers, in turns, by their gradient."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..optim import innermost
from ..utils.option_types import PositiveFloat, PositiveInt
from ..utils.parts import Part, register_part, require
from .collectives import all_reduce_sum, from_first_rank
from .probing import drawn_batches, loss_of, modes_kept, random_state_kept
from .run import Run


@dataclass(frozen=True)
class LayerChoice(Part):
    """Base of what `SwitchLayers(choice=...)` takes."""

    part_kind: ClassVar[str] = "layer_choice"
    needs: ClassVar[frozenset[str]] = frozenset()
    """As `Rule.needs`."""

    def begin(self, rule: Any, run: Run) -> None:
        """Training begins, or goes on; layers are found."""

    def choose(self, rule: Any, run: Run, start: int) -> list[int]:
        """Numbers of the layers that train from step `start` on, `rule.layers` of every stack; the same on all ranks,
        and again in a resumed run."""
        raise NotImplementedError


@register_part("uniform")
@dataclass(frozen=True)
class Uniform(LayerChoice):
    """Drawn alike, without replacement (LISA)."""

    def choose(self, rule: Any, run: Run, start: int) -> list[int]:
        """As `LayerChoice`."""
        return rule.drawn(run, torch.ones(len(run.memory.layers)), start)


@register_part("outliers")
@dataclass(frozen=True)
class Outliers(LayerChoice):
    r"""Drawn without replacement in proportion to the outliers of each layer (OwLore; Li et al., 2024): of all entries
    of its linear layers together, the fraction with

    .. math:: A_{ij} = |W_{ij}|\,\|X_j\|_2 > M \cdot \mathrm{mean}(A)

    where :math:`X_j` is feature j of the inputs of `samples` training samples and the mean is over the whole layer, as
    in OWL (Yin et al., 2024), on which it builds. Taken before the first step, kept in `run.saved["outliers"]`. Drawing
    one after the other, a layer's chance of being among several is not proportional to its score.
    """

    threshold: PositiveFloat = 13.0
    """M, how many times the mean an outlier is (OwLore's files: 13; OWL: 5 or 7)."""
    samples: PositiveInt = 128
    """Training samples whose inputs are read (OWL: 128)."""
    batch: PositiveInt = 8
    """Of them in a forward pass."""

    needs: ClassVar[frozenset[str]] = frozenset({"batches"})

    def begin(self, rule: Any, run: Run) -> None:
        """Find the outliers, unless a checkpoint brought them."""
        names = list(run.memory.layers)
        if not run.resumed:
            run.saved["outliers"] = self._fractions(rule, run, names)
        found = run.saved.get("outliers", [])
        if len(found) != len(names):
            raise ValueError(
                f"The checkpoint has the outliers of {len(found)} layers for {len(names)}. Resume from a run of "
                "Outliers on the same model, or start afresh."
            )
        for numbers in rule.stacks(run):
            some = sum(found[number] > 0 for number in numbers)
            if some < min(rule.layers, len(numbers)):
                raise ValueError(
                    f"Outliers.threshold={self.threshold} finds outliers in {some} of {len(numbers)} layers, and "
                    f"SwitchLayers.layers={rule.layers} are to be drawn by them. Lower the threshold, or layers."
                )

    def choose(self, rule: Any, run: Run, start: int) -> list[int]:
        """As `LayerChoice`."""
        return rule.drawn(run, torch.tensor(run.saved["outliers"], dtype=torch.float64), start)

    @torch.no_grad()
    def _fractions(self, rule: Any, run: Run, names: list[str]) -> list[float]:
        linears = [_linears_of(run.model, name) for name in names]
        for name, found in zip(names, linears, strict=True):
            if not found:
                raise ValueError(
                    f"Outliers found no linear layer in '{name}'. Set layers_pattern, or choice='uniform'."
                )
        sums: dict[nn.Module, Tensor] = {}

        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float()
            sums[module] = sums.get(module, 0) + x.flatten(0, -2).pow(2).sum(0)

        hooks = [module.register_forward_pre_hook(read) for found in linears for module, _ in found]
        try:
            with modes_kept(run.model, training=False), random_state_kept():
                for inputs in drawn_batches(run, rule, self.samples, self.batch, "outliers"):
                    loss_of(run.model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        fractions = []
        for found in linears:
            scores = [
                (_matrix(base).float().abs() * all_reduce_sum(sums[module]).sqrt()).flatten()
                for module, base in found
                if module in sums
            ]
            fractions.append(outlier_fraction(scores, self.threshold))
        return from_first_rank(torch.tensor(fractions, dtype=torch.float64)).tolist()


@register_part("cyclic")
@dataclass(frozen=True)
class Cyclic(LayerChoice):
    """In turns, `layers` at a time (cyclic block coordinate descent; BAdam's orders; Luo et al., 2024)."""

    order: Literal["ascending", "descending", "permutation"] = "ascending"
    """From the first layer on, from the last one, or by a permutation that is drawn anew for every cycle."""

    def choose(self, rule: Any, run: Run, start: int) -> list[int]:
        """As `LayerChoice`."""
        period, chosen = start // rule.every, []
        for which, numbers in enumerate(rule.stacks(run)):
            size, count = len(numbers), min(rule.layers, len(numbers))
            if self.order == "permutation":
                turns = -(-size // count)
                generator = torch.Generator().manual_seed(rule.stream(run, "cycle", period // turns, which))
                places = torch.randperm(size, generator=generator).tolist()
                places = (places + places)[period % turns * count :][:count]
            else:
                places = [(period * count + at) % size for at in range(count)]
                places = places if self.order == "ascending" else [size - 1 - place for place in places]
            chosen += [numbers[place] for place in sorted(places)]
        return chosen


@register_part("largest_gradient")
@dataclass(frozen=True)
class LargestGradient(LayerChoice):
    r"""Those with the largest norm of the gradient of `samples` training samples (greedy block coordinate descent;
    Nutini et al., 2022):

    | `by` | chosen | name |
    |---|---|---|
    | "gradient" | :math:`\arg\max_b \|g_b\|` | Gauss-Southwell |
    | "lipschitz" | :math:`\arg\max_b \|g_b\| / \sqrt{L_b}` | Gauss-Southwell-Lipschitz |
    | "diagonal" | :math:`\arg\max_b \|g_b / \sqrt{D_b}\|`, by entries | Gauss-Southwell-diagonal |

    Ties go to the first layer; one without a gradient is never chosen, and where none has any the layers stay as they
    were.

    The diagonal bound is Adam's, :math:`D = \sqrt{\hat v} + \epsilon`, of each layer when it last trained, so that the
    rule has to keep them (`SwitchLayers(moments="keep")`). Layers that never trained have none and come first.

    A choice costs a forward and a backward pass with the gradients of all layers, in evaluation mode. It is kept in
    `run.saved["largest_gradient"]`.
    """

    norm: Literal["2", "1"] = "2"
    """Of the gradient: Euclidean, as in the paper, or the sum of magnitudes, as in its authors' code."""
    samples: PositiveInt = 16
    """Training samples, the same on every rank."""
    by: Literal["gradient", "lipschitz", "diagonal"] = "gradient"
    """What a gradient is divided by: nothing, a constant of its layer, or a bound of each entry."""
    lipschitz: list[PositiveFloat] | None = None
    """With `by="lipschitz"` the constants :math:`L_b` of all layers, in model order."""

    needs: ClassVar[frozenset[str]] = frozenset({"batches"})

    def __post_init__(self) -> None:
        super().__post_init__()
        accepted = "a positive number for each layer with by='lipschitz', None otherwise"
        fits = (self.by == "lipschitz") == bool(self.lipschitz) and all(L > 0 for L in self.lipschitz or ())
        require(fits, self, "lipschitz", accepted)

    def begin(self, rule: Any, run: Run) -> None:
        """Are there constants for all layers, and does the rule keep second moments where they are asked for?"""
        layers = len(run.memory.layers)
        if self.lipschitz and len(self.lipschitz) != layers:
            raise ValueError(
                f"LargestGradient.lipschitz has {len(self.lipschitz)} numbers for {layers} layers. Give one for each."
            )
        if self.by == "diagonal" and rule.moments != "keep":
            raise ValueError(
                f"LargestGradient.by='diagonal' compares second moments, and SwitchLayers.moments={rule.moments!r} "
                "leaves none of layers that rest. Set moments='keep'."
            )

    def choose(self, rule: Any, run: Run, start: int) -> list[int]:
        """As `LayerChoice`."""
        kept = run.saved.get("largest_gradient")
        if kept and kept["step"] == start:
            return kept["layers"]
        rule.train_only(run, list(range(len(run.memory.layers))))
        scores, chosen = from_first_rank(self._scores(rule, run)).tolist(), []
        for numbers in rule.stacks(run):
            best = [numbers[at] for at in largest_blocks([scores[number] for number in numbers], rule.layers)]
            before = [number for number in (kept or {"layers": numbers})["layers"] if number in numbers]
            chosen += best or before[: rule.layers]
        run.saved["largest_gradient"] = {"step": start, "layers": chosen}
        return chosen

    def _scores(self, rule: Any, run: Run) -> Tensor:
        parameters = [[p for space in spaces for p in space.parameters()] for spaces in run.memory.layers.values()]
        flat = [p for group in parameters for p in group]
        with modes_kept(run.model, training=False), random_state_kept(), torch.enable_grad():
            (inputs,) = drawn_batches(run, rule, self.samples, self.samples, "gradient", run.step, share=False)
            found = torch.autograd.grad(loss_of(run.model, inputs).mean(), flat, allow_unused=True)
        by_parameter = dict(zip(map(id, flat), found, strict=True))
        bounds = self.lipschitz or [1.0] * len(parameters)
        if self.by == "diagonal":
            bounds = [[_adam_bound(run.optimizer, p) for p in group] for group in parameters]
        gradients = [[by_parameter[id(p)] for p in group] for group in parameters]
        scores = [block_score(g, int(self.norm), bound) for g, bound in zip(gradients, bounds, strict=True)]
        return torch.stack(scores).to(flat[0].device)


def outlier_fraction(scores: Iterable[Tensor], threshold: float) -> float:
    """Fraction of all numbers of `scores` together that are above `threshold` times the mean of all of them."""
    scores = list(scores)
    count = sum(one.numel() for one in scores)
    mean = sum(float(one.double().sum()) for one in scores) / max(1, count)
    return sum(int((one > threshold * mean).sum()) for one in scores) / max(1, count)


def block_score(
    gradients: Iterable[Tensor | None], norm: int = 2, lipschitz: float | list[Tensor | float] = 1.0
) -> Tensor:
    r"""A block's score by a greedy rule, fp64: :math:`\|g_b\|_2` or :math:`\|g_b\|_1`; with a number :math:`L_b` what
    Gauss-Southwell-Lipschitz compares, :math:`\|g_b\|/\sqrt{L_b}`, with a bound D for each gradient what the diagonal
    rule does, :math:`\|g_b/\sqrt{D}\|`. 0 without a gradient.

    Source: Nutini et al., 2022.
    """
    gradients = list(gradients)
    bounds = lipschitz if isinstance(lipschitz, list) else [lipschitz] * len(gradients)
    scaled = [_scaled(g.detach().double(), D) for g, D in zip(gradients, bounds, strict=True) if g is not None]
    total = sum((g.pow(2) if norm == 2 else g.abs()).sum() for g in scaled)
    total = torch.as_tensor(total, dtype=torch.float64)
    return total.sqrt() if norm == 2 else total


def _scaled(gradient: Tensor, bound: Tensor | float) -> Tensor:
    bound = torch.as_tensor(bound, dtype=torch.float64, device=gradient.device)
    return torch.where(gradient == 0, 0.0, gradient / bound.sqrt())  # 0 where the bound is 0 too


def _adam_bound(optimizer: Any, parameter: nn.Parameter) -> Tensor | float:
    r""":math:`\sqrt{\hat v} + \epsilon`; 0 of a parameter that never trained.

    Raises:
        ValueError: the optimizer has no second moments of each entry.
    """
    inner = innermost(optimizer)
    state = inner.state.get(parameter)
    if not state:
        return 0.0
    group = next(group for group in inner.param_groups if any(one is parameter for one in group["params"]))
    moment = state.get("exp_avg_sq")
    if moment is None or moment.shape != parameter.shape or "betas" not in group:
        raise ValueError(
            f"LargestGradient.by='diagonal' needs Adam's second moments, and {type(inner).__name__} keeps none of each "
            "entry. Train by AdamW, or set by='gradient'."
        )
    correction = 1 - group["betas"][1] ** int(state["step"])
    return (moment.double() / correction).sqrt() + group["eps"]


def largest_blocks(scores: list[float], count: int) -> list[int]:
    """Places of the `count` largest positive scores, sorted; equal ones from the first on."""
    order = sorted((place for place, score in enumerate(scores) if score > 0), key=lambda place: -scores[place])
    return sorted(order[:count])


def _linears_of(model: nn.Module, layer: str) -> list[tuple[nn.Module, nn.Module]]:
    """Linear layers of the base in `layer`: what is called, which may be an adapter around it, and the layer itself."""
    modules = dict(model.named_modules())
    inside = re.compile(rf"(?:^|\.){re.escape(layer)}\.")
    found = []
    for name, module in modules.items():
        kind = any(cls.__name__ in ("Linear", "Conv1D") for cls in type(module).__mro__)
        of_adapter = re.search(r"(?:^|\.)[a-z_]*lora_|(?:^|\.)modules_to_save\.", name)
        if not inside.search(name) or not kind or of_adapter or hasattr(module, "base_layer"):
            continue
        if getattr(module, "weight", None) is not None:
            called = modules[name.removesuffix(".base_layer")] if name.endswith(".base_layer") else module
            found.append((called, module))
    return found


def _matrix(module: nn.Module) -> Tensor:
    """The weight as `[out, in]`; a 4-bit one is dequantised for the moment."""
    weight = module.weight.detach()
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight, state)
    return weight.T if type(module).__name__ == "Conv1D" else weight
