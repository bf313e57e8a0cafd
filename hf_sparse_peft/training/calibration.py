"""Supports that are chosen from data, or come from outside, before training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..rules.calibration_data import CalibrationData
from ..rules.probing import random_state_kept
from ..sparsity import DataCriterion, Score, UnitGrid
from ..sparsity.statistics import DeltaMagnitude
from ..tuners import SparseLoraConfig, SparseLoraLayer, adapter_layers
from ..utils.parts import UnknownPart, load_part_by_name
from .calibrated_selection import CalibratedSelection
from .calibration_passes import estimate, groups_within
from .calibration_warmup import DenseWarmup, endless
from .support_file import read_support_file, write_support_file

ACCUMULATOR_BYTES = 4 << 30


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
    there is an optimizer. Under torch.distributed every rank brings its share of the data, statistics are reduced, and
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
        ValueError: a criterion that needs no data, an adapter that is unknown, frozen, merged or trained already, a
            budget that leaves a module without a unit, no batch, no loss, or scores of all modules that are 0 or not
            finite.
        TypeError: a dataloader that cannot be read twice, or batches that are no mappings.
    """
    layers, config = _layers_of(model, adapter_name)
    layers = [layer for layer in layers if adapter_name in layer.sparse_lora_values]
    score = _criterion(config, criterion)
    for name, number in (("max_examples", max_examples), ("batches_per_step", batches_per_step)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} must be an integer >= 1.")
    _check_fresh(layers, adapter_name)
    for layer in layers:
        score.check_grid(layer.sparse_lora_grid[adapter_name], layer.module_name)
    if compute_loss is not None and score.over_labels:
        raise ValueError(
            f"mode='expect' of criterion='{score.part_type}' takes the model's own probabilities, and compute_loss "
            "would not be asked. Leave compute_loss out, or set mode='square'."
        )
    options = {"batches_per_step": batches_per_step, "compute_loss": compute_loss, "show_progress": show_progress}
    warmup: DenseWarmup | None = None
    with random_state_kept():
        data = CalibrationData(dataloader, next(model.parameters()).device)
        selection = CalibratedSelection(model, config, layers, adapter_name)
        if isinstance(score, DeltaMagnitude):
            units, warmup = _by_warmup(selection, score, data, **options)
        else:
            examples = max_examples or score.examples
            groups = groups_within(layers, score, accumulator_bytes)
            passes = estimate(model, groups, adapter_name, score, data, examples=examples, **options)
            left_out: dict[str, int] = {}
            for readers in passes:
                left_out |= {reader.layer.module_name: reader.left_out for reader in readers if reader.left_out}
                selection.add(
                    {
                        reader.layer.module_name: score.scores(
                            reader.state,
                            reader.layer.sparse_lora_grid[adapter_name],
                            reader.layer.dense_base_weight(),
                        )
                        for reader in readers
                    }
                )
            _report_left_out(score.part_type, left_out)
            selection.check_evidence(score.part_type)
            units = selection.units()
    write_supports(model, units, adapter_name)
    if warmup is not None:
        warmup.write_values()
    config.criterion = score
    if save_to is not None:
        save_support(model, save_to, adapter_name)


def _report_left_out(criterion: str, left_out: dict[str, int]) -> None:
    if left_out:
        most = max(left_out, key=left_out.__getitem__)
        warnings.warn(
            f"criterion='{criterion}' leaves out readings that are not finite, in {len(left_out)} modules; most in "
            f"'{most}': {left_out[most]}. Under fp16 use bf16 or fp32; else look at the loss of the first batches.",
            stacklevel=3,
        )


def _by_warmup(
    selection: CalibratedSelection,
    score: DeltaMagnitude,
    data: CalibrationData,
    *,
    batches_per_step: int,
    compute_loss: Any,
    show_progress: bool,
) -> tuple[dict[str, torch.Tensor], DenseWarmup]:
    layers, adapter_name = selection.layers, selection.adapter_name
    warmup = DenseWarmup(selection.model, layers, adapter_name, score)
    batches = endless(data, layers[0].get_base_layer_device())
    chosen: dict[str, torch.Tensor] = {}
    try:
        for iteration in range(score.n_iterations):
            if iteration:
                warmup.train_chosen(chosen, batches, batches_per_step, compute_loss, show_progress)
            warmup.train(batches, batches_per_step, compute_loss, show_progress)
            part = CalibratedSelection(
                selection.model, selection.config, layers, adapter_name, (iteration + 1) / score.n_iterations
            )
            scores = {
                layer.module_name: score.scores({"sum": delta.detach()}, layer.sparse_lora_grid[adapter_name])
                for layer, delta in zip(layers, warmup.deltas, strict=True)
            }
            part.add(scores, chosen)
            part.check_evidence(score.part_type)
            chosen = part.units()
    except BaseException:
        warmup.reset()
        raise
    warmup.rewind()
    return chosen, warmup


