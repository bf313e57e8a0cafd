"""The unit spaces of a sparse + low-rank layer: the units of its support, the components of its low-rank half."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...rules import ComponentSpace, ExpertDraw, UnitSpace
from ...rules.space import zeroed
from ...sparsity import Pattern, UnitGrid
from ...utils.tensors import whole
from .factors import drawn_expert, forward_factors
from .subnet_spaces import SubnetColumns, SubnetRows, WeightSpace


@dataclass(frozen=True)
class SupportSpace(WeightSpace):
    """Entries, blocks, rows, columns or diagonal blocks of one weight: the support of one adapter."""

    kind: ClassVar[str] = "support"

    @property
    def grid(self) -> UnitGrid:
        """How the weight is cut into units."""
        return self.layer.sparse_lora_grid[self.adapter]

    @property
    def values(self) -> nn.Parameter:
        """Values of the support, living units first."""
        return self.layer.sparse_lora_values[self.adapter]

    @property
    def size(self) -> int:
        """Units of the weight."""
        return self.grid.num_units

    @property
    def capacity(self) -> int:
        """Units that values and support have room for."""
        return self.values.shape[0]

    @property
    def unit(self) -> str:
        """The granularity: "entry", "block", "row", "column" or "diagonal"."""
        return self.grid.granularity

    @property
    def unit_numel(self) -> int:
        """Entries of a unit, with those of a diagonal's padding."""
        return self.grid.unit_numel

    unit_entries = unit_numel

    @property
    def alive_entries(self) -> int:
        """Entries of the weight that the living units are, without padding."""
        padding = self.grid.padding
        if padding and not (self.alive() == self.grid.num_units - 1).any():
            padding = 0
        return self.count * self.unit_entries - padding

    @property
    def initial(self) -> int:
        """Units of the first support; there may be room for more."""
        return self.layer.sizes[self.adapter].units

    @property
    def pattern(self) -> Pattern | None:
        """The shape in which the units lie."""
        return self.layer.pattern_on_weight(self.adapter)

    def alive(self) -> Tensor:
        """Living units, sorted; `values[:a]` belong to them."""
        return self.layer.units(self.adapter)

    def version(self) -> Hashable:
        """Identity and version of the buffer that holds the units."""
        codes = self.layer.sparse_lora_support[self.adapter]
        return id(codes), 0 if codes.is_inference() else codes._version

    def gather(self, dense: Tensor) -> Tensor:
        """`[a, ...]` as the values are, in `dense`'s dtype."""
        return self.grid.gather(dense, self.alive())

    def parameters(self) -> list[nn.Parameter]:
        """The values."""
        return [self.values]

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """The values."""
        return {"values": (self.values, 0)}

    def largest_entries(self) -> Tensor:
        """`[a]` fp32: the largest |value| of each unit, as it is in the update."""
        return self.living_values().float().abs().unsqueeze(1).flatten(1).amax(1) * abs(self.scaling)

    @contextmanager
    def without(self, units: Tensor) -> Iterator[None]:
        """Their values are 0 inside."""
        with zeroed(self.values, units.nonzero().squeeze(1)):
            yield

    def write(self, units: Tensor) -> None:
        """Make `units` the support."""
        self.layer.write_support(self.adapter, units)

    # The start

    def is_random_start(self) -> bool:
        """Whether the support is the random draw that injection made, not one that was chosen, loaded or moved."""
        return self.layer.is_random_start(self.adapter)

    def has_first_values(self) -> bool:
        """Whether the values are those of injection."""
        return self.layer.has_first_values(self.adapter)

    # Frozen units: excluded from the update, still part of the weight

    @property
    def frozen(self) -> Tensor | None:
        """uint8 `[capacity]`, 1 where a living unit is frozen; None where no rule freezes units."""
        return self.state().get("frozen")

    def trained(self) -> Tensor:
        """Bool `[a]`: which living units are updated, that is, are not frozen."""
        count, frozen = self.count, self.frozen
        if frozen is None:
            return torch.ones(count, dtype=torch.bool, device=self.values.device)
        return frozen[:count] == 0

    def trained_units(self) -> Tensor:
        """Units that are updated, sorted."""
        return self.alive()[self.trained()]

    # Weights

    def living_values(self) -> Tensor:
        """Values of the living units, `[a, ...]`, detached; gathered where ranks hold a shard each (`whole`)."""
        return whole(self.values.detach())[: self.count]

    @property
    def scaling(self) -> float:
        """What a value is multiplied by in the update."""
        return self.layer.sparse_lora_support_scaling[self.adapter]


