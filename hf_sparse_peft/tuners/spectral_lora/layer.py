"""What every adapted layer holds of spectral adapters, and the adapted linear layer itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ...ops.frozen_product import frozen_product
from ...rules import UnitSpace
from ...utils.tensors import TensorSpec
from ..shared.linear import AdditiveLinear
from ..shared.pieces import Decomposed, LowRank, Piece, Tiles
from ..shared.sharing import read_shape, shape_spec
from .bases import Site
from .config import SpectralLoraConfig
from .names import MAGNITUDE, OFFSET, SHAPE
from .spaces import DiagonalSpace
from .start import SpectralStart, times


class SpectralLoraLayer(SpectralStart):
    """What every adapted layer holds per adapter, keyed by adapter name. Parameters are fp32 masters."""

    prefix: str = "spectral_lora_"
    spectral_lora_A: nn.ParameterDict
    """`[b, in]`, where A is trained."""
    spectral_lora_B: nn.ParameterDict
    """`[out, a]`, where B is trained."""
    spectral_lora_core: nn.ParameterDict
    """The core's numbers; see `cores`."""
    spectral_lora_core_A: nn.ParameterDict
    """`[r, b]`, the core's second factor."""
    spectral_lora_core_B: nn.ParameterDict
    """`[a, r]`, the core's first factor."""
    spectral_lora_scale: nn.ParameterDict
    """`[1]`, s where it is trained."""
    spectral_lora_basis_A: BufferDict
    """`[b, in]`, where A is fixed and does not follow from a seed."""
    spectral_lora_basis_B: BufferDict
    """`[out, a]`, where B is fixed and does not follow from a seed."""
    spectral_lora_core_mask: BufferDict
    """uint8 `[r]`, which components of a diagonal core live, where some may die."""
    spectral_lora_fingerprint: BufferDict
    """`[2, r]`, what fixed bases are known by that are found in the weight again instead of saved."""
    spectral_lora_offset: BufferDict
    """What the base keeps: :math:`C_0`, or :math:`B_0 C_0` where B is trained."""
    spectral_lora_shape: BufferDict
    """int64 `[2]`, rows and columns of the weight, which a file of a core alone would not tell."""
    spectral_lora_A_coefficients: nn.ParameterDict
    """`[k]`, where A is a trained sum of random matrices."""
    spectral_lora_B_coefficients: nn.ParameterDict
    """`[l]`, where B is."""
    spectral_lora_B_values: nn.ParameterDict
    """`[k]`, where single entries of B are trained."""
    spectral_lora_B_entries: BufferDict
    """uint8, their coded places (`sparsity.codec`)."""
    spectral_lora_point: nn.ParameterDict
    """`[d]`, the point that is projected to all updates; at its owner."""
    spectral_lora_magnitude: nn.ParameterDict
    """`[out]`, the trained norms of the rows, with `use_dora`."""
    spectral_lora_site: dict[str, Site]
    """What bases know of this module."""
    spectral_lora_scaling: dict[str, float]
    """s, 1 where it is trained."""
    spectral_lora_owner: dict[str, SpectralLoraLayer]
    """The layer that has what this one shares, where that is another."""
    spectral_lora_derived: dict[str, dict[str, Tensor]]
    """What follows from the seed, made at first use."""
    spectral_lora_found: dict[str, bool]
    """Whether bases that wait for data were seen to be there."""
    spectral_lora_places: dict[str, tuple[tuple, Tensor]]
    """The decoded places of trained entries of B, and the buffer that they were decoded from."""
    spectral_lora_norms: dict[str, tuple[Tensor, ...]]
    """Of the base weight, what norms are computed from, made at first use."""

    @classmethod
    def tensor_specs(
        cls, config: SpectralLoraConfig, module_name: str, rows: int, cols: int, sizes: None = None
    ) -> list[TensorSpec]:
        """The shape of the weight, the bases and the core, and what the base keeps of them."""
        site, bases, core = config.site(module_name, rows, cols), config.bases, config.core
        found = [shape_spec(SHAPE, rows, cols)]
        found += bases.specs(site)
        if config.use_dora:
            found.append(TensorSpec(MAGNITUDE, (rows,)))
        if core is None:
            return found
        a, b = bases.inner(site)
        found += core.specs(a, b, site)
        if core.residual is not None:
            shape = (rows, b) if "B" in bases.trained else (a,) if core.diagonal else (a, b)
            found.append(TensorSpec(OFFSET, shape, role="saved"))
        return found

    @classmethod
    def read_sizes(
        cls, config: SpectralLoraConfig, module_name: str, held: Mapping[str, Tensor]
    ) -> tuple[int, int, None]:
        """Rows and columns as the file says; every other tensor is checked against them.

        Raises:
            ValueError: the tensor that says so is missing or damaged.
        """
        return *read_shape(held, SHAPE, module_name), None

    def set_sizes(self, adapter_name: str, sizes: None) -> None:
        """Note what the adapter's bases know of this module, and its scaling."""
        config = self.adapter_configs[adapter_name]
        site = config.site(self.module_name, self.out_features, self.in_features)
        self.spectral_lora_site[adapter_name] = site
        trained = config.core is not None and config.core.trained_scale
        self.spectral_lora_scaling[adapter_name] = 1.0 if trained else site.scaling
        super().set_sizes(adapter_name, sizes)

    def unit_spaces(self, adapter_name: str) -> list[UnitSpace]:
        """The core's units, a trained basis's, and the module itself."""
        found = super().unit_spaces(adapter_name)
        if adapter_name not in self.spectral_lora_core_mask:
            return found
        return [DiagonalSpace(self, adapter_name), *(space for space in found if space.kind != "core")]

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has a part of that adapter; all of its tensors may belong to another layer."""
        return adapter_name in self.adapter_configs

    def _parts(self, adapter_name: str) -> tuple[Tensor, Tensor | None, Tensor, float]:
        """B, core (a matrix, a diagonal, or None), A and the scaling, with gradients."""
        config, tensors = self.adapter_configs[adapter_name], self._tensors(adapter_name)
        B, A = config.bases.factors(tensors, self.site(adapter_name))
        core, matrix = config.core, None
        scaling = self.spectral_lora_scaling[adapter_name]
        if core is not None:
            matrix = core.matrix(tensors)
            if core.residual is not None and "B" in config.bases.trained:
                return times(B, matrix) - tensors[OFFSET], None, A, scaling
            matrix = matrix - tensors[OFFSET] if core.residual is not None else matrix
        return B, matrix, A, scaling

    def pieces(self, adapter_name: str) -> list[Piece]:
        """One product of factors: the core is a gate where it is diagonal, else part of B."""
        if not self.holds(adapter_name):
            return []
        config, tensors = self.adapter_configs[adapter_name], self._tensors(adapter_name)
        if config.bases.dense:
            return [self._dense_piece(adapter_name)]
        B, core, A, scaling = self._parts(adapter_name)
        around = None if config.core is None else config.core.around(B, A, tensors)
        if around is not None:
            found = LowRank(*around, scale=scaling)
        elif core is None or core.dim() == 1:
            found = LowRank(B, A, core, scaling)
        else:
            found = LowRank(times(B, core), A, scale=scaling)
        return [Decomposed(found, tensors[MAGNITUDE], self.dense_base_weight) if config.use_dora else found]

    @torch.no_grad()
    def write_pieces(self, adapter_name: str, pieces: list[Piece]) -> None:
        """Fill an adapter with `Factors` for these pieces, one `LowRank` of scale 1."""
        for piece in pieces:
            A, B = piece.factors()
            A, B = (A, B) if A.shape[0] == self.site(adapter_name).r else _smaller(A, B)
            self.spectral_lora_A[adapter_name].data.copy_(A)
            self.spectral_lora_B[adapter_name].data.copy_(B)

    def _dense_piece(self, adapter_name: str) -> Tiles:
        def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
            bases, site = self.adapter_configs[adapter_name].bases, self.site(adapter_name)
            update = bases.update(self._tensors(adapter_name), site).detach()
            yield slice(None), slice(None), update * self.spectral_lora_scaling[adapter_name]

        return Tiles((self.out_features, self.in_features), tiles, dense=True)

    def _norm_ratio(self, adapter_name: str) -> Tensor:
        r""":math:`m / n` `[out]` of a layer with `use_dora`, with the norms n as constants, which is how DoRA is
        published.

        :math:`n^2 = \|W_i\|^2 + 2 \langle L_i, W_i A^\top\rangle + \langle L_i A A^\top, L_i\rangle` with
        :math:`L = s B C`: where A is fixed no step reads the base weight again, which is dear where that is in 4 bits.
        """
        B, core, A, scaling = (
            part.detach() if isinstance(part, Tensor) else part for part in self._parts(adapter_name)
        )
        cached = self.spectral_lora_norms.get(adapter_name)
        if cached is None or cached[0].device != A.device or "A" in self.adapter_configs[adapter_name].bases.trained:
            weight = self.dense_base_weight().detach().float()
            cached = weight.square().sum(1), weight @ A.t().float(), A.float() @ A.t().float()
            self.spectral_lora_norms[adapter_name] = cached
        squares, projected, gram = cached
        L = scaling * (B.float() if core is None else times(B, core))
        squares = squares + 2 * (L * projected).sum(1) + (L @ gram * L).sum(1)
        return self.spectral_lora_magnitude[adapter_name] / squares.clamp_min(0).sqrt()

    def _apply(self, *args: Any, **kwargs: Any) -> SpectralLoraLayer:
        self.spectral_lora_norms.clear()  # of the weight as it was: moved, or cast
        return super()._apply(*args, **kwargs)


def _smaller(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of the same product with as many components as its smaller side."""
    product = B @ A
    if product.shape[0] <= product.shape[1]:
        return product, torch.eye(product.shape[0], device=product.device)
    return torch.eye(product.shape[1], device=product.device), product


