"""`SampleLayers`: the adapters of a few transformer layers train at a step, drawn by an importance (IST)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from ..utils.option_types import PositiveFloat, PositiveFraction, PositiveInt, Range
from ..utils.parts import register_part
from .collectives import all_reduce_mean
from .drawn_layers import DrawnLayers
from .probing import drawn_batches, indexed_dataset, loss_of, modes_kept, random_state_kept
from .run import Run


@register_part("sample_layers")
@dataclass(frozen=True)
class SampleLayers(DrawnLayers):
    r"""Trains the adapters of a few transformer layers at a time (IST; Yao et al., 2024); any peft adapter of linear
    layers that has a `scaling`, upstream LoRA and DoRA included. The defaults are the paper's.

    Each step draws `int(trained * L)` layers with probability :math:`\propto \sigma(-I)`, in every stack of L layers
    where a model has several; only their adapters get gradients. Once in `every` steps, `probes` sets of
    `int(suppressed * L)` layers are drawn by :math:`\sigma(I)`, the scaling of their adapters is multiplied by
    `suppression`, and the loss :math:`\ell_k` of one training batch is taken in eval mode. With
    :math:`\rho_k = e^{-\ell_k}`, :math:`p_i = \sigma(I_i)` from before the probes:
    :math:`I_i \mathrel{+}= \eta (\rho_k - \bar\rho)\, p_i (1 - p_i)` for each suppressed i. A high `I` marks a layer
    that is not missed.

    The importance (float64, 0 at first) is kept in `run.saved["importance"]`, so that checkpoints have it; all draws
    follow from the seed and the step. What trains outside the layers (`modules_to_save`, an adapted head) always
    trains. Upstream's adapters have no schedule: `LayerSamplingCallback(SampleLayers())` runs it on them.
    """

    trained: PositiveFraction = 0.25
    """Fraction of the layers that trains at a step: `int(trained * layers)`, at least one."""
    suppressed: PositiveFraction = 0.5
    """Fraction of the layers whose adapter is suppressed in a probe: `int(suppressed * layers)`, at least one."""
    suppression: Annotated[float, Range(least=0, below=1)] = 0.25
    """Factor on the adapter's scaling in suppressed layers."""
    probes: Annotated[int, Range(least=2)] = 3
    """Probes, each with layers of its own, whose losses are compared."""
    every: PositiveInt = 10
    """Optimizer steps between two sets of probes; the first is after that many steps."""
    step_size: PositiveFloat = 10.0
    """Factor of an importance update."""
    probe_batch: PositiveInt = 16
    """Training samples of a probe."""
    layers_pattern: str | None = None
    """Name of the module list that holds the layers, if it is not in the common places; several with `|` between."""
    seed: int | None = None
    """Seed of the draws, mixed with the step; None: the adapter's."""

    needs: ClassVar[frozenset[str]] = frozenset({"batches"})

    # In training

    def begin(self, run: Run) -> None:
        """Find the layers, and the importance that a checkpoint brought."""
        self.find(run)
        unscaled = [space for spaces in run.memory.layers.values() for space in spaces if not space.scalings()]
        if unscaled:
            raise ValueError(
                f"'{unscaled[0].name}' ({type(unscaled[0].layer).__name__}) has no scaling that could be suppressed. "
                "SampleLayers works on adapters with one: LoRA, DoRA, SparseLora, SpectralLora."
            )
        if self.every < run.total_steps:
            indexed_dataset(run, type(self).__name__)
        if run.resumed:
            self._check_importance(run)
        else:
            run.saved["importance"] = [0.0] * len(run.memory.layers)
            self._check_effect(run)

    def before_step(self, run: Run) -> None:
        """Probe where it is due, then draw the layers of the coming step."""
        if run.step and run.step % self.every == 0:
            self._probe(run)
        weights = torch.sigmoid(-torch.tensor(run.saved["importance"], dtype=torch.float64))
        self.train_only(run, self.draw(run, weights, _share(self.trained), run.step, "trained"))

    def _check_importance(self, run: Run) -> None:
        found, count = run.saved.get("importance", []), len(run.memory.layers)
        if len(found) != count:
            raise ValueError(
                f"The checkpoint has the importance of {len(found)} layers for {count} adapted ones. Resume from a run "
                "of SampleLayers on the same model, or start afresh."
            )

    def _check_effect(self, run: Run) -> None:
        """Say where nothing is sampled, or nothing is learned about the layers."""
        count = min(len(stack) for stack in self.stacks(run))
        trained, suppressed = int(self.trained * count), int(self.suppressed * count)
        said = []
        if trained == count or count == 1:
            said.append(f"trained={self.trained} of {count} layers trains all of them at every step: none is drawn")
        elif trained == 0:
            said.append(f"trained={self.trained} of {count} layers rounds to 0; 1 layer trains at a step")
        if suppressed == count or count == 1:
            said.append(
                f"suppressed={self.suppressed} of {count} layers suppresses all of them in every probe: the "
                "importance never changes"
            )
        elif suppressed == 0:
            said.append(f"suppressed={self.suppressed} of {count} layers rounds to 0; a probe suppresses 1 layer")
        if self.every >= run.total_steps:
            said.append(
                f"every={self.every} leaves no probe in {run.total_steps} steps: all layers are drawn alike, "
                "and the importance never changes"
            )
        if said:
            warnings.warn(
                f"SampleLayers: {'; '.join(said)}. Change these options, adapt more layers, train longer, or leave the "
                "rule out.",
                stacklevel=2,
            )

    def _probe(self, run: Run) -> None:
        sets = self._suppressed_sets(run)
        with modes_kept(run.model, training=False), torch.no_grad(), random_state_kept():
            (batch,) = drawn_batches(run, self, self.probe_batch, self.probe_batch, run.step, "batch")
            losses = []
            for chosen in sets:
                with self._suppressed(run, chosen):
                    losses.append(float(all_reduce_mean(loss_of(run.model, batch).detach().double().mean())))
        run.saved["importance"] = updated_importance(run.saved["importance"], sets, losses, self.step_size)
        run.record(losses=losses, importance=list(run.saved["importance"]))

    def _suppressed_sets(self, run: Run) -> list[list[int]]:
        """The layers of each probe, no two probes alike where there are enough choices."""
        sizes = [(len(stack), max(1, int(self.suppressed * len(stack)))) for stack in self.stacks(run)]
        choices = math.prod(math.comb(count, size) for count, size in sizes)
        weights = torch.sigmoid(torch.tensor(run.saved["importance"], dtype=torch.float64))
        sets: list[list[int]] = []
        attempt = 0
        while len(sets) < self.probes:
            found = self.draw(run, weights, _share(self.suppressed), run.step, "suppressed", attempt)
            attempt += 1
            if found not in sets or len(sets) >= choices or attempt > 100:
                sets.append(found)
        return sets

    @contextmanager
    def _suppressed(self, run: Run, numbers: list[int]) -> Iterator[None]:
        layers = list(run.memory.layers.values())
        spaces = [space for number in numbers for space in layers[number]]
        kept = [(held, space.adapter, held[space.adapter]) for space in spaces for held in space.scalings()]
        try:
            for held, name, value in kept:
                held[name] = value * self.suppression
            yield
        finally:
            for held, name, value in kept:
                held[name] = value


def _share(fraction: float) -> Callable[[int], int]:
    """`int(fraction * L)` of L layers, at least one."""
    return lambda layers: max(1, int(fraction * layers))


def updated_importance(
    importance: list[float], sets: list[list[int]], losses: list[float], step_size: float
) -> list[float]:
    r""":math:`I_i + \eta \sum_{k: i \in S_k} (\rho_k - \bar\rho)\, p_i (1 - p_i)`, :math:`\rho_k = e^{-\ell_k}`,
    :math:`p = \sigma(I)`, in float64; unchanged where all losses are equal, or one is not a number (every reward
    would be none) or below -700 (its reward would be infinite)."""
    if len(set(losses)) == 1 or not all(loss > -700 for loss in losses):
        return list(importance)
    rewards = [math.exp(-loss) for loss in losses]
    mean = sum(rewards) / len(rewards)
    chances = torch.sigmoid(torch.tensor(importance, dtype=torch.float64)).tolist()
    updated = list(importance)
    for chosen, reward in zip(sets, rewards, strict=True):
        for i in chosen:
            updated[i] += step_size * (reward - mean) * chances[i] * (1 - chances[i])
    return updated
