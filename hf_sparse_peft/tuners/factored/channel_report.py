"""`channel_report`: how many bits each weight has, measured on what an adapter holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .channel_bits import ChannelBits, PackedChannels
from .layer import FactoredLayer


@dataclass(frozen=True)
class ChannelStatistics:
    """Bits of one weight of `rows` x `cols`."""

    rows: int
    cols: int
    pruned: int
    """Rows at 0 bits."""
    mean_bits: float
    r"""Mean of :math:`\max(b, 0)` over the rows, or of whole bits where the adapter is packed."""
    packed_bytes: int
    """Bytes of the codes at whole bits, in a file of packed channels."""


def channel_report(model: nn.Module, adapter_name: str = "default") -> dict[str, ChannelStatistics]:
    """Module name -> bits of its weight, of an adapter whose form is `ChannelBits` or `PackedChannels`.

    Raises:
        ValueError: no layer has such an adapter of that name.
    """
    layers = [m for m in model.modules() if isinstance(m, FactoredLayer) and m.holds(adapter_name)]
    if not layers or not isinstance(layers[0].form(adapter_name), (ChannelBits, PackedChannels)):
        raise ValueError(
            f"adapter_name={adapter_name!r} is no adapter with bit depths here: take "
            "FactoredConfig(form=ChannelBits()), or the name of an adapter that has it."
        )
    found = {}
    for layer in layers:
        bits = layer.form_tensors(adapter_name)["bits"].detach().float().clamp_min(0)
        rows, cols = layer.out_features, layer.in_features
        size = max(int(bits.ceil().sum()), 1) * -(-cols // 8)
        found[layer.module_name] = ChannelStatistics(rows, cols, int((bits == 0).sum()), float(bits.mean()), size)
    return found
