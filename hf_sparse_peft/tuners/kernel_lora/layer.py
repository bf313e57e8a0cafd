"""State of one layer under kernel adapters, and the adapted linear layer itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from ...rules import ModuleSpace, UnitSpace
from ...utils.tensors import TensorSpec
from ..shared.layer import AdapterLayer
from ..shared.linear import AdditiveLinear
from ..shared.merge import broken
from ..shared.pieces import Piece, Tiles
from .config import KernelLoraConfig
from .kernels import KernelPlan, update_tiles
from .product import kernel_product
from .spaces import KernelSpace


class KernelLoraLayer(AdapterLayer):
    """What every adapted layer holds per adapter, keyed by adapter name. Parameters are fp32 masters."""

    prefix: str = "kernel_lora_"
    kernel_lora_P: nn.ParameterDict
    """`[2, in, r/2]`."""
    kernel_lora_Q: nn.ParameterDict
    """`[2, out, r/2]`."""
    kernel_lora_mix: nn.ParameterDict
    """`[3]`, the numbers a, g, b of the mixed kernel."""
    kernel_lora_survivors: BufferDict
    """int64 `[1]`, the entries that win; only with `own_counts`."""

    @classmethod
    def tensor_specs(
        cls, config: KernelLoraConfig, module_name: str, rows: int, cols: int, sizes: None = None
    ) -> list[TensorSpec]:
        """Points drawn Kaiming-uniform (a = sqrt 5) on the whole tensors as the authors do, the mixed kernel's numbers,
        and the count of survivors."""
        numel = rows * cols

        def points(generator: torch.Generator | None, count: int) -> torch.Tensor:
            tensor = torch.empty(2, count, config.r // 2, dtype=torch.float32)
            if config.init_weights:
                return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
            return nn.init.normal_(tensor, generator=generator)

        def check_survivors(tensor: torch.Tensor, key: str) -> None:
            if tensor.dtype != torch.int64 or tensor.numel() != 1 or not 0 <= int(tensor) <= numel:
                raise ValueError(
                    f"'{key}' is {tensor.tolist()} ({tensor.dtype}), no count of the entries of its weight, which has "
                    f"shape {(rows, cols)}; it is int64. The file is damaged or belongs to another base model."
                )

        half = config.r // 2
        found = [
            TensorSpec("kernel_lora_P", (2, cols, half), start=partial(points, count=cols)),
            TensorSpec("kernel_lora_Q", (2, rows, half), start=partial(points, count=rows)),
        ]
        if config.kernel == "mixed":
            found.append(TensorSpec("kernel_lora_mix", (3,), start=lambda _: torch.tensor([1.0, 1.0, 0.0])))
        if config.own_counts:
            first = numel - round(config.sparsity * numel)
            start = partial(torch.full, (1,), first, dtype=torch.int64)
            found.append(
                TensorSpec(
                    "kernel_lora_survivors", (1,), torch.int64, "saved", start=lambda _: start(), check=check_survivors
                )
            )
        return found

    def unit_spaces(self, adapter_name: str) -> list[UnitSpace]:
        """The entries of the adapter's update, and the module itself."""
        return [KernelSpace(self, adapter_name), ModuleSpace(self, adapter_name)]

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return self.in_features * self.out_features

    def set_sizes(self, adapter_name: str, sizes: None) -> None:
        """Check that the adapter has an entry in this layer.

        Raises:
            ValueError: `sparsity` leaves no entry of this weight.
        """
        config = self.adapter_configs[adapter_name]
        if not config.own_counts and self.numel == round(config.sparsity * self.numel):
            raise ValueError(
                f"sparsity={config.sparsity} leaves no entry in '{self.module_name}' ({self.out_features}x"
                f"{self.in_features}). Lower sparsity, or leave the module out of target_modules."
            )
        super().set_sizes(adapter_name, sizes)

    def survivors(self, adapter_name: str) -> int | None:
        """Entries of the update that are not zero by competition; None where nothing competes."""
        held = self.kernel_lora_survivors
        if adapter_name in held and not held[adapter_name].is_meta:
            return int(held[adapter_name])
        config = self.adapter_configs[adapter_name]
        return self.numel - round(config.sparsity * self.numel) if config.competes else None

    def write_survivors(self, adapter_name: str, count: int) -> None:
        """Let `count` entries win from now on.

        Raises:
            ValueError: the adapter's matrices do not compete, or the weight does not have as many entries.
        """
        if adapter_name not in self.kernel_lora_survivors:
            raise ValueError(
                f"Adapter '{adapter_name}' has own_counts=False, so its survivors follow from its sparsity."
            )
        if not 0 <= count <= self.numel:
            raise ValueError(f"{count} entries cannot survive in '{self.module_name}', which has {self.numel}.")
        self.kernel_lora_survivors[adapter_name].fill_(count)

    def _factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        mix = self.kernel_lora_mix.get(adapter_name)
        return self.kernel_lora_P[adapter_name], self.kernel_lora_Q[adapter_name], mix

    def _plan(self, adapter_name: str, dtype: torch.dtype = torch.float32) -> KernelPlan:
        config = self.adapter_configs[adapter_name]
        survivors = self.survivors(adapter_name)
        return KernelPlan(config.scale, config.mode, survivors, config.tile_entries, dtype, self.module_name)

    def pieces(self, adapter_name: str) -> list[Piece]:
        """The kernel's winners, in tiles of some input columns."""
        if not self.holds(adapter_name):
            return []
        factors, plan = self._factors(adapter_name), self._plan(adapter_name)

        def tiles() -> Iterator[tuple[slice, slice, torch.Tensor]]:
            for columns, update in update_tiles(*factors, plan):
                yield slice(None), columns, update.t()

        return [Tiles((self.out_features, self.in_features), tiles)]


class KernelLoraLinear(AdditiveLinear, KernelLoraLayer):
    r""":math:`Y = X W^\top + b + X\,\Delta W^\top`, the kernel built tile by tile inside the product."""

    def update(self, x: torch.Tensor, adapter_name: str, dtype: torch.dtype) -> torch.Tensor:
        r""":math:`X\,\Delta W^\top` of one adapter, with its drop path."""
        update = kernel_product(x, *self._factors(adapter_name), self._plan(adapter_name, dtype))
        return self._drop_path(update, self.adapter_configs[adapter_name].drop_path)

    def _merge(self, names: list[str], safe_merge: bool) -> None:
        for name in filter(self.holds, names if safe_merge else ()):
            # Before entries compete: NaN has no rank among them, which is another error.
            if not all(one is None or torch.isfinite(one).all() for one in self._factors(name)):
                raise broken(name)
        super()._merge(names, safe_merge)

    def _drop_path(self, update: torch.Tensor, fraction: float) -> torch.Tensor:
        if not fraction or not self.training:
            return update
        kept = torch.rand(update.shape[0], *[1] * (update.ndim - 1), device=update.device) >= fraction
        return update * (kept / (1 - fraction)).to(update.dtype)
