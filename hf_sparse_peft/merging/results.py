"""Merged updates as pieces of a new adapter, with the error that a lower rank costs, and as files of adapters."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ..hub.card import adapter_card, exported_card
from ..hub.export import rank_pattern_of
from ..hub.folders import staged_folder
from ..hub.held_layers import weights_of_zeros
from ..hub.saving import write_card
from ..sparsity import UnitGrid
from ..sparsity.decomposition import truncated_svd
from ..tuners import SparseLoraConfig, adapter_layers
from ..tuners.shared.file_check import OPTIONS, PREFIX
from ..tuners.shared.pieces import Entries, LowRank, Piece
from ..tuners.sparse_lora.model import config_of_pieces
from ..utils.checksums import save_checked
from .row import Update

Shapes = Mapping[str, tuple[int, int]]


@torch.no_grad()
def as_entries(update: Update) -> list[Piece]:
    """The entries that are not 0, exactly."""
    positions, values = update.entries()
    return [Entries(positions, values.float(), UnitGrid(*update.shape))] if positions.numel() else []


@torch.no_grad()
def as_low_rank(update: Update, rank: int, seed: int = 0) -> tuple[list[Piece], float]:
    r"""The best approximation of rank `rank`, and its relative error :math:`\|\tau - BA\|_F / \|\tau\|_F`."""
    dense = update.dense()
    norm = float(dense.norm())
    if not norm:
        return [], 0.0
    U, S, Vh = truncated_svd(dense.float(), min(rank, *update.shape), seed=seed)
    alive = S > 0
    piece = LowRank((U * S)[:, alive].contiguous(), Vh[alive].contiguous())
    return [piece], float((dense - (piece.B @ piece.A).to(dense.dtype)).norm()) / norm


def write_adapter(
    path: str | os.PathLike,
    pieces: Mapping[str, list[Piece]],
    shapes: Shapes,
    others: Mapping[str, Tensor],
    options: Mapping[str, Any],
    notes: str,
) -> None:
    """Write `pieces`, at most one `LowRank` of scale 1 and one `Entries` a module, as a sparse_lora adapter into the
    folder `path`, with heads and biases `others`; whole or not at all.

    Raises:
        ValueError: there are no pieces, or `path` holds something else than a sparse_lora adapter.
    """
    pieces = {name: found for name, found in pieces.items() if found}
    if not pieces:
        raise ValueError("Nothing is left of the adapters: every merged entry is 0. Raise the fraction that is kept.")
    config = config_of_pieces(SparseLoraConfig(r=0), pieces)
    config.target_modules = set(pieces)
    model = PeftModel(weights_of_zeros({name: shapes[name] for name in pieces}), config)
    config = model.peft_config["default"]
    for layer in adapter_layers(model):
        layer.write_pieces("default", pieces[layer.module_name])
    tensors = {**get_peft_model_state_dict(model, save_embedding_layers=False), **others}
    for name, value in options.items():
        setattr(config, name, value)
    config.inference_mode = True
    with staged_folder(path, config.peft_type.value) as stage:
        config.save_pretrained(str(stage))
        metadata = {"format": "pt", OPTIONS: json.dumps(config.option_checksums(), sort_keys=True)}
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_checked(held, stage / "adapter_model.safetensors", metadata)
        write_card(_card(model, notes), stage)


def write_lora(
    path: str | os.PathLike,
    pieces: Mapping[str, list[Piece]],
    others: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> dict[str, int]:
    """Write pieces that have exact ranks as a LoRA of upstream peft's, of scaling 1; returns the ranks.

    Raises:
        ValueError: nothing is left, or `path` holds something else than a LoRA.
    """
    factors = {}
    for name, found in pieces.items():
        halves = [piece.factors() for piece in found]
        if halves:
            factors[name] = torch.cat([A for A, _ in halves]), torch.cat([B for _, B in halves], dim=1)
    factors = {name: (A, B) for name, (A, B) in factors.items() if A.shape[0]}
    if not factors:
        raise ValueError("Nothing is left of the adapters: every merged entry is 0. Raise the fraction that is kept.")
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    default = Counter(ranks.values()).most_common(1)[0][0]
    pattern = rank_pattern_of(ranks, default)
    known = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "modules_to_save")
    config = LoraConfig(
        r=default, lora_alpha=default, rank_pattern=pattern, alpha_pattern=dict(pattern), target_modules=sorted(ranks),
        bias="lora_only" if options["bias"].endswith("_only") else options["bias"], inference_mode=True,
        **{name: options[name] for name in known},
    )  # fmt: skip
    tensors = dict(others)
    for name, (A, B) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
    with staged_folder(path, "LORA") as stage:
        config.save_pretrained(str(stage))
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(held, stage / "adapter_model.safetensors", metadata={"format": "pt"})
        write_card(exported_card(config, SparseLoraConfig()), stage)
    return ranks


def _card(model: PeftModel, notes: str) -> ModelCard:
    return adapter_card(model, notes=notes)


def file_bytes(path: str | os.PathLike) -> int:
    """Size of the weights in an adapter folder."""
    return (Path(path) / "adapter_model.safetensors").stat().st_size
