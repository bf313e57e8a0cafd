"""Batches of one task each, drawn by a temperature: data for adapters that are told the task of a pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ..sparsity import stream_seed


class TaskMixture(Dataset):
    r"""Examples of several datasets, in an order in which every `batch` of them that follow each other are of one task,
    drawn with probability :math:`p_\tau \propto n_\tau^{1/T}` (HyperFormer; Karimi Mahabadi et al., 2021).

    An example is one of its dataset, a mapping, with its task's name under "task"; it is drawn with replacement. What
    stands at an index follows from seed, epoch and index alone, so that all ranks draw the same tasks and a resumed run
    goes on with what was to come. It is to be read in order, which is one option of a Trainer:

        batch = args.per_device_train_batch_size * args.world_size
        args = TrainingArguments(..., train_sampling_strategy="sequential", remove_unused_columns=False)
        Trainer(model, args, train_dataset=TaskMixture(datasets, batch), data_collator=TaskCollator(collator))

    Args:
        datasets: sized datasets by the names of their tasks.
        batch: examples that all ranks together take at a time.
        temperature: T; 1: in proportion to the sizes; large: tasks alike.
        batches: of an epoch; None: as many as one pass over all examples would be.
        seed: of the draws.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        datasets: Mapping[str, Sequence[Mapping[str, Any]]],
        batch: int,
        *,
        temperature: float = 10.0,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        sizes = {name: len(dataset) for name, dataset in datasets.items()}
        if not sizes or not all(sizes.values()):
            raise ValueError(f"datasets have the sizes {sizes}: there must be one or more, none of them empty.")
        for name, value in (
            ("batch", batch),
            ("temperature", temperature),
            ("batches", 1 if batches is None else batches),
        ):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be a positive number.")
        self.datasets, self.batch, self.seed, self.epoch = dict(datasets), batch, seed, 0
        shares = torch.tensor([size / sum(sizes.values()) for size in sizes.values()]).double() ** (1 / temperature)
        self.probabilities: dict[str, float] = dict(zip(sizes, (shares / shares.sum()).tolist(), strict=True))
        self.batches = batches or math.ceil(sum(sizes.values()) / batch)
        self._drawn: dict[tuple[int, int], tuple[str, list[int]]] = {}

    def __len__(self) -> int:
        return self.batches * self.batch

    def set_epoch(self, epoch: int) -> None:
        """Draw other tasks and examples, those of that epoch; Trainer and accelerate call it."""
        self.epoch = epoch

    def task(self, batch: int) -> str:
        """Task of a batch of this epoch."""
        return self._draw(batch)[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        task, examples = self._draw(index % len(self) // self.batch)
        return {**self.datasets[task][examples[index % self.batch]], "task": task}

    def _draw(self, batch: int) -> tuple[str, list[int]]:
        key = (self.epoch, batch)
        if key not in self._drawn:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "task mixture", self.epoch, batch))
            shares = torch.tensor(list(self.probabilities.values()), dtype=torch.float64)
            task = list(self.datasets)[int(torch.multinomial(shares, 1, generator=generator))]
            drawn = torch.randint(len(self.datasets[task]), (self.batch,), generator=generator).tolist()
            self._drawn = {key: (task, drawn)}  # read in order, one batch is enough
        return self._drawn[key]


class TaskCollator:
    """Makes a batch of examples of one task by `collate`, and puts the task's name under "task", which the model takes.

    Args:
        collate: makes a batch of the examples without their tasks.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch.

        Raises:
            ValueError: the examples are of several tasks, or have none.
        """
        tasks = sorted({str(example.get("task")) for example in examples})
        if len(tasks) > 1 or any("task" not in example for example in examples):
            raise ValueError(
                f"A batch has examples of the tasks {tasks}, and every batch is of one. Give TaskMixture the number of "
                "examples that all ranks take at a time (batch), and read it in order: "
                "train_sampling_strategy='sequential', remove_unused_columns=False."
            )
        own = [{name: value for name, value in example.items() if name != "task"} for example in examples]
        return {**self.collate(own), "task": tasks[0]}
