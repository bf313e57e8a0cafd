"""Sparse model soups: the average of models that were retrained from one pruned model, as sparse as each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...hub.analysis.checkpoints import Checkpoint, CheckpointTensors
from ...hub.patches.checkpoint_names import CheckpointNames
from ...sparsity import unpack_bits
from ...tuners.shared.rollback import uninterrupted
from ..reading.one_shot import prunable_layers


@dataclass
class Soup:
    """What `sparse_soup` averaged."""

    members: list[int]
    """Which replicas are in the average, by their place."""
    metrics: list[float] = field(default_factory=list)
    """What `evaluate` gave for each replica; empty without it."""
    metric: float | None = None
    """What it gave for the average."""


@torch.no_grad()
def sparse_soup(
    model: nn.Module,
    replicas: Sequence[Checkpoint],
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> Soup:
    """Write the average of replicas with one mask into `model`: all of them, or, with `evaluate`, a greedy choice
    (Sparse Model Soups; Zimmer et al., 2024).

    Greedy: the replica with the highest metric first; each of the others, in falling order, is added where the metric
    of the average does not fall; so the soup is never below the best replica. Averages are taken in fp32 and rounded
    once. Replicas are read one tensor at a time; the next phase of pruning then starts from `model`.

    Adapters that were trained under one mask are averaged by `hub.merge_to_dense(model, adapter_names=names,
    weights=[1 / len(names)] * len(names))`, which keeps the zeros too.

    Args:
        model: a dense model of the replicas' class; what it holds is replaced.
        replicas: models, folders, safetensors files or state dicts, two or more.
        evaluate: a number for the model with a soup in it, the higher the better.
        masks: bits of what was removed, as `PruningReport.masks`: replicas must be 0 there. None: all replicas must
            be 0 at the same entries of the trunk's linear layers; averages of other supports are denser.

    Raises:
        ValueError: fewer than two replicas, other tensors or shapes, masks that differ, or a metric that is no number.
            The model is as it was.
    """
    if len(replicas) < 2:
        raise ValueError(f"replicas has {len(replicas)}: a soup takes two or more.")
    pot = _Pot(model, [CheckpointTensors(replica) for replica in replicas])
    pot.check(masks)
    everybody = list(range(len(replicas)))
    if evaluate is None:
        with uninterrupted():
            pot.fill(everybody)
        return Soup(everybody)
    before = {name: p.detach().clone() for name, p in pot.parameters.items()}
    try:
        metrics = [pot.metric([at], evaluate) for at in everybody]
        first, *others = sorted(everybody, key=lambda at: -metrics[at])
        members, best = [first], metrics[first]
        for at in others:
            metric = pot.metric([*members, at], evaluate)
            if metric >= best:
                members, best = [*members, at], metric
        pot.fill(members)
    except BaseException:
        for name, parameter in pot.parameters.items():
            parameter.copy_(before[name])
        raise
    return Soup(members, metrics, best)


class _Pot:
    """A model and the replicas that are averaged into it."""

    def __init__(self, model: nn.Module, replicas: list[CheckpointTensors]) -> None:
        names = CheckpointNames(model)
        self.model, self.replicas = model, replicas
        self.parameters = names.parameters
        """By the first name of each."""
        self.stored = {name: names.stored.get(name, name) for name in names.parameters}
        for name, parameter in self.parameters.items():
            for at in range(len(replicas)):
                shape = tuple(self._read(at, name).shape)
                if shape != tuple(parameter.shape):
                    raise ValueError(
                        f"'{name}' has shape {shape} in replica {at} and {tuple(parameter.shape)} in the model: they "
                        "are of two models."
                    )

    def _read(self, at: int, name: str) -> Tensor:
        replica = self.replicas[at]
        known = {*replica.names, *replica.tied}
        found = next((key for key in (self.stored[name], name) if key in known), None)
        if found is None:
            raise ValueError(f"Replica {at} has no tensor '{name}': it is of another model.")
        return replica.get(found)

    def check(self, masks: Mapping[str, Tensor] | None) -> None:
        """Refuse replicas whose zeros do not lie at the same entries."""
        for layer in prunable_layers(self.model):
            name = f"{layer.name}.weight"
            if masks is not None and layer.name not in masks:
                continue
            zeros = [self._zeros(at, name, layer.module) for at in range(len(self.replicas))]
            if masks is None:
                odd = [at for at, found in enumerate(zeros) if not torch.equal(found, zeros[0])]
            else:
                gone = unpack_bits(masks[layer.name], layer.grid.num_units).view(layer.grid.rows, layer.grid.cols)
                odd = [at for at, found in enumerate(zeros) if not found[gone.to(found.device)].all()]
            if odd:
                other = "replica 0" if masks is None else "the masks"
                raise ValueError(
                    f"Replica {odd[0]} is not 0 where {other} is in '{layer.name}': averages of different masks are "
                    "denser than each. Retrain all replicas from one pruned model under its mask, or pass the masks "
                    "of that walk if weights became 0 by chance."
                )

    def _zeros(self, at: int, name: str, module: nn.Module) -> Tensor:
        zeros = self._read(at, name) == 0
        return zeros.t() if isinstance(module, Conv1D) else zeros

    def fill(self, members: list[int]) -> None:
        """Write the average of these replicas into the model."""
        for name, parameter in self.parameters.items():
            total = sum(self._read(at, name).to(parameter.device, torch.float32) for at in members)
            parameter.copy_(total / len(members))

    def metric(self, members: list[int], evaluate: Callable[[nn.Module], float]) -> float:
        """The metric of their average."""
        self.fill(members)
        found = float(evaluate(self.model))
        if found != found:
            raise ValueError(f"evaluate gave {found} for replicas {members}, and soups are ordered by it.")
        return found