def write_supports(model: nn.Module, units: dict[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Make `units` (module name -> sorted distinct units) the supports of an adapter, all values at zero.

    Where the config leaves sizes to data (`criterion="given"`, or a criterion by data with `budget=Global(...)` or
    structures of `scope="model"`), any number of units of a module is taken, none included, and `sizes` is
    written.

    Raises:
        ValueError: modules that are not the adapter's, or a number of units that the config does not allow; names them.
            Trained values, which a new support would throw away.
    """
    layers, config = _layers_of(model, adapter_name)
    _check_untrained(layers, adapter_name)
    by_name = {layer.module_name: layer for layer in layers}
    odd = sorted(set(units) ^ set(by_name))
    if odd:
        raise ValueError(f"The units are of other modules than adapter '{adapter_name}': {odd[:3]} ({len(odd)}).")
    if not any(chosen.numel() for chosen in units.values()):
        raise ValueError("No module has a unit: there is nothing to train.")
    open_sizes = config.calibrates_sizes
    for name, layer in by_name.items():
        size, given = _size(layer, adapter_name), units[name].numel()
        if not open_sizes and given != size:
            raise ValueError(
                f"'{name}' is given {given} units and its support has {size}. Sizes can change only before training, "
                "with criterion='given', or a criterion by data with budget=Global(...) or structures of "
                "scope='model', and empty sizes."
            )
    for name, layer in by_name.items():
        chosen = units[name].to(layer.get_base_layer_device())
        if chosen.numel() != _size(layer, adapter_name):
            layer.resize_support(adapter_name, chosen.numel())
        if chosen.numel():
            layer.write_support(adapter_name, chosen)
            layer.sparse_lora_values[adapter_name].data.zero_()
    if open_sizes:
        adapted = [layer for layer in adapter_layers(model, SparseLoraLayer) if adapter_name in layer.sizes]
        config.sizes = {layer.module_name: layer.sizes[adapter_name].as_list() for layer in adapted}


def save_support(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Write an adapter's supports, without values, to a safetensors file that `load_support` reads.

    Raises:
        ValueError: a support has not been chosen yet.
    """
    layers, config = _layers_of(model, adapter_name)
    waiting = [layer.module_name for layer in layers if layer.awaits_calibration(adapter_name)]
    if waiting:
        raise ValueError(f"Nothing to save: the support of '{waiting[0]}' has not been chosen yet.")
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    none = torch.empty(0, dtype=torch.int32)
    units = {layer.module_name: layer.units(adapter_name) if _size(layer, adapter_name) else none for layer in layers}
    about = {"criterion": config.criterion.to_dict()}
    write_support_file(path, units, _grids(layers, adapter_name), about)


def load_support(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Start from the supports in a file of `initialize_support(..., save_to=path)`; values are zeroed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, of another format, made for another model (the message names the module), or
            its sizes are not the config's.
    """
    layers, _ = _layers_of(model, adapter_name)
    _check_fresh(layers, adapter_name)
    units, _ = read_support_file(path, _grids(layers, adapter_name))
    write_supports(model, units, adapter_name)


def _size(layer: SparseLoraLayer, adapter_name: str) -> int:
    return layer.sizes[adapter_name].units if adapter_name in layer.sparse_lora_values else 0


def _grids(layers: list[SparseLoraLayer], adapter_name: str) -> dict[str, UnitGrid]:
    return {layer.module_name: layer.sparse_lora_grid[adapter_name] for layer in layers}


def _layers_of(model: nn.Module, adapter_name: str) -> tuple[list[SparseLoraLayer], SparseLoraConfig]:
    layers = [layer for layer in adapter_layers(model, SparseLoraLayer) if adapter_name in layer.sparse_lora_grid]
    if not layers:
        known = sorted({name for layer in adapter_layers(model, SparseLoraLayer) for name in layer.sparse_lora_grid})
        raise ValueError(
            f"The model has no adapter '{adapter_name}' with a support; adapters that have one: {known or 'none'}. "
            "Call get_peft_model with a SparseLoraConfig of density > 0 first."
        )
    return layers, layers[0].adapter_configs[adapter_name]


def _check_fresh(layers: list[SparseLoraLayer], adapter_name: str) -> None:
    for layer in layers:
        values = layer.sparse_lora_values.get(adapter_name, None)
        if values is None:
            continue
        if adapter_name not in layer.active_adapters or layer.merged or layer.disable_adapters:
            raise ValueError(
                f"Adapter '{adapter_name}' is inactive, disabled or merged; call model.set_adapter('{adapter_name}')."
            )
        if not values.requires_grad:
            raise ValueError(f"Adapter '{adapter_name}' is frozen; load it with is_trainable=True.")
    _check_untrained(layers, adapter_name)


def _check_untrained(layers: list[SparseLoraLayer], adapter_name: str) -> None:
    for layer in layers:
        if adapter_name in layer.sparse_lora_values and not layer.has_first_values(adapter_name):
            raise ValueError(
                f"Adapter '{adapter_name}' has trained values in '{layer.module_name}', which a new support would "
                "throw away. Choose the support before training."
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
