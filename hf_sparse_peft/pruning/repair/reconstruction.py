"""Layer-wise reconstruction: an adapter on a pruned base is tuned block by block to what the dense blocks give."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from ...hub.analysis.checkpoints import Checkpoint
from ...tuners import AdapterLayer
from ...tuners.masked_lora import MaskedLoraLayer
from ...utils.tables import Table, table
from ..reading.block_inputs import Block, BlockInputs, blocks_of, collect
from ..reading.block_statistics import evaluating
from ..reading.one_shot import prunable_layers
from ..reading.reference_weights import ReferenceWeights, with_weights
from .reconstruction_checkpoint import ReconstructionCheckpoint


@dataclass
class Reconstruction:
    """What `reconstruct` did."""

    before: dict[str, float] = field(default_factory=dict)
    """By block, the mean squared error of its output to the dense block's, over all tokens that count."""
    after: dict[str, float] = field(default_factory=dict)
    """The same with the tuned block."""

    def table(self) -> Table:
        """A row a block."""
        rows = [(name, self.before[name], self.after[name]) for name in self.before]
        return table(("block", "error before", "error after"), rows)


def reconstruct(
    model: PeftModel,
    reference: Checkpoint,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    steps: int = 200,
    learning_rate: float = 1e-4,
    warmup: float = 0.1,
    checkpoint: str | Path | None = None,
    show_progress: bool = True,
) -> Reconstruction:
    r"""Tune what trains in each block of an adapted, pruned model so that the block's output is the dense block's,
    :math:`\min \|f_{dense}(X) - f(X)\|^2`, one block after the other (PERP; Zimmer et al., 2023).

    Both see the inputs that the pruned and already tuned blocks before it give. Only tensors that require gradients
    change: an adapter's, and biases and norms that it trains (`methods.get("perp")`). AdamW without weight decay, at a
    learning rate that rises over the first `warmup` of the steps and falls linearly to 0. A step takes one batch of the
    data, in order and round again. Dropout is off. The output head has no block and takes no part.

    On a dense base the next block's inputs come from this block as it will be merged, which differs from how it was
    tuned for `MaskAtMerge`; 4-bit bases are not merged, which would round them. The adapter stays: merge it afterwards.
    Memory: hidden states of all batches twice, and one block's activations of a batch.

    Args:
        model: what `get_peft_model` gives on the pruned base.
        reference: the dense model, its folder or its state dict: weights of the linear layers are read from it. What
            else a block has is the pruned model's own.
        dataloader: batches as the model takes them; 128 sequences in the paper.
        steps: updates of each block.
        learning_rate: the highest; the paper searches 5e-6 to 5e-4.
        warmup: fraction of the steps.
        checkpoint: a folder that the tensors of each tuned block are written to; a run that was killed goes on behind
            the last of them, with the same arguments and data.
        show_progress: whether a bar shows on stderr.

    Raises:
        ValueError: no adapter, one that is merged or does not know its mask, nothing that trains in any block, a
            reference of another model, a loss that is not finite, or what `prune_model` refuses of model and data. The
            block that it happens in is as it was before it.
        TypeError: a batch that is no mapping.
    """
    base = _base(model, steps, learning_rate, warmup)
    layers = prunable_layers(base)
    original = ReferenceWeights(reference, base, layers)
    blocks = blocks_of(base, layers)
    if not any(_trained(block) for block in blocks):
        raise ValueError(
            "Nothing trains in any block of the model: add an adapter with get_peft_model(model, "
            "methods.get('perp').config), or set requires_grad of what is to be tuned."
        )
    options = {"steps": steps, "learning_rate": learning_rate, "warmup": warmup}
    finished = ReconstructionCheckpoint(None if checkpoint is None else Path(checkpoint), options)
    report = Reconstruction()
    with evaluating(model):
        inputs = collect(base, blocks, dataloader, layers[0].module.weight.device)
        finished.begin(inputs.digest)
        for number, block in enumerate(tqdm(blocks, desc="Reconstruction", unit="block", disable=not show_progress)):
            trained = _trained(block)
            finished.start(trained)
            held = finished.load(number, trained)
            if held is None:
                held = _tuned(model, block, inputs, original, trained, options) if trained else (0.0, 0.0)
                finished.save(number, trained, held)
            report.before[block.name], report.after[block.name] = held
            if number + 1 < len(blocks):
                with torch.no_grad(), _merged(block):
                    inputs.hidden = [inputs.call(block, at) for at in range(len(inputs.hidden))]
    return report


