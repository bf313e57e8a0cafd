"""Calibration of adapters of any tuner: by hand with `calibrate`, at the start of training with `calibrate_waiting`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ...optim import forget_removed
from ...rules import Training
from ...rules.calibration_data import CalibrationData
from ...rules.collectives import world_size
from ...rules.probing import random_state_kept
from ...tuners import AdapterLayer, SparseLoraLayer, adapter_layers
from ..trainer_checks import sharding_switched_on
from .both_halves import start_both_halves
from .evidence import tell_missing
from .initialize import initialize_support
from .passes import ACCUMULATOR_BYTES, check_numbers, read_statistics


def calibrate(
    model: nn.Module,
    dataloader: Iterable,
    adapter_name: str = "default",
    *,
    batches_per_step: int = 1,
    compute_loss: Callable[[nn.Module, dict[str, Any]], torch.Tensor] | None = None,
    accumulator_bytes: int = ACCUMULATOR_BYTES,
    show_progress: bool = True,
) -> None:
    """Let data decide what an adapter waits for: a support (as `initialize_support`), bases, ranks and factors
    (`SparseLoraConfig.start`), whatever its tuner takes.

    The model runs in evaluation mode and every module gets its mode back; neither the global random states nor a
    DataLoader's sampler move, so that training sees its data in the order that it would have seen. Under
    torch.distributed every rank brings its part of the data, and all decide the same. A Trainer with
    `callbacks_for(model)` and `Controller(dataloader=...)` do it by themselves. An adapter that does not wait, because
    it was calibrated or loaded, is left as it is.

    Args:
        model: has the adapter, active and trainable.
        dataloader: batches as mappings of the model's arguments, labels included; a DataLoader or a list.
        adapter_name: which adapter.
        batches_per_step: batches whose gradients make one optimizer step, for statistics that go by steps.
        compute_loss: `(model, batch) -> mean loss`; None: the model's own.
        accumulator_bytes: statistics alive at once; what needs more takes further passes over the data.
        show_progress: whether a bar shows on stderr.

    Raises:
        ValueError: no such adapter, a number that is no integer >= 1, no batch, no loss, or data that says nothing
            about any layer.
        TypeError: a dataloader that cannot be read twice, or batches that are no mappings.
    """
    check_numbers(batches_per_step, accumulator_bytes)
    layers = adapter_layers(model, adapter_name=adapter_name)
    waiting = {layer.module_name: layer for layer in layers if layer.awaits_calibration(adapter_name)}
    options = {
        "batches_per_step": batches_per_step,
        "compute_loss": compute_loss,
        "accumulator_bytes": accumulator_bytes,
        "show_progress": show_progress,
    }
    if any(layer.adapter_configs[adapter_name].awaits_start for layer in layers if isinstance(layer, SparseLoraLayer)):
        start_both_halves(model, layers, dataloader, adapter_name, options)
        return
    shared = {name for name, layer in waiting.items() if adapter_name in getattr(layer, "sparse_lora_grid", ())}
    if shared:  # supports may share a budget; every subnet has its own
        initialize_support(model, dataloader, adapter_name=adapter_name, **options)
    own = {name: layer for name, layer in waiting.items() if name not in shared}
    if own:
        _calibrate_each(model, own, dataloader, adapter_name, options)


def _calibrate_each(
    model: nn.Module, waiting: dict[str, AdapterLayer], dataloader: Iterable, adapter_name: str, options: dict[str, Any]
) -> None:
    """Give each layer its own statistic."""
    by_statistic: dict[Any, dict[str, AdapterLayer]] = {}
    for name, layer in waiting.items():
        by_statistic.setdefault(layer.calibration_statistic(adapter_name), {})[name] = layer
    without: list[str] = []
    with random_state_kept():
        data = CalibrationData(dataloader, next(model.parameters()).device)
        for statistic, layers in by_statistic.items():
            for readers in read_statistics(model, layers, statistic, data, **options):
                for reader in readers:
                    if reader.says_something():
                        layers[reader.name].take_calibration(adapter_name, reader.state)
                    else:
                        without.append(reader.name)
    tell_missing(
        f"The data says nothing about any of the {len(waiting)} modules of adapter '{adapter_name}': their statistics "
        "are 0 or not finite",
        f"The data says nothing about {len(without)} of {len(waiting)} modules of adapter '{adapter_name}', whose "
        "statistics are 0 or not finite; they start as without data",
        without,
        len(waiting),
        stacklevel=4,
    )
    for name in without:
        waiting[name].take_calibration(adapter_name, None)


def calibrate_waiting(training: Training) -> None:
    """Let the training data decide what trained adapters wait for, at the start of a run; nothing to do in a resumed
    one, whose checkpoint has it.

    Raises:
        ValueError: there is no data, weights are sharded, or sizes would change under a model that is wrapped.
    """
    model = extract_model_from_parallel(training.model)
    for adapter, layers in _waiting_adapters(model).items():
        _check_loop(training, adapter, layers[0])
        calibrate(
            model,
            training.dataloader,
            adapter,
            batches_per_step=training.accumulation,
            show_progress=training.show_progress,
        )
    if training.optimizer is not None and forget_removed(training.optimizer):
        warnings.warn(
            "No module has any left of the parameters of one of the optimizer's groups (a half that was left out "
            "everywhere): a run that goes on from a checkpoint makes an optimizer without that group, which does not "
            "fit. Call hf_sparse_peft.calibrate(model, dataloader) before creating the Trainer to have such runs.",
            stacklevel=2,
        )


def waits_for_data(model: nn.Module) -> bool:
    """Whether a trained adapter of `model` waits for data."""
    return bool(_waiting_adapters(model))


def _waiting_adapters(model: nn.Module) -> dict[str, list[AdapterLayer]]:
    """The layers that wait for data, by active adapter that trains."""
    found: dict[str, list[AdapterLayer]] = {}
    for adapter, layer in _active(model):
        trains = any(parameter.requires_grad for parameter in layer.trained_parameters(adapter))
        if trains and layer.awaits_calibration(adapter):
            found.setdefault(adapter, []).append(layer)
    return found


def _active(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    return ((adapter, layer) for layer in adapter_layers(model) for adapter in layer.active_adapters)


def _check_loop(training: Training, adapter: str, layer: AdapterLayer) -> None:
    config = layer.adapter_configs[adapter]
    what = f"Adapter '{adapter}' starts from '{layer.calibration_statistic(adapter).name}' of whole weights"
    mend = "Call hf_sparse_peft.calibrate(model, dataloader) before creating the Trainer"
    sharded = sharding_switched_on(training.arguments)
    if sharded is not None and sharded[0] != "FSDP2":  # which gathers a weight that is asked for
        raise ValueError(f"{what}, and {sharded[0]}, switched on by {sharded[1]}, has sharded them. {mend}.")
    processes = getattr(training.arguments, "world_size", None) or world_size()
    if config.calibrates_sizes and processes > 1:
        raise ValueError(
            f"{what}, which changes sizes (with budget=Global(...), a structure of scope='model', or start=...), and "
            f"{processes} processes have wrapped the model already. {mend}, on every rank, or set a density, "
            "scope='block' and start=None."
        )
    if training.dataloader is None and training.arguments is None:
        raise ValueError(
            f"{what}, and this loop gives no data: pass Controller(..., dataloader=...), or call "
            "hf_sparse_peft.calibrate(model, dataloader) first."
        )
    if training.dataloader is None:
        raise ValueError(f"{what}, and this trainer hands its callbacks no dataloader. {mend}.")
