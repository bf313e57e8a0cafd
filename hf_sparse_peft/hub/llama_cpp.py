"""Adapters for llama.cpp, as far as this side of its converter goes."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peft import PeftModel

from ..tuners import adapter_layers
from ..tuners.shared.pieces import Decomposed
from .export import LoraExport, export_lora

_CONVERTER = "convert_lora_to_gguf.py"


@dataclass(frozen=True)
class LlamaCppExport:
    """What `export_lora_for_llama_cpp` wrote, and what is left to do."""

    lora: LoraExport
    """The plain LoRA."""
    rank: int
    """Its one rank."""
    command: str
    """Line for a shell in a checkout of llama.cpp that makes the GGUF file beside the folder."""


def export_lora_for_llama_cpp(
    model: PeftModel,
    path: str | os.PathLike,
    adapter_name: str = "default",
    *,
    uniform_rank: bool | int = True,
    rank: int | None = None,
    only: Literal["low_rank", "support"] | None = None,
) -> LlamaCppExport:
    """Write an adapter as the plain LoRA that llama.cpp's `convert_lora_to_gguf.py` reads, and say how to call it.

    The converter reads one `lora_alpha` and no patterns, and llama.cpp scales by it over each tensor's own rank: all
    modules get one rank, padded with zeros, and a scaling of 1. Names and reordered rows of each architecture are the
    converter's knowledge, which no package holds, so the last step is its.

    Args:
        model: has the adapter.
        path: the folder to write.
        adapter_name: which adapter.
        uniform_rank: True: the largest rank of a module; an integer: that rank.
        rank: cut updates without exact low-rank form to this rank, as in `export_lora`.
        only: one half of the adapter, as in `export_lora`.

    Raises:
        ValueError: the adapter has heads, biases or magnitudes of its own, which the converter refuses, or what
            `export_lora` refuses.
    """
    config = model.peft_config[adapter_name]
    if config.modules_to_save or getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"A LoRA of llama.cpp holds low-rank updates alone, and this adapter trains more (modules_to_save="
            f"{config.modules_to_save}, bias={getattr(config, 'bias', 'none')!r}). Merge it with merge_to_dense and "
            "convert the model."
        )
    layers = [layer for layer in adapter_layers(model) if layer.holds(adapter_name)]
    if rank is None and any(isinstance(piece, Decomposed) for layer in layers for piece in layer.pieces(adapter_name)):
        raise ValueError(
            "llama.cpp knows no magnitudes (DoRA), and this adapter has them. Pass rank= to cut its updates to a plain "
            "LoRA, or merge it with merge_to_dense and convert the model."
        )
    done = export_lora(model, path, adapter_name, uniform_rank=uniform_rank, rank=rank, only=only)
    folder, base = Path(path), config.base_model_name_or_path
    words = ["python", _CONVERTER, str(folder.resolve()), "--outfile", f"{folder.resolve()}.gguf", "--outtype", "f16"]
    if base:
        words += ["--base", str(Path(base).resolve())] if Path(base).is_dir() else ["--base-model-id", base]
    return LlamaCppExport(done, next(iter(done.ranks.values())), shlex.join(words))
