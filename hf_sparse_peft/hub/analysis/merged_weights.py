"""The weight that an adapted linear layer acts as, of whichever tuner, without a change to the layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...rules.probing import modes_kept
from ...training.calibration.readers import dense_weight
from ...tuners import AdapterLayer
from ...tuners.shared.base_weight import keep_4bit_weight_stable
from ...tuners.shared.pieces import BaseMask
from ...tuners.upstream import UpstreamLowRank, upstream_layers


def adapted_linears(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """The linear layers that the adapter `adapter_name` changes, of this package and of upstream peft, by the base's
    names and in model order.

    Raises:
        ValueError: it changes none.
    """
    names = dict(upstream_layers(model))
    own = {m.module_name: m for m in model.modules() if isinstance(m, AdapterLayer) and _holds(m, adapter_name)}
    upstream = {n: m for n, m in names.items() if _holds(m, adapter_name) and _is_linear(m.get_base_layer())}
    places = {id(module): at for at, module in enumerate(model.modules())}
    found = sorted({**own, **upstream}.items(), key=lambda pair: places[id(pair[1])])
    if not found:
        raise ValueError(f"adapter_name={adapter_name!r} changes no linear layer of this model.")
    return dict(found)


def plain_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers without an adapter, but for the output embedding, by name."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {name: module for name, module in model.named_modules() if _is_linear(module) and module is not head}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or (
        not isinstance(module, BaseTunerLayer) and hasattr(module, "quant_state")
    )


def _holds(layer: BaseTunerLayer, adapter_name: str) -> bool:
    if isinstance(layer, AdapterLayer):
        return layer.holds(adapter_name)
    return any(adapter_name in getattr(layer, name, ()) for name in layer.adapter_layer_names)


@torch.no_grad()
def base_weight(layer: nn.Module) -> Tensor:
    """The base weight `[out, in]`, fp32, dequantised if need be."""
    return dense_weight(layer).detach().float()


@torch.no_grad()
def merged_weight(layer: nn.Module, adapter_names: Iterable[str]) -> Tensor:
    """Base weight plus updates `[out, in]`, fp32. Of upstream's layers other than plain LoRA's it is read off the
    outputs for the unit vectors, whatever their update is.

    Raises:
        ValueError: such a layer, and other adapters are active than the ones asked for; or something is merged.
    """
    names = list(adapter_names)
    if not isinstance(layer, BaseTunerLayer):
        return base_weight(layer)
    if layer.merged:
        raise ValueError(f"{layer.merged_adapters} are merged into the base weights. Call model.unmerge_adapter().")
    weight = base_weight(layer).clone()
    names = [name for name in names if _holds(layer, name)]
    source = layer if isinstance(layer, AdapterLayer) else _as_low_rank(layer, names)
    if source is not None:
        if isinstance(source, AdapterLayer):
            source.zero_removed_(weight, [(name, 1.0) for name in names])
        for piece in (piece for name in names for piece in source.pieces(name)):
            if not isinstance(piece, BaseMask):
                piece.add_(weight)
        return weight
    if set(layer.active_adapters) != set(names):
        raise ValueError(
            f"The update of {type(layer).__name__} is read off its outputs, and {layer.active_adapters} are active. "
            f"Call model.set_adapter({names})."
        )
    keep_4bit_weight_stable(layer.get_base_layer())  # a forward pass without gradients would repack it on a CPU
    cols, _ = _get_in_out_features(layer.get_base_layer())
    with modes_kept(layer, training=False):
        dtype = next((p.dtype for p in layer.get_base_layer().parameters() if p.is_floating_point()), torch.float32)
        unit = torch.eye(cols, device=weight.device, dtype=dtype)
        return (layer(unit) - layer(torch.zeros_like(unit[:1]))).float().t().contiguous()


def _as_low_rank(layer: BaseTunerLayer, names: list[str]) -> UpstreamLowRank | None:
    """Upstream's LoRA or AdaLoRA without a variant (DoRA), whose update is added to the weight; None for others."""
    plain = isinstance(layer, LoraLayer) and all(name in layer.lora_A for name in names)
    return UpstreamLowRank("", layer) if plain and not any(name in layer.lora_variant for name in names) else None
