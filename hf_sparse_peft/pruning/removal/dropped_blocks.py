"""Whole transformer blocks taken out of a model (ShortGPT)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...tuners.shared.rollback import uninterrupted
from ..criteria.block_influence import lowest_influence
from ..units.kept_units import KeptUnits
from ..units.structure import block_names

# Lists of a config that hold blocks' numbers, not an entry for each block.
_NUMBERS = ("mlp_only_layers", "moe_layers")


def drop_blocks(
    model: nn.Module, count: int | Iterable[str], influence: Mapping[str, float] | None = None
) -> list[int]:
    """Take whole transformer blocks out of a model, in place, and renumber what is left: `layer_idx`, by which caches
    are read, `config.num_hidden_layers`, lists of the config with an entry a block (`layer_types`), and the kept units
    of a sliced model.

        influence = block_influence(model, dataloader)
        kept = drop_blocks(model, 4, influence)
        model.save_pretrained("shorter")

    All blocks are chosen at once by the dense model's influence, as ShortGPT does. Adapters are trained afterwards: a
    block's number is part of their names, so they load on the shorter model alone; keep the returned numbers.

    Args:
        model: a transformers model without adapters.
        count: how many go, or their names.
        influence: of every block (`block_influence`); needed where `count` is a number.

    Returns:
        The old number of each block that is left, in order.

    Raises:
        ValueError: adapters; blocks in several lists, as of an encoder and a decoder; no such block; none left; a
            config that would not rebuild the shorter model.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("The model has adapters, whose layers are named by their blocks' numbers. Drop blocks first.")
    names = block_names(model)
    place, *others = sorted({name.rpartition(".")[0] for name in names})
    blocks = model.get_submodule(place)
    if others or not isinstance(blocks, nn.ModuleList) or len(blocks) != len(names):
        raise ValueError(
            f"The model's blocks lie in {[place, *others]}, and blocks of one ModuleList, all with linear layers, can "
            "be dropped."
        )
    gone = _chosen(names, count, influence)
    kept = [number for number, name in enumerate(names) if name not in gone]
    if not kept:
        raise ValueError(f"count={count!r} leaves none of {len(names)} blocks: keep one at least.")
    changed = _changes(model, kept, len(names))
    _check_rebuilt(model, place, kept, changed)
    with uninterrupted():
        for number in sorted(set(range(len(names))) - set(kept), reverse=True):
            del blocks[number]
        for number, block in enumerate(blocks):
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = number
        for config, values in changed:
            for key, value in values.items():
                setattr(config, key, value)
        units = getattr(model, "kept_units", None)
        if units is not None:
            new = {names[old]: f"{place}.{number}" for number, old in enumerate(kept)}
            model.kept_units = KeptUnits({new[name]: own for name, own in units.blocks.items() if name in new})
    return kept


def _chosen(names: list[str], count: Any, influence: Mapping[str, float] | None) -> set[str]:
    if isinstance(count, int) and not isinstance(count, bool):
        if influence is None or set(influence) != set(names):
            raise ValueError(
                f"count={count} needs the influence of each of the {len(names)} blocks: pass block_influence(model, "
                "dataloader), or the names of the blocks that go."
            )
        if not 0 <= count < len(names):
            raise ValueError(f"count={count} is out of range: of {len(names)} blocks 0 to {len(names) - 1} may go.")
        return set(lowest_influence({name: influence[name] for name in names}, count))
    gone = set(count) if isinstance(count, Iterable) and not isinstance(count, str) else None
    if gone is None or gone - set(names):
        raise ValueError(f"count={count!r} is neither a number nor names of blocks such as '{names[0]}'.")
    return gone


def _changes(model: nn.Module, kept: list[int], old: int) -> list[tuple[Any, dict[str, Any]]]:
    """What changes in each config that counts these blocks; modules mostly share one."""
    configs = {id(one): one for module in model.modules() if (one := getattr(module, "config", None)) is not None}
    found = []
    for config in configs.values():
        if getattr(config, "num_hidden_layers", None) != old or id(config) not in _inside(model.config):
            continue
        values: dict[str, Any] = {"num_hidden_layers": len(kept)}
        for key, value in vars(config).items():
            if key in _NUMBERS and value:
                values[key] = [new for new, number in enumerate(kept) if number in value]
            elif isinstance(value, (list, tuple)) and len(value) == old and "layer" in key:
                values[key] = type(value)(value[number] for number in kept)
        found.append((config, values))
    if not found:
        raise ValueError(
            f"No config of {type(model).__name__} says num_hidden_layers={old}, which is how many blocks it has."
        )
    return found


def _inside(config: Any) -> set[int]:
    """A config and those it holds."""
    return {id(config)} | {id(value) for value in vars(config).values() if hasattr(value, "num_hidden_layers")}


def _check_rebuilt(model: nn.Module, place: str, kept: list[int], changed: list[tuple[Any, dict[str, Any]]]) -> None:
    """Refuse a config that makes other blocks of those numbers: the shorter model would not load."""
    memo: dict[int, Any] = {}
    whole, shorter = copy.deepcopy(model.config), copy.deepcopy(model.config, memo)
    for own, values in changed:
        for key, value in values.items():
            setattr(memo[id(own)], key, value)
    with torch.device("meta"):
        before, after = (type(model)(config).get_submodule(place) for config in (whole, shorter))
    for number, old in enumerate(kept):
        differing = dict(_made_with(before[old]) ^ _made_with(after[number]))
        if differing:
            raise ValueError(
                f"Block {old} of '{place}' would be block {number}, and a {type(model).__name__} makes that one with "
                f"another '{min(differing)}': its number decides what it is. Choose other blocks."
            )


def _made_with(block: nn.Module) -> set[tuple[str, str]]:
    """Shapes, numbers and words that the modules of a block were made with, but for its number."""
    shapes = {(name, str(tuple(p.shape))) for name, p in block.named_parameters()}
    return shapes | {
        (f"{name}.{key}", repr(value))
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if key != "layer_idx" and isinstance(value, (bool, int, float, str, type(None)))
    }
