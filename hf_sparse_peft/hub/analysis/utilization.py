r"""Utilized rank: how much of a weight's rank the data makes use of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...rules.calibration_data import CalibrationData
from ...rules.probing import random_state_kept
from ...sparsity import Statistic
from ...sparsity.weight_statistics import State
from ...training.calibration import read_statistics
from ...utils.option_types import PositiveInt
from ...utils.tables import Table, table
from .merged_weights import adapted_linears, merged_weight, plain_linears
from .module_picture import draw_modules

_TOLERANCE = 1e-6
"""Singular values up to this fraction of the largest count as 0; eigenvalues up to its square."""


@dataclass(frozen=True)
class InputGram(Statistic):
    r""":math:`C_x = \sum_t x_t x_t^\top` of a layer's inputs, not centred: `state["gram"]` `[cols, cols]`, fp64 sums of
    each batch's fp32 product."""

    examples: PositiveInt = 128
    reads_activations: ClassVar[bool] = True

    def state_numel(self, rows: int, cols: int) -> int:
        """Two fp32 numbers for each fp64."""
        return 2 * cols * cols

    def start(self, rows: int, cols: int, device: torch.device | str = "cpu") -> State:
        """No inputs yet."""
        return {"gram": torch.zeros(cols, cols, dtype=torch.float64, device=device)}

    def observe(self, state: State, inputs: Tensor, outputs: Tensor) -> None:
        """Add a batch."""
        inputs = inputs.float()
        state["gram"].add_(inputs.T @ inputs)


@dataclass(frozen=True)
class ModuleUtilization:
    """Ranks of one weight `[out, in]`."""

    utilized: int
    """Of the weight between both projections."""
    weight: int
    """Of the weight itself."""
    inputs: int
    """Directions of the inputs."""
    outputs: int
    """Directions of the outputs."""
    largest: int
    """`min(out, in)`."""

    @property
    def utilization(self) -> float:
        """`utilized / min(out, in)`."""
        return self.utilized / self.largest


@dataclass(frozen=True)
class UtilizationReport:
    """Utilized ranks of a model's weights."""

    threshold: float
    """Fraction of the variance of inputs and outputs that the projections keep."""
    modules: dict[str, ModuleUtilization] = field(repr=False)
    """By module name, in model order."""

    @property
    def utilization(self) -> float:
        """Mean over modules."""
        return sum(module.utilization for module in self.modules.values()) / len(self.modules)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Utilized rank by module name, as `LoraConfig(rank_pattern=...)` takes it."""
        return {name: module.utilized for name, module in self.modules.items()}

    def table(self) -> Table:
        """A line for each module and one for all; `str()` of it is aligned text."""
        rows = [(name, m.utilized, m.weight, m.inputs, m.outputs, m.largest) for name, m in self.modules.items()]
        totals = (f"{len(self.modules)} modules", f"{self.utilization:.1%}", *[""] * 4)
        return table(("module", "utilized", "weight", "inputs", "outputs", "of"), rows, totals=totals)

    def draw(self, path: str | Path) -> Path:
        """A heat map of utilized / largest rank in percent, blocks over kinds of matrices; returns `path`."""
        values = {name: round(100 * module.utilization, 1) for name, module in self.modules.items()}
        title = f"utilized rank at {self.threshold:g} of the variance: {self.utilization:.1%} on average"
        return draw_modules(values, path, title, "utilized rank [% of the largest]", top=100.0)


def utilized_rank(
    model: nn.Module,
    dataloader: Iterable,
    adapter_name: str | None = "default",
    *,
    threshold: float = 0.99,
    examples: int = 128,
    compute_loss: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None,
    show_progress: bool = True,
) -> UtilizationReport:
    r"""Measure the rank of each weight between the directions that its inputs and outputs have.

    With :math:`C_x = \sum_t x_t x_t^\top` over all tokens and :math:`C_y = W C_x W^\top`, :math:`P_x` and :math:`P_y`
    project on the fewest leading eigenvectors that hold `threshold` of the trace; the utilized rank is that of
    :math:`W' = P_y W P_x`, up to singular values of 1e-6 of the largest. `W` is the weight as it acts: base and active
    adapters. Inputs are not centred. From the abstract of "Revealing the Utilized Rank of Subspaces of Learning in
    Neural Networks" (2024); the formulas are this project's reading, **thresholds and centring are not verified**.

    The model runs in evaluation mode, without gradients and labels. `in * in` numbers in fp64 a module are held,
    modules in passes of their own where that is too much; under torch.distributed every rank brings its share of data.

    Args:
        model: adapted or not.
        dataloader: batches as mappings of the model's arguments; a DataLoader or a list.
        adapter_name: measures the linear layers that this adapter changes; None: all linear layers of a model without
            adapters, but for the output embedding.
        threshold: fraction of the variance, in (0, 1].
        examples: examples to read, over all ranks.
        compute_loss: `(model, batch) -> anything` for models that are not called as `model(**batch)`.
        show_progress: whether a bar shows on stderr.

    Raises:
        ValueError: a number out of range, no such adapter, no batch, or layers that no batch reached.
        TypeError: a dataloader that cannot be read twice, or batches that are no mappings.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is the fraction of variance to keep; give one in (0, 1].")
    layers = plain_linears(model) if adapter_name is None else adapted_linears(model, adapter_name)
    if not layers:
        raise ValueError("The model has no linear layer without an adapter; give adapter_name.")
    found = {}
    with random_state_kept():
        data = CalibrationData(dataloader, next(model.parameters()).device)
        options = {"compute_loss": compute_loss, "show_progress": show_progress}
        for readers in read_statistics(model, layers, InputGram(examples), data, **options):
            for reader in readers:
                if not reader.says_something():
                    raise ValueError(
                        f"No batch reached '{reader.name}', or its inputs are 0 or not finite: nothing is known of its "
                        "rank. Use other data, or measure other modules."
                    )
                weight = merged_weight(reader.module, getattr(reader.module, "active_adapters", []))
                found[reader.name] = utilization_of(weight, reader.state["gram"], threshold)
    return UtilizationReport(threshold, found)


@torch.no_grad()
def utilization_of(weight: Tensor, gram: Tensor, threshold: float) -> ModuleUtilization:
    """Ranks of `weight` `[out, in]` under inputs with the sum of outer products `gram` `[in, in]`; both in fp64."""
    weight, gram = weight.double(), gram.double()
    inputs = _leading(gram, threshold)
    outputs = _leading(weight @ gram @ weight.T, threshold)
    core = outputs.T @ weight @ inputs
    largest = torch.linalg.matrix_norm(weight, ord=2) if weight.any() else weight.new_zeros(())
    ranks = [int((torch.linalg.svdvals(matrix) > _TOLERANCE * largest).sum()) for matrix in (core, weight)]
    return ModuleUtilization(*ranks, inputs.shape[1], outputs.shape[1], min(weight.shape))


def _leading(gram: Tensor, threshold: float) -> Tensor:
    """The fewest leading eigenvectors, `[side, p]`, whose eigenvalues sum to `threshold` of all."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    count = int((values > _TOLERANCE**2 * values[0]).sum()) if values[0] > 0 else 0
    if threshold < 1 and count:
        reached = values[:count].cumsum(0) >= threshold * values.sum() * (1 - 1e-12)
        count = min(count, int((~reached).sum()) + 1)
    return vectors[:, :count]
