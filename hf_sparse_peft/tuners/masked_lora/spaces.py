"""The unit space of a mask: the entries of the weight that live."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rules import UnitSpace
from ...sparsity import UnitGrid, pack_bits
from .weight import masked


@dataclass(frozen=True)
class MaskSpace(UnitSpace):
    """Entries of one weight under a mask: a unit is an entry, and every one may leave and return.

    Bits are all that is stored of them; indices exist while a move lasts. Where the masking computes its mask, the
    space is `counted`: rules say how many entries live.
    """

    kind: ClassVar[str] = "mask"
    unit: ClassVar[str] = "entry"
    packed: ClassVar[bool] = False
    unit_entries: ClassVar[int] = 1
    frozen: ClassVar[None] = None

    @property
    def counted(self) -> bool:
        """Whether the masking computes which entries live."""
        return self.config.masking.computes_mask

    @property
    def grid(self) -> UnitGrid:
        """Single entries."""
        return UnitGrid(*self.weight_shape, "entry")

    @property
    def size(self) -> int:
        """Entries of the weight."""
        rows, cols = self.weight_shape
        return rows * cols

    capacity = size

    @property
    def unit_numel(self) -> int:
        """Trained numbers of an entry: 1 where each has its own, 0 where all depend on the same factors."""
        return int(any(tuple(p.shape) == self.weight_shape for p in self.parameters()))

    @property
    def alive_entries(self) -> int:
        """Living entries."""
        return self.count

    @property
    def pattern(self) -> Any:
        """The shape in which living entries lie."""
        return self.config.known_pattern

    @property
    def count(self) -> int:
        """Living entries; no index of one is made."""
        if self.counted:
            return int(self.layer.masked_lora_count[self.adapter])
        return count_bits(self.bits)

    @property
    def initial(self) -> int:
        """Entries that the mask began with are not recorded: all that there are."""
        return self.capacity

    def alive(self) -> Tensor:
        """Flat positions of the living entries, sorted, of the grid's dtype."""
        return self.layer.kept(self.adapter).view(-1).nonzero().squeeze(1).to(self.grid.index_dtype)

    def trained(self) -> Tensor:
        """Bool `[a]`: all living entries are updated."""
        return torch.ones(self.count, dtype=torch.bool, device=self.device)

    @property
    def values(self) -> Tensor:
        """What a dense gradient of the weight lies beside: the mask itself, for its device."""
        return self.layer.masked_lora_count[self.adapter] if self.counted else self.bits

    def trained_units(self) -> Tensor:
        """The living entries."""
        return self.alive()

    def version(self) -> Hashable | None:
        """Identity and version of the bits; None where the mask is computed."""
        if self.counted:
            return None
        bits = self.layer.masked_lora_mask[self.adapter]
        return id(bits), 0 if bits.is_inference() else bits._version

    @property
    def device(self) -> torch.device:
        """Where the mask lies."""
        held = self.layer.masked_lora_count if self.counted else self.layer.masked_lora_mask
        return held[self.adapter].device

    def gather(self, dense: Tensor) -> Tensor:
        """`[a]`, in `dense`'s dtype."""
        return dense[self.layer.kept(self.adapter)]

    # Weights

    @torch.no_grad()
    def current_weight(self, of: Literal["merged", "base"] = "merged") -> Tensor:
        """V = W + D `[out, in]` of all entries, removed ones too, or W alone; fp32 or wider, not to be written to."""
        weight = self.layer.masked_weight(self.adapter)
        return weight.dense if of == "merged" else weight.base

    def base_weight(self) -> Tensor:
        """W `[out, in]`, dequantised if need be; not to be written to."""
        return self.layer.dense_base_weight()

    def living_values(self, of: Literal["merged", "base"] = "merged") -> Tensor:
        """V, or W, of the living entries, `[a]`."""
        return self.gather(self.current_weight(of))

    @torch.no_grad()
    def add_l1_gradient(self, of: Literal["weights", "update"], weight: float) -> None:
        r"""Add, to what the update's parameters have of a gradient, that of :math:`w \sum |M \odot V|`, or of
        :math:`w \sum |M \odot D|`; parameters without one stay so."""
        read = self.layer.masked_weight(self.adapter)
        pulled = read.dense if of == "weights" else read.delta
        if read.delta is None or pulled is None:
            return
        signs = masked(pulled.sign(), read.config.masking.mask(read)) * weight
        held = self.layer.own_tensors(self.adapter)
        for name, gradient in read.config.update.gradients(read, signs).items():
            if held[name].grad is not None:
                held[name].grad.add_(gradient)

    def largest_entries(self) -> Tensor:
        """`[a]` fp32: |V| of the living entries."""
        return self.living_values().float().abs()

    @contextmanager
    def without(self, units: Tensor) -> Iterator[None]:
        """Their bits are 0 inside.

        Raises:
            ValueError: the masking computes its mask.
        """
        if self.counted:
            raise ValueError(f"The mask of '{self.name}' is computed in every pass: no entry can be left out of it.")
        before = self.bits.clone()
        self.write(self.alive()[~units.to(self.device)])
        try:
            yield
        finally:
            self.write_bits(before)

    # What a rule does with dense tensors of the weight's shape

    def dense_change(self) -> nn.Parameter:
        """The trained matrix `[out, in]` that is added to the base.

        Raises:
            ValueError: the update is of another form.
        """
        found = self.layer.own_tensors(self.adapter).get("delta")
        if not isinstance(found, nn.Parameter) or tuple(found.shape) != self.weight_shape:
            raise ValueError(
                f"update={self.config.update} has no trained matrix of the shape of '{self.name}'. Set "
                "update=DenseUpdate() or ScaledDenseUpdate()."
            )
        return found

    @torch.no_grad()
    def add_gradient(self, gradient: Tensor, scale: float = 1.0) -> None:
        """Add, to what the update's parameters have of a gradient, that of `scale * gradient` `[out, in]` as the
        gradient of D; parameters without one stay so."""
        weight = self.layer.masked_weight(self.adapter)
        self._accumulate(weight.config.update.gradients(weight, gradient * scale))

    def scores(self) -> Tensor | None:
        """The trained scores of the entries `[out, in]` (`ScoredMask`), or None without any."""
        tensors = self.layer.own_tensors(self.adapter)
        return self.config.masking.scores(tensors).detach() if "scores" in tensors else None

    @torch.no_grad()
    def add_score_gradient(self, gradient: Tensor, scale: float = 1.0) -> None:
        """As `add_gradient`, for the scores."""
        tensors = self.layer.own_tensors(self.adapter)
        self._accumulate(self.config.masking.score_gradients(tensors, gradient * scale))

    def drop_scores(self) -> None:
        """Delete what only training needs: the mask stays as it is."""
        self.layer.resize(self.adapter, "shipped")

    def _accumulate(self, gradients: dict[str, Tensor]) -> None:
        tensors = self.layer.own_tensors(self.adapter)
        for name, gradient in gradients.items():
            if tensors[name].grad is not None:
                tensors[name].grad.add_(gradient)

    # Parameters

    def parameters(self) -> list[nn.Parameter]:
        """Those of the update and the masking: every entry depends on them."""
        return self.layer.trained_parameters(self.adapter)

    @property
    def trains(self) -> bool:
        """Whether the space takes part in the current step; with nothing trained, always."""
        return super().trains or not self.parameters()

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """The parameters, whose numbers belong to all entries."""
        held = self.layer.own_tensors(self.adapter)
        return {name: (one, None) for name, one in held.items() if isinstance(one, nn.Parameter)}

    def followers(self) -> list:
        """None: an entry has its own place in every tensor of the weight's shape."""
        return []

    def parameter_axes(self) -> list[tuple[nn.Parameter, int]]:
        """None of them has an axis of single entries."""
        return []

    # Moves

    @property
    def numbers(self) -> dict[str, float]:
        """Numbers for the passes of a step, by name, that the masking reads (`MaskedWeight.numbers`). The rule that
        sets one takes it off again (`Run.for_this_step`); nothing of them is saved."""
        return self.layer.masked_lora_numbers.setdefault(self.adapter, {})

    @property
    def bits(self) -> Tensor:
        """The bits of the mask, uint8 `[ceil(out * in / 8)]`; not to be written to."""
        return self.layer.mask_bits(self.adapter)

    def write_bits(self, bits: Tensor) -> None:
        """Let the entries live whose bit is set, as `sparsity.pack_bits` packs them."""
        self.layer.keep(self.adapter, bits)

    def write_input_bits(self, bits: Tensor | None) -> None:
        """Let the gradient of the input go through the weight under this mask instead, until it is taken off (None):
        like `numbers`, for the passes of a step, and saved nowhere."""
        if bits is None:
            self.layer.masked_lora_input_mask.pop(self.adapter, None)
        else:
            self.layer.masked_lora_input_mask[self.adapter] = bits

    def write(self, units: Tensor) -> None:
        """Let the entries `units` live, or as many as they are, where the masking computes which."""
        if self.counted:
            self.resize(units.numel())
            return
        kept = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        kept[units.long().to(self.device)] = True
        self.layer.keep(self.adapter, pack_bits(kept))

    def resize(self, count: int) -> None:
        """Let `count` entries live from now on, where the masking computes which."""
        if not self.counted:
            super().resize(count)
        if not 0 <= count <= self.size:
            raise ValueError(f"{count} entries cannot live in '{self.name}', which has {self.size}.")
        self.layer.masked_lora_count[self.adapter].fill_(count)

    def is_random_start(self) -> bool:
        """False: a mask is read, given or chosen."""
        return False


_COUNTS = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


def count_bits(bits: Tensor) -> int:
    """How many bits of uint8 `[n]` are set."""
    table = _COUNTS.to(bits.device)
    return sum(int(table[chunk.int()].sum(dtype=torch.int64)) for chunk in bits.split(1 << 22))
