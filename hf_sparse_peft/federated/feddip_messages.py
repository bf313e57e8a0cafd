"""FedDIP's messages: kept values, and of a new mask one bit for every entry that the former one kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor

from ..sparsity import pack_bits, unpack_bits
from ..tuners.masked_lora import MaskedLoraLayer
from ..utils.checksums import checksums
from ..utils.option_types import NonNegativeInt
from .adapter_tensors import adapter_tensors, write_adapter_tensors
from .feddip import FedDIP, FedDIPUpdate, check_modules, delta, draw_masks, masked_layers, masks_of
from .messages import Message, check_tensors_like, pack, unpack

_VALUES, _KEPT, _OTHER = "values/", "kept/", "other/"


@torch.no_grad()
def feddip_server_message(
    model: PeftModel,
    options: FedDIP,
    number: int,
    *,
    known: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
) -> bytes:
    """The global model for round `number`: D of the kept entries, and what of the mask the receiver does not know.

    Args:
        model: the server's.
        options: of the method.
        number: of the round.
        known: the masks that the receiver has (`masks_of` when it was sent to last): the same ones are not sent again,
            and of others a bit for each entry that these kept. None: it has none; a bit an entry.
        adapter_name: which adapter.

    Raises:
        ValueError: the mask has entries that `known` has not: masks only shrink.
    """
    layers = masked_layers(model, adapter_name)
    values = _values(layers, adapter_name, dense=options.draws_masks(number))
    fresh = not any(bool(one.any()) for one in values.values())  # the base, which all have
    tensors = _others(model, adapter_name)
    masks, about = masks_of(model, adapter_name), {"fresh": fresh}
    if not options.draws_masks(number):
        about |= {"mask": checksums(masks, {}), "former": None if known is None else checksums(known, {})}
        if known is None or about["mask"] != about["former"]:
            tensors |= {_KEPT + name: _coded(bits, name, known) for name, bits in masks.items()}
    if not fresh:
        tensors |= values
    return pack("feddip", tensors, round=number, client="server", **about)


@torch.no_grad()
def feddip_receive(
    model: PeftModel, data: bytes, options: FedDIP, number: int, client: str, adapter_name: str = "default"
) -> None:
    """Make the client's model the global one, ready to train in round `number`; all of it or nothing.

    Raises:
        ValueError: the message is cut, damaged or of another round, or made for a client that has other masks: names
            the tensor or what is awaited.
    """
    layers = masked_layers(model, adapter_name)
    message = unpack(data, "server", "feddip")
    if message.get("round", NonNegativeInt, "server") != number:
        raise ValueError(f"The message of 'server' is for round {message.about['round']}, and {number} is awaited.")
    drawn = options.draws_masks(number)
    kept = {layer.module_name: layer.kept(adapter_name).cpu() for layer in layers}
    if not drawn:
        kept = _received_masks(message, layers, adapter_name)
    values = _part(message, _VALUES)
    if message.get("fresh", bool, "server"):
        values = {}
    else:
        check_modules(values, layers, "server")
        for layer in layers:
            _check_values(values[layer.module_name], layer, kept[layer.module_name], drawn, "server")
    _write_others(model, _part(message, _OTHER), adapter_name, "server")
    for layer in layers:
        _write(layer, adapter_name, kept[layer.module_name], values.get(layer.module_name), keep_removed=drawn)
    if drawn:
        draw_masks(model, options, client, adapter_name)


@torch.no_grad()
def feddip_client_message(
    model: PeftModel, options: FedDIP, number: int, client: str, examples: int, adapter_name: str = "default"
) -> bytes:
    """What the client sends back: D of the kept entries, or in round 0 under masks of their own, all of it."""
    layers, dense = masked_layers(model, adapter_name), options.draws_masks(number)
    tensors = {**_others(model, adapter_name), **_values(layers, adapter_name, dense)}
    mask = None if dense else checksums(masks_of(model, adapter_name), {})
    return pack("feddip", tensors, round=number, client=client, examples=examples, mask=mask)


def read_feddip_message(
    model: PeftModel, data: bytes, sender: str, options: FedDIP, number: int, adapter_name: str = "default"
) -> FedDIPUpdate:
    """A client's reply, checked against the server's model.

    Raises:
        ValueError: it is cut, damaged, not finite, of another sender or round, or trained under another mask; names the
            sender and the tensor.
    """
    layers, drawn = masked_layers(model, adapter_name), options.draws_masks(number)
    message = unpack(data, sender, "feddip")
    found, client = message.get("round", NonNegativeInt, sender), message.get("client", str, sender)
    if client != sender or found != number:
        raise ValueError(
            f"The message of '{sender}' says that it is of '{client}' and round {found}; awaited: round {number}."
        )
    expected = None if drawn else checksums(masks_of(model, adapter_name), {})
    if message.get("mask", str | None, sender) != expected:
        raise ValueError(f"'{sender}' trained under another mask than round {number} has. Send it the global model.")
    values, others = _part(message, _VALUES), _part(message, _OTHER)
    check_modules(values, layers, sender)
    for layer in layers:
        _check_values(values[layer.module_name], layer, layer.kept(adapter_name), drawn, sender)
    check_tensors_like(others, _part_of(_others(model, adapter_name), _OTHER), sender)
    return FedDIPUpdate(client, message.get("examples", NonNegativeInt, sender), values, others)


def _values(layers: list[MaskedLoraLayer], adapter_name: str, dense: bool) -> dict[str, Tensor]:
    found = {}
    for layer in layers:
        change = delta(layer, adapter_name).detach()
        found[_VALUES + layer.module_name] = change if dense else change[layer.kept(adapter_name)]
    return found


def _others(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Heads and biases: what is no tensor of the adapted layers."""
    held = adapter_tensors(model, adapter_name).items()
    return {_OTHER + name: tensor for name, tensor in held if not name.rpartition(".")[2].startswith("masked_lora_")}


