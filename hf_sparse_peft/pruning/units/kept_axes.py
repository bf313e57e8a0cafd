"""Rows and columns of each linear weight that a sliced model keeps, from the units that its blocks keep."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .kept_units import KeptUnits
from .structure import CHANNELS, HEADS, BlockStructure, structures_of

KINDS = (HEADS, CHANNELS)
FullShape = tuple[int, int]


@dataclass(frozen=True)
class KeptAxes:
    """What is kept of a weight `[out, in]`: int64, in the order of the small weight; None: all."""

    rows: Tensor | None = None
    cols: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing was cut."""
        return self.rows is None and self.cols is None


def kept_axes(model: nn.Module, kept: KeptUnits) -> dict[str, KeptAxes]:
    """Of each linear layer of the full `model` that is cut, by name.

    Raises:
        ValueError: `kept` does not fit the model.
    """
    return axes_of(cut_structures(model, kept), kept)


def cut_structures(model: nn.Module, kept: KeptUnits) -> list[BlockStructure]:
    """The structures of the blocks that lose something.

    Raises:
        ValueError: `kept` names another block, or units that the block does not have, or leaves a block none of a kind.
    """
    kinds = [kind for kind in KINDS if any(block.all_units(kind) for block in kept.blocks.values())]
    structures = structures_of(model, kinds) if kinds else []
    kept.check(structures)
    return [one for one in structures if any(kept_of(kept, one.name, kind) is not None for kind in kinds)]


def kept_of(kept: KeptUnits, block: str, kind: str) -> Tensor | None:
    """Units of a kind that a block keeps; None where it keeps all."""
    found = kept.blocks.get(block)
    return None if found is None or len(found.units(kind)) == found.all_units(kind) else found.units(kind)


def axes_of(structures: list[BlockStructure], kept: KeptUnits) -> dict[str, KeptAxes]:
    """The same, of structures."""
    found: dict[str, KeptAxes] = {}
    for structure in structures:
        for kind in KINDS:
            units = kept_of(kept, structure.name, kind)
            for member in structure.members(kind) if units is not None else ():
                lines, axes = member.lines(units), found.get(member.module, KeptAxes())
                if member.axis:
                    found[member.module] = replace(axes, cols=lines)
                else:  # a layer that holds several projections, one below the other
                    rows = lines if axes.rows is None else torch.cat((axes.rows, lines))
                    found[member.module] = replace(axes, rows=rows)
    return found


def linear_shapes(model: nn.Module) -> dict[str, FullShape]:
    """`(out, in)` of every linear layer, by name."""
    found = {}
    for name, module in model.named_modules():
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(module, (nn.Linear, Conv1D)):
            cols, rows = _get_in_out_features(module)
            found[name] = (rows, cols)
    return found


def full_model(full: str | os.PathLike | PreTrainedConfig | nn.Module) -> tuple[nn.Module, str]:
    """The full base, without weights (on the meta device) where it is not given itself, and its name."""
    if isinstance(full, nn.Module):
        return full, getattr(getattr(full, "config", None), "name_or_path", "")
    config = full if isinstance(full, PreTrainedConfig) else AutoConfig.from_pretrained(full)
    with torch.device("meta"):
        return model_class(config)._from_config(config), config.name_or_path


def model_class(config: PreTrainedConfig) -> Any:
    """The class that a config's weights are of; a causal language model where it names none."""
    for name in config.architectures or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM._model_mapping[type(config)]
    raise ValueError(
        f"The config names none of transformers' classes (architectures={config.architectures}), so that the model of "
        f"a {type(config).__name__} is unknown. Pass the model, or its class."
    )
