"""The base model with merged updates in its weights: loaded once, written to one weight after another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..hub.base_model import load_base
from ..hub.folders import staged_folder
from ..hub.processors import load_processor
from ..tuners.shared.file_check import CONFIG_FILE, PREFIX, read_json
from ..tuners.shared.merge import untie_embeddings
from ..tuners.shared.pieces import Piece
from .row import Update


class DenseBase:
    """The base of adapters in full precision, with their heads and biases `others` in it.

    Raises:
        ValueError: no base is named, it is stored quantised, it has no linear layer where an adapter has one, or no
            place for a head or bias of its shape.
    """

    def __init__(
        self,
        like: Path,
        about: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, int]],
        others: Mapping[str, Tensor],
    ) -> None:
        named = about["base_model_name_or_path"]
        if not named:
            raise ValueError("form='dense' needs the base, and the adapters do not name it; pass base=.")
        options = read_json(like / CONFIG_FILE)
        where = {"revision": about["revision"]} if about["revision"] else {}
        self.model = load_base(str(named), options, like, base_as="full", dtype="auto", **where)
        self.model.requires_grad_(False)
        for name, shape in shapes.items():
            weight, transposed = self._weight(name)
            found = tuple(weight.shape[::-1]) if transposed else (weight.shape[:-1].numel(), weight.shape[-1])
            if found != shape:
                raise ValueError(
                    f"'{name}' is {found[0]}x{found[1]} in '{named}' and {shape[0]}x{shape[1]} in adapters."
                )

        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for key, tensor in others.items():
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ValueError(f"'{named}' has no '{name}' of shape {tuple(tensor.shape)}, which '{key}' is for.")
            tensor = tensor.to(parameters[name].dtype)
            if not torch.equal(parameters[name].data, tensor):
                self._replace(parameters[name], tensor, name.rpartition(".")[0])

    def add(self, name: str, result: list[Piece] | Update) -> int:
        """Add to the weight of a module, in fp32 or wider, rounded once; returns how many entries changed."""
        weight, transposed = self._weight(name)
        before = weight.data.t() if transposed else weight.data.reshape(-1, weight.shape[-1])
        merged = before.to(torch.promote_types(weight.dtype, torch.float32), copy=True).contiguous()
        if not isinstance(result, Update):
            for piece in result:
                piece.add_(merged)
        elif result.positions is None:
            merged += result.values.view_as(merged)
        else:
            merged.view(-1)[result.positions] += result.values.to(merged.dtype)
        merged = merged.to(weight.dtype)
        changed = int((merged != before).sum())
        self._replace(weight, merged.t().contiguous() if transposed else merged.view_as(weight), name)
        return changed

    def save(self, out: str | os.PathLike) -> int:
        """Write the model with its tokenizer into `out`; returns bytes of weights."""
        processor = load_processor("base", getattr(self.model, "name_or_path", None))
        with staged_folder(out) as stage:
            self.model.save_pretrained(stage)
            if processor is not None:
                processor.save_pretrained(stage)
        return sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))

    def _weight(self, name: str) -> tuple[nn.Parameter, bool]:
        """A weight, and whether it is stored as `[in, out]`."""
        parent, _, last = name.rpartition(".")
        try:
            owner = self.model.get_submodule(parent)
        except AttributeError:
            owner = None
        found = getattr(owner, last, None)
        if isinstance(found, nn.Parameter) and found.ndim > 1:
            return found, False
        weight = getattr(found, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            raise ValueError(f"'{name}', which an adapter changes, is no linear layer of this base.")
        return weight, isinstance(found, Conv1D)

    def _replace(self, weight: nn.Parameter, data: Tensor, name: str) -> None:
        owners = [path for path, one in self.model.named_parameters(remove_duplicate=False) if one is weight]
        if len(owners) == 1:
            weight.data.copy_(data)
            return
        # A tied head: the embedding stays as it is.
        own = next(path for path in owners if path.rpartition(".")[0] == name or path == name)
        parent, _, last = own.rpartition(".")
        setattr(self.model.get_submodule(parent), last, nn.Parameter(data.clone(), requires_grad=False))
        untie_embeddings(self.model)
