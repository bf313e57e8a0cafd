"""What a layer does with a start from data (`starts.py`): waits for it, takes it, and finds it in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ...sparsity import Statistic, stream_seed
from ..shared.layer import AdapterLayer
from .config import SparseLoraConfig
from .factors import drawn_A
from .plan import ModuleSizes, low_rank_scaling, module_sizes
from .starts import Started, StartSite


class StartState(AdapterLayer):
    """What `SparseLoraLayer` does with the config's `start`."""

    def awaits_start(self, adapter_name: str) -> bool:
        """Whether what both halves start with is still to be found in data."""
        config = self.adapter_configs.get(adapter_name)
        return config is not None and config.awaits_start and adapter_name not in self.assumed

    def calibration_statistic(self, adapter_name: str) -> Statistic:
        """The start's, where the adapter waits for one."""
        if self.awaits_start(adapter_name):
            return self.adapter_configs[adapter_name].start.statistic
        return super().calibration_statistic(adapter_name)

    def start_site(self, adapter_name: str) -> StartSite:
        """What a start is told of this layer."""
        config, sizes = self.adapter_configs[adapter_name], self.sizes[adapter_name]
        device = self.get_base_layer_device()

        def draw_A(rank: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(stream_seed(config.seed, self.module_name, "start"))
            return drawn_A(rank, self.in_features, config.factor_init, generator).to(device)

        return StartSite(
            self.module_name,
            self.out_features,
            self.in_features,
            sizes.rank,
            sizes.units,
            config.seed,
            device,
            draw_A,
            self.dense_base_weight,
        )

    @torch.no_grad()
    def take_start(self, adapter_name: str, started: Started) -> None:
        """Start both halves as data says, at sizes that follow: in the same parameters, or without those that the
        sizes leave nothing of."""
        config = self.adapter_configs[adapter_name]
        units = 0 if started.units is None else started.units.numel()
        shape = (self.out_features, self.in_features)
        sizes = module_sizes(config, self.module_name, *shape, units, units, started.A.shape[0])
        self.resize(adapter_name, sizes)
        if sizes.rank:
            self.sparse_lora_A[adapter_name].copy_(started.A)
            self.sparse_lora_B[adapter_name].copy_(started.B / sizes.scaling)
        if adapter_name in self.sparse_lora_gate:
            self.sparse_lora_gate[adapter_name].fill_(1)
            self.sparse_lora_rank_mask[adapter_name].fill_(1)
        if units:
            self.write_support(adapter_name, started.units)
            values = self.sparse_lora_values[adapter_name]
            values.zero_() if started.values is None else values.copy_(started.values / sizes.support_scaling)

    @staticmethod
    def read_start(
        config: SparseLoraConfig, module_name: str, held: Mapping[str, torch.Tensor], sizes: ModuleSizes
    ) -> ModuleSizes:
        """The sizes that a start has led to, by the tensors `held` of a file; `sizes` are those of injection.

        What does not fit is left for the check of shapes to name.
        """
        A, values = held.get("sparse_lora_A"), held.get("sparse_lora_values")
        rank = A.shape[0] if A is not None and A.ndim else 0
        sizes = replace(sizes, rank=rank, scaling=low_rank_scaling(config, module_name, rank))
        if sizes.grid is None:
            return sizes
        count = values.shape[0] if values is not None and values.ndim else 0
        if count == 0:
            return replace(sizes, grid=None, units=0, capacity=0, support_scaling=None)
        return replace(sizes, units=count, capacity=count) if count <= sizes.grid.num_units else sizes