class SpectralLoraLinear(AdditiveLinear, SpectralLoraLayer):
    r""":math:`Y = X W^\top + b + s\,((X A^\top) C^\top) B^\top`."""

    _apply = SpectralLoraLayer._apply

    def update(self, x: Tensor, adapter_name: str, dtype: torch.dtype) -> Tensor:
        r""":math:`X\,\Delta W^\top` of one adapter, from the input side to the output side."""
        bases = self.adapter_configs[adapter_name].bases
        if bases.dense:
            product = bases.product(x, self._tensors(adapter_name), self.site(adapter_name), dtype)
            return self.spectral_lora_scaling[adapter_name] * product
        B, core, A, scaling = self._parts(adapter_name)
        inner = frozen_product(x, A, dtype)
        if core is not None:
            core = core.to(dtype)
            inner = inner * core if core.dim() == 1 else inner @ core.t()
        return scaling * frozen_product(inner, B, dtype)

    def _update_beside(self, base: Tensor, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        r"""With `use_dora` :math:`(m/n - 1) \odot X W^\top + m/n \odot X P^\top`; the bias stays out of it."""
        update = self.update(x, name, dtype)
        if not self.adapter_configs[name].use_dora:
            return update
        bias, ratio = self.get_base_layer().bias, self._norm_ratio(name)
        return (ratio - 1) * (base if bias is None else base - bias) + ratio * update
