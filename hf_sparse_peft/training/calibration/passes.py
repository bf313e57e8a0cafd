"""Passes over the training data that read statistics of many layers, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from tqdm.auto import tqdm

from ...rules.calibration_data import CalibrationData, batch_size, endless, items_in, rows_of
from ...rules.collectives import all_reduce_sum, on_every_rank, world_size
from ...rules.probing import loss_of, modes_kept
from ...sparsity import Statistic
from ...tuners.shared.base_weight import keep_4bit_weight_stable
from ...utils.option_types import PositiveInt, check_value
from .readers import ActivationReader, GradientReader, Reader

ACCUMULATOR_BYTES = 4 << 30
"""Statistics alive at once."""


def read_statistics(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    statistic: Statistic,
    data: CalibrationData,
    *,
    examples: int | None = None,
    batches_per_step: int = 1,
    compute_loss: Callable[[nn.Module, dict[str, Any]], torch.Tensor] | None = None,
    accumulator_bytes: int = ACCUMULATOR_BYTES,
    show_progress: bool = True,
) -> Iterator[list[Reader]]:
    """Read `statistic` of the base weights of linear layers: the readers of a group of layers after each pass over the
    data, `reader.state` added up over ranks.

    Any linear layers of `model` will do: adapted by this package, by upstream peft, or plain; dense or quantised.
    The model runs in evaluation mode and every module gets its mode back; gradients of base weights exist for one layer
    at a time, and no `.grad` is touched. Statistics that read activations get forward passes alone and need no labels.
    Call it inside `rules.probing.random_state_kept`. Under torch.distributed every rank brings its part of the data.

    Args:
        model: computes the loss.
        modules: the layers, by the names that messages give them, in model order.
        statistic: what to read.
        data: the batches; each pass begins at the first.
        examples: examples to read, over all ranks; None: the statistic's.
        batches_per_step: batches whose gradients make one optimizer step, for statistics that go by steps.
        compute_loss: `(model, batch) -> mean loss`; None: the model's own.
        accumulator_bytes: states alive at once; what needs more takes further passes, one layer a pass in the limit.
        show_progress: whether a bar shows on stderr.

    Raises:
        ValueError: no batch, or no loss.
        TypeError: batches that are no mappings of the model's arguments.
    """
    share = -(-(examples or statistic.examples) // world_size())
    steps, device = None if examples else statistic.steps_read, next(model.parameters()).device
    groups = groups_within(modules, statistic, accumulator_bytes)
    kind = ActivationReader if statistic.reads_activations else GradientReader
    if statistic.reads_activations:
        for module in model.modules():
            keep_4bit_weight_stable(module)
    total = len(groups) * share if steps is None else None
    with tqdm(total=total, desc=f"Estimating {statistic.name}", disable=not show_progress) as bar:
        for group in groups:
            readers = [kind(name, module, statistic) for name, module in group.items()]
            batches = data.examples(share) if steps is None else islice(endless(data, device), steps * batches_per_step)
            _one_pass(model, readers, batches, batches_per_step, compute_loss, bar)
            for reader in readers:
                reader.finish()
            yield readers


def check_numbers(batches_per_step: int, accumulator_bytes: int) -> None:
    """Refuse, before any pass, numbers that no pass can take.

    Raises:
        ValueError: names the argument.
    """
    check_value(batches_per_step, PositiveInt, "batches_per_step")
    check_value(accumulator_bytes, PositiveInt, "accumulator_bytes")


def groups_within(modules: Mapping[str, nn.Module], statistic: Statistic, limit: int) -> list[dict[str, nn.Module]]:
    """`modules` in runs whose states together take at most `limit` bytes, or single ones where one alone does."""
    groups: list[dict[str, nn.Module]] = []
    used = limit + 1
    for name, module in modules.items():
        cols, rows = _get_in_out_features(getattr(module, "get_base_layer", lambda module=module: module)())
        numel = statistic.state_numel(rows, cols) + (statistic.step_numel(rows, cols) if statistic.per_step else 0)
        if used + 4 * numel > limit:
            groups.append({})
            used = 0
        groups[-1][name] = module
        used += 4 * numel
    return groups


def _one_pass(
    model: nn.Module,
    readers: list[Reader],
    batches: Iterator[dict[str, Any]],
    batches_per_step: int,
    compute_loss: Callable | None,
    bar: tqdm,
) -> None:
    """All `batches` once, into `readers` of one statistic."""
    statistic, device = readers[0].statistic, readers[0].device
    read = _read_activations if statistic.reads_activations else _read_gradients
    try:
        for reader in readers:
            reader.attach()
        # Graphs compiled before know of no hook, and those compiled now would not forget them.
        with (
            modes_kept(model, training=False),
            torch.set_grad_enabled(not statistic.reads_activations),
            torch.compiler.set_stance("force_eager"),
        ):
            for step in _steps(batches, batches_per_step, statistic.per_step, device):
                items = sum(read(model, batch, readers, compute_loss, bar) for batch in step)
                if statistic.per_step:
                    total = int(all_reduce_sum(torch.tensor(items, device=device)))
                    for reader in readers:
                        reader.finish_step(total)
    finally:
        for reader in readers:
            reader.detach()


def _steps(
    batches: Iterator[dict[str, Any]], per_step: int, together: bool, device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """Lists of the micro-batches of a step; where ranks must meet at every step, as long as all of them have one."""
    while True:
        step = [batch for _, batch in zip(range(per_step), batches, strict=False)]
        if not (on_every_rank(bool(step), device) if together else step):
            return
        yield step


def _read_gradients(model, batch, readers: list[GradientReader], compute_loss, bar) -> int:
    """One micro-batch's gradients into the readers; returns what its loss is a mean of."""
    statistic, size, items = readers[0].statistic, batch_size(batch), items_in(batch, model)
    probes = [reader.probe for reader in readers]
    pieces = [rows_of(batch, i, i + 1) for i in range(size)] if statistic.per_example else [batch]
    for piece in pieces:
        losses = _losses(model, piece, statistic, compute_loss)
        uses = [reader.uses.expected for reader in readers]
        for number, loss in enumerate(losses, 1):
            for reader, expected in zip(readers, uses, strict=True):
                reader.items, reader.uses.expected = items, expected
            if loss.requires_grad:  # else the batch reached none of these layers
                torch.autograd.grad(loss, probes, allow_unused=True, retain_graph=number < len(losses))
            for reader in readers:
                reader.finish_backward()
    bar.update(size)
    return items


def _read_activations(model, batch, readers: list[ActivationReader], compute_loss, bar) -> int:
    """One micro-batch's activations into the readers, labels or not; returns its examples."""
    mask, size = batch.get("attention_mask"), batch_size(batch)
    visible = mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    for reader in readers:
        reader.visible = visible
    if compute_loss is None:
        model(**batch)
    else:
        compute_loss(model, batch)
    bar.update(size)
    return size


def _losses(model, batch, statistic, compute_loss) -> list[torch.Tensor]:
    """What to take gradients of: the loss, or a loss for every label that the model could give."""
    if statistic.over_labels:
        return label_losses(model, batch, statistic.max_labels)
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
