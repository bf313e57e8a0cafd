"""Where the tensors of a spectral adapter in one layer come from, and what they start with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...sparsity import Statistic
from ..shared.file_check import file_being_loaded
from ..shared.layer import AdapterLayer
from ..shared.sharing import tensor_of
from .bases import Found, Site
from .names import B_ENTRIES, FINGERPRINT, FIXED_A, FIXED_B, MAGNITUDE, OFFSET, PLACES, SHAPE, TRAINED_A, TRAINED_B


class SpectralStart(AdapterLayer):
    """The part of `SpectralLoraLayer` that finds bases, starts cores, and gathers what a pass uses."""

    def place_over(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        """Take `base_layer`'s place."""
        super().place_over(base_layer, module_name, **kwargs)
        self.register_load_state_dict_post_hook(_after_loading)

    def site(self, adapter_name: str) -> Site:
        """What the adapter's bases know of this module."""
        return self.spectral_lora_site[adapter_name]

    def _tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The adapter's tensors here, those of the layer that it shares with, and those that follow from the seed."""
        config, found = self.adapter_configs[adapter_name], self.tensors(adapter_name)
        owner = self.spectral_lora_owner.get(adapter_name)
        if owner is not None:
            device = found[SHAPE].device
            found |= {name: tensor_of(owner, self, name, adapter_name, device) for name in config.bases.shared}
        if config.bases.derived_names:
            found |= self._derived(adapter_name, found[SHAPE].device)
        if B_ENTRIES in found:
            found[PLACES] = self.places(adapter_name)
        return found

    def places(self, adapter_name: str) -> Tensor:
        """Flat places in B of its trained entries, sorted, `[k]`; decoded again whenever the buffer was replaced or
        rewritten.

        Raises:
            ValueError: the buffer is damaged or was never written; names it.
        """
        known = self.spectral_lora_places.get(adapter_name)
        if torch.compiler.is_compiling() and known is not None:
            return known[1]
        codes = self.spectral_lora_B_entries[adapter_name]
        version = 0 if codes.is_inference() else codes._version
        # The buffer itself is kept for comparison: a freed one's address may come back with the same version.
        if known is not None and known[0][0] is codes and known[0][1:] == (codes.data_ptr(), version):
            return known[1]
        decoded = self.adapter_configs[adapter_name].bases.decode(codes, self.site(adapter_name))
        self.spectral_lora_places[adapter_name] = ((codes, codes.data_ptr(), version), decoded)
        return decoded

    @torch.no_grad()
    def _derived(self, adapter_name: str, device: torch.device) -> dict[str, Tensor]:
        derived = self.spectral_lora_derived.get(adapter_name)
        if derived is not None and all(tensor.device == device for tensor in derived.values()):
            return derived
        bases, site = self.adapter_configs[adapter_name].bases, self.site(adapter_name)
        if derived is not None:
            derived = {name: tensor.to(device) for name, tensor in derived.items()}
        elif bases.recomputed:
            found = bases.find(self.dense_base_weight().float(), site)
            derived = bases.derive_from(found, self.spectral_lora_fingerprint[adapter_name], site)
        else:
            derived = bases.derive(site, device)
        self.spectral_lora_derived[adapter_name] = derived
        return derived

    def forget_decoded(self, adapter_name: str) -> None:
        """Derive bases again at the next use."""
        self.spectral_lora_derived.pop(adapter_name, None)
        self.spectral_lora_places.pop(adapter_name, None)

    @torch.no_grad()
    def _begin(self, adapter_name: str, first: Mapping[str, Tensor] | None) -> None:
        """Write what the bases have decided (`first`), find bases in the weight, and write what the core starts with
        and what the base keeps of it; a file that is being loaded brings all of them."""
        config = self.adapter_configs[adapter_name]
        tensors, weight = self.tensors(adapter_name), self.dense_base_weight()
        if file_being_loaded() is not None or weight.is_meta or any(tensor.is_meta for tensor in tensors.values()):
            return
        for name, tensor in (first or {}).items():
            tensors[name].copy_(tensor)
        if config.use_dora:
            tensors[MAGNITUDE].copy_(weight.float().square().sum(1).sqrt())
        if not config.needs_calibration:
            self._begin_with(adapter_name, config.bases.find(weight.float(), self.site(adapter_name)))

    def awaits_calibration(self, adapter_name: str) -> bool:
        """Whether the adapter's bases are still to be found in data, or a mask of B to be brought by a file."""
        if adapter_name in self.spectral_lora_B_entries:
            codes, known = self.spectral_lora_B_entries[adapter_name], self.spectral_lora_places.get(adapter_name)
            return known is None and not codes.is_meta and not codes[:4].any()
        if adapter_name not in self.spectral_lora_basis_A or self.spectral_lora_found.get(adapter_name, False):
            return False
        basis = self.spectral_lora_basis_A[adapter_name]
        if not self.adapter_configs[adapter_name].needs_calibration or basis.is_meta:
            return False
        self.spectral_lora_found[adapter_name] = found = bool(basis.any())
        return not found

    def calibration_statistic(self, adapter_name: str) -> Statistic:
        """That of the bases.

        Raises:
            ValueError: they wait for a file, not for data.
        """
        if adapter_name in self.spectral_lora_B_entries:
            raise ValueError(self.calibration_message(adapter_name))
        return self.adapter_configs[adapter_name].bases.statistic

    def calibration_message(self, adapter_name: str) -> str:
        """What to tell a user whose adapter waits for data, or for the mask of B."""
        if adapter_name not in self.spectral_lora_B_entries:
            return super().calibration_message(adapter_name)
        return (
            f"Adapter '{adapter_name}' has the sizes of a mask of B, and no mask: its config is that of an adapter "
            "whose weights were not loaded. Load it with PeftModel.from_pretrained(base, folder, is_trainable=True), "
            "or make a new one, methods.get('lori', mask_from=...)."
        )

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
            derived = config.bases.derive_from(found, fingerprint.to(found.A.device), site)
            self.spectral_lora_derived[adapter_name] = derived
        core, values = config.core, None if found is None else found.values
        if core is None:
            return
        core.start(tensors, None if values is None else values.to(tensors[SHAPE].device))
        if core.residual == "init":
            self.fix_residual(adapter_name)
        elif core.residual == "values":
            residual = core.known(values)
            residual = residual * self.site(adapter_name).scaling if core.trained_scale else residual
            self._write_offset(adapter_name, residual if core.diagonal else torch.diag(residual))

    @torch.no_grad()
    def fix_residual(self, adapter_name: str) -> None:
        """Let the base keep what the core is now, if it keeps what the core starts with."""
        core = self.adapter_configs[adapter_name].core
        if core is not None and core.residual == "init":
            self._write_offset(adapter_name, core.matrix(self.tensors(adapter_name)))

    def _write_offset(self, adapter_name: str, core: Tensor) -> None:
        config, tensors = self.adapter_configs[adapter_name], self.tensors(adapter_name)
        if "B" in config.bases.trained:
            B, _ = config.bases.factors(tensors, self.site(adapter_name))
            core = times(B, core)
        tensors[OFFSET].copy_(core)


def times(B: Tensor, core: Tensor) -> Tensor:
    """:math:`B C`, fp32, for a core or its diagonal: one of the two may have been cast to the base's dtype."""
    B, core = B.float(), core.float()
    return B * core if core.dim() == 1 else B @ core


def _after_loading(layer: SpectralStart, incompatible_keys: Any) -> None:
    """What was loaded may belong to other bases."""
    layer.spectral_lora_norms.clear()
    layer.spectral_lora_places.clear()
    for name in layer.spectral_lora_B_entries:
        if not layer.spectral_lora_B_entries[name].is_meta and not layer.awaits_calibration(name):
            layer.places(name)  # a compiled graph reads what was decoded without looking at the buffer
    for name in list(layer.spectral_lora_fingerprint):
        layer.forget_decoded(name)
