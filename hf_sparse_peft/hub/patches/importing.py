"""`Patch` -> an adapter whose entries are the patch's."""

from __future__ import annotations

import os

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...sparsity import UnitGrid
from ...tuners import SparseLoraConfig, adapter_layers
from ...tuners.shared.pieces import Entries
from ...tuners.sparse_lora.model import config_of_pieces
from .checkpoint_names import CheckpointNames
from .patch_files import read_patch
from .weight_patch import Patch, digest


@torch.no_grad()
def import_patch(
    patch: Patch | str | os.PathLike, base: nn.Module, adapter_name: str = "default", **options: object
) -> PeftModel:
    r"""`base` with a sparse_lora adapter of single entries, :math:`\Delta = \text{value} - W`, in fp32 at the patch's
    indices: within the rounding of the cast what was exported. `options` are those of `SparseLoraConfig`.

    Raises:
        ValueError: the patch replaces whole tensors, changes what is no weight of a linear layer, or was made against
            other values than `base` has.
    """
    patch = patch if isinstance(patch, Patch) else read_patch(patch)
    names, pieces = CheckpointNames(base), {}
    modules = dict(base.named_modules())
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for weight in patch.weights:
        if weight.indices is None:
            raise ValueError(
                f"'{weight.name}' is replaced as a whole; an adapter of entries has no place for it. Load it into the "
                "base, and import the sparse part alone."
            )
        before = torch.empty_like(weight.values)
        for place in names.to_memory(weight.name, weight.indices, weight.shape):
            order = slice(None) if place.order is None else place.order
            base_values = names.dense(place.name).reshape(-1)[place.positions].to(weight.dtype)
            before[order] = base_values.cpu()
            parts.setdefault(place.name, []).append(
                (place.positions, weight.values[order].float() - base_values.cpu().float())
            )
        expected = patch.base_digests.get(weight.name)
        if expected is not None and digest(before) != expected:
            raise ValueError(f"'{weight.name}' of the base is not what this patch was made against.")
    for name, found in parts.items():
        owner, _, kind = name.rpartition(".")
        module = modules.get(owner)
        if kind != "weight" or not isinstance(module, (nn.Linear, Conv1D)):
            raise ValueError(f"'{name}' is no weight of a linear layer, and sparse_lora adapts nothing else.")
        positions, deltas = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        rows, cols = names.shapes[name]
        if isinstance(module, Conv1D):
            positions, rows, cols = positions % cols * rows + positions // cols, cols, rows
        positions, order = positions.sort()
        pieces[owner] = [Entries(positions, deltas[order], UnitGrid(rows, cols))]
    if not pieces:
        raise ValueError("The patch changes nothing; there is no adapter in it.")
    config = config_of_pieces(SparseLoraConfig(r=0, **options), pieces)
    config.target_modules = set(pieces)
    model = get_peft_model(base, config, adapter_name=adapter_name)
    for layer in adapter_layers(model, adapter_name=adapter_name):
        layer.write_pieces(adapter_name, pieces[layer.module_name])
    return model
