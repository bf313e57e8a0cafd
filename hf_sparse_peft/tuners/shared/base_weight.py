"""How one product reaches the frozen weight of the layer that an adapter wraps."""

from __future__ import annotations

import copy
import warnings
from functools import lru_cache, partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ...ops import DenseSource, DequantizedSource, Source, autocast_dtype
from .parameters import ParameterWeight
from .quantised import backend_of
from .rollback import uninterrupted

_LINEAR_FORWARDS = (nn.Linear.forward, Conv1D.forward)


def is_bnb_4bit(module: nn.Module) -> bool:
    """Whether `module` is a bitsandbytes 4-bit linear layer."""
    if not type(module).__module__.startswith("bitsandbytes"):
        return False
    return type(getattr(module, "weight", None)).__name__ == "Params4bit" or four_bit_state(module) is not None


def four_bit_state(module: nn.Module) -> Any:
    """How the 4-bit weight of a bitsandbytes layer is coded, None before it is; `fully_shard` makes another parameter
    of the weight, and the module alone knows it then."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def weight_source(layer: BaseTunerLayer) -> Source | None:
    """Where the engine gets the `[out, in]` weight of `layer`'s base, or None where the base must compute itself.

    None keeps what a fused product would skip: hooks on the base layer, an overridden forward (offloading, custom
    classes), another tuner's layer underneath, and quantisers whose own kernel defines the output (8-bit, GPTQ, ...).
    """
    base = layer.base_layer
    if isinstance(base, BaseTunerLayer) or _observed(base):
        return None
    if is_bnb_4bit(base):
        if (state := four_bit_state(base)) is None:
            return None
        return DequantizedSource(partial(dequantize_4bit, base.weight, state), base.weight)
    if layer.quantization_backend is not None or type(base).forward not in _LINEAR_FORWARDS:
        return None
    transposed = isinstance(base, Conv1D)
    return DenseSource(base.weight, transposed=transposed)


def _observed(module: nn.Module) -> bool:
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def dense_weight(base: nn.Module, backend: Any) -> torch.Tensor:
    """The weight of a linear layer as `[out, in]`: its own memory where it is dense (no `backend`), a fresh dense copy
    by `backend`, peft's access to a quantised weight."""
    if isinstance(base, ParameterWeight):
        return base.matrix
    weight = gathered_weight(base)
    if weight is None:
        weight = base.weight.data if backend is None else backend.get_base_weight(base)
    return weight.t() if backend is None and isinstance(base, Conv1D) else weight


def gathered_weight(base: nn.Module) -> torch.Tensor | None:
    """The whole weight of a layer that `fully_shard` has sharded, as the layer stores it, dequantised if need be; None
    where it is whole, as within its forward pass. Every rank must ask for it at the same time.

    Raises:
        ValueError: it is sharded and quantised by something else than bitsandbytes in 4 bits.
    """
    if not isinstance(getattr(base, "weight", None), DTensor):
        return None
    weight = base.weight.detach().full_tensor()
    if is_bnb_4bit(base):
        state = four_bit_state(base)
        return dequantize_4bit(weight, state, state.dtype)
    if backend_of(base) is not None:
        raise ValueError(
            f"The weight of a {type(base).__name__} is quantised and sharded, and can be read in its forward pass "
            "alone. Load the base in 4 bits with bnb_4bit_quant_storage, or dense, or train with DDP."
        )
    return weight


def compute_dtype(layer: BaseTunerLayer, x: torch.Tensor, source: Source | None) -> torch.dtype:
    """The dtype of the products: autocast's, else the base layer's own."""
    base = layer.base_layer
    autocast = autocast_dtype(x.device.type)
    if isinstance(source, DenseSource):
        return autocast or source.weight.dtype
    if isinstance(source, DequantizedSource) and getattr(base, "compute_dtype", None) is not None:
        return base.compute_dtype
    return autocast or x.dtype


def dequantize_4bit(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """A fresh `[out, in]` buffer with the bitsandbytes 4-bit weight `packed`, which `state` says how to read, in
    `dtype`."""
    import bitsandbytes as bnb

    weight = bnb.functional.dequantize_4bit(packed.data.view(-1, 1), state)
    # The stored dtype may be the wider one; `.to` returns the fresh buffer itself when there is nothing to convert.
    return weight.to(dtype)


@lru_cache(None)
def _warn_rounded_scales() -> None:
    warnings.warn(
        "The 4-bit base ran without gradients on CPU before the adapter was added, and bitsandbytes rounded its block "
        "scales to bf16 then. Training goes on with the rounded scales; outputs will differ slightly from the same "
        "adapter on a freshly loaded base. Load the base again and add the adapter before the first evaluation (its "
        "`disable_adapter()` context evaluates the base).",
        stacklevel=2,
    )


def keep_4bit_weight_stable(base: nn.Module) -> None:
    """Stop bitsandbytes from repacking a CPU 4-bit weight in place at the first forward without gradients.

    The repacking rounds the block scales to bf16, its inverse quantises them anew, and its kernel has no gradient: a
    model that was evaluated once would train on another base than the one it is saved with, or not at all. A weight
    that was repacked before the adapter came is brought back to the common layout with the scales it has now.
    """
    if not hasattr(base, "support_avx512bf16_for_cpu"):
        return
    base.support_avx512bf16_for_cpu = False
    state = getattr(base.weight, "quant_state", None)
    if state is None or not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    _warn_rounded_scales()
    absmax = state.absmax.float().t().contiguous().view(-1)
    state = copy.copy(state)  # the conversion writes into it
    state.original_nested = False  # re-nesting would quantise the scales again
    data, state = _convert_weight_packed_for_cpu_inverse(base.weight.data, state)
    state.absmax = absmax
    with uninterrupted():  # codes and the layout they are in change together
        base.weight.data, base.weight.quant_state = data, state
