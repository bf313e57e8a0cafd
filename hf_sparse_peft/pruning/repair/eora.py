"""EoRA: a low-rank adapter, in closed form, that makes up for what pruning and quantising did to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ...hub.analysis.checkpoints import Checkpoint
from ...ops import autocast_off
from ...tuners.shared.base_weight import keep_4bit_weight_stable
from ...tuners.shared.module_patterns import pattern_key
from ...tuners.shared.target_checks import expert_parameters
from ...utils.tables import Table, table
from ..reading.block_inputs import Block, blocks_of, collect
from ..reading.block_statistics import block_statistics, evaluating
from ..reading.input_statistics import HESSIAN
from ..reading.one_shot import PrunableLayer, check_own_weight, prunable_layers
from ..reading.reference_weights import ReferenceWeights, with_weights


@dataclass
class LowRankCorrection:
    """The best product of a rank for one layer, and what it leaves."""

    B: Tensor
    """`[out, k]`, float64; `k` is at most the rank asked for, less where fewer directions hold any error."""
    A: Tensor
    """`[k, in]`, float64."""
    before: float
    r""":math:`\mathrm{tr}(\Delta W S \Delta W^\top)`: the mean squared error of an output without the product."""
    after: float
    """The same with it: the sum of the squared singular values that are left out."""


def eigenspace_correction(error: Tensor, second_moment: Tensor, rank: int) -> LowRankCorrection:
    r"""The product :math:`BA` of a rank that leaves the least error of the outputs,
    :math:`\mathrm{tr}((\Delta W - BA) S (\Delta W - BA)^\top)`, on inputs with second moment :math:`S = E[x x^\top]`
    (EoRA; Liu et al., 2024).

    With :math:`S = Q \Lambda Q^\top` and the SVD :math:`\Delta W Q \Lambda^{1/2} = U \Sigma V^\top`,
    :math:`B = U_r \Sigma_r^{1/2}` and :math:`A = \Sigma_r^{1/2} V_r^\top \Lambda^{-1/2} Q^\top`. Eigenvalues up to
    :math:`\lambda_{max}\,n\,\epsilon_{fp32}` count as 0 and are left out of both roots: the official code replaces
    negative ones by the smallest positive one, whose inverse root is huge.

    Args:
        error: :math:`\Delta W = W - \hat W`, `[out, in]`, any float dtype; computed in float64.
        second_moment: S, `[in, in]`, symmetric; any positive multiple of it gives the same product.
        rank: r.
    """
    return _correction(error, *_eigenspace(second_moment), rank)


def _eigenspace(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Roots of the eigenvalues that are not 0, `[k]`, and their vectors, `[in, k]`."""
    values, vectors = torch.linalg.eigh(second_moment.double())
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float32).eps
    return values[kept].sqrt(), vectors[:, kept]


def _correction(error: Tensor, root: Tensor, vectors: Tensor, rank: int) -> LowRankCorrection:
    U, sigma, Vt = torch.linalg.svd(error.double() @ (vectors * root), full_matrices=False)
    squares = sigma.square()
    noise = sigma[:1].sum() * max(error.shape) * torch.finfo(torch.float64).eps
    used = min(rank, int((sigma > noise).sum()))
    balance = sigma[:used].sqrt()
    A = (balance[:, None] * Vt[:used] / root) @ vectors.T
    return LowRankCorrection(U[:, :used] * balance, A, float(squares.sum()), float(squares[used:].sum()))


@dataclass
class Compensation:
    """What `compensate` made."""

    model: PeftModel
    """The compressed model with a plain LoRA of peft beside it, whose factors can train."""
    before: dict[str, float] = field(default_factory=dict)
    r"""By layer, the relative error of its output on the calibration data without the adapter,
    :math:`\|\Delta W X\|_F / \|W X\|_F`."""
    after: dict[str, float] = field(default_factory=dict)
    """The same with it."""

    def table(self) -> Table:
        """A row a layer: its rank, and the relative error of its output without and with the adapter."""
        rank = {name: self.model.get_submodule(f"base_model.model.{name}").r for name in self.before}
        rows = [(name, *rank[name].values(), self.before[name], self.after[name]) for name in self.before]
        return table(("layer", "rank", "error before", "error after"), rows)


