r"""FedAvg of adapters (McMahan et al., 2017): :math:`\theta_{t+1} = \sum_k p_k \theta_k`, with supports that moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor

from ..sparsity import coded_grid, decode_support, encode_support, stream_seed, top_units
from ..tuners.shared.config import AdapterConfig
from ..tuners.shared.file_check import check_tensors
from ..utils.checksums import checksums
from ..utils.option_types import NonNegativeInt, PositiveInt, check_value
from .adapter_tensors import adapter_tensors
from .factor_average import average_factors, factor_pairs
from .messages import check_finite, check_tensors_like, pack, unpack

SUPPORT, VALUES = ".sparse_lora_support", ".sparse_lora_values"


@dataclass(frozen=True)
class AdapterUpdate:
    """What a client sent back, or the server sent out."""

    client: str
    examples: int
    """That it trained on."""
    number: int
    """Of the round."""
    tensors: dict[str, Tensor]
    """All of the adapter's, by the names in its file."""


@dataclass
class Averaged:
    """An average, and what it is not exact in."""

    tensors: dict[str, Tensor]
    """All of the adapter's."""
    factor_errors: dict[str, float] = field(default_factory=dict)
    r"""Module -> :math:`\|\Delta - \sum_k p_k B_k A_k\|_F / \|\sum_k p_k B_k A_k\|_F` of its low-rank half, where the
    factors were not all the same."""
    dropped: dict[str, float] = field(default_factory=dict)
    """Module -> share of the squared mean that was on units which found no room, where supports differed."""


def adapter_message(
    model: PeftModel,
    number: int,
    *,
    client: str = "server",
    examples: int = 0,
    known: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
) -> bytes:
    """The adapter, as bytes to send.

    Args:
        model: holds it.
        number: of the round.
        client: who sends.
        examples: that the client trained on in this round.
        known: tensors that the receiver has (what the server sent it): those that are the same to the bit, such as a
            support that did not move or a frozen factor, are left out, and stand in it as one checksum.
        adapter_name: which adapter.
    """
    tensors = adapter_tensors(model, adapter_name)
    same = {name: tensor for name, tensor in tensors.items() if known is not None and _equal(tensor, known.get(name))}
    sent = {name: tensor for name, tensor in tensors.items() if name not in same}
    return pack("adapter", sent, round=number, client=client, examples=examples, left_out=checksums(same, {}))


def read_adapter_message(
    data: bytes,
    sender: str,
    known: Mapping[str, Tensor],
    *,
    number: int | None = None,
    config: PeftConfig | None = None,
) -> AdapterUpdate:
    """What `adapter_message` made, checked.

    Args:
        data: the message.
        sender: who it came from, as the receiver knows: the message has to say the same.
        known: the tensors that it was made against, or any of the same names, shapes and dtypes where it is complete.
        number: of the round that is awaited.
        config: the adapter's; with one of this package, supports and codes are checked as those of a file.

    Raises:
        ValueError: the message is cut, damaged, not finite, of another round or sender, or made against other tensors;
            names the sender and the tensor.
    """
    message = unpack(data, sender, "adapter")
    client, examples = message.get("client", str, sender), message.get("examples", NonNegativeInt, sender)
    found = message.get("round", NonNegativeInt, sender)
    if client != sender or (number is not None and found != number):
        raise ValueError(
            f"The message of '{sender}' says that it is of '{client}' and round {found}; awaited: round {number}."
        )
    left_out = {name: tensor for name, tensor in known.items() if name not in message.tensors}
    if message.get("left_out", str, sender) != checksums(left_out, {}):
        raise ValueError(
            f"The message of '{sender}' leaves out tensors that it believes known, and they are not those known here, "
            "or one is missing. Send all of them: adapter_message(known=None)."
        )
    tensors = {**left_out, **message.tensors}
    check_tensors_like(tensors, known, sender)
    if isinstance(config, AdapterConfig):
        check_tensors(tensors, config, f"the message of {sender}")
    return AdapterUpdate(client, examples, found, dict(sorted(tensors.items())))


