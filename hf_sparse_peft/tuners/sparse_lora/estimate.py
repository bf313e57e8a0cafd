"""Statistics of dense gradients, gathered from a few layers at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...sparsity import DataCriterion
from .calibration_data import CalibrationData, batch_size, items_in, label_losses, loss_of, modes_kept, rows_of
from .layer import SparseLoraLayer

Groups = list[list[SparseLoraLayer]]


def world_size() -> int:
    """Ranks that take part, 1 where nothing is distributed."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` added up over all ranks, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def on_every_rank(condition: bool, device: torch.device) -> bool:
    """Whether `condition` holds on all ranks."""
    return int(all_reduce_sum(torch.tensor(int(condition), device=device))) == world_size()


class GradientReader:
    """Feeds a criterion's state of one layer with that layer's dense gradients; a sink of `sparse_linear`."""

    def __init__(self, layer: SparseLoraLayer, criterion: DataCriterion) -> None:
        self.layer, self.criterion = layer, criterion
        self.state = criterion.start(layer.out_features, layer.in_features, layer.get_base_layer_device())
        self.items, self.calls = 1, 0
        self.pending: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, dense: torch.Tensor) -> None:
        """Take the dense gradient of the mean loss over `items`."""
        self.calls += 1
        if self.criterion.per_example and self.calls > 1:
            raise ValueError(
                f"'{self.layer.module_name}' runs twice in one forward pass, so that no single gradient of an example "
                f"exists for criterion='{self.criterion.name}'. Choose criterion='gradient', or leave the module out."
            )
        gradient = dense.float()
        if not self.criterion.per_example and self.items != 1:
            gradient = gradient.mul_(self.items)  # sums over examples do not depend on how they are batched
        if self.criterion.per_step:
            self.pending = gradient if self.pending is None else self.pending.add_(gradient)
        else:
            self._update(gradient)

    def _update(self, gradient: torch.Tensor) -> None:
        weight = self.layer.dense_base_weight() if self.criterion.reads_weight else None
        self.criterion.update(self.state, gradient, weight)

    @torch.no_grad()
    def finish_step(self, items: int) -> None:
        """Close an optimizer step whose micro-batches were means over `items` on all ranks together."""
        gradient, self.pending = self.pending, None
        if gradient is None:
            gradient = torch.zeros(self.layer.out_features, self.layer.in_features, device=self._device())
        self._update(all_reduce_sum(gradient).div_(items))

    @torch.no_grad()
    def finish(self) -> None:
        """Add up the ranks' states.

        Raises:
            ValueError: a gradient was not finite; names the module.
        """
        for tensor in self.state.values():
            if not self.criterion.per_step:
                all_reduce_sum(tensor)
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"Gradients of '{self.layer.module_name}' are not finite, so they rank nothing. Look at the loss "
                    "of the first batches; under fp16 use bf16 or fp32."
                )

    def _device(self) -> torch.device | None:
        return self.layer.get_base_layer_device()


def groups_within(layers: list[SparseLoraLayer], criterion: DataCriterion, limit: int) -> Groups:
    """`layers` in runs whose states together take at most `limit` bytes, or in single layers where one alone does."""
    groups: Groups = []
    used = limit + 1
    for layer in layers:
        numel = criterion.state_numel(layer.out_features, layer.in_features)
        numel += layer.out_features * layer.in_features if criterion.per_step else 0
        if used + 4 * numel > limit:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += 4 * numel
    return groups


def estimate(
    model: nn.Module,
    groups: Groups,
    adapter_name: str,
    criterion: DataCriterion,
    data: CalibrationData,
    *,
    examples: int,
    batches_per_step: int = 1,
    compute_loss: Callable | None = None,
    show_progress: bool = True,
) -> Iterator[list[GradientReader]]:
    """One pass over `examples` examples of the data for each group: the readers of its layers, fed and reduced.

    The model runs in evaluation mode. Gradients exist for one layer at a time; those of adapter parameters are thrown
    away and no `.grad` is touched.
    """
    share = -(-examples // world_size())
    with tqdm(total=len(groups) * share, desc=f"Estimating {criterion.name}", disable=not show_progress) as bar:
        for group in groups:
            readers = [GradientReader(layer, criterion) for layer in group]
            with modes_kept(model, training=False), torch.enable_grad():
                for layer, reader in zip(group, readers, strict=True):
                    layer.sparse_lora_sink[adapter_name] = reader
                try:
                    inputs = [layer.sparse_lora_values[adapter_name] for layer in group]
                    steps = _steps(data.examples(share), batches_per_step, criterion.per_step, inputs[0].device)
                    for step in steps:
                        items = sum(_read(model, batch, readers, inputs, compute_loss, bar) for batch in step)
                        if criterion.per_step:
                            total = int(all_reduce_sum(torch.tensor(items, device=inputs[0].device)))
                            for reader in readers:
                                reader.finish_step(total)
                finally:
                    for layer in group:
                        layer.sparse_lora_sink.pop(adapter_name, None)
            for reader in readers:
                reader.finish()
            yield readers


def _steps(
    batches: Iterator[dict[str, Any]], per_step: int, together: bool, device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """Lists of the micro-batches of a step; where ranks must meet at every step, as long as all of them have one."""
    while True:
        step = [batch for _, batch in zip(range(per_step), batches, strict=False)]
        if not (on_every_rank(bool(step), device) if together else step):
            return
        yield step


def _read(model, batch, readers, inputs, compute_loss, bar) -> int:
    """One micro-batch's gradients into the readers; returns what its loss is a mean of."""
    size = batch_size(batch)
    items = items_in(batch, model)
    pieces = [rows_of(batch, i, i + 1) for i in range(size)] if readers[0].criterion.per_example else [batch]
    for piece in pieces:
        losses = _losses(model, piece, readers[0].criterion, compute_loss)
        for number, loss in enumerate(losses, 1):
            for reader in readers:
                reader.items, reader.calls = items, 0
            torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=number < len(losses))
    bar.update(size)
    return items


def _losses(model, batch, criterion, compute_loss) -> list[torch.Tensor]:
    """What to take gradients of: the loss, or a loss for every label that the model could give."""
    if criterion.over_labels:
        return label_losses(model, batch, criterion.max_labels)
    return [loss_of(model, batch, compute_loss)]
