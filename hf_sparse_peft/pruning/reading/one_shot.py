"""A model without its smallest weights, for as long as a block runs: one-shot pruning that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _get_in_out_features
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...sparsity import (
    UnitGrid,
    erdos_renyi_counts,
    pack_bits,
    stream_seed,
    top_units,
    unpack_bits,
)
from ...sparsity.scores import Magnitude, Random
from ...sparsity.selection import Source, count_selected, find_cut, tie_priority
from ...tuners.shared import AdapterConfig
from ...tuners.shared.base_weight import dense_weight, keep_4bit_weight_stable
from ...tuners.shared.layer import is_supported
from ...tuners.shared.quantised import backend_of
from ...tuners.shared.rollback import uninterrupted
from ...tuners.shared.target_checks import target_layers

SCOPES = ("global", "layer", "random", "erdos_renyi", "n:m")
# Linear layers inside the trunk that belong to the output all the same.
_OUTPUT_PARTS = ("pooler",)


@dataclass(frozen=True)
class PrunableLayer:
    """A linear layer of the trunk, dense or quantised."""

    name: str
    module: nn.Module
    backend: Any
    """peft's access to a quantised weight; None: dense."""

    @property
    def grid(self) -> UnitGrid:
        """The weight's entries, `[out, in]`."""
        cols, rows = _get_in_out_features(self.module)
        return UnitGrid(rows, cols, "entry")

    def weight(self) -> Tensor:
        """The weight as `[out, in]`: the layer's own memory where it is dense, a fresh dense copy where it is not."""
        return dense_weight(self.module, self.backend)


def prunable_layers(
    model: nn.Module, target_modules: Any = "all-linear", exclude_modules: Any = None, *, required: bool = True
) -> list[PrunableLayer]:
    """The linear layers of a model's trunk (attention and feed-forward); embeddings, pooler and heads are left out.

    Raises:
        ValueError: nothing matches, and something is `required`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk = getattr(base, "base_model", base)
    inside = {id(module) for module in trunk.modules()}
    config = AdapterConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    found = []
    for name, module in target_layers(config, base, BaseTuner._check_target_module_exists).items():
        if id(module) not in inside or set(name.split(".")) & set(_OUTPUT_PARTS):
            continue
        backend = backend_of(module, **get_quantization_kwargs(base))
        if is_supported(module, backend):
            found.append(PrunableLayer(name, module, backend))
    if not found and required:
        raise ValueError(
            f"target_modules={target_modules!r} matches no linear layer of the model's trunk. Name modules as peft "
            "does, or take 'all-linear'."
        )
    return found


@contextmanager
def one_shot_pruned(
    model: nn.Module,
    sparsity: float,
    scope: str = "global",
    *,
    group: int = 4,
    seed: int = 0,
    target_modules: Any = "all-linear",
    exclude_modules: Any = None,
) -> Iterator[dict[str, float]]:
    """Inside, the fraction `sparsity` of the trunk's linear weights is zero; afterwards every bit is back.

    Which go (Jaiswal et al., 2023): `global` the smallest |w| of all matrices together, exactly
    `floor(sparsity * entries)` of them, ties drawn for from `seed`; `layer` the smallest of each matrix;
    `random` any, over all matrices; `erdos_renyi` any, with densities by Erdos-Renyi; `n:m` the
    smallest of every `group` neighbours along the inputs. A larger sparsity removes what a smaller one does, and more.

    No weight is written to. Dense layers hold a pruned copy of their weight inside, as many bytes once more; 4-bit and
    other quantised layers compute with a dense copy of theirs, made anew in each forward, zeroed and thrown away, and
    keep a bit an entry. At sparsity 0 nothing is touched.

    Yields: fraction of zeroed entries by module name.

    Raises:
        ValueError: sparsity or scope out of range, `n:m` that does not fit, nothing to prune, or a parametrized weight.
    """
    layers = prunable_layers(model, target_modules, exclude_modules)
    masks = pruning_masks(layers, sparsity, scope, group=group, seed=seed)
    undo: list[Callable[[], None]] = []
    try:
        for layer in layers if sparsity else ():
            with uninterrupted():  # what is pruned is known to the code that undoes it
                undo.append((_hold_pruned_copy if layer.backend is None else _compute_pruned)(layer, masks[layer.name]))
        yield {layer.name: set_fraction(masks[layer.name], layer.grid) for layer in layers}
    finally:
        with uninterrupted():
            for bring_back in undo:
                bring_back()


@torch.no_grad()
def pruning_masks(
    layers: list[PrunableLayer], sparsity: float, scope: str = "global", *, group: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """What one-shot pruning removes from each layer, as packed bits (`sparsity.unpack_bits`), one dense weight at a
    time.

    Raises: as `one_shot_pruned`.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; choose one of {list(SCOPES)}.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is not a fraction in [0, 1): it is how much of the weights is removed.")
    for layer in layers:  # a forward without gradients repacks 4-bit weights on a CPU, and rounds their scales
        keep_4bit_weight_stable(layer.module)
    if scope == "n:m":
        return {layer.name: pack_bits(_smallest_of_group(layer, sparsity, group, seed)) for layer in layers}
    scores = {layer.name: _scores(layer, scope, seed) for layer in layers}
    sources = {name: Source(name, chunks, stream_seed(seed, name)) for name, chunks in scores.items()}
    counts = _counts(layers, sources, sparsity, scope, seed)
    return {layer.name: pack_bits(_mask(layer, sources[layer.name], counts[layer.name])) for layer in layers}


