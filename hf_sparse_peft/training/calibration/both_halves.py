"""Starts of both halves of an adapter, sizes included, decided over the whole model (`SparseLoraConfig.start`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...optim import note_kept
from ...rules.calibration_data import CalibrationData
from ...rules.collectives import from_first_rank, is_distributed
from ...rules.probing import random_state_kept
from ...tuners.shared.rollback import uninterrupted
from ...tuners.sparse_lora import SparseLoraLayer, Start
from ...tuners.sparse_lora.starts import Started
from .evidence import tell_missing
from .passes import read_statistics


def start_both_halves(
    model: nn.Module,
    layers: list[SparseLoraLayer],
    dataloader: Iterable,
    adapter_name: str,
    options: dict[str, Any],
) -> None:
    """Read the statistic of the adapter's `start` in every layer, decide, and only then give all layers their sizes and
    first content; `options` are those of `read_statistics`. The config's `sizes` say what was decided.

    Raises:
        ValueError: the adapter is inactive, disabled or merged, there is no batch, or the data says nothing about any
            layer.
    """
    config = layers[0].adapter_configs[adapter_name]
    start: Start = config.start
    if any(adapter_name not in one.active_adapters or one.merged or one.disable_adapters for one in layers):
        raise ValueError(
            f"Adapter '{adapter_name}' is inactive, disabled or merged, and starts by gradients of the model as it is "
            f"with it. Call model.set_adapter('{adapter_name}'), model.unmerge_adapter()."
        )
    by_name = {layer.module_name: layer for layer in layers}
    sites = {name: layer.start_site(adapter_name) for name, layer in by_name.items()}
    summaries, without = {}, []
    with random_state_kept(), torch.no_grad():
        data = CalibrationData(dataloader, next(model.parameters()).device)
        for readers in read_statistics(model, by_name, start.statistic, data, **options):
            for reader in readers:
                says_something = reader.says_something()
                without += [] if says_something else [reader.name]
                state = reader.state if says_something else None
                summaries[reader.name] = start.summary(sites[reader.name], state)
        tell_missing(
            f"start='{start.part_type}' of adapter '{adapter_name}' has no gradient to go by: those of all "
            f"{len(layers)} modules are 0 or not finite",
            f"start='{start.part_type}' has no gradient of {len(without)} of {len(layers)} modules of adapter "
            f"'{adapter_name}', 0 or not finite: they start at the base, with the least that the start gives",
            without,
            len(layers),
            stacklevel=3,
        )
        started = start.decide(sites, summaries)
        started = {name: _same_on_all_ranks(started[name], sites[name].device) for name in by_name}
    with uninterrupted(), _whole_or_not(layers, adapter_name):
        for name, layer in by_name.items():
            layer.take_start(adapter_name, started[name])
        config.sizes = {name: layer.sizes[adapter_name].as_list() for name, layer in by_name.items()}


def _same_on_all_ranks(started: Started, device: torch.device) -> Started:
    """The first rank's decision: an SVD, or a product, may have been rounded otherwise on another."""
    if not is_distributed():
        return started
    found = []
    for tensor in started:
        shape = [-1] * 2 if tensor is None else [*tensor.shape, *[-1] * (2 - tensor.dim())]
        shape = [side for side in from_first_rank(torch.tensor(shape, device=device)).tolist() if side >= 0]
        found.append(from_first_rank(_fitting(tensor, shape, device)) if shape else None)
    return Started(*found)


def _fitting(tensor: Tensor | None, shape: list[int], device: torch.device) -> Tensor:
    if tensor is not None and list(tensor.shape) == shape:
        return tensor
    dtype = torch.float32 if tensor is None else tensor.dtype
    return torch.empty(shape, dtype=dtype, device=device)


@contextmanager
def _whole_or_not(layers: list[SparseLoraLayer], adapter_name: str) -> Iterator[None]:
    """Where the block fails, give the layers back the sizes and tensors of the adapter that they had."""
    before = [
        (layer, layer.sizes[adapter_name], {name: (t, t.data) for name, t in layer.tensors(adapter_name).items()})
        for layer in layers
    ]
    try:
        yield
    except BaseException:
        for layer, sizes, tensors in before:
            had_state = bool(layer.rule_state(adapter_name))
            layer.drop_training_state(adapter_name)
            layer.set_sizes(adapter_name, sizes)
            layer.forget_decoded(adapter_name)
            for name, (tensor, data) in tensors.items():
                tensor.data = data
                if isinstance(tensor, nn.Parameter):
                    note_kept(tensor)
                getattr(layer, name)[adapter_name] = tensor
            if had_state:
                layer.allocate_training_state(adapter_name)
        raise