def _write_others(model: PeftModel, others: Mapping[str, Tensor], adapter_name: str, sender: str) -> None:
    known = _part_of(_others(model, adapter_name), _OTHER)
    check_tensors_like(others, known, sender)
    if others:
        write_adapter_tensors(model, {**adapter_tensors(model, adapter_name), **others}, adapter_name, sender)


def _write(layer: MaskedLoraLayer, adapter_name: str, kept: Tensor, values: Tensor | None, keep_removed: bool) -> None:
    change = delta(layer, adapter_name)
    kept = kept.to(change.device)
    if values is None:
        change.zero_()
    elif values.dim() == 2:
        change.copy_(values)
    else:
        change.masked_scatter_(kept, values.to(change.device))
    if not keep_removed:
        layer.keep(adapter_name, pack_bits(kept))
        change.copy_(torch.where(kept, change, -layer.dense_base_weight().to(change.dtype)))


def _coded(bits: Tensor, name: str, known: Mapping[str, Tensor] | None) -> Tensor:
    """All bits, or those of the entries that were known to be kept."""
    if known is None:
        return bits
    now, former = (unpack_bits(one, one.numel() * 8) for one in (bits, known[name]))
    if bool((now & ~former).any()):
        raise ValueError(f"known: the mask of '{name}' keeps entries that the receiver's does not. Send known=None.")
    return pack_bits(now[former])


def _received_masks(message: Message, layers: list[MaskedLoraLayer], adapter_name: str) -> dict[str, Tensor]:
    here = {layer.module_name: pack_bits(layer.kept(adapter_name).cpu()) for layer in layers}
    former, sent = message.get("former", str | None, "server"), _part(message, _KEPT)
    if former is not None and former != checksums(here, {}):
        raise ValueError(
            "The message of 'server' changes masks that this client does not have. Ask for a whole one: "
            "feddip_server_message(known=None)."
        )
    bits = here
    if sent:
        check_modules(sent, layers, "server")
        bits = {}
        for layer in layers:
            name, numel = layer.module_name, layer.out_features * layer.in_features
            last = torch.ones(numel, dtype=torch.bool) if former is None else unpack_bits(here[name], numel)
            bits[name] = _decoded(sent[name], last, name)
    if message.get("mask", str, "server") != checksums(bits, {}):
        raise ValueError("The masks in the message of 'server' are not those that it speaks of. Have it sent again.")
    return {
        layer.module_name: unpack_bits(bits[layer.module_name], layer.out_features * layer.in_features).view(
            layer.out_features, layer.in_features
        )
        for layer in layers
    }


def _decoded(sent: Tensor, former: Tensor, name: str) -> Tensor:
    count = int(former.sum())
    if sent.dtype != torch.uint8 or tuple(sent.shape) != ((count + 7) // 8,):
        raise ValueError(
            f"The mask of '{name}' in the message of 'server' is {sent.dtype} of shape {tuple(sent.shape)}, and a bit "
            f"for each of {count} entries takes {(count + 7) // 8} bytes."
        )
    now = torch.zeros_like(former)
    now[former] = unpack_bits(sent, count)
    return pack_bits(now)


def _check_values(values: Tensor, layer: MaskedLoraLayer, kept: Tensor, dense: bool, sender: str) -> None:
    shape = (layer.out_features, layer.in_features) if dense else (int(kept.sum()),)
    if values.dtype != torch.float32 or tuple(values.shape) != shape:
        raise ValueError(
            f"The values of '{layer.module_name}' of '{sender}' are {values.dtype} of shape {tuple(values.shape)}, and "
            f"torch.float32 of {shape} is awaited."
        )


def _part(message: Message, prefix: str) -> dict[str, Tensor]:
    return _part_of(message.tensors, prefix)


def _part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
