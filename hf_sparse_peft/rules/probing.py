"""Forward and backward passes beside training that leave no trace: modes and random states are put back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..sparsity import random_units
from .collectives import rank, world_size


def random_state() -> tuple:
    """The global random states of Python, numpy and torch, those of GPUs in use included."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple) -> None:
    """Put back what `random_state` gave."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state_all(state[3])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global random states of Python, numpy and torch back at the end."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def modes_kept(model: nn.Module, training: bool) -> Iterator[None]:
    """Switch `model` to training or evaluation, and every module back to its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch, or what is in it at any depth of mappings, with its tensors on `device`."""
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch


def loss_of(model: nn.Module, batch: Mapping[str, Any], compute_loss: Any = None) -> Tensor:
    """The mean loss of a batch, by `compute_loss(model, batch)` or the model's own `loss`.

    Raises:
        ValueError: the model gives no loss.
    """
    if compute_loss is not None:
        return compute_loss(model, batch)
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"The model returns no loss for batches of {sorted(batch)}. Give the batches labels; what is read before "
            "training may also come from hf_sparse_peft.calibrate(..., compute_loss=lambda model, batch: ...)."
        )
    return loss


def indexed_dataset(run: Any, owner: str) -> Any:
    """The training data, which samples can be drawn of.

    Raises:
        ValueError: it has no index.
    """
    loader = run.training.dataloader
    dataset = getattr(loader, "dataset", None)
    if not all(hasattr(dataset, name) for name in ("__getitem__", "__len__")) or not hasattr(loader, "collate_fn"):
        raise ValueError(
            f"{owner} draws its probes by index, and this training data has no index. Train on a dataset with "
            "__getitem__ and __len__."
        )
    return dataset


def drawn_batches(
    run: Any, rule: Any, samples: int, size: int, *stream: Any, share: bool = True
) -> Iterator[Mapping[str, Any]]:
    """Random training samples, collated as in training, on the device of what trains, `size` at a time.

    Args:
        run: of `rule`, a rule that draws (`rule.stream`).
        rule: the rule, whose name errors have.
        samples: how many, or all that there are.
        size: of a batch.
        stream: what the draw is for.
        share: whether ranks share the samples out; else each has all of them.

    Raises:
        ValueError: the training data has no index.
    """
    dataset = indexed_dataset(run, type(rule).__name__)
    generator = torch.Generator().manual_seed(rule.stream(run, *stream))
    rows = random_units(len(dataset), min(samples, len(dataset)), generator).tolist()
    rows = (rows[rank() :: world_size()] or rows) if share else rows
    device = run.all_spaces[0].parameters()[0].device
    for first in range(0, len(rows), size):
        batch = run.training.dataloader.collate_fn([dataset[row] for row in rows[first : first + size]])
        yield to_device(batch, device)
