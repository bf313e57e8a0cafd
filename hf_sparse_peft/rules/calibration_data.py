"""Reading the training data before training without anybody noticing: on copies of samplers and random states."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..utils.label_shift import shift_by_class
from .collectives import on_every_rank
from .probing import random_state, set_random_state, to_device


class CalibrationData:
    """The batches of `dataloader` in the order in which training will see them, as often as they are asked for.

    A `DataLoader` (Accelerate's included) is never iterated itself: every pass reads its dataset through a deep copy of
    its batch sampler, collate function and generator, from the random states of the moment of construction. Any other
    iterable of batches must give the same ones at every pass. Use it inside `random_state_kept`.

    Raises:
        TypeError: `dataloader` is not an iterable, or is an iterator, which can be read only once.
    """

    def __init__(self, dataloader: Any, device: torch.device) -> None:
        if isinstance(dataloader, Iterator) or not isinstance(dataloader, Iterable):
            raise TypeError(
                f"dataloader={type(dataloader).__name__} cannot be read again from its start. Pass a DataLoader or a "
                "list of batches."
            )
        self._loader, self._device, self._state = dataloader, device, random_state()

    def batches(self) -> Iterator[dict[str, Any]]:
        """One pass over the batches, moved to the model's device.

        Raises:
            TypeError: a batch is not a mapping of the model's arguments.
        """
        set_random_state(self._state)
        return self._read(_copy_of(self._loader))

    def epochs(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Pass after pass over the batches, shuffled anew where training would be."""
        set_random_state(self._state)
        loader = _copy_of(self._loader)
        while True:
            yield self._read(loader)

    def _read(self, loader: Iterable) -> Iterator[dict[str, Any]]:
        for batch in loader:
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"The dataloader gives batches of {type(batch).__name__}; the model takes them as keyword "
                    "arguments. Use a collate function that returns a dict."
                )
            yield to_device(batch, self._device)

    def examples(self, count: int) -> Iterator[dict[str, Any]]:
        """Batches of `count` examples in all, the last one cut to fit.

        Raises:
            ValueError: there is no batch.
        """
        left = count
        for batch in self.batches():
            size = batch_size(batch)
            yield batch if size <= left else rows_of(batch, 0, left)
            left -= size
            if left <= 0:
                return
        if left == count:
            raise ValueError("The dataloader has no batch to read.")


def endless(data: CalibrationData, device: torch.device) -> Iterator[dict[str, Any]]:
    """The batches of `data` over and over; ranks start a new pass together.

    Raises:
        ValueError: there is no batch.
    """
    for batches in data.epochs():
        seen = False
        while on_every_rank((batch := next(batches, None)) is not None, device):
            seen = True
            yield batch
        if not seen:
            raise ValueError("The dataloader has no batch to read.")


def _copy_of(loader: Any) -> Iterable:
    if not isinstance(loader, DataLoader):
        return loader
    dataset = loader.dataset
    shared = {id(dataset): dataset}
    collate = copy.deepcopy(loader.collate_fn, shared)
    generator = copy.deepcopy(loader.generator)
    if isinstance(dataset, IterableDataset) or loader.batch_sampler is None:
        options = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        return DataLoader(dataset, collate_fn=collate, generator=generator, **options)
    sampler = copy.deepcopy(loader.batch_sampler, shared)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, generator=generator)


def batch_size(batch: Mapping[str, Any]) -> int:
    """Examples in a batch: the length of its first tensor."""
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.ndim:
            return len(value)
    raise TypeError(f"The batch {sorted(batch)} has no tensor whose first dimension counts its examples.")


def rows_of(batch: Mapping[str, Any], begin: int, end: int) -> dict[str, Any]:
    """Some examples of a batch, as a batch."""
    size = batch_size(batch)
    return {
        key: value[begin:end]
        if isinstance(value, (torch.Tensor, list, tuple))
        and not (isinstance(value, torch.Tensor) and not value.ndim)
        and len(value) == size
        else value
        for key, value in batch.items()
    }


def items_in(batch: Mapping[str, Any], model: nn.Module) -> int:
    """What the mean loss of a batch is a mean of: labelled tokens, or examples where labels are no tokens."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return batch_size(batch)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if shift_by_class(base):
        labels = labels[..., 1:]  # the first token is never predicted
    return max(1, int((labels != -100).sum()))
