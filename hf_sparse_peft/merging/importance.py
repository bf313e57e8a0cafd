"""The Fisher information of the weights that an adapter changes, at the adapter's own entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..rules.calibration_data import CalibrationData, batch_size
from ..rules.collectives import all_reduce_sum, world_size
from ..rules.probing import random_state_kept
from ..sparsity import Fisher
from ..training.calibration.passes import ACCUMULATOR_BYTES, read_statistics
from ..tuners import AdapterLayer, adapter_layers
from ..tuners.shared.pieces import Entries, Subgrid, summed_entries
from ..tuners.upstream import upstream_low_rank


def fisher_importance(
    model: PeftModel,
    data: Any,
    adapter_name: str = "default",
    *,
    examples: int = 1024,
    mode: Literal["square", "expect"] = "square",
    max_labels: int = 32,
    compute_loss: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None,
    accumulator_bytes: int = ACCUMULATOR_BYTES,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    r"""The diagonal Fisher information of adapted weights, the mean over examples of squared gradients, for
    `merge_adapters(method="fisher", importance=[...])` (Matena and Raffel, 2022).

    `expect` is the true one of a classifier, :math:`F = \frac1n \sum_x \sum_y p(y|x) (\nabla \log p(y|x))^2`; `square`
    the empirical one, by the labels of the data, one example at a time. Gradients are those of the weights
    :math:`W + \Delta W`, so that factors have it too. The adapter must be active, alone.

    Args:
        model: with the adapter.
        data: batches of the adapter's own task; the first `examples` are read, in evaluation mode.
        adapter_name: which adapter.
        examples: examples to read.
        mode: which Fisher information.
        max_labels: labels that `expect` sums over at most.
        compute_loss: `(model, batch) -> mean loss`; None: the model's own.
        accumulator_bytes: dense matrices alive at once; what needs more takes further passes.
        show_progress: whether a bar shows on stderr.

    Returns:
        By module: fp32 `[k]` for the entries that the adapter has there, in their order, or `[out, in]` where it has
        factors.

    Raises:
        ValueError: the adapter is unknown or not the one that is active, or the model gives no loss.
    """
    layers = upstream_low_rank(model, adapter_name) or adapter_layers(model, adapter_name=adapter_name)
    active = list(model.active_adapters)
    if active != [adapter_name]:
        raise ValueError(
            f"adapter_name={adapter_name!r}: {active} are active, and gradients would be theirs. Call "
            f"model.set_adapter({adapter_name!r}) first."
        )
    modules = {layer.module_name: _module(layer) for layer in layers}
    pieces = {layer.module_name: layer.pieces(adapter_name) for layer in layers}
    statistic, found = Fisher(examples=examples, mode=mode, max_labels=max_labels), {}
    with random_state_kept():
        device = next(model.parameters()).device
        batches = CalibrationData(data, device)
        groups = read_statistics(
            model, modules, statistic, batches, examples=examples, compute_loss=compute_loss,
            accumulator_bytes=accumulator_bytes, show_progress=show_progress,
        )  # fmt: skip
        share = -(-examples // world_size())
        read = sum(batch_size(batch) for batch in batches.examples(share))
        read = int(all_reduce_sum(torch.tensor(read, device=device)))
        for readers in groups:
            for reader in readers:
                F = reader.state["sum"] / max(read, 1)
                found[reader.name] = _at_own_entries(F, pieces[reader.name]).cpu()
    return found


def _module(layer: Any) -> nn.Module:
    return layer if isinstance(layer, AdapterLayer) else layer.layer


def _at_own_entries(F: Tensor, pieces: list[Any]) -> Tensor:
    if not all(isinstance(piece, (Entries, Subgrid)) for piece in pieces):
        return F
    entries = summed_entries(pieces)
    return F.new_zeros(0) if entries is None else F.reshape(-1)[entries[0].to(F.device)]
