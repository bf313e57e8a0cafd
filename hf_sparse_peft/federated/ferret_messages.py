"""Ferret's messages: coordinates, and the seeds of their bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..utils.option_types import NonNegativeFloat, NonNegativeInt
from .ferret import Ferret, FerretUpdate, Term, apply_terms, project
from .messages import check_tensors_like, pack, unpack
from .seeded_bases import Block, blocks_of


def ferret_client_message(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    options: Ferret,
    number: int,
    client: str,
    examples: int,
) -> bytes:
    """What a client sends back after its local steps: coordinates and two seeds, whatever the size of the tensors.

    Args:
        before: the tensors that it was given, by name, in an order that all share.
        after: those that it has now.
        options: of the method.
        number: of the round.
        client: its name.
        examples: that it trained on.

    Raises:
        ValueError: other names or shapes in `after`, or numbers that are not finite; names the tensor.
    """
    check_tensors_like(after, before, client)
    update = {name: before[name].float() - after[name].float() for name in before}
    found = project(update, options, number, client, examples)
    about = {"client": client, "examples": examples, "seed": found.seed, "chosen": found.chosen}
    return pack("ferret", _coordinates(found.coordinates), round=number, **about)


def read_ferret_message(
    data: bytes, sender: str, like: Mapping[str, Tensor], options: Ferret, number: int
) -> FerretUpdate:
    """A client's reply, checked against the global tensors.

    Raises:
        ValueError: it is cut, damaged, not finite, of another sender or round, in other bases, or has another number of
            blocks or too many coordinates; names the sender.
    """
    message, parts = unpack(data, sender, "ferret"), blocks_of(like, options.block_share)
    counts = _checked_counts(message.tensors, "", parts, options, sender)
    client, found = message.get("client", str, sender), message.get("round", NonNegativeInt, sender)
    if client != sender or found != number:
        raise ValueError(
            f"The message of '{sender}' says that it is of '{client}' and round {found}; awaited: round {number}."
        )
    update = FerretUpdate(
        client,
        message.get("examples", NonNegativeInt, sender),
        message.get("seed", NonNegativeInt, sender),
        message.get("chosen", NonNegativeInt | None, sender),
        list(message.tensors["coordinates"].split(counts)),
    )
    if (update.seed, update.chosen) != (options.bases_seed(number, sender), options.chosen_seed(number, sender)):
        raise ValueError(f"'{sender}' projects on other bases than round {number} has. All take part with one Ferret.")
    return update


def ferret_server_message(terms: Sequence[Term], number: int, step: float) -> bytes:
    """What the server sends to all after a round: the coordinates that it applied, for `ferret_receive`."""
    tensors: dict[str, Tensor] = {}
    for at, term in enumerate(terms):
        tensors |= _coordinates(term.coordinates, f"{at}/")
        if any(numbers != list(range(len(numbers))) for numbers in term.base_numbers):
            flat = [number for numbers in term.base_numbers for number in numbers]
            tensors[f"{at}/numbers"] = torch.tensor(flat, dtype=torch.int32)
    return pack("ferret_round", tensors, round=number, step=float(step), seeds=[term.seed for term in terms])


def ferret_receive(tensors: Mapping[str, Tensor], data: bytes, options: Ferret, number: int) -> dict[str, Tensor]:
    """The global tensors after round `number`, of a client that has those before it; `tensors` are not changed. Who
    missed rounds receives their messages one after the other.

    Raises:
        ValueError: it is cut, damaged, of another round, or does not fit the tensors.
    """
    message = unpack(data, "server", "ferret_round")
    if message.get("round", NonNegativeInt, "server") != number:
        raise ValueError(f"The message of 'server' is of round {message.about['round']}, and {number} is awaited.")
    parts, terms = blocks_of(tensors, options.block_share), []
    for at, seed in enumerate(message.get("seeds", list[NonNegativeInt], "server")):
        counts = _checked_counts(message.tensors, f"{at}/", parts, options, "server")
        numbers, flat = [list(range(count)) for count in counts], message.tensors.get(f"{at}/numbers")
        if flat is not None:
            if flat.dtype != torch.int32 or flat.numel() != sum(counts) or not _within(flat, options.bases):
                raise ValueError(f"'{at}/numbers' of 'server' does not name {sum(counts)} of {options.bases} bases.")
            numbers = [part.tolist() for part in flat.split(counts)]
        terms.append(Term(seed, numbers, list(message.tensors[f"{at}/coordinates"].split(counts))))
    return apply_terms(tensors, terms, options, message.get("step", NonNegativeFloat, "server"))


def _within(numbers: Tensor, below: int) -> bool:
    return not numbers.numel() or bool((numbers >= 0).all() & (numbers < below).all())


def _coordinates(blocks: Sequence[Tensor], prefix: str = "") -> dict[str, Tensor]:
    counts = torch.tensor([one.numel() for one in blocks], dtype=torch.int32)
    return {f"{prefix}counts": counts, f"{prefix}coordinates": torch.cat(list(blocks))}


def _checked_counts(
    tensors: Mapping[str, Tensor], prefix: str, parts: Sequence[Block], options: Ferret, sender: str
) -> list[int]:
    counts, coordinates = (tensors.get(f"{prefix}{name}") for name in ("counts", "coordinates"))
    fits = counts is not None and coordinates is not None
    fits = fits and counts.dtype == torch.int32 and tuple(counts.shape) == (len(parts),)
    fits = fits and _within(counts, options.bases + 1)
    if not fits or coordinates.dtype != torch.float32 or tuple(coordinates.shape) != (int(counts.sum()),):
        raise ValueError(
            f"The coordinates of '{sender}' are not those of {len(parts)} blocks with at most {options.bases} each. "
            "All take part with one Ferret and one model."
        )
    return counts.tolist()
