"""Projections: the part of a matrix' gradient that an optimizer keeps moments for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..sparsity import random_units, stream_seed
from ..utils.option_types import Fraction, PositiveFraction, PositiveInt
from ..utils.parts import Part, register_part

State = Mapping[str, Tensor]
"""The tensors of a subspace, by name; they are part of the optimizer's state."""


@dataclass(frozen=True)
class Projection(Part):
    """Base of what `ProjectedAdamW(projection=...)` takes: a subspace of the matrices `[m, n]` of one parameter, chosen
    anew every so many steps, and the linear maps into it and back.

    A subspace is tensors only (`choose`), which are saved with the optimizer's state.
    """

    part_kind: ClassVar[str] = "projection"
    reads_gradient: ClassVar[bool] = True
    """Whether the choice reads the gradient. It is put off while that is 0."""

    def reduced(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the projected gradient, and so of both moments, of a matrix of `shape`."""
        raise NotImplementedError

    def holds(self, position: int, count: int, period: int, seed: int) -> bool:
        """Whether the parameter at `position` of `count` has moments in this period (from 0) at all."""
        return True

    def choose(self, gradient: Tensor, seed: int) -> dict[str, Tensor]:
        """The subspace for the coming steps, from the gradient `[m, n]` in fp32 or fp64, and a seed."""
        raise NotImplementedError

    def down(self, gradient: Tensor, state: State) -> Tensor:
        """The projected gradient, of shape `reduced`."""
        raise NotImplementedError

    def up(self, small: Tensor, state: State, shape: tuple[int, int]) -> Tensor:
        """`small`, back in the shape of the matrix; `down(up(x)) == x`."""
        raise NotImplementedError

    def kept_axis(self, shape: tuple[int, int]) -> int | None:
        """The axis of the matrix that is not projected, which is one of the small matrix too; None: there is none."""
        return None


@register_part("svd")
@dataclass(frozen=True)
class SVDProjection(Projection):
    r"""The leading singular vectors of the gradient, on its smaller side (GaLore; Zhao et al., 2024):

    .. math:: R = G V_r \;(m \ge n), \qquad R = U_r^\top G \;(m < n), \qquad G = U S V^\top

    The SVD is taken in fp32 (fp64 for fp64 gradients); the vectors are kept in the parameter's dtype. The entry of
    largest magnitude of each vector is positive: moments outlive the basis, so that its signs matter, and no paper
    fixes them. `rank` above the smaller side is that side.
    """

    rank: PositiveInt = 128
    """Rank r of the subspace (paper: 128 to 1024 to pre-train, 4 or 8 to fine-tune)."""
    side: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    """Which side is projected: the smaller (`std`), the larger, always the left or the right one, or both (`full`)."""

    def _side(self, shape: tuple[int, int]) -> str:
        tall = shape[0] >= shape[1]
        return {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}.get(
            self.side, self.side
        )

    def reduced(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """As `Projection`."""
        r, side = min(self.rank, *shape), self._side(shape)
        return (r, r) if side == "full" else (shape[0], r) if side == "right" else (r, shape[1])

    def choose(self, gradient: Tensor, seed: int) -> dict[str, Tensor]:
        """`left` `[m, r]`, `right` `[n, r]` or both."""
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        r, side = min(self.rank, *gradient.shape), self._side(tuple(gradient.shape))
        found = {"left": u[:, :r], "right": vh[:r].T}
        return {name: _signed(basis) for name, basis in found.items() if side in (name, "full")}

    def down(self, gradient: Tensor, state: State) -> Tensor:
        """As `Projection`."""
        for name, basis in _bases(state, gradient.dtype):
            gradient = gradient @ basis if name == "right" else basis.T @ gradient
        return gradient

    def up(self, small: Tensor, state: State, shape: tuple[int, int]) -> Tensor:
        """As `Projection`."""
        for name, basis in _bases(state, small.dtype):
            small = small @ basis.T if name == "right" else basis @ small
        return small

    def kept_axis(self, shape: tuple[int, int]) -> int | None:
        """As `Projection`."""
        return {"right": 0, "left": 1}.get(self._side(shape))


@register_part("random_basis")
@dataclass(frozen=True)
class RandomProjection(SVDProjection):
    """Random orthonormal vectors in the place of singular ones (FRUGAL's `random`; Zmushko et al., 2024): the Q of a
    normal matrix' QR. Seeded, the same on every rank and after a resume."""

    reads_gradient: ClassVar[bool] = False

    def choose(self, gradient: Tensor, seed: int) -> dict[str, Tensor]:
        """As `SVDProjection.choose`."""
        r, side = min(self.rank, *gradient.shape), self._side(tuple(gradient.shape))
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for name, size in zip(("left", "right"), gradient.shape, strict=True):
            if side in (name, "full"):
                normal = torch.randn(size, r, generator=generator, dtype=torch.float64)
                basis = torch.linalg.qr(normal).Q.to(gradient.dtype)
                found[name] = basis.to(gradient.device)
        return found


@register_part("columns")
@dataclass(frozen=True)
class ColumnProjection(Projection):
    """Random columns or rows of the matrix (FRUGAL's `columns` and `rows`; Zmushko et al., 2024), `int(density * side)`
    of them."""

    density: PositiveFraction = 0.25
    """Fraction of the columns that has moments."""
    axis: Literal["columns", "rows"] = "columns"
    """What is drawn."""

    reads_gradient: ClassVar[bool] = False

    @property
    def _dim(self) -> int:
        return 1 if self.axis == "columns" else 0

    def reduced(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """As `Projection`."""
        count = int(self.density * shape[self._dim])
        return (shape[0], count) if self._dim else (count, shape[1])

    def choose(self, gradient: Tensor, seed: int) -> dict[str, Tensor]:
        """`indices` int32."""
        return _drawn(gradient.shape[self._dim], self.reduced(tuple(gradient.shape))[self._dim], seed, gradient)

    def down(self, gradient: Tensor, state: State) -> Tensor:
        """As `Projection`."""
        return gradient.index_select(self._dim, state["indices"])

    def up(self, small: Tensor, state: State, shape: tuple[int, int]) -> Tensor:
        """As `Projection`."""
        return small.new_zeros(shape).index_copy_(self._dim, state["indices"].long(), small)

    def kept_axis(self, shape: tuple[int, int]) -> int | None:
        """As `Projection`."""
        return 1 - self._dim


@register_part("entries")
@dataclass(frozen=True)
class EntryProjection(Projection):
    """Random entries (FRUGAL's `randk`; Zmushko et al., 2024), `int(density * m * n)` of them."""

    density: PositiveFraction = 0.25
    """Fraction of the entries that has moments."""

    reads_gradient: ClassVar[bool] = False

    def reduced(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """As `Projection`."""
        return (int(self.density * shape[0] * shape[1]),)

    def choose(self, gradient: Tensor, seed: int) -> dict[str, Tensor]:
        """`indices` int32, of the flat matrix."""
        return _drawn(gradient.numel(), self.reduced(tuple(gradient.shape))[0], seed, gradient)

    def down(self, gradient: Tensor, state: State) -> Tensor:
        """As `Projection`."""
        return gradient.reshape(-1).index_select(0, state["indices"])

    def up(self, small: Tensor, state: State, shape: tuple[int, int]) -> Tensor:
        """As `Projection`."""
        flat = small.new_zeros(shape[0] * shape[1])
        return flat.index_copy_(0, state["indices"].long(), small).view(shape)


@register_part("whole_blocks")
@dataclass(frozen=True)
class BlockProjection(Projection):
    """Whole parameters in turns (FRUGAL's blockwise form; Zmushko et al., 2024; without a residual BAdam; Luo et al.,
    2024): `round(density * parameters)` of the projected parameters have moments in a period, the others none."""

    density: Fraction = 0.25
    """Fraction of the parameters that has moments."""
    order: Literal["random", "ascending", "descending"] = "random"
    """Which they are: drawn anew in each period, or in the order of the optimizer's groups, wrapping around."""

    reads_gradient: ClassVar[bool] = False

    def reduced(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """As `Projection`."""
        return shape

    def holds(self, position: int, count: int, period: int, seed: int) -> bool:
        """As `Projection`."""
        active = round(self.density * count)
        if self.order == "random":
            generator = torch.Generator().manual_seed(stream_seed(seed, "blocks", period))
            return position in random_units(count, active, generator).tolist()
        first = period * active % count
        turn = [(first + at) % count for at in range(active)]
        return position in (turn if self.order == "ascending" else [count - 1 - at for at in turn])

    def choose(self, gradient: Tensor, seed: int) -> dict[str, Tensor]:
        """Nothing: the parameter itself."""
        return {}

    def down(self, gradient: Tensor, state: State) -> Tensor:
        """As `Projection`."""
        return gradient

    def up(self, small: Tensor, state: State, shape: tuple[int, int]) -> Tensor:
        """As `Projection`."""
        return small


def _bases(state: State, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    return [(name, state[name].to(dtype)) for name in ("left", "right") if name in state]


def _signed(basis: Tensor) -> Tensor:
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return (basis * torch.where(largest < 0, -1.0, 1.0).to(basis.dtype)).contiguous()


def _drawn(size: int, count: int, seed: int, like: Tensor) -> dict[str, Any]:
    found = random_units(size, count, torch.Generator().manual_seed(seed))
    return {"indices": found.to(device=like.device, dtype=torch.int32)}
