"""How many zeros a model's weights have, counted: as they are, and as they would be with the adapters merged."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from ...utils.tables import Table, table
from .base_weight import dense_weight
from .layer import AdapterLayer, is_supported
from .merge import MergeMixin
from .pieces import BaseMask
from .quantised import backend_of


@dataclass(frozen=True)
class WeightSparsity:
    """The zeros of one weight."""

    name: str
    """Its module's."""
    entries: int
    """Entries of the weight."""
    zeros: int
    """Those that are 0 in the base."""
    merged_zeros: int
    """Those that are 0 once the active adapters are merged, rounded and, on quantised bases, requantised."""
    filled: int = 0
    """Zeros of the base that merging fills."""
    removed: int = 0
    """Entries that are not 0 in the base and that the adapters' masks remove."""

    @property
    def rounded(self) -> int:
        """Entries that merging makes 0 and no mask removes: small sums, on the grid of a quantised base."""
        return self.merged_zeros - (self.zeros - self.filled) - self.removed

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the base."""
        return self.zeros / max(self.entries, 1)

    @property
    def merged_sparsity(self) -> float:
        """Fraction of zeros once merged."""
        return self.merged_zeros / max(self.entries, 1)


@dataclass(frozen=True)
class SparsityReport:
    """The zeros of a model's linear weights."""

    layers: tuple[WeightSparsity, ...]
    """One a weight, in model order."""
    unreadable: tuple[str, ...] = ()
    """Modules whose quantised weight nobody can read."""

    @property
    def total(self) -> WeightSparsity:
        """All of them together."""
        names = ("entries", "zeros", "merged_zeros", "filled", "removed")
        return WeightSparsity("all", *(sum(getattr(one, name) for one in self.layers) for name in names))

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the base."""
        return self.total.sparsity

    @property
    def merged_sparsity(self) -> float:
        """Fraction of zeros once merged."""
        return self.total.merged_sparsity

    def table(self) -> Table:
        """A row a weight, and one for all: fractions of zeros before and after merging, and what merging changes."""
        rows = [
            (one.name, one.entries, one.sparsity, one.merged_sparsity, one.filled, one.removed, one.rounded)
            for one in (*self.layers, self.total)
        ]
        names = ("weight", "entries", "sparsity", "merged", "filled", "removed", "rounded to 0")
        return table(names, rows[:-1], totals=rows[-1])


@torch.no_grad()
def sparsity_report(model: nn.Module) -> SparsityReport:
    """Count the zeros of every linear weight of `model`, adapted or not: nothing is assumed of masks or of the base.

    Layers of this package's adapters are merged one after another to be counted, and put back to the bit. Layers of
    other tuners are counted by their base weight alone.

    Args:
        model: any model, with adapters or without, dense or quantised.
    """
    quantisation, found, unreadable = get_quantization_kwargs(model), [], []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside |= {id(part) for part in module.modules()}
        if isinstance(module, AdapterLayer):
            counted = _of_layer(module)
        else:
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            backend = backend_of(base, **quantisation)
            if not is_supported(base, backend):
                continue
            name = name.removeprefix("base_model.model.")
            counted = None
            if backend is None or getattr(backend, "supports_merge", True):
                counted = _as_it_is(name, dense_weight(base, backend))
        if counted is None:
            unreadable.append(getattr(module, "module_name", name))
        else:
            found.append(counted)
    return SparsityReport(tuple(found), tuple(unreadable))


def _as_it_is(name: str, weight: Tensor) -> WeightSparsity:
    zeros = int((weight == 0).sum())
    return WeightSparsity(name, weight.numel(), zeros, zeros)


def _of_layer(layer: AdapterLayer) -> WeightSparsity | None:
    if not getattr(layer.quantization_backend, "supports_merge", True):
        return None
    if not isinstance(layer, MergeMixin):
        return _as_it_is(layer.module_name, layer.dense_base_weight())
    before = layer.merge_state()
    names = before.merged_adapters or [name for name in layer.active_adapters if layer.holds(name)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that merging rounds is what is counted
            if not before.merged_adapters:
                layer.merge(adapter_names=names)
            merged = layer.dense_base_weight() == 0
            if layer.merged:
                layer.unmerge()
            zeros = layer.dense_base_weight() == 0
            removed = torch.zeros_like(zeros)
            for piece in (piece for name in names if layer.masks_base(name) for piece in layer.pieces(name)):
                if isinstance(piece, BaseMask):
                    removed |= piece.removed(zeros.device)
    finally:
        layer.restore_merge_state(before)
    return WeightSparsity(
        layer.module_name,
        zeros.numel(),
        int(zeros.sum()),
        int(merged.sum()),
        int((zeros & ~merged).sum()),
        int((removed & ~zeros & merged).sum()),
    )
