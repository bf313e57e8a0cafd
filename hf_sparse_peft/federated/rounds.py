"""One round, whatever is sent: who takes part, whose replies count and how much, what it cost on the wire."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

import torch

from ..sparsity import stream_seed
from ..utils.option_types import NonNegativeInt, PositiveFraction, PositiveInt, check_value


class Weighted(Protocol):
    """What a share follows from."""

    client: str
    examples: int


Reply = TypeVar("Reply", bound=Weighted)


@dataclass
class Round(Generic[Reply]):
    """What came back in one round."""

    number: int
    """From 0 on."""
    replies: list[Reply] = field(default_factory=list)
    """Those that count, in the order of the clients' names: sums do not depend on who was first."""
    refused: dict[str, str] = field(default_factory=dict)
    """Client -> why its reply does not count."""
    bytes_up: int = 0
    """Of all replies, refused ones too."""

    def shares(self, by: Literal["examples", "equal"] = "examples") -> list[float]:
        """Weights of the replies, which add up to 1: by the examples that clients trained on, or equal."""
        check_value(by, Literal["examples", "equal"], "shares(by)")
        counts = [reply.examples if by == "examples" else 1 for reply in self.replies]
        return [count / sum(counts) for count in counts]


def choose_clients(clients: Sequence[str], fraction: float, number: int, seed: int = 0) -> list[str]:
    """The `int(fraction * N)` clients of round `number`, at least one, drawn without replacement; sorted.

    Raises:
        ValueError: no client, a name twice, or a fraction outside (0, 1].
    """
    check_value(fraction, PositiveFraction, "choose_clients(fraction)")
    if not clients or len(set(clients)) != len(clients):
        raise ValueError(f"clients={list(clients)[:3]} takes one different name or more.")
    count = max(1, int(fraction * len(clients) + 1e-9))
    generator = torch.Generator().manual_seed(stream_seed(seed, "clients", number))
    drawn = torch.randperm(len(clients), generator=generator)[:count].tolist()
    return sorted(sorted(clients)[at] for at in drawn)


def collect(
    number: int,
    replies: Mapping[str, bytes | BaseException | None],
    read: Callable[[bytes, str], Reply],
    *,
    on_bad: Literal["skip", "stop"] = "skip",
    least: int = 1,
) -> Round[Reply]:
    """Read what the chosen clients sent back.

    Args:
        number: of the round.
        replies: client -> its message; None where there is none (it dropped out, or was too late), or the error that it
            ended with.
        read: `(message, client)` -> what is averaged; raises `ValueError` where it refuses.
        on_bad: whether a round goes on without a reply that is missing or refused, with a warning that names the
            client, or stops.
        least: how many replies it takes.

    Raises:
        ValueError: a bad reply with `on_bad="stop"`, or fewer than `least` good ones. Nothing was changed then.
    """
    check_value(number, NonNegativeInt, "collect(number)")
    check_value(least, PositiveInt, "collect(least)")
    check_value(on_bad, Literal["skip", "stop"], "collect(on_bad)")
    found: Round[Reply] = Round(number)
    for client in sorted(replies):
        data = replies[client]
        if data is None or isinstance(data, BaseException):
            found.refused[client] = "no reply" if data is None else f"no reply: {type(data).__name__}: {data}"
        else:
            found.bytes_up += len(data)
            try:
                found.replies.append(read(data, client))
            except ValueError as error:
                found.refused[client] = str(error)
        if client in found.refused:
            told = f"Round {number}, client '{client}': {found.refused[client]}"
            if on_bad == "stop":
                raise ValueError(f"{told} (on_bad='stop').")
            warnings.warn(f"{told.rstrip('.')}. The round goes on without it.", stacklevel=2)
    if len(found.replies) < least:
        raise ValueError(
            f"Round {number} has {len(found.replies)} good replies of {len(replies)}, and least={least}: "
            f"{found.refused}. The global model is as it was; choose clients again."
        )
    return found
