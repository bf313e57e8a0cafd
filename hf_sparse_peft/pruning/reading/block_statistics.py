"""What reaches the linear layers of one block, over all calibration data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .block_inputs import Block, BlockInputs
from .expert_matrices import ExpertMatrix, expert_hooks
from .input_statistics import InputStatistics


def block_statistics(
    block: Block, inputs: BlockInputs, reads: frozenset[str], *, running: bool = False
) -> dict[str, InputStatistics]:
    r"""Statistics of each layer's inputs, by its name, over all batches of what the block is called with.

    With `running`, sums are multiplied by :math:`N / (N + b)` before each batch of `b` sequences, `N` all sequences: an
    exponential average that later batches dominate.

    Raises:
        ValueError: inputs that are not finite, or a layer that no token reaches.
    """
    found, hooks, current = {}, [], {"mask": None}
    for layer in block.layers:
        found[layer.name] = InputStatistics(layer.grid.cols, reads, layer.weight().device)
        add = found[layer.name].add
        if not isinstance(layer, ExpertMatrix):
            hooks.append(layer.module.register_forward_pre_hook(lambda _, args, add=add: add(args[0], current["mask"])))
    hooks += expert_hooks(block.layers, found, current)
    total = sum(len(hidden) for hidden in inputs.hidden)
    try:
        for at, hidden in enumerate(inputs.hidden):
            current["mask"] = inputs.masks[at]
            for statistics in found.values() if running else ():
                statistics.scale(total / (total + len(hidden)))
            inputs.call(block, at)
    finally:
        for hook in hooks:
            hook.remove()
    silent = [name for name, statistics in found.items() if not statistics.tokens]
    if silent:
        raise ValueError(
            f"No token of the data reaches '{silent[0]}'. Check the attention masks, use other data, or name it in "
            "exclude_modules."
        )
    broken = [name for name, statistics in found.items() if not statistics.is_finite()]
    if broken:
        raise ValueError(
            f"The inputs of '{broken[0]}' are not finite on this data. Under fp16 use bf16 or fp32; else look for the "
            "batch, or for weights that are not finite."
        )
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the modes of all modules again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
