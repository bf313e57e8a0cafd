"""Statistics of gradients or activations, gathered from a few layers at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..rules.calibration_data import CalibrationData, batch_size, items_in, rows_of
from ..rules.collectives import all_reduce_sum, on_every_rank, world_size
from ..rules.probing import loss_of, modes_kept
from ..sparsity import DataCriterion
from ..tuners.shared.base_weight import keep_4bit_weight_stable
from ..tuners.sparse_lora.layer import SparseLoraLayer
from .statistic_readers import ActivationReader, GradientReader, Reader

Groups = list[list[SparseLoraLayer]]


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
) -> Iterator[list[Reader]]:
    """One pass over `examples` examples of the data for each group: the readers of its layers, fed and reduced.

    The model runs in evaluation mode. Gradients exist for one layer at a time; those of adapter parameters are thrown
    away and no `.grad` is touched. Criteria that read activations get forward passes alone.
    """
    share = -(-examples // world_size())
    forward_only = criterion.reads_activations
    if forward_only:
        for module in model.modules():
            keep_4bit_weight_stable(module)
    with tqdm(total=len(groups) * share, desc=f"Estimating {criterion.part_type}", disable=not show_progress) as bar:
        for group in groups:
            readers = [(ActivationReader if forward_only else GradientReader)(layer, criterion) for layer in group]
            with modes_kept(model, training=False), torch.set_grad_enabled(not forward_only):
                try:
                    for reader in readers:
                        reader.attach(adapter_name)
                    inputs = [layer.sparse_lora_values[adapter_name] for layer in group]
                    steps = _steps(data.examples(share), batches_per_step, criterion.per_step, inputs[0].device)
                    for step in steps:
                        items = sum(_read(model, batch, readers, inputs, compute_loss, bar) for batch in step)
                        if criterion.per_step:
                            total = int(all_reduce_sum(torch.tensor(items, device=inputs[0].device)))
                            for reader in readers:
                                reader.finish_step(total)
                finally:
                    for reader in readers:
                        reader.detach(adapter_name)
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
    if readers[0].criterion.reads_activations:
        _observe(model, batch, readers, compute_loss)
        bar.update(size)
        return size
    items = items_in(batch, model)
    pieces = [rows_of(batch, i, i + 1) for i in range(size)] if readers[0].criterion.per_example else [batch]
    for piece in pieces:
        losses = _losses(model, piece, readers[0].criterion, compute_loss)
        uses = [reader.uses.expected for reader in readers]
        for number, loss in enumerate(losses, 1):
            for reader, expected in zip(readers, uses, strict=True):
                reader.items, reader.uses.expected = items, expected
            torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=number < len(losses))
            for reader in readers:
                reader.finish_backward()
    bar.update(size)
    return items


def _observe(model, batch, readers, compute_loss) -> None:
    """One micro-batch's activations into the readers; labels are not needed."""
    mask = batch.get("attention_mask")
    visible = mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    for reader in readers:
        reader.visible = visible
    if compute_loss is None:
        model(**batch)
    else:
        compute_loss(model, batch)


def _losses(model, batch, criterion, compute_loss) -> list[torch.Tensor]:
    """What to take gradients of: the loss, or a loss for every label that the model could give."""
    if criterion.over_labels:
        return label_losses(model, batch, criterion.max_labels)
    return [loss_of(model, batch, compute_loss)]


def label_losses(model: nn.Module, example: Mapping[str, Any], max_labels: int) -> list[torch.Tensor]:
    r""":math:`-\sqrt{p(y|x)} \log p(y|x)` for every label y of a batch of one example, the root held fixed.

    The squares of their gradients add up to the example's Fisher information
    :math:`\sum_y p(y|x) (\nabla -\log p(y|x))^2`.

    Raises:
        ValueError: the model does not give one probability to each of a few labels.
    """
    start = "mode='expect' of criterion='fisher' sums over the labels of a classifier of whole examples, and "
    mend = "Set criterion=Fisher(mode='square'), which goes by the data's own labels."
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    problem, labels = getattr(getattr(base, "config", None), "problem_type", None), example.get("labels")
    one_of_many = labels is None or not torch.is_floating_point(torch.as_tensor(labels))
    if problem not in (None, "single_label_classification") or not one_of_many:
        raise ValueError(f"{start}this one's problem is {problem or 'regression or several labels at once'}. {mend}")
    output = model(**{key: value for key, value in example.items() if key != "labels"})
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else None
    if shape is None or len(shape) != 2 or shape[0] != 1 or shape[1] < 2:
        raise ValueError(f"{start}this model's logits for one example have shape {shape}, not (1, labels). {mend}")
    if shape[1] > max_labels:
        raise ValueError(
            f"{start}takes a backward pass for each: this model has {shape[1]}, above max_labels={max_labels}. Raise "
            f"criterion=Fisher(mode='expect', max_labels={shape[1]}) if you can wait. {mend}"
        )
    log_p = logits[0].float().log_softmax(-1)
    return list(-(log_p.detach().exp().sqrt() * log_p))
