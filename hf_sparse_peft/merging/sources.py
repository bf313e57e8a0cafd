"""Adapter folders as sources of pieces, read and checked without their base: this package's, and upstream's LoRA."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..hub.held_layers import layers_without_base
from ..tuners import AdapterLayer
from ..tuners.factored import FactoredLayer
from ..tuners.shared.file_check import CONFIG_FILE, PREFIX, WEIGHTS_FILE, is_head, read_adapter, read_json
from ..tuners.shared.pieces import Entries, LowRank, Piece, Subgrid, Tiles
from ..utils.file_length import read_safetensors

KNOWN_WITHOUT_BASE = (LowRank, Entries, Subgrid, Tiles)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that was read and found whole."""

    path: Path
    """Its folder."""
    shapes: dict[str, tuple[int, int]]
    """Module -> `(out, in)` of its weight."""
    read: Callable[[str], list[Piece]] = field(repr=False)
    """Pieces of a module."""
    others: dict[str, Tensor] = field(repr=False)
    """Heads and biases by their keys in the file: absolute values, no updates."""
    config: Mapping[str, Any] = field(repr=False)
    """Options that an adapter of any type has: base, task, heads."""

    def pieces(self, name: str) -> list[Piece]:
        """Pieces of the module; none where the adapter leaves it alone."""
        return self.read(name) if name in self.shapes else []


@torch.no_grad()
def read_source(path: str | os.PathLike) -> AdapterSource:
    """Read the adapter in the folder `path`, of this package or a LoRA of upstream's.

    Raises:
        ValueError: the folder holds no whole adapter, or one whose update is known with the base's weights only (DoRA,
            masked, factored); names the module.
    """
    folder = Path(path)
    if read_json(folder / CONFIG_FILE).get("peft_type") == "LORA":
        return _lora_source(folder)
    file = read_adapter(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
    layers = layers_without_base(file)
    for name, layer in layers.items():
        _check_layer(name, layer, folder)
    any_layer = next(iter(layers.values()))
    others = {key: t for key, t in file.others.items() if not any_layer.is_training_state(key.rpartition(".")[2])}
    return AdapterSource(
        folder,
        {name: (layer.out_features, layer.in_features) for name, layer in layers.items()},
        lambda name: layers[name].pieces("default"),
        others,
        vars(file.config),
    )


def _check_layer(name: str, layer: AdapterLayer, folder: Path) -> None:
    odd = [piece for piece in layer.pieces("default") if not isinstance(piece, KNOWN_WITHOUT_BASE)]
    needs_base = bool(odd) or isinstance(layer, FactoredLayer) or layer.masks_base("default")
    if needs_base or layer.bias_change("default") is not None:
        kind = type(odd[0]).__name__ if odd else type(layer).__name__
        raise ValueError(
            f"The update of '{name}' in '{folder}' is known with the base's weights only ({kind}), so that it cannot "
            "be merged from files. Merge it into the base (hub.merge_to_dense), or export it as a LoRA or a patch."
        )


def _lora_source(folder: Path) -> AdapterSource:
    options = read_json(folder / CONFIG_FILE)
    config = LoraConfig.from_pretrained(str(folder))
    for name, why in (
        ("use_dora", "its update is known with the base's weights only"),
        ("use_qalora", "its inputs are pooled"),
        ("trainable_token_indices", "it trains single tokens"),
        ("target_parameters", "it adapts parameters of experts"),
        ("layer_replication", "it copies layers of the base"),
        ("megatron_config", "its layers are split"),
    ):
        if getattr(config, name, None):
            raise ValueError(f"'{folder}' is a LoRA with {name}={getattr(config, name)!r}: {why}. It cannot be merged.")
    init = str(config.init_lora_weights).lower()
    if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(
            f"'{folder}' is a LoRA with init_lora_weights={init!r}, which changed the base weights: it is no update of "
            "the base alone. save_pretrained(..., path_initial_model_for_weight_conversion=...) makes one of it."
        )
    tensors = _tensors(folder / WEIGHTS_FILE)
    halves: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in sorted(tensors.items()):
        name, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        if kind in ("A.weight", "B.weight"):
            if tensor.ndim != 2 or not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"'{key}' in '{folder}' is no matrix of finite numbers.")
            halves.setdefault(name, {})[kind[0]] = tensor
        elif kind:
            raise ValueError(f"'{key}' in '{folder}' is a part of a LoRA that cannot be merged (linear layers can).")
        elif not is_head(key, config.modules_to_save) and not key.endswith(".bias"):
            raise ValueError(
                f"'{key}' in '{folder}' is no tensor of a LoRA with modules_to_save={config.modules_to_save}."
            )
        else:
            others[key] = tensor
    pieces = {}
    for name, found in halves.items():
        if set(found) != {"A", "B"} or found["A"].shape[0] != found["B"].shape[1]:
            raise ValueError(f"'{name}' in '{folder}' has not both factors of one rank; the file is incomplete.")
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        if found["A"].shape[0] != rank:
            raise ValueError(f"'{name}' in '{folder}' has rank {found['A'].shape[0]}, and its config says {rank}.")
        pieces[name] = [LowRank(found["B"], found["A"], scale=alpha / (rank**0.5 if config.use_rslora else rank))]
    if not pieces:
        raise ValueError(f"'{folder}' holds no LoRA of a linear layer.")
    shapes = {name: (piece.B.shape[0], piece.A.shape[1]) for name, (piece,) in pieces.items()}
    return AdapterSource(folder, shapes, pieces.__getitem__, others, {**vars(config), **_extra(options)})


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"'{file.parent}' has no {file.name}; pickled weights are never read. Save it again.")
    return read_safetensors(file)[0]  # upstream writes no checksums


def _extra(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"base_overrides": options.get("base_overrides") or {}}


def check_alike(sources: Sequence[AdapterSource], base: str | None) -> dict[str, tuple[int, int]]:
    """Shapes of all modules that any of them adapts, in sorted order.

    Raises:
        ValueError: weights of other shapes or, without `base`, other bases; names both.
    """
    if base is None:
        names = [source.config.get("base_model_name_or_path") for source in sources]
        odd = next((at for at, name in enumerate(names) if name != names[0]), None)
        if odd is not None:
            raise ValueError(
                f"'{sources[0].path}' and '{sources[odd].path}' differ in base_model_name_or_path ({names[0]}, "
                f"{names[odd]}), and only adapters of one base can be merged. Pass base= if they are one model by two "
                "names."
            )
    shapes: dict[str, tuple[int, int]] = {}
    owner: dict[str, AdapterSource] = {}
    for source in sources:
        for name, shape in source.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                first = "x".join(map(str, shapes[name]))
                raise ValueError(
                    f"'{name}' is {first} in '{owner[name].path}' and {shape[0]}x{shape[1]} in '{source.path}': "
                    "they are adapters of different base models."
                )
            owner.setdefault(name, source)
    return dict(sorted(shapes.items()))