def _base(model: PeftModel, steps: int, learning_rate: float, warmup: float) -> nn.Module:
    for name, value, fits in (
        ("steps", steps, isinstance(steps, int) and not isinstance(steps, bool) and steps > 0),
        ("learning_rate", learning_rate, learning_rate > 0),
        ("warmup", warmup, 0 <= warmup < 1),
    ):
        if not fits:
            raise ValueError(
                f"{name}={value!r} is out of range: steps is 1 or more, learning_rate above 0, warmup in [0, 1)."
            )
    if not isinstance(model, PeftModel):
        raise ValueError(
            "reconstruct tunes an adapter, and the model has none. Pass get_peft_model(model, "
            "methods.get('perp').config)."
        )
    for layer in (module for module in model.modules() if isinstance(module, AdapterLayer)):
        if layer.merged_adapters:
            raise ValueError(f"{layer.merged_adapters} are merged. Call model.unmerge_adapter() first.")
    masked = [module for module in model.modules() if isinstance(module, MaskedLoraLayer)]
    unknown = [one for one in masked for name in one.active_adapters if one.holds(name) and not one.knows_mask(name)]
    if unknown:
        raise ValueError(
            f"'{unknown[0].module_name}' does not know its mask (mask='given'). Call hf_sparse_peft.set_masks(model, "
            "report.masks) first."
        )
    return model.get_base_model()


def _trained(block: Block) -> dict[str, nn.Parameter]:
    return {name: p for name, p in block.module.named_parameters() if p.requires_grad}


def _tuned(
    model: PeftModel,
    block: Block,
    inputs: BlockInputs,
    original: ReferenceWeights,
    trained: dict[str, nn.Parameter],
    options: dict[str, Any],
) -> tuple[float, float]:
    """Tune one block; its error before and after. Whatever ends this early leaves the block as it was."""
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    weights = {layer.name: original.get(layer) for layer in block.layers}
    with warnings.catch_warnings():
        # peft says that biases which train stay what they are; no step has changed this block's yet
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
        with torch.no_grad(), model.disable_adapter(), with_weights(block.layers, weights):
            targets = [inputs.call(block, at) for at in range(len(inputs.hidden))]
    del weights
    optimizer = torch.optim.AdamW(trained.values(), lr=options["learning_rate"], weight_decay=0.0)
    first = int(options["warmup"] * options["steps"])
    schedule = get_linear_schedule_with_warmup(optimizer, first, options["steps"])
    try:
        before = _error(block, inputs, targets)
        for step in range(options["steps"]):
            at = step % len(targets)
            loss = _loss(inputs.call(block, at), targets[at], inputs.masks[at]).mean()
            if not loss.isfinite():
                raise ValueError(
                    f"The loss of '{block.name}' is {loss.item()} after {step} steps at learning_rate="
                    f"{options['learning_rate']}. Lower it, or load the model in bf16 or fp32."
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        return before, _error(block, inputs, targets)
    except BaseException:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)


def _loss(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Squared errors of the tokens that count, fp32 `[tokens, width]`."""
    error = (output.float() - target.float()).square()
    return error.flatten(0, -2) if mask is None else error[mask.bool().to(error.device)]


@torch.no_grad()
def _error(block: Block, inputs: BlockInputs, targets: list[Tensor]) -> float:
    errors = [_loss(inputs.call(block, at), target, inputs.masks[at]) for at, target in enumerate(targets)]
    return float(sum(error.double().sum() for error in errors)) / max(sum(error.numel() for error in errors), 1)


@contextmanager
def _merged(block: Block) -> Iterator[None]:
    """The block's masked adapters merged inside, where the base is dense and every bit comes back."""
    adapted = [one for one in block.module.modules() if isinstance(one, AdapterLayer)]
    layers = [one for one in adapted if one.quantization_backend is None]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            if layer.merged_adapters:
                layer.unmerge()
