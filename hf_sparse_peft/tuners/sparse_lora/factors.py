r"""The low-rank factors of one layer: how they start, and what of them one forward pass uses.

    dense        A, B
    parallel     A' = [A * M_1; A * M_2; ...]     B' = [B * M_1, B * M_2, ...]     rank d r, one pair of parameters
    stochastic   A where expert e owns the entry, its start elsewhere; B likewise, whose start is 0

The first line is the plain low-rank half, the others are what `factor_masks` makes of it (`factor_masks.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ...sparsity import stream_seed
from ...utils.tensors import TensorSpec
from ..shared.tensors import AdapterTensors
from .config import SparseLoraConfig
from .factor_masks import draw_map


def factor_specs(config: SparseLoraConfig, module_name: str, rows: int, cols: int, r: int) -> list[TensorSpec]:
    """`A` `[r, in]`, `B` `[out, r]`, and with `gate` the gate and its mask, with `factor_masks` the maps."""
    if not r:
        return []
    by_gate, masks = config.gate == "zeros", config.factor_masks
    at_zero = config.init_weights or config.start is not None
    with_start = masks is not None and masks.splits and masks.masks("A")
    A_drawn: list[torch.Tensor] = []

    def start_A(generator: torch.Generator | None) -> torch.Tensor:
        A = drawn_A(r, cols, "normal" if by_gate else config.factor_init, generator)
        if with_start:
            # A itself, not its parameter: that is on the meta device while a file is about to be loaded.
            A_drawn.append(A.clone())
        return A

    def start_B(generator: torch.Generator | None) -> torch.Tensor:
        B = torch.zeros(rows, r, dtype=torch.float32)
        if by_gate:  # AdaLoRA's start: the zero gate, not B, makes the identity
            nn.init.normal_(B, std=0.02, generator=generator)
        elif not at_zero:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5), generator=generator)
        return B

    def start_gate(generator: torch.Generator | None) -> torch.Tensor:
        if config.gate == "ones" or (by_gate and config.init_weights):
            return torch.full((r,), 1.0 if config.gate == "ones" else 0.0)
        return torch.randn(r, generator=generator) / (0.02**2 if by_gate else 1)

    rank = partial(TensorSpec, space="rank")
    found = [
        rank("sparse_lora_A", (r, cols), start=start_A),
        rank("sparse_lora_B", (rows, r), axis=1, start=start_B),
    ]
    if config.gate is not None:
        ones = partial(torch.ones, r, dtype=torch.uint8)
        found += [
            rank("sparse_lora_gate", (r,), start=start_gate),
            rank("sparse_lora_rank_mask", (r,), torch.uint8, "saved", start=lambda _: ones(), check=_upto(1)),
        ]
    if masks is None:
        return found
    mapped = partial(rank, dtype=torch.uint8, role="saved", check=_upto(masks.largest))
    for factor, shape, axis in (("B", (rows, r), 1), ("A", (r, cols), 0)):
        if masks.masks(factor):
            draw = partial(draw_map, masks, config.seed, module_name, factor, shape)
            found.append(mapped(f"sparse_lora_{factor}_map", shape, axis=axis, start=lambda _, draw=draw: draw()))
    if with_start:
        found.append(rank("sparse_lora_A_start", (r, cols), role="saved", start=lambda _: A_drawn.pop()))
    return found


def drawn_A(r: int, cols: int, init: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """`A` `[r, cols]`, fp32, as the config's `factor_init` says it starts; its first rows are those of a smaller r."""
    A = torch.empty(r, cols, dtype=torch.float32)
    if init == "normal":
        return nn.init.normal_(A, std=0.02, generator=generator)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)


def _upto(largest: int) -> Callable[[torch.Tensor, str], None]:
    def check(tensor: torch.Tensor, key: str) -> None:
        if tensor.dtype != torch.uint8 or (tensor.numel() and int(tensor.max()) > largest):
            numbers = "of 0 and 1" if largest == 1 else f"from 0 to {largest}"
            raise ValueError(f"'{key}' must be uint8 {numbers}; the file is damaged.")

    return check


def drawn_expert(layer: AdapterTensors, adapter_name: str, factor: str, draw: tuple[int, ...]) -> int:
    """The expert that `factor` ("A" or "B") of this layer uses at `draw` (step, micro-batch, pass).

    A hash, not a stream: recomputation under gradient checkpointing, a resumed run and every rank find the same one.
    """
    config = layer.adapter_configs[adapter_name]
    return stream_seed(config.seed, layer.module_name, "expert", factor, *draw) % config.factor_masks.experts


def forward_factors(layer: AdapterTensors, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`A'` `[k, in]` and `B'` `[out, k]` of this forward pass, differentiable in the parameters."""
    config = layer.adapter_configs[adapter_name]
    if adapter_name not in layer.expert_draws or config.factor_masks is None or not layer.training:
        return merged_factors(layer, adapter_name)
    now = layer.expert_draws[adapter_name]
    draw = (now.step, now.micro_batch, now.number)
    A, B = layer.sparse_lora_A[adapter_name], layer.sparse_lora_B[adapter_name]
    if adapter_name in layer.sparse_lora_A_map:
        owned = layer.sparse_lora_A_map[adapter_name] == drawn_expert(layer, adapter_name, "A", draw)
        A = torch.where(owned, A, layer.sparse_lora_A_start[adapter_name].to(A.dtype))
    owned = layer.sparse_lora_B_map[adapter_name] == drawn_expert(layer, adapter_name, "B", draw)
    return A, torch.where(owned, B, B.new_zeros(()))


def merged_factors(layer: AdapterTensors, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    r"""`A'` `[k, in]` and `B'` `[out, k]` of evaluation, merging and files.

    `parallel`: the masked copies side by side, `k = copies * r`. `stochastic`, merged by `add`: the mean of the
    experts, :math:`(A + (E-1) A_0)/E` and :math:`B/E`; by `joint`: the parameters as they are.
    """
    A, B = layer.sparse_lora_A[adapter_name], layer.sparse_lora_B[adapter_name]
    masks = layer.adapter_configs[adapter_name].factor_masks
    if masks is None:
        return A, B
    if masks.kind == "parallel":
        bits_A, bits_B = layer.sparse_lora_A_map[adapter_name], layer.sparse_lora_B_map[adapter_name]
        copies = range(masks.copies)
        A = torch.cat([A * (bits_A >> i).bitwise_and(1).to(A.dtype) for i in copies])
        return A, torch.cat([B * (bits_B >> i).bitwise_and(1).to(B.dtype) for i in copies], dim=1)
    if masks.merge == "joint" or masks.experts == 1:
        return A, B
    if adapter_name in layer.sparse_lora_A_map:
        A = (A + (masks.experts - 1) * layer.sparse_lora_A_start[adapter_name].to(A.dtype)) / masks.experts
    return A, B / masks.experts


@torch.no_grad()
def fold_experts(layer: AdapterTensors, adapter_name: str) -> None:
    """Replace split factors by their merge, for good: what is left is a plain low-rank half."""
    A, B = merged_factors(layer, adapter_name)
    layer.sparse_lora_A[adapter_name].data.copy_(A)
    layer.sparse_lora_B[adapter_name].data.copy_(B)
    for held in (layer.sparse_lora_A_map, layer.sparse_lora_B_map, layer.sparse_lora_A_start):
        if adapter_name in held:
            del held[adapter_name]
