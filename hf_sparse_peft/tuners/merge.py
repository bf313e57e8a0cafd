"""Merging adapters into the base weight and taking them out again, bit for bit."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from .adapter_layer import AdapterLayer


@lru_cache(None)
def _warn_requantised(backend: str) -> None:
    warnings.warn(
        f"Merging into a {backend} base rounds base + delta to its grid again, which loses small deltas. "
        "model.merge_errors() has the measured relative error of each layer; to merge without that loss, load the base "
        "dequantised and merge there, or keep the adapter separate.",
        stacklevel=3,
    )


class MergeMixin(AdapterLayer):
    """`merge` and `unmerge` of an adapted layer.

    The original weight (packed, where it is quantised) is kept aside while something is merged and put back by
    `unmerge`: nothing is ever subtracted. `merge_and_unload` drops it with the adapter.
    """

    _merge_backup: tuple | None = None
    merge_error: float | None = None
    """Relative Frobenius error of the merged quantised weight; None while nothing is merged and on dense bases."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight: `W <- round(W + sum of deltas)`, added in fp32 from the original `W`.

        Raises:
            ValueError: `safe_merge` and the merged weight has a value that is not finite; the base is untouched.
            TypeError: the base layer's quantiser cannot be written to.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if self.holds(n)]
        if not names:
            return
        everything = [*self.merged_adapters, *names]
        kept = self._merge_backup
        if kept is not None:
            self._restore(kept)
        try:
            merged, backup = self._merged(everything)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        except Exception:
            if kept is not None:  # the layer stays as merged as it was
                self._merge_backup = None
                self._install(*self._merged(self.merged_adapters))
            raise
        self._install(merged, backup)
        self.merged_adapters = everything

    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._merge_backup is not None:
            self._restore(self._merge_backup)
            self._merge_backup = None
        self.merged_adapters = []
        self.merge_error = None

    @torch.no_grad()
    def _merged(self, names: list[str]) -> tuple[torch.Tensor, tuple]:
        base = self.get_base_layer()
        if self.quantization_backend is not None:
            backup = ("module", base, base.weight, _mutable_state(base))
            merged = self.get_base_weight().float()
        else:
            backup = ("weight", base.weight.data)
            # Deltas are summed before anything is rounded, so that merging is one rounding however many adapters.
            merged = base.weight.data.to(torch.promote_types(base.weight.dtype, torch.float32), copy=True)
        view = merged.t() if self.fan_in_fan_out else merged
        for name in names:
            self._add_delta_(view, name)
        return merged, backup

    @torch.no_grad()
    def _install(self, merged: torch.Tensor, backup: tuple) -> None:
        if backup[0] == "weight":
            base = self.get_base_layer()
            base.weight.data = merged.to(base.weight.dtype)
        else:
            before = self.quantization_backend.get_base_weight(self.get_base_layer()).dtype
            self.set_base_weight(merged.to(before))
            stored = self.get_base_weight().float()
            error = (stored - merged).norm() / merged.norm().clamp_min(torch.finfo(torch.float32).tiny)
            self.merge_error = float(error)
            _warn_requantised(self.quantization_backend.backend_name)
        self._merge_backup = backup

    @torch.no_grad()
    def _restore(self, backup: tuple) -> None:
        if backup[0] == "weight":
            self.get_base_layer().weight.data = backup[1]
            return
        _, base, weight, saved = backup
        if self.base_layer is not base:  # HQQ puts a new module in place
            self.base_layer = base
        base.weight = weight
        for owner, attributes in saved:
            owner.__dict__.update(attributes)


def _mutable_state(base: nn.Module) -> list[tuple[object, dict]]:
    """Attributes that writing a quantised weight changes behind its back: bitsandbytes marks the old 4-bit parameter
    as unquantised, hangs scales on the module, and empties the `state` of 8-bit layers."""
    owners: list[tuple[object, dict]] = [(base.weight, dict(base.weight.__dict__))]
    if getattr(base, "state", None) is not None:
        owners.append((base.state, dict(base.state.__dict__)))
    if "quant_state" in base.__dict__:
        owners.append((base, {"quant_state": base.quant_state}))
    return owners
