"""What every adapted layer holds of spectral adapters, and the adapted linear layer itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ...rules import UnitSpace
from ...sparsity import Statistic
from ...utils.tensors import TensorSpec
from ..shared.file_check import file_being_loaded
from ..shared.layer import AdapterLayer
from ..shared.linear import AdditiveLinear
from ..shared.pieces import Decomposed, LowRank, Piece, Tiles
from ..shared.tensor_checks import side
from .bases import FINGERPRINT, FIXED_A, FIXED_B, TRAINED_A, TRAINED_B, Found, Site
from .config import SpectralLoraConfig
from .spaces import DiagonalSpace

OFFSET, SHAPE, MAGNITUDE = "spectral_lora_offset", "spectral_lora_shape", "spectral_lora_magnitude"


class SpectralLoraLayer(AdapterLayer):
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
    spectral_lora_norms: dict[str, tuple[Tensor, ...]]
    """Of the base weight, what norms are computed from, made at first use."""

    @classmethod
    def tensor_specs(
        cls, config: SpectralLoraConfig, module_name: str, rows: int, cols: int, sizes: None = None
    ) -> list[TensorSpec]:
        """The shape of the weight, the bases and the core, and what the base keeps of them."""
        site, bases, core = config.site(module_name, rows, cols), config.bases, config.core

        def check_shape(tensor: Tensor, key: str) -> None:
            if tensor.dtype != torch.int64 or tensor.tolist() != [rows, cols]:
                raise ValueError(
                    f"'{key}' is {tensor.tolist()} ({tensor.dtype}), and the weight is {[rows, cols]} (int64). The "
                    "file is damaged or belongs to another base model."
                )

        found = [
            TensorSpec(SHAPE, (2,), torch.int64, "saved", start=lambda _: torch.tensor([rows, cols]), check=check_shape)
        ]
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
        key = f"{module_name}.{SHAPE}"
        if side(held, SHAPE, 0, 1, key) != 2 or held[SHAPE].dtype != torch.int64 or int(held[SHAPE].min()) < 1:
            raise ValueError(f"'{key}' is {held[SHAPE].tolist()}, no shape of a weight; the file is damaged.")
        rows, cols = held[SHAPE].tolist()
        return rows, cols, None

    def place_over(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        """Take `base_layer`'s place."""
        super().place_over(base_layer, module_name, **kwargs)
        self.register_load_state_dict_post_hook(_find_bases_again)

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

    def site(self, adapter_name: str) -> Site:
        """What the adapter's bases know of this module."""
        return self.spectral_lora_site[adapter_name]

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has a part of that adapter; all of its tensors may belong to another layer."""
        return adapter_name in self.adapter_configs

    def _tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The adapter's tensors here, those of the layer that it shares with, and those that follow from the seed."""
        config, found = self.adapter_configs[adapter_name], self.tensors(adapter_name)
        owner = self.spectral_lora_owner.get(adapter_name)
        if owner is not None:
            held = owner.tensors(adapter_name)
            found |= {name: held[name].to(found[SHAPE].device) for name in config.bases.shared}
        if config.bases.derived_names:
            found |= self._derived(adapter_name, found[SHAPE].device)
        return found

    @torch.no_grad()
    def _derived(self, adapter_name: str, device: torch.device) -> dict[str, Tensor]:
        held = self.spectral_lora_derived.get(adapter_name)
        if held is not None and all(tensor.device == device for tensor in held.values()):
            return held
        bases, site = self.adapter_configs[adapter_name].bases, self.site(adapter_name)
        if held is not None:
            held = {name: tensor.to(device) for name, tensor in held.items()}
        elif bases.recomputed:
            found = bases.find(self.dense_base_weight().float(), site)
            held = bases.derive_from(found, self.spectral_lora_fingerprint[adapter_name], site)
        else:
            held = bases.derive(site, device)
        self.spectral_lora_derived[adapter_name] = held
        return held

    def forget_decoded(self, adapter_name: str) -> None:
        """Derive bases again at the next use."""
        self.spectral_lora_derived.pop(adapter_name, None)

    @torch.no_grad()
    def _begin(self, adapter_name: str, first: None) -> None:
        """Find bases in the weight, and write what the core starts with and what the base keeps of it; a file that is
        being loaded brings all of them."""
        config = self.adapter_configs[adapter_name]
        tensors, weight = self.tensors(adapter_name), self.dense_base_weight()
        if file_being_loaded() is not None or weight.is_meta or any(tensor.is_meta for tensor in tensors.values()):
            return
        if config.use_dora:
            tensors[MAGNITUDE].copy_(weight.float().square().sum(1).sqrt())
        if not config.needs_calibration:
            self._begin_with(adapter_name, config.bases.find(weight.float(), self.site(adapter_name)))

    def awaits_calibration(self, adapter_name: str) -> bool:
        """Whether the adapter's bases are still to be found in data."""
        if adapter_name not in self.spectral_lora_basis_A or self.spectral_lora_found.get(adapter_name, False):
            return False
        basis = self.spectral_lora_basis_A[adapter_name]
        if not self.adapter_configs[adapter_name].needs_calibration or basis.is_meta:
            return False
        self.spectral_lora_found[adapter_name] = found = bool(basis.any())
        return not found

    def calibration_statistic(self, adapter_name: str) -> Statistic:
        """That of the bases."""
        return self.adapter_configs[adapter_name].bases.statistic

    @torch.no_grad()
    def take_calibration(self, adapter_name: str, state: dict[str, Tensor] | None) -> None:
        """Find the bases, and start the core."""
        bases, weight = self.adapter_configs[adapter_name].bases, self.dense_base_weight().float()
        self._begin_with(adapter_name, bases.find_in(state, weight, self.site(adapter_name)))

    def _begin_with(self, adapter_name: str, found: Found | None) -> None:
        config, tensors = self.adapter_configs[adapter_name], self.tensors(adapter_name)
        if found is not None:
            for fixed, learned, basis in ((FIXED_A, TRAINED_A, found.A), (FIXED_B, TRAINED_B, found.B)):
                for name in {fixed, learned} & set(tensors):
                    tensors[name].copy_(basis)
        if config.bases.recomputed:
            site, fingerprint = self.site(adapter_name), tensors[FINGERPRINT]
            fingerprint.copy_(config.bases.fingerprint(found, site))
            held = config.bases.derive_from(found, fingerprint.to(found.A.device), site)
            self.spectral_lora_derived[adapter_name] = held
        core, values = config.core, None if found is None else found.values
        if core is None:
            return
        core.start(tensors, None if values is None else values.to(tensors[SHAPE].device))
        if core.residual == "init":
            self.keep_residual(adapter_name)
        elif core.residual == "values":
            kept = core.known(values)
            kept = kept * self.site(adapter_name).scaling if core.trained_scale else kept
            self._keep(adapter_name, kept if core.diagonal else torch.diag(kept))

    @torch.no_grad()
    def keep_residual(self, adapter_name: str) -> None:
        """Let the base keep what the core is now, if it keeps what the core starts with."""
        core = self.adapter_configs[adapter_name].core
        if core is not None and core.residual == "init":
            self._keep(adapter_name, core.matrix(self.tensors(adapter_name)))

    def _keep(self, adapter_name: str, core: Tensor) -> None:
        config, tensors = self.adapter_configs[adapter_name], self.tensors(adapter_name)
        if "B" in config.bases.trained:
            B, _ = config.bases.factors(tensors, self.site(adapter_name))
            core = _times(B, core)
        tensors[OFFSET].copy_(core)

    def _parts(self, adapter_name: str) -> tuple[Tensor, Tensor | None, Tensor, float]:
        """B, core (a matrix, a diagonal, or None), A and the scaling, with gradients."""
        config, tensors = self.adapter_configs[adapter_name], self._tensors(adapter_name)
        B, A = config.bases.factors(tensors, self.site(adapter_name))
        core, matrix = config.core, None
        scaling = self.spectral_lora_scaling[adapter_name]
        if core is not None:
            matrix = core.matrix(tensors)
            if core.residual is not None and "B" in config.bases.trained:
                return _times(B, matrix) - tensors[OFFSET], None, A, scaling
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
            found = LowRank(_times(B, core), A, scale=scaling)
        return [Decomposed(found, tensors[MAGNITUDE], self.dense_base_weight) if config.use_dora else found]

    def _dense_piece(self, adapter_name: str) -> Tiles:
        def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
            bases, site = self.adapter_configs[adapter_name].bases, self.site(adapter_name)
            update = bases.update(self._tensors(adapter_name), site).detach()
            yield slice(None), slice(None), update * self.spectral_lora_scaling[adapter_name]

        return Tiles((self.out_features, self.in_features), tiles)

    def _norm_ratio(self, adapter_name: str) -> Tensor:
        r""":math:`m / n` `[out]` of a layer with `use_dora`, with the norms n as constants, which is how DoRA is
        published.

        :math:`n^2 = \|W_i\|^2 + 2 \langle L_i, W_i A^\top\rangle + \langle L_i A A^\top, L_i\rangle` with
        :math:`L = s B C`: no step reads the base weight again, which is dear where that is in 4 bits.
        """
        B, core, A, scaling = (one.detach() if isinstance(one, Tensor) else one for one in self._parts(adapter_name))
        held = self.spectral_lora_norms.get(adapter_name)
        if held is None or held[0].device != A.device:
            weight = self.dense_base_weight().detach().float()
            held = weight.square().sum(1), weight @ A.t(), A @ A.t()
            self.spectral_lora_norms[adapter_name] = held
        squares, projected, gram = held
        L = scaling * (B if core is None else _times(B, core))
        squares = squares + 2 * (L * projected).sum(1) + (L @ gram * L).sum(1)
        return self.spectral_lora_magnitude[adapter_name] / squares.clamp_min(0).sqrt()

    def _apply(self, *args: Any, **kwargs: Any) -> SpectralLoraLayer:
        self.spectral_lora_norms.clear()  # of the weight as it was: moved, or cast
        return super()._apply(*args, **kwargs)


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
        inner = x.to(dtype) @ A.to(dtype).t()
        if core is not None:
            core = core.to(dtype)
            inner = inner * core if core.dim() == 1 else inner @ core.t()
        return scaling * (inner @ B.to(dtype).t())

    def _update_beside(self, base: Tensor, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        r"""With `use_dora` :math:`(m/n - 1) \odot X W^\top + m/n \odot X P^\top`; the bias stays out of it."""
        update = self.update(x, name, dtype)
        if not self.adapter_configs[name].use_dora:
            return update
        bias, ratio = self.get_base_layer().bias, self._norm_ratio(name)
        return (ratio - 1) * (base if bias is None else base - bias) + ratio * update


def _times(B: Tensor, core: Tensor) -> Tensor:
    B, core = B.float(), core.float()  # one of them may have been cast to the base's dtype
    return B * core if core.dim() == 1 else B @ core


def _find_bases_again(layer: SpectralLoraLayer, incompatible_keys: Any) -> None:
    """What was loaded may belong to bases of other signs."""
    for name in list(layer.spectral_lora_fingerprint):
        layer.forget_decoded(name)
