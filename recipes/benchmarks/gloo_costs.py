"""Times of gloo's collectives between processes of this machine, a model of them, and a simulation for more ranks."""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from hf_sparse_peft.preflight import Traffic


def timed_sizes(largest: int) -> list[int]:
    """Bytes from 1 KiB on, four times as many each."""
    return [1 << power for power in range(10, 40, 2) if 1 << power <= largest]


def measure_gloo(ranks: int, largest: int, rounds: int) -> dict[str, Any]:
    """Seconds of sums and of sends from the first rank, by size: of the slowest rank, `rounds` times each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = get_context("fork")
    queue = context.Queue()
    arguments = (ranks, port, timed_sizes(largest), rounds, queue)
    workers = [context.Process(target=_worker, args=(rank, *arguments)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    times = queue.get(timeout=1200)
    for worker in workers:
        worker.join()
    return {"times": times}


def _worker(rank: int, ranks: int, port: int, sizes: list[int], rounds: int, queue: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    found = []
    for name in ("all_reduce", "broadcast"):
        for size in sizes:
            tensor, seconds = torch.zeros(size // 4), []
            for _ in range(rounds + 2):
                torch.distributed.barrier()
                begin = time.perf_counter()
                torch.distributed.all_reduce(tensor) if name == "all_reduce" else torch.distributed.broadcast(tensor, 0)
                # A rank that has sent is not done: the slowest one's time counts.
                took = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
                torch.distributed.all_reduce(took, torch.distributed.ReduceOp.MAX)
                seconds.append(took.item())
            found.append({"collective": name, "bytes": size, "seconds": seconds[2:]})
    if rank == 0:
        queue.put(found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def messages(collective: str, ranks: int) -> tuple[float, float]:
    """Of a ring sum, or of a send down a binary tree: messages one after the other, and the whole tensor's bytes that
    one rank sends in them."""
    if collective == "all_reduce":
        return 2 * (ranks - 1), 2 * (ranks - 1) / ranks
    return math.ceil(math.log2(ranks)), math.ceil(math.log2(ranks))


@dataclass(frozen=True)
class Fit:
    r"""Seconds of a collective of `n` bytes: :math:`t_0 + m\alpha + q n\beta`, `m` messages, `q` as in `messages`."""

    start: float
    latency: float
    seconds_a_byte: float
    errors: tuple[float, ...]
    """Of each size and number of ranks, relative: model / fastest measured - 1."""

    def seconds(self, collective: str, ranks: int, size: int) -> float:
        """Of one collective."""
        count, share = messages(collective, ranks)
        return self.start + count * self.latency + share * size * self.seconds_a_byte

    @property
    def residual(self) -> tuple[float, float]:
        """Median and largest of the absolute errors."""
        return statistics.median(map(abs, self.errors)), max(map(abs, self.errors))


def fit(measured: list[tuple[int, dict[str, Any]]], collective: str) -> Fit:
    """Least squares of relative errors, of coefficients that are not below 0, over all ranks and sizes."""
    points = [(ranks, one) for ranks, one in measured if one["collective"] == collective]
    rows, target = [], []
    for ranks, one in points:
        seconds = min(one["seconds"])  # what other processes take is not the collective's
        count, share = messages(collective, ranks)
        rows.append([1 / seconds, count / seconds, share * one["bytes"] / seconds])
        target.append(1.0)
    matrix, kept = np.array(rows), [0, 1, 2]
    while True:
        found = np.linalg.lstsq(matrix[:, kept], np.array(target), rcond=None)[0]
        if (found >= 0).all() or len(kept) == 1:
            break
        kept.remove(kept[int(found.argmin())])
    values = [0.0, 0.0, 0.0]
    for place, value in zip(kept, found, strict=True):
        values[place] = float(max(value, 0.0))
    return Fit(*values, tuple(float(one) for one in matrix @ np.array(values) - 1))


def noise_of(measured: list[tuple[int, dict[str, Any]]], collective: str) -> np.ndarray:
    """Each measured time over the fastest of its size and ranks."""
    found = []
    for _, one in measured:
        if one["collective"] == collective:
            found += [seconds / min(one["seconds"]) for seconds in one["seconds"]]
    return np.array(found)


def simulate(fitted: Fit, noise: np.ndarray, ranks: int, size: int, generator: np.random.Generator) -> float:
    r"""Seconds of one ring sum, message by message: rank `r` sends its next part when it has sent the last one and has
    received rank `r - 1`'s; a message takes :math:`(\alpha + \frac{n}{R}\beta)` times a draw of the measured noise."""
    ready = np.zeros(ranks)
    message = fitted.latency + size / ranks * fitted.seconds_a_byte
    for _ in range(2 * (ranks - 1)):
        sent = ready + message * generator.choice(noise, ranks)
        ready = np.maximum(sent, np.roll(sent, 1))
    return fitted.start * float(generator.choice(noise)) + float(ready.max())


CALM = np.linspace(0.8, 1.2, 41)
"""Noise of messages that differ by a fifth at most."""


def simulated_move(
    fitted: Fit, noise: np.ndarray, ranks: int, moves: list[Traffic], draws: int
) -> tuple[float, float, float]:
    """Seconds of a move's sums: by the formula, and the means of `draws` simulations of each size with `CALM` and with
    the measured `noise`."""
    sizes: dict[int, int] = {}
    for one in moves:
        for size in one.sizes:
            sizes[size] = sizes.get(size, 0) + 1
    generator = np.random.default_rng(0)
    formula = sum(count * fitted.seconds("all_reduce", ranks, size) for size, count in sizes.items())
    calm, measured = (
        sum(
            count * statistics.mean(simulate(fitted, drawn, ranks, size, generator) for _ in range(draws))
            for size, count in sizes.items()
        )
        for drawn in (CALM, noise)
    )
    return formula, calm, measured