@torch.no_grad()
def compensate(
    model: nn.Module,
    reference: Checkpoint,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    rank: int = 128,
    rank_pattern: Mapping[str, int] | None = None,
    average: Literal["mean", "running"] = "mean",
    target_modules: Any = "all-linear",
    exclude_modules: Any = None,
    task_type: str | None = None,
    adapter_name: str = "default",
    show_progress: bool = True,
) -> Compensation:
    r"""Put beside each linear layer of a compressed model the LoRA that makes up best for
    :math:`\Delta W = W - \hat W` on calibration data, without training (EoRA; Liu et al., 2024).

    Blocks are taken from left to right. The second moment of each layer's inputs is read while its block runs with the
    reference's weights, on what the compensated blocks before it give; then the block runs compensated. One block's
    moments, an fp32 `[in, in]` a layer, are alive at a time, and the hidden states of all batches. :math:`\hat W` of a
    quantised layer is the weight that it dequantises to.

    The result is a `LoraConfig` adapter with `lora_alpha = r`, of which nothing is merged: saved, it loads beside the
    compressed model with peft alone, to be served or tuned further. Merging would fill a pruned base's zeros, and
    quantising again would throw it away. Directions beyond the error's own rank start as LoRA's do (B = 0).

    Args:
        model: the compressed model of transformers, pruned, quantised or both; it is wrapped, as by `get_peft_model`.
        reference: the dense model, its folder or safetensors file, or its state dict; weights are read one block at a
            time.
        dataloader: batches as the model takes them (64 sequences in the paper, of the task where there is one).
        rank: r of every layer, at most the smaller side of its weight (128 in the paper's tables).
        rank_pattern: other ranks, by names or patterns as in `LoraConfig`.
        average: "mean" of all tokens' :math:`x x^\top`; "running": as the official code,
            :math:`S \leftarrow \frac{N}{N+b} S + \frac1N \sum x x^\top` over batches of `b` sequences, which later
            batches dominate (by 1 / 0.38 over 64).
        target_modules, exclude_modules: as in a peft config; embeddings and heads stay out.
        task_type, adapter_name: of the adapter.
        show_progress: whether a bar shows on stderr.

    Raises:
        ValueError: an option out of range; a model with adapters, experts in 3-D parameters, weights that cannot be
            read, blocks that run twice in a pass or do not feed one another; a reference without one of the layers, of
            other shapes, not finite, or equal to the model; data that is missing or not finite. The model is as it was.
        TypeError: a batch that is no mapping.
    """
    layers = prunable_layers(model, target_modules, exclude_modules)
    _refuse(model, layers, average)
    config = _config(layers, rank, rank_pattern, task_type)
    original = ReferenceWeights(reference, model, layers)
    blocks = blocks_of(model, layers)
    walk = _Walk({layer.name: _rank_of(config, layer.name) for layer in layers}, original, average == "running")
    try:
        with evaluating(model):
            inputs = collect(model, blocks, dataloader, layers[0].module.weight.device)
            for number, block in enumerate(tqdm(blocks, desc="EoRA", unit="block", disable=not show_progress)):
                walk.compensate(block, inputs)
                if number + 1 < len(blocks):
                    inputs.hidden = [inputs.call(block, at) for at in range(len(inputs.hidden))]
    finally:
        walk.remove()
    if not any(walk.before.values()):
        raise ValueError(
            "model and reference have equal weights, so there is nothing to make up for. Pass the compressed model "
            "first, and the dense one that it was made of as reference."
        )
    adapted = get_peft_model(model, config, adapter_name)
    for name, (B, A) in walk.factors.items():
        layer = adapted.get_submodule(f"base_model.model.{name}")
        # Where the error has fewer directions than r, the rest stays as peft started it, and can train.
        layer.lora_A[adapter_name].weight[: len(A)].copy_(A)
        layer.lora_B[adapter_name].weight[:, : len(A)].copy_(B)
    return Compensation(adapted, walk.before, walk.after)


