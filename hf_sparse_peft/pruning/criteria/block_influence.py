"""ShortGPT: how much each transformer block changes its hidden states, and models without those that change least."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..reading.block_inputs import HIDDEN, first_of
from ..reading.block_statistics import evaluating
from ..reading.calibration_batches import CalibrationBatches, no_cache, read_batches
from ..units.structure import block_names


@dataclass
class Cosines:
    """Sums over tokens of what a block's input and output have in common."""

    cosine: float = 0.0
    angle: float = 0.0
    """Of arccos(cosine) / pi."""
    tokens: int = 0


@torch.no_grad()
def block_influence(
    model: nn.Module, dataloader: Iterable[Mapping[str, Any]], *, show_progress: bool = True
) -> dict[str, float]:
    r"""Influence of every block, :math:`BI_l = 1 - E_t[\cos(x_{l,t}, x_{l+1,t})]` over all tokens that
    `attention_mask` does not hide (ShortGPT; Men et al., 2024), by the block's name.

    A block that only scales its input has influence 0, though it cannot go. fp32.

    Args:
        model: a transformers model.
        dataloader: batches as the model takes them.
        show_progress: whether a bar shows on stderr.

    Raises:
        ValueError: no batch; no numbered blocks; a block that does not run, runs twice in a pass, or whose states are
            not finite.
        TypeError: a batch is no mapping.
    """
    names = block_names(model)
    data = read_batches(dataloader, next(model.parameters()).device)
    data.progress = tqdm(total=len(data.inputs), desc="Reading", unit="batch", disable=not show_progress)
    with evaluating(model), data.progress:
        found = block_cosines(model, names, data)
    return {name: 1 - one.cosine / one.tokens for name, one in found.items()}


@torch.no_grad()
def block_angles(
    model: nn.Module, dataloader: Iterable[Mapping[str, Any]], *, last_token: bool = True, show_progress: bool = True
) -> dict[str, float]:
    r"""Angular distance of every block's output from its input, :math:`\mathbb{E}[\arccos \cos(x_l, x_{l+1})] / \pi`
    from 0 to 1, at each sequence's last token that `attention_mask` does not hide, or at all of them; by the block's
    name. CURing (Park and Moon, 2025) compresses the blocks of the smallest, the first and last left out.

    Args:
        model: a transformers model.
        dataloader: batches as the model takes them.
        last_token: whether only the last token of a sequence counts.
        show_progress: whether a bar shows on stderr.

    Raises:
        ValueError: as `block_influence`.
        TypeError: a batch is no mapping.
    """
    names = block_names(model)
    data = read_batches(dataloader, next(model.parameters()).device)
    if last_token:
        data.masks = [_last_tokens(inputs, mask) for inputs, mask in zip(data.inputs, data.masks, strict=True)]
    data.progress = tqdm(total=len(data.inputs), desc="Reading", unit="batch", disable=not show_progress)
    with evaluating(model), data.progress:
        found = block_cosines(model, names, data)
    return {name: one.angle / one.tokens for name, one in found.items()}


def _last_tokens(inputs: Mapping[str, Any], mask: Tensor | None) -> Tensor:
    """bool `[sequences, tokens]`: the last token that counts."""
    if mask is None:
        given = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        mask = torch.ones(given.shape[:2], device=given.device)
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (mask.bool() * places).amax(1, keepdim=True)
    return (places == last) & mask.bool()


def block_cosines(
    model: nn.Module, names: list[str], data: CalibrationBatches, current: dict[str, Tensor | None] | None = None
) -> dict[str, Cosines]:
    """Run all batches, and compare input and output of each block token by token; `current["mask"]` is the mask of the
    batch under way, for others' hooks."""
    found, before, hooks, current = {name: Cosines() for name in names}, {}, [], {} if current is None else current

    def enter(name: str):
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if name in before:
                raise ValueError(f"'{name}' runs more than once in a pass, so it has no influence of its own.")
            before[name] = args[0] if args else kwargs[HIDDEN]

        return hook

    def leave(name: str):
        return lambda _, __, output: _count(found[name], name, before[name], first_of(output), current["mask"])

    try:
        for name in names:
            module = model.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(leave(name)))
        for at, inputs in enumerate(data.inputs):
            before.clear()
            current["mask"] = data.masks[at]
            model(**{**inputs, **no_cache(model)})
            if data.progress is not None:
                data.progress.update()
    finally:
        for hook in hooks:
            hook.remove()
    silent = next((name for name, one in found.items() if not one.tokens), None)
    if silent is not None:
        raise ValueError(f"'{silent}' does not run on this data, or no token of it counts: use other data.")
    return found


def _count(one: Cosines, name: str, given: Tensor, made: Tensor, mask: Tensor | None) -> None:
    x, y = given.float(), made.float()
    # fp32 may give a hair more than 1, whose arccos is NaN.
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=1e-20).clamp(-1, 1)
    if mask is not None and mask.shape == cosine.shape:
        cosine = cosine[mask.bool()]
    if not cosine.isfinite().all():
        raise ValueError(
            f"Hidden states of '{name}' are not finite. Under fp16 use bf16 or fp32; else look for the batch."
        )
    one.cosine += float(cosine.double().sum())
    one.angle += float(cosine.double().arccos().sum()) / torch.pi
    one.tokens += cosine.numel()


def lowest_influence(influence: Mapping[str, float], count: int) -> list[str]:
    """The `count` blocks of the lowest influence, of equals the earlier, in the model's order."""
    order = sorted(influence, key=influence.get)[:count]
    return [name for name in influence if name in order]