def fedavg(
    updates: Sequence[AdapterUpdate],
    shares: Sequence[float] | None = None,
    *,
    moved: Literal["largest", "refuse"] = "largest",
    factors: Literal["apart", "product"] = "apart",
    seed: int = 0,
) -> Averaged:
    r"""The weighted mean of adapters of one config on one base.

    Where all clients have the same support, values are averaged one by one, and that is the mean of the updates. Where
    supports moved, the mean :math:`\sum_k p_k S_k` lies on their union, and the `capacity` units of it with the largest
    :math:`\sum|v|` are kept; `Averaged.dropped` says what that left out (`hub.combine_adapters` keeps the union, in a
    larger adapter). Heads and biases are averaged; masks, codes and counts have to be equal.

    The mean of low-rank factors is not that of their products: `factor_errors` measures it. Train with one factor
    frozen, and it is 0.

    Args:
        updates: of the clients whose replies count.
        shares: p, which add up to 1 (`Round.shares`); None: by examples.
        moved: "refuse": supports have to be equal.
        factors: "apart": factors are averaged one by one (FedIT; Zhang et al., 2024). "product": the best product of
            their rank to :math:`\sum_k p_k B_k A_k`, without building that; for modules that have no gate or
            other tensor between the factors.
        seed: for ties between units.

    Raises:
        ValueError: no update, shares that do not fit, other tensors in one update than in another, or integer tensors
            that differ; names the client and the tensor. Nothing is changed.
    """
    check_value(moved, Literal["largest", "refuse"], "fedavg(moved)")
    check_value(factors, Literal["apart", "product"], "fedavg(factors)")
    weights = _weights(updates, shares)
    first = updates[0].tensors
    for update in updates:
        check_tensors_like(update.tensors, first, update.client)
        check_finite(update.tensors, update.client)
    held = {name: [update.tensors[name] for update in updates] for name in sorted(first)}
    result = Averaged({})
    for name, tensors in held.items():
        if tensors[0].is_floating_point():
            result.tensors[name] = mean(tensors, weights)
        elif name.endswith(SUPPORT) or all(torch.equal(tensors[0], other) for other in tensors):
            result.tensors[name] = tensors[0].clone()
        else:
            odd = next(at for at, other in enumerate(tensors) if not torch.equal(tensors[0], other))
            raise ValueError(
                f"'{name}' of '{updates[odd].client}' is not that of '{updates[0].client}', and masks, codes and "
                "counts have no mean. Let the server say them, or leave out the rule that changes them on clients."
            )
    for name in [name for name in held if name.endswith(SUPPORT)]:
        module = name.removesuffix(SUPPORT)
        if any(not torch.equal(held[name][0], other) for other in held[name]):
            if moved == "refuse":
                raise ValueError(
                    f"The supports of '{module}' differ between clients, and moved='refuse'. Take moved='largest', or "
                    "leave out the rule that moves them."
                )
            _average_supports(module, held, weights, result, seed)
    for module, a, b in factor_pairs(held):
        average_factors(module, held, (a, b), weights, result, factors)
    return result


def mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """:math:`\\sum_k p_k t_k` in float64, rounded once to the tensors' dtype."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.double(), alpha=weight)
    return total.to(tensors[0].dtype)


def _average_supports(
    module: str, held: Mapping[str, list[Tensor]], weights: Sequence[float], result: Averaged, seed: int
) -> None:
    codes, values = held[module + SUPPORT], held[module + VALUES]
    grid, capacity = coded_grid(codes[0], module + SUPPORT), values[0].shape[0]
    units = [decode_support(code, grid, capacity, module + SUPPORT).long() for code in codes]
    united, owner = torch.unique(torch.cat(units), return_inverse=True)
    total = torch.zeros(united.numel(), *values[0].shape[1:], dtype=torch.float64)
    places = owner.split([one.numel() for one in units])
    for at, value, weight in zip(places, values, weights, strict=True):
        total.index_add_(0, at, value[: at.numel()].double(), alpha=weight)
    sizes = total.abs().flatten(1).sum(1) if total.dim() > 1 else total.abs()
    room = min(capacity, united.numel())
    best = top_units(sizes.float(), room, seed=stream_seed(seed, "fedavg", module)).long()
    kept = torch.zeros_like(values[0])
    kept[:room] = total[best].to(kept.dtype)
    whole = float(total.square().sum())
    result.dropped[module] = 1 - float(total[best].square().sum()) / whole if whole else 0.0
    result.tensors[module + SUPPORT] = encode_support(united[best], grid, capacity)
    result.tensors[module + VALUES] = kept


def _weights(updates: Sequence[AdapterUpdate], shares: Sequence[float] | None) -> list[float]:
    if not updates:
        raise ValueError("updates=[] has no update to average. `collect(least=1)` stops a round that has none.")
    if shares is None:
        for update in updates:
            check_value(update.examples, PositiveInt, f"the examples of '{update.client}'")
        total = sum(update.examples for update in updates)
        return [update.examples / total for update in updates]
    if len(shares) != len(updates) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares={list(shares)} takes {len(updates)} numbers >= 0 that add up to 1.")
    return list(shares)


def _equal(tensor: Tensor, other: Any) -> bool:
    same = other is not None and (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
    # Bits, not numbers: -0.0 is not 0.0, and the receiver takes its own.
    return same and torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
