"""The blocks of a model, and what each is called with on calibration data."""

from __future__ import annotations

import hashlib
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
    digest: str = ""
    """Of all batches: the same for the same data in the same order."""

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
        ValueError: no batch, or a block whose input is not the output of the one before it, that runs twice in a pass,
            or not at all.
        TypeError: a batch is no mapping.
    """
    found, digests = BlockInputs(), []
    config = getattr(model, "config", None)
    _refuse_decoder(model, blocks, config)
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"dataloader gives a {type(batch).__name__}, and the model takes mappings such as {{'input_ids': ..., "
                "'attention_mask': ...}. Pass an iterable of those."
            )
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        if not getattr(config, "is_encoder_decoder", False):  # there the decoder's inputs are made of them
            inputs.pop("labels", None)
        _refuse_padded_cross_attention(inputs)
        found.masks.append(inputs.get("attention_mask") if _is_padding_mask(inputs.get("attention_mask")) else None)
        found.others.append({})
        digests += [f"{key} {digest(batch[key])}" for key in sorted(inputs) if isinstance(inputs[key], Tensor)]
        _record(model, blocks, inputs, found)
    if not found.hidden:
        raise ValueError("dataloader gave no batch: pruning by inputs needs some, 128 sequences in the papers.")
    found.digest = digest(torch.frombuffer(bytearray("\n".join(digests).encode()), dtype=torch.uint8))
    return found


def digest(tensor: Tensor) -> str:
    """The same for the same bytes in row-major order."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(values.numpy(), digest_size=16).hexdigest()


def first_of(output: Any) -> Tensor:
    """The hidden states of what a block returns: a tensor, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def _refuse_decoder(model: nn.Module, blocks: list[Block], config: Any) -> None:
    decoder = model.get_decoder() if getattr(config, "is_encoder_decoder", False) else None
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    encoder = model.get_encoder() if inside else None
    inside -= {id(module) for module in encoder.modules()} if isinstance(encoder, nn.Module) else set()
    for block in blocks:
        if id(block.module) in inside:
            raise ValueError(
                f"'{block.name}' ({type(block.module).__name__}) is of a decoder beside an encoder: it does not take "
                "the output of the block before it, and its tokens are not those of attention_mask. Name the decoder "
                "in exclude_modules, or prune with method='magnitude' or 'random', which ask for no inputs."
            )


def _refuse_padded_cross_attention(inputs: Mapping[str, Any]) -> None:
    given = [inputs.get(name) for name in ("attention_mask", "encoder_attention_mask")]
    padded = any(isinstance(mask, Tensor) and not mask.all() for mask in given)
    if isinstance(inputs.get("encoder_hidden_states"), Tensor) and padded:
        raise ValueError(
            "A batch has padding and encoder_hidden_states: attention_mask does not say which of those count. Use "
            "sequences of equal length, without masks that hide some."
        )


def _is_padding_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _record(model: nn.Module, blocks: list[Block], inputs: dict[str, Any], found: BlockInputs) -> None:
    last: dict[str, Tensor] = {}

    def note(block: Block, args: tuple, kwargs: dict[str, Any]) -> None:
        if block.name in found.others[-1]:
            raise ValueError(
                f"'{block.name}' ({type(block.module).__name__}) runs more than once in a pass, so pruning cannot walk "
                "from block to block. Prune it with method='magnitude' or 'random', which ask for no inputs."
            )
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
    use_cache = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) is not None else {}
    try:
        model(**{**inputs, **use_cache})
    finally:
        for hook in hooks:
            hook.remove()
    silent = [block.name for block in blocks if block.name not in found.others[-1]]
    if silent:
        raise ValueError(f"'{silent[0]}' does not run on this data. Use other data, or name it in exclude_modules.")


def _same(left: Tensor, right: Tensor) -> bool:
    if left is right or left.shape != right.shape or left.device != right.device:
        return left is right
    return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def _noting(note: Any, block: Block) -> Any:
    return lambda module, args, kwargs: note(block, args, kwargs)