class _Walk:
    """Corrections block by block, added to the layers' outputs until `remove`."""

    def __init__(self, ranks: dict[str, int], original: ReferenceWeights, running: bool) -> None:
        self.ranks, self.original, self.running = ranks, original, running
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self._hooks: list[Any] = []

    def compensate(self, block: Block, inputs: Any) -> None:
        """Find and add the corrections of one block's layers."""
        weights = {layer.name: self.original.get(layer) for layer in block.layers}
        with with_weights(block.layers, weights):
            read = block_statistics(block, inputs, frozenset({HESSIAN}), running=self.running)
        moment, eigenspace = None, None
        for layer in block.layers:
            own = read.pop(layer.name).hessian()
            if moment is None or not torch.equal(own, moment):  # queries, keys and values read the same inputs
                moment, eigenspace = own, _eigenspace(own)
            self._add(layer, weights.pop(layer.name), moment, eigenspace)

    def _add(self, layer: PrunableLayer, weight: Tensor, moment: Tensor, eigenspace: tuple[Tensor, Tensor]) -> None:
        compressed = layer.weight()
        if not compressed.isfinite().all():
            raise ValueError(f"The weight of '{layer.name}' is not finite: load the compressed model again.")
        wide = weight.double()
        with autocast_off(weight.device.type):
            found = _correction(wide - compressed.double(), *eigenspace, self.ranks[layer.name])
            size = float(((wide @ moment.double()) * wide).sum())
        self.before[layer.name], self.after[layer.name] = (
            (max(part, 0.0) / size) ** 0.5 if size > 0 else 0.0 for part in (found.before, found.after)
        )
        B, A = self.factors[layer.name] = (found.B.float(), found.A.float())
        self._hooks.append(layer.module.register_forward_hook(partial(_add_product, A, B)))

    def remove(self) -> None:
        """Take the corrections off again."""
        for hook in self._hooks:
            hook.remove()


def _add_product(A: Tensor, B: Tensor, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    with autocast_off(output.device.type):
        return (output + (args[0].float() @ A.T) @ B.T).to(output.dtype)


def _config(
    layers: list[PrunableLayer], rank: int, rank_pattern: Mapping[str, int] | None, task_type: str | None
) -> LoraConfig:
    for name, value in {
        "rank": rank,
        **{f"rank_pattern[{key!r}]": r for key, r in (rank_pattern or {}).items()},
    }.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is no rank: it takes whole numbers from 1.")
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", use_rslora=False, task_type=task_type,
        target_modules=[layer.name for layer in layers], rank_pattern=dict(rank_pattern or {}),
        fan_in_fan_out=any(isinstance(layer.module, Conv1D) for layer in layers),
    )  # fmt: skip
    ranks = {layer.name: min(_rank_of(config, layer.name), layer.grid.rows, layer.grid.cols) for layer in layers}
    others = {f"^{name}": r for name, r in ranks.items() if r != rank}
    config.rank_pattern, config.alpha_pattern = dict(others), dict(others)  # a product as it is: the scaling is 1
    return config


def _rank_of(config: LoraConfig, name: str) -> int:
    return config.rank_pattern.get(pattern_key(config.rank_pattern, name, "rank_pattern"), config.r)


def _refuse(model: nn.Module, layers: list[PrunableLayer], average: str) -> None:
    """Refuse what cannot be read or adapted, before anything is touched."""
    if average not in ("mean", "running"):
        raise ValueError(f"average={average!r} is unknown; choose 'mean' or 'running'.")
    if hasattr(model, "peft_config"):
        raise ValueError("The model has adapters. Merge or unload them first, or compensate before they are added.")
    experts = [f"{name}.{own}" for name, module in model.named_modules() for own, _ in expert_parameters(name, module)]
    if experts:
        raise ValueError(
            f"Experts in 3-D parameters, such as '{experts[0]}', get no correction here, and most of the model's error "
            "would stay. Models whose experts are linear layers can be compensated."
        )
    for layer in layers:
        if layer.module.weight.is_meta:
            raise ValueError(
                f"The weight of '{layer.name}' is on the meta device: load the model whole, without offload."
            )
        if layer.backend is None:
            check_own_weight(layer)
            continue
        keep_4bit_weight_stable(layer.module)
    for layer in {type(layer.backend): layer for layer in layers if layer.backend is not None}.values():
        try:
            layer.weight()
        except (TypeError, NotImplementedError) as error:
            raise ValueError(
                f"'{layer.name}' is quantised as {layer.backend.backend_name}, whose weights cannot be read back. Name "
                "such layers in exclude_modules, or quantise with bitsandbytes."
            ) from error
