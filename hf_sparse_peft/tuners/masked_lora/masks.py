"""Telling masked LoRAs what was removed from the base."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...sparsity import pack_bits, unpack_bits
from ..shared.layer import adapter_layers
from .layer import MaskedLoraLayer


@torch.no_grad()
def set_masks(model: nn.Module, removed: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Let an adapter with `mask="given"` leave alone what was removed from the base, in all of its layers or in none.

    Args:
        model: the adapted model, dense or quantised.
        removed: by module name the bits of what is gone, as `PruningReport.masks` has them. Names of a model without a
            head, or inside of one, are understood.
        adapter_name: which adapter.

    Raises:
        ValueError: no such adapter, one whose mask is computed, a layer that `removed` does not name, bits of another
            weight, or, unless the adapter masks the base too (`masks_base`), a base that is not 0 where something was
            removed: it is not the one that was pruned.
        TypeError: `removed` is no mapping.
    """
    layers = adapter_layers(model, MaskedLoraLayer, adapter_name)
    if not isinstance(removed, Mapping):
        raise TypeError(f"removed is a {type(removed).__name__}; it takes the report's masks, bits by module name.")
    masking = layers[0].adapter_configs[adapter_name].masking
    if masking.computes_mask:
        raise ValueError(f"Adapter '{adapter_name}' computes its mask ({type(masking).__name__}), and none can be set.")
    found = {}
    for layer in layers:
        bits = _bits_of(layer.module_name, removed)
        numel = layer.out_features * layer.in_features
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != ((numel + 7) // 8,):
            what = "nothing" if bits is None else f"a {type(bits).__name__}"
            what = f"{bits.numel()} bytes of {bits.dtype}" if isinstance(bits, Tensor) else what
            raise ValueError(
                f"removed has {what} for '{layer.module_name}', a weight of {numel} entries, which takes "
                f"{(numel + 7) // 8} bytes of uint8. Pass the masks of the walk that pruned this base."
            )
        device = layer.get_base_layer_device()
        gone = unpack_bits(bits.to(device), numel).view(layer.out_features, layer.in_features)
        if not layer.masks_base(adapter_name) and bool(layer.dense_base_weight()[gone].any()):
            raise ValueError(
                f"'{layer.module_name}' is not 0 where weights were removed: this base is not the one that was pruned. "
                "Load that, prune and quantise again, or set masks_base=True in the config to mask this base too."
            )
        found[layer] = pack_bits(~gone)  # a bit an entry: these are all layers'
    for layer, kept in found.items():
        layer.keep(adapter_name, kept)


def _bits_of(name: str, removed: Mapping[str, Tensor]) -> Tensor | None:
    if name in removed:
        return removed[name]
    close = [bits for other, bits in removed.items() if name.endswith(f".{other}") or other.endswith(f".{name}")]
    return close[0] if len(close) == 1 else None
