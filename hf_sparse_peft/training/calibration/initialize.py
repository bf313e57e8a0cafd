"""`initialize_support`: the units that rank highest by what data says of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...rules.calibration_data import CalibrationData
from ...rules.probing import random_state_kept
from ...sparsity import DataCriterion, DeltaMagnitude, Score, UnitGrid
from ...sparsity.scores import Chunks
from ...tuners.sparse_lora import SparseLoraConfig, SparseLoraLayer
from ...utils.option_types import PositiveInt, check_value
from ...utils.parts import UnknownPart, load_part_by_name
from .passes import ACCUMULATOR_BYTES, check_numbers, read_statistics
from .readers import Reader, dense_weight
from .selection import SupportSelection
from .supports import check_fresh, layers_with_support, save_support, write_supports
from .warmup import DenseWarmup


def initialize_support(
    model: nn.Module,
    dataloader: Iterable,
    criterion: str | Score | None = None,
    *,
    adapter_name: str = "default",
    max_examples: int | None = None,
    batches_per_step: int = 1,
    compute_loss: Callable[[nn.Module, dict[str, Any]], torch.Tensor] | None = None,
    save_to: str | Path | None = None,
    accumulator_bytes: int = ACCUMULATOR_BYTES,
    show_progress: bool = True,
) -> None:
    """Choose the supports of an adapter from data: the units that rank highest by `criterion`, values at zero.

    Gradients of the base weights, dense or 4-bit, are read one layer at a time inside the backward pass; those of the
    adapter's parameters are thrown away. The model runs in evaluation mode, for one result whatever its dropout
    (`delta_magnitude` trains, in training mode), and every module gets its mode back. Neither the global random
    states nor a DataLoader's sampler move, so that training sees its data in the order that it would have seen. With
    `budget=Global(...)` all units of the model compete, each module keeps at least its best one, and the sizes are
    written to the config's `sizes`; so they are with structures of `scope="model"`, where a module may be
    left without a unit. Criteria that read activations make forward passes alone and need no labels. Call it before
    there is an optimizer. Under torch.distributed every rank brings its part of the data, statistics are reduced, and
    supports are identical.

    Readings that are not finite (an fp16 overflow) are left out. A module whose scores are all 0 or not finite (no
    batch reached it, no label did) gets random units, or none where all modules compete, and is named in a warning.

    Args:
        model: has the adapter, active and trainable.
        dataloader: batches as mappings of the model's arguments, labels included; a DataLoader or a list.
        criterion: a score that needs data, or its name; None: the config's. Written to the config.
        adapter_name: which adapter.
        max_examples: examples to read, over all ranks; None: the criterion's `examples`.
        batches_per_step: batches whose gradients make one optimizer step, for criteria that go by steps.
        compute_loss: `(model, batch) -> mean loss`; None: the model's own.
        save_to: file to write, for `load_support`.
        accumulator_bytes: statistics alive at once; what needs more takes further passes over the data, one layer a
            pass in the limit. `delta_magnitude` trains all weights at once, 16 bytes an entry, whatever this says.
        show_progress: whether a bar shows on stderr.

    Raises:
        ValueError: a number that is no integer >= 1, a criterion that needs no data, an adapter that is unknown,
            frozen, merged or trained already, a budget that leaves a module without a unit, no batch, no loss, or
            scores of all modules that are 0 or not finite.
        TypeError: a dataloader that cannot be read twice, or batches that are no mappings.
    """
    layers, config = layers_with_support(model, adapter_name)
    layers = [layer for layer in layers if adapter_name in layer.sparse_lora_values]
    score = _criterion(config, criterion)
    check_numbers(batches_per_step, accumulator_bytes)
    check_value(max_examples, PositiveInt | None, "max_examples")
    check_fresh(layers, adapter_name)
    _check_criterion(score, layers, adapter_name, compute_loss)
    passes = {"batches_per_step": batches_per_step, "compute_loss": compute_loss, "show_progress": show_progress}
    warmup = None
    with random_state_kept():
        data = CalibrationData(dataloader, next(model.parameters()).device)
        if isinstance(score, DeltaMagnitude):
            warmup = DenseWarmup(model, layers, adapter_name, score)
            units = warmup.choose(data, **passes)
        else:
            passes |= {"examples": max_examples, "accumulator_bytes": accumulator_bytes}
            units = _by_statistic(SupportSelection(model, layers, adapter_name), score, data, passes)
    write_supports(model, units, adapter_name)
    if warmup is not None:
        warmup.write_values()
    config.criterion = score
    if save_to is not None:
        save_support(model, save_to, adapter_name)


def _by_statistic(
    selection: SupportSelection, score: DataCriterion, data: CalibrationData, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The selection's units by `score`, read in passes over `data` with `read_statistics`'s `options`."""
    layers = {layer.module_name: layer for layer in selection.layers}
    left_out: dict[str, int] = {}
    for readers in read_statistics(selection.model, layers, score, data, **options):
        left_out |= {reader.name: reader.left_out for reader in readers if reader.left_out}
        selection.add({reader.name: _scores(score, reader, selection.grids[reader.name]) for reader in readers})
    _report_left_out(score, left_out)
    selection.check_evidence(score.part_type)
    return selection.units()


def _scores(score: DataCriterion, reader: Reader, grid: UnitGrid) -> Chunks:
    return score.scores(reader.state, grid, dense_weight(reader.module))


def _report_left_out(score: DataCriterion, left_out: dict[str, int]) -> None:
    if left_out:
        most = max(left_out, key=left_out.__getitem__)
        warnings.warn(
            f"criterion='{score.part_type}' leaves out readings that are not finite, in {len(left_out)} modules; most "
            f"in '{most}': {left_out[most]}. Under fp16 use bf16 or fp32; else look at the loss of the first batches.",
            stacklevel=4,
        )


def _check_criterion(
    score: DataCriterion, layers: list[SparseLoraLayer], adapter_name: str, compute_loss: Callable | None
) -> None:
    """Refuse a criterion that has no score for a layer's units, or a loss that it would not ask."""
    for layer in layers:
        score.check_grid(layer.sparse_lora_grid[adapter_name], layer.module_name)
    if compute_loss is not None and score.over_labels:
        raise ValueError(
            f"mode='expect' of criterion='{score.part_type}' takes the model's own probabilities, and compute_loss "
            "would not be asked. Leave compute_loss out, or set mode='square'."
        )


def _criterion(config: SparseLoraConfig, criterion: str | Score | None) -> DataCriterion:
    same = criterion is None or criterion == config.criterion.part_type
    score = config.criterion if same else load_part_by_name(Score, criterion, "criterion")
    if isinstance(score, UnknownPart):
        config.check_runnable()
    if not score.needs_data:
        raise ValueError(
            f"criterion='{score.part_type}' ranks units without data, and chose them when the adapter was injected. "
            "Pass one that is estimated from data, e.g. criterion='fisher'."
        )
    if not isinstance(score, DataCriterion):
        score(None, None)  # says where its units come from
    return score