@dataclass(frozen=True)
class RankSpace(ComponentSpace):
    """Components of the low-rank half: component i is row i of `A`, column i of `B` and number i of the gate."""

    @property
    def size(self) -> int:
        """Components that there is room for."""
        return self.layer.sizes[self.adapter].rank

    capacity = size

    @property
    def unit_numel(self) -> int:
        """Numbers of a component: its row of `A`, its column of `B`, its gate."""
        return self.layer.in_features + self.layer.out_features + (self.gate is not None)

    @property
    def A(self) -> nn.Parameter:
        """`[r, in]`."""
        return self.layer.sparse_lora_A[self.adapter]

    @property
    def B(self) -> nn.Parameter:
        """`[out, r]`."""
        return self.layer.sparse_lora_B[self.adapter]

    @property
    def gate(self) -> nn.Parameter | None:
        """`[r]`, or None without one."""
        return self.layer.sparse_lora_gate.get(self.adapter)

    @property
    def scalings(self) -> dict[str, float]:
        """The layer's own dictionary, adapter -> what `B A` is multiplied by."""
        return self.layer.sparse_lora_scaling

    @property
    def scale(self) -> float:
        """What `B diag(g) A` is multiplied by."""
        return self.scalings[self.adapter]

    @property
    def mask(self) -> Tensor:
        """uint8 `[r]`: which components live; all of them where there is no gate."""
        held = self.layer.sparse_lora_rank_mask
        return held[self.adapter] if self.adapter in held else torch.ones(self.size, dtype=torch.uint8)

    def alive(self) -> Tensor:
        """Living components, sorted."""
        return self.mask.nonzero().squeeze(1)

    @property
    def count(self) -> int:
        """Living components."""
        return self.layer.alive_components(self.adapter)

    def write(self, units: Tensor) -> None:
        """Let the components `units` live: the others' gates are zero from now on, in place, and their mask is 0.

        Raises:
            ValueError: without a gate no component can die.
        """
        if self.gate is None:
            raise ValueError(f"The components of '{self.name}' have no gate, so that none can be switched off.")
        mask = torch.zeros_like(self.mask)
        mask[units.long()] = 1
        self.mask.copy_(mask)
        self.apply_mask()

    # What a step uses, where that is not what evaluation and files use (`Run.for_this_step`)

    def delta(self) -> Tensor:
        r"""The update :math:`s B \mathrm{diag}(g) A` `[out, in]` of these components, as it is now."""
        return self.scaled_columns(self.B) @ self.A

    def scaled_columns(self, B: Tensor) -> Tensor:
        r""":math:`s B \mathrm{diag}(g)` of a tensor in the shape of the factor `B`."""
        gate = 1.0 if self.gate is None else self.gate
        return B * (gate * self.scalings[self.adapter])

    def scaled_factors(self) -> tuple[Tensor, Tensor]:
        r""":math:`s B' \mathrm{diag}(g)` `[out, k]` and :math:`A'` `[k, in]` of a forward pass (`factors.py`),
        differentiable in the parameters."""
        A, B = forward_factors(self.layer, self.adapter)
        return self.scaled_columns(B), A

    @contextmanager
    def leading(self, count: int, rescaled: bool = True) -> Iterator[None]:
        r"""Inside, the first `b = count` components alone (all that live, where there are fewer), if `rescaled` scaled
        by R / b with R living ones: by :math:`\alpha/b`, as a LoRA of that rank, while all live. The gate, which must
        not train meanwhile, is put back."""
        before = self.gate.detach().clone()
        self._cut(count, rescaled)
        try:
            yield
        finally:
            self.gate.data.copy_(before)

    @torch.no_grad()
    def truncate(self, count: int, rescaled: bool = True) -> None:
        """Let the first `count` of the living components alone live, scaled as in `leading`."""
        self._cut(count, rescaled)
        self.write(self.alive()[:count])

    @torch.no_grad()
    def _cut(self, count: int, rescaled: bool) -> None:
        alive = self.alive()
        if rescaled and 0 < count < alive.numel():
            self.gate.data.mul_(alive.numel() / count)
        self.gate.data[alive[count:]] = 0.0

    def entering(self, count: int) -> Tensor:
        """Bool `[r]`: the first `count` components that do not live."""
        dead = self.mask == 0
        return dead & (dead.cumsum(0) <= count)

    @contextmanager
    def scaled_by_rank(self, reserve: Tensor, reserve_gate: float, epsilon: float = 0.0) -> Iterator[None]:
        r"""Inside, the update is :math:`\frac{\alpha}{R + \epsilon} B\,\mathrm{diag}(E) A` with `R` living components,
        and the gate is `E`, which may train; components of `reserve` (bool `[r]`), which do not live, have
        `reserve_gate`. Outside, the update is that of the living ones in the config's scaling by `r`: on leaving, the
        gate is scaled by the rank of then, and zero for all others."""
        scaling = self.scalings[self.adapter]
        ratio = self.size / (self.count + epsilon)
        self.scalings[self.adapter] = scaling * ratio
        self.gate.data.div_(ratio)
        self.gate.data[reserve] = reserve_gate
        try:
            yield
        finally:
            self.scalings[self.adapter] = scaling
            self.apply_mask()
            self.gate.data.mul_(self.size / (self.count + epsilon))

    # Experts of split factors

    def split_factors(self) -> list[tuple[str, nn.Parameter]]:
        """Names ("A", "B") and parameters of the factors that are split over experts."""
        return [(name, p) for name, p in (("A", self.A), ("B", self.B)) if self.expert_map(name) is not None]

    def expert_map(self, factor: str) -> Tensor | None:
        """uint8, of the factor's shape: the expert of every entry; None where it is not split."""
        owners = getattr(self.layer, f"sparse_lora_{factor}_map")
        split = self.layer.has_experts(self.adapter) and self.adapter in owners
        return owners[self.adapter] if split else None

    def drawn_expert(self, factor: str, draw: tuple[int, int, int]) -> int:
        """The expert that a factor uses at `draw` (step, micro-batch, pass)."""
        return drawn_expert(self.layer, self.adapter, factor, draw)

    def draw_experts(self, draw: ExpertDraw | None) -> None:
        """Let training passes use the experts of `draw` from now on; None: the merge."""
        if draw is None:
            self.layer.expert_draws.pop(self.adapter, None)
        else:
            self.layer.expert_draws[self.adapter] = draw

    def check_needs(self, needs: frozenset[str]) -> None:
        """Raises `ValueError` where a rule needs a gate, or split factors, that the layer does not have."""
        if "experts" in needs and not self.layer.has_experts(self.adapter):
            raise ValueError(
                f"The factors of '{self.name}' are not split over experts. Set "
                "factor_masks=FactorMaskConfig(kind='stochastic') in the config."
            )
        if "gate" in needs and self.gate is None:
            raise ValueError(
                f"The components of '{self.name}' have no gate, so that none can be switched off. Name the rule in the "
                "config's schedule, or set gate='zeros' in the config."
            )

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Zero the gates of components that do not live; an optimizer may have moved them."""
        self.gate.data.mul_(self.mask)


def spaces_of(layer: Any, adapter: str) -> list[UnitSpace]:
    """The spaces of one adapter of a sparse + low-rank layer."""
    found: list[UnitSpace] = []
    if adapter in layer.sparse_lora_values:
        found.append(SupportSpace(layer, adapter))
    if adapter in layer.sparse_lora_subnet:
        found += [SubnetRows(layer, adapter), SubnetColumns(layer, adapter)]
    if adapter in layer.sparse_lora_A:
        found.append(RankSpace(layer, adapter))
    return found
