"""What every adapted layer holds of masked LoRAs, and the adapted linear layer itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ...sparsity import pack_bits, unpack_bits
from ...utils.tensors import TensorSpec
from ..shared.layer import AdapterLayer
from ..shared.linear import AdditiveLinear
from ..shared.pieces import Piece, Tiles
from .config import MaskedLoraConfig
from .product import masked_product, masked_update

A, B, MASK = "masked_lora_A", "masked_lora_B", "masked_lora_mask"


class MaskedLoraLayer(AdapterLayer):
    """What every adapted layer holds per adapter, keyed by adapter name. Parameters are fp32 masters."""

    prefix: str = "masked_lora_"
    masked_lora_A: nn.ParameterDict
    """`[r, in]`."""
    masked_lora_B: nn.ParameterDict
    """`[out, r]`."""
    masked_lora_mask: BufferDict
    """uint8 `[ceil(out * in / 8)]`, the bits of what the base keeps, row-major; all 0 until they are known."""
    masked_lora_known: dict[str, bool]
    """Whether the adapter's mask was seen to be there."""

    @classmethod
    def tensor_specs(
        cls, config: MaskedLoraConfig, module_name: str, rows: int, cols: int, sizes: None = None
    ) -> list[TensorSpec]:
        """The factors and the mask."""

        def drawn(*shape: int) -> Callable[[torch.Generator | None], Tensor]:
            return lambda generator: nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)

        return [
            TensorSpec(A, (config.r, cols), start=drawn(config.r, cols)),
            TensorSpec(B, (rows, config.r), start=None if config.init_weights else drawn(rows, config.r)),
            TensorSpec(MASK, ((rows * cols + 7) // 8,), torch.uint8, "saved"),
        ]

    def _begin(self, adapter_name: str, first: Any) -> None:
        zeros = self.adapter_configs[adapter_name].mask == "zeros" and self.quantization_backend is None
        if zeros and not self.get_base_layer().weight.is_meta:
            self.masked_lora_mask[adapter_name] = pack_bits(self.dense_base_weight() != 0).cpu()
            self.masked_lora_known[adapter_name] = True

    def keep(self, adapter_name: str, kept: Tensor) -> None:
        """Let the adapter change the entries that `kept` names, bits as `pack_bits` gives them, and no others."""
        self.masked_lora_mask[adapter_name].copy_(kept)
        self.masked_lora_known[adapter_name] = True

    def kept(self, adapter_name: str) -> Tensor:
        """M as bool `[out, in]`."""
        bits = unpack_bits(self.masked_lora_mask[adapter_name], self.out_features * self.in_features)
        return bits.view(self.out_features, self.in_features)

    def knows_mask(self, adapter_name: str) -> bool:
        """Whether anything is known to be kept; looked up on the device until it is."""
        if not self.masked_lora_known.get(adapter_name):
            self.masked_lora_known[adapter_name] = bool(self.masked_lora_mask[adapter_name].any())
        return self.masked_lora_known[adapter_name]

    def pieces(self, adapter_name: str) -> list[Piece]:
        """The masked product, as one dense tile."""
        if not self.holds(adapter_name):
            return []

        def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
            yield slice(None), slice(None), masked_update(*self._parts(adapter_name)).detach()

        return [Tiles((self.out_features, self.in_features), tiles)]

    def _parts(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        held = (getattr(self, name)[adapter_name] for name in (A, B, MASK))
        return *held, self.adapter_configs[adapter_name].scaling

    def _before_training(self, active: list[str]) -> None:
        for name in active:
            if not self.knows_mask(name):
                raise ValueError(
                    f"Adapter '{name}' has mask='given' and does not know yet what '{self.module_name}' keeps. Call "
                    "hf_sparse_peft.set_masks(model, report.masks) with what prune_model returned."
                )
        super()._before_training(active)


class MaskedLoraLinear(AdditiveLinear, MaskedLoraLayer):
    r""":math:`Y = X W^\top + b + X (s\,M \odot (B A))^\top`."""

    def update(self, x: Tensor, adapter_name: str, dtype: torch.dtype) -> Tensor:
        r""":math:`X\,\Delta W^\top` of one adapter."""
        return masked_product(x, *self._parts(adapter_name), dtype)
