"""Memory of one rank of several: what DDP, FSDP2 and ZeRO-3 divide of a step, and what they add to it."""

from __future__ import annotations

import math
from dataclasses import replace

from ..rules.collectives import BUCKET
from .dry_run import DryRun
from .memory_trace import GRADIENTS

SHARDINGS = ("ddp", "fsdp2", "zero3")
"""How a run is spread over processes: DDP holds everything on every rank; FSDP2 shards the base and leaves adapters
whole; DeepSpeed ZeRO-3 shards all parameters, gradients and optimizer state."""
GATHERED, BUCKETS, MASTERS = "gathered", "buckets", "masters"
LIVE_NUMBERS = 10**9
"""DeepSpeed's `stage3_max_live_parameters`, its default and transformers' example."""


def per_rank(found: DryRun, sharding: str, processes: int, *, bits: int, hidden: int) -> DryRun:
    r"""What `found` is on the rank that holds most, of `processes`.

    * ddp: all of it, and buckets of the gradients' size.
    * fsdp2: :math:`1/R` of the base's parameters (constants of quantisation stay whole), and gathered: the root's, and
      two layers' (one is used, the next one on its way). Adapters, their gradients and their optimizer state are whole;
      64 MiB at most to average gradients in.
    * zero3: :math:`1/R` of the base, of adapter values and gradients in the base's dtype, and of fp32 copies and
      optimizer state. Gathered: `stage3_max_live_parameters`, or a single module that is larger; and buckets of
      :math:`1.9\,h^2` numbers (`"auto"` in transformers: to reduce and to fetch ahead).

    Args:
        found: of one process, with the micro-batch of a rank.
        bits: of the base.
        hidden: width of the model, `h`.

    Raises:
        ValueError: LLM.int8(), which nothing shards.
    """
    if sharding != "ddp" and bits == 8:
        raise ValueError(
            f"bits=8 with sharding={sharding!r}: LLM.int8() keeps codes and scales in forms that are not sharded. Set "
            "bits=4 or 16, or sharding='ddp'."
        )
    at_rest, at_peak, optimizer = dict(found.at_rest), dict(found.at_peak), found.optimizer_bytes
    groups = found.groups
    if sharding == "ddp":
        at_rest[BUCKETS] = found.at_rest["values"]
        return replace(found, at_rest=at_rest)
    whole = sum(group.bytes for group in groups)
    at_rest["weights"] += sum(group.shard(processes) for group in groups) - whole
    layers = [group.bytes for group in groups if not group.root]
    if sharding == "fsdp2":
        root = sum(group.bytes for group in groups if group.root)
        at_rest[GATHERED] = root + sum(sorted(layers)[-2:])
        largest = max((size for _, size in found.trained), default=0)
        at_rest[BUCKETS] = min(found.at_rest["values"], max(4 * BUCKET, largest))
        return replace(found, at_rest=at_rest)
    width = 4 if bits == 32 else 2
    numbers = math.ceil(found.trained_numbers / processes)
    stored = width if bits > 8 else 1  # bytes of a number as DeepSpeed counts it: packed codes are numbers to it
    live = max(*(group.largest_module for group in groups), min(whole, LIVE_NUMBERS * stored))
    at_rest["values"], optimizer = width * numbers, math.ceil(optimizer / processes)
    at_rest[MASTERS] = 4 * numbers
    at_rest[GATHERED] = live
    at_rest[BUCKETS] = int(1.9 * hidden**2) * width
    if at_peak.get(GRADIENTS):
        at_peak[GRADIENTS] = width * numbers
    return replace(found, at_rest=at_rest, at_peak=at_peak, optimizer_bytes=optimizer)


def said_of(sharding: str, processes: int, found: DryRun) -> list[str]:
    """What is taken for granted of such a run."""
    said = [f"Figures are those of the rank that holds most, of {processes}; batch is a rank's micro-batch."]
    if sharding == "ddp":
        said.append(
            "Gradients are no views of DDP's buckets (accelerate's default). DDP sends buffers of the base at every "
            "forward pass, and none of an adapter's."
        )
    elif sharding == "fsdp2":
        said.append(
            "FSDP2 shards layer by layer and again after the forward pass; two layers and what is in none are gathered "
            "at the highest point, which is an upper bound. 4-bit codes are stored as bf16 (bnb_4bit_quant_storage)."
        )
    else:
        said.append(
            "ZeRO-3 trains values in the base's dtype with fp32 copies, with 'auto' buckets and a billion live "
            "parameters."
        )
        if found.moves or found.uncounted:
            said.append("Moves are refused under DeepSpeed: these are figures of units that stay.")
    if sharding != "zero3" and found.moves:
        said.append("A move is counted without accumulation, at its largest fraction, all layers having gradients.")
    if sharding != "zero3" and found.uncounted:
        said.append(f"What {', '.join(sorted(set(found.uncounted)))} send is not counted.")
    return said