def check_own_weight(layer: PrunableLayer) -> None:
    """Raises `ValueError` where a dense layer's weight is no parameter of its own."""
    if layer.module._parameters.get("weight") is None:
        raise ValueError(
            f"The weight of '{layer.name}' is computed at each forward (a parametrization), so it cannot be pruned. "
            "Call torch.nn.utils.parametrize.remove_parametrizations first, or exclude the module."
        )


def set_fraction(packed: Tensor, grid: UnitGrid) -> float:
    """Fraction of set bits in a layer's mask."""
    return int(unpack_bits(packed, grid.num_units).sum()) / grid.num_units


def _scores(layer: PrunableLayer, scope: str, seed: int) -> Callable[[], Iterable[Tensor]]:
    """Score chunks, the smallest first to go; computed anew at each pass: one dense weight is alive at a time."""
    if scope in ("random", "erdos_renyi"):
        generator = torch.Generator().manual_seed(stream_seed(seed, layer.name))
        return Random()(None, layer.grid, generator)
    return lambda: Magnitude()(layer.weight(), layer.grid)()


def _counts(
    layers: list[PrunableLayer], sources: dict[str, Source], sparsity: float, scope: str, seed: int
) -> dict[str, int]:
    sizes = {layer.name: layer.grid.num_units for layer in layers}
    if not sparsity:
        return dict.fromkeys(sizes, 0)
    if scope == "layer":
        return {name: round(sparsity * size) for name, size in sizes.items()}
    if scope == "erdos_renyi":
        kept = erdos_renyi_counts({layer.name: layer.grid for layer in layers}, 1 - sparsity, seed)
        return {name: size - kept[name] for name, size in sizes.items()}
    cut = find_cut(list(sources.values()), round(sparsity * sum(sizes.values())), largest=False)
    return {name: count_selected(source, cut, largest=False)[0] for name, source in sources.items()}


def _mask(layer: PrunableLayer, source: Source, count: int) -> Tensor:
    units = top_units(source.chunks, count, largest=False, seed=source.seed).long()
    mask = torch.zeros(layer.grid.num_units, dtype=torch.bool, device=units.device)
    mask[units] = True
    return mask


def _smallest_of_group(layer: PrunableLayer, sparsity: float, group: int, seed: int) -> Tensor:
    gone = round(sparsity * group)
    if group < 2 or abs(gone - sparsity * group) > 1e-6:
        raise ValueError(
            f"sparsity={sparsity} removes {sparsity * group:g} of every {group} neighbours, and scope='n:m' removes "
            f"whole ones. Choose multiples of 1/{group}, or another group."
        )
    if layer.grid.cols % group:
        raise ValueError(
            f"scope='n:m': groups of {group} do not divide the {layer.grid.cols} inputs of '{layer.name}'. Choose "
            "another group, or exclude the module."
        )
    weight = layer.weight()
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    rows = max(1, (1 << 20) // layer.grid.cols)
    for begin in range(0, layer.grid.rows if gone else 0, rows):
        part = weight[begin : begin + rows].float().abs().reshape(-1, group)
        # By priority first: the stable sort by magnitude leaves equal weights in that order.
        units = torch.arange(part.numel(), device=part.device) + begin * layer.grid.cols
        drawn = tie_priority(stream_seed(seed, layer.name), units).view_as(part).argsort(dim=1)
        order = drawn.gather(1, part.gather(1, drawn).argsort(dim=1, stable=True))[:, :gone]
        mask[begin : begin + rows].view(-1, group).scatter_(1, order, True)
    return mask


@torch.no_grad()
def _hold_pruned_copy(layer: PrunableLayer, packed: Tensor) -> Callable[[], None]:
    module, kept = layer.module, layer.module.weight
    check_own_weight(layer)
    mask = unpack_bits(packed.to(kept.device), layer.grid.num_units).view(layer.weight().shape)
    mask = mask.t() if isinstance(module, Conv1D) else mask
    module.weight = nn.Parameter(kept.masked_fill(mask, 0), requires_grad=kept.requires_grad)

    def bring_back() -> None:
        module.weight = kept

    return bring_back


def _compute_pruned(layer: PrunableLayer, packed: Tensor) -> Callable[[], None]:
    had = layer.module.__dict__.get("forward")
    # An attribute of the instance: adapters above see that the base must compute by itself.
    layer.module.forward = partial(_dense_forward, layer, packed)

    def bring_back() -> None:
        if had is None:
            del layer.module.forward
        else:
            layer.module.forward = had

    return bring_back


def _dense_forward(layer: PrunableLayer, packed: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dtype = getattr(layer.module, "compute_dtype", None) or x.dtype
    weight = layer.weight().to(dtype)
    mask = unpack_bits(packed.to(weight.device), layer.grid.num_units).view(weight.shape)
    bias = layer.module.bias
    weight = weight.masked_fill(mask, 0)
    return nn.functional.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)
