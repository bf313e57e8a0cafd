"""The blocks of a model, and what each is called with on calibration data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .one_shot import PrunableLayer

HIDDEN = "hidden_states"


@dataclass
class Block:
    """A transformer block and its linear layers that are pruned."""

    name: str
    module: nn.Module
    layers: list[PrunableLayer]


@dataclass
class BlockInputs:
    """What the blocks are called with: the hidden states of the next one, and the other arguments of each."""

    hidden: list[Tensor] = field(default_factory=list)
    """One of each batch, for the block that comes next."""
    others: list[dict[str, tuple[tuple, dict]]] = field(default_factory=list)
    """By batch and block: what stands behind the hidden states. Blocks mostly share the same tensors."""
    masks: list[Tensor | None] = field(default_factory=list)
    """`[sequences, tokens]` of each batch, true for tokens that count."""

    def call(self, block: Block, at: int) -> Tensor:
        """The hidden states of batch `at` behind `block`."""
        args, kwargs = self.others[at][block.name]
        return first_of(block.module(self.hidden[at], *args, **kwargs))


def blocks_of(model: nn.Module, layers: list[PrunableLayer]) -> list[Block]:
    """The blocks that `layers` lie in, in their order: modules of the outermost numbered list.

    Raises:
        ValueError: a layer in no block.
    """
    found: dict[str, Block] = {}
    modules = dict(model.named_modules())
    for layer in layers:
        name = re.match(r"(?:.*?\.)?\d+(?=\.)", layer.name)
        if name is None:
            raise ValueError(
                f"'{layer.name}' lies in no block, and pruning walks from block to block. Name it in exclude_modules."
            )
        found.setdefault(name.group(), Block(name.group(), modules[name.group()], [])).layers.append(layer)
    return list(found.values())


@torch.no_grad()
def collect(model: nn.Module, blocks: list[Block], batches: Iterable[Mapping[str, Any]], device: Any) -> BlockInputs:
    """Run every batch through the whole model once and note what each block was called with.

    Raises:
        ValueError: no batch, or a block whose input is not the output of the one before it.
    """
    found = BlockInputs()
    for batch in batches:
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        inputs.pop("labels", None)
        found.masks.append(inputs.get("attention_mask") if _is_padding_mask(inputs.get("attention_mask")) else None)
        found.others.append({})
        _record(model, blocks, inputs, found)
    if not found.hidden:
        raise ValueError("dataloader gave no batch: pruning by inputs needs some, 128 sequences in the papers.")
    return found


def first_of(output: Any) -> Tensor:
    """The hidden states of what a block returns: a tensor, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def _is_padding_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _record(model: nn.Module, blocks: list[Block], inputs: dict[str, Any], found: BlockInputs) -> None:
    last: dict[str, Tensor] = {}

    def note(block: Block, args: tuple, kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get(HIDDEN)
        if not isinstance(given, Tensor) or ("output" in last and not _same(given, last["output"])):
            raise ValueError(
                f"'{block.name}' ({type(block.module).__name__}) does not take the output of the block before it, so "
                "pruning cannot walk from block to block. Prune it with method='magnitude' or 'random', which ask for "
                "no inputs."
            )
        if not last:
            found.hidden.append(given)
        found.others[-1][block.name] = (args[1:], {key: value for key, value in kwargs.items() if key != HIDDEN})

    hooks = []
    for block in blocks:
        hooks.append(block.module.register_forward_pre_hook(_noting(note, block), with_kwargs=True))
        hooks.append(block.module.register_forward_hook(lambda _, __, output: last.update(output=first_of(output))))
    use_cache = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    try:
        model(**inputs, **use_cache)
    finally:
        for hook in hooks:
            hook.remove()


def _same(left: Tensor, right: Tensor) -> bool:
    return left is right or torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def _noting(note: Any, block: Block) -> Any:
    return lambda module, args, kwargs: note(block, args, kwargs)
