"""Merging adapters into the base weight and taking them out again, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.distributed.tensor import DTensor

from .layer import AdapterLayer
from .parameters import ParameterHost, ParameterWeight
from .rollback import uninterrupted


@lru_cache(None)
def _warn_requantised(backend: str) -> None:
    warnings.warn(
        f"Merging into a {backend} base rounds base + delta to its grid again, which loses small deltas. "
        "model.merge_errors() has the measured relative error of each layer; to merge without that loss, load the base "
        "dequantised and merge there, or keep the adapter separate.",
        stacklevel=3,
    )


def broken(adapter_name: str) -> ValueError:
    """The error of a safe merge that would give a weight that is not finite, in peft's words."""
    return ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")


class HeldWeight(NamedTuple):
    """Which objects hold a base layer's weight and bias."""

    base: nn.Module
    weight: torch.Tensor
    attributes: list[tuple[object, dict[str, Any]]]
    """What changes with a weight behind its back, by owner."""
    bias: torch.Tensor | None = None


class MergeState(NamedTuple):
    """All that merging changes in one layer."""

    held: HeldWeight
    backup: HeldWeight | None
    merged_adapters: list[str]
    merge_error: float | None


class MergeMixin(AdapterLayer):
    """`merge` and `unmerge` of an adapted layer.

    Merging writes into no tensor: the layer gets a new weight, and the original (packed, where it is quantised) is kept
    aside and put back by `unmerge`. So a weight that other layers share, a tied embedding's for one, stays theirs.
    `merge_and_unload` drops the original with the adapter.
    """

    _merge_backup: HeldWeight | None = None
    merge_error: float | None = None
    """Relative Frobenius error of the merged quantised weight; None while nothing is merged and on dense bases."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight: `W <- round(W + sum of deltas)`, added in fp32 from the original `W`.

        Whole or not at all: whatever ends it early, Ctrl-C included, leaves the layer as merged as it was.

        Raises:
            ValueError: `safe_merge` and the merged weight has a value that is not finite, or the weight is computed
                from others at each forward (`torch.nn.utils.parametrize`); the base is untouched.
            TypeError: the base layer's quantiser cannot be written to.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if self.holds(n)]
        if not names:
            return
        before = self.merge_state()
        try:
            self._merge([*self.merged_adapters, *names], safe_merge)
        except BaseException:
            self.restore_merge_state(before)
            raise

    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        before = self.merge_state()
        self.restore_merge_state(MergeState(before.backup or before.held, None, [], None))

    def merge_state(self) -> MergeState:
        """What is merged now, for `restore_merge_state`."""
        return MergeState(self._held(), self._merge_backup, list(self.merged_adapters), self.merge_error)

    def restore_merge_state(self, state: MergeState) -> None:
        """Bring the layer's weight back to `state`, the very objects; Ctrl-C waits until that is done."""
        with uninterrupted():
            self._put_back(state.held)
            self._merge_backup, self.merge_error = state.backup, state.merge_error
            self.merged_adapters = list(state.merged_adapters)

    @torch.no_grad()
    def _merge(self, names: list[str], safe_merge: bool) -> None:
        if self._merge_backup is not None:
            self._put_back(self._merge_backup)
        held = self._held()
        if isinstance(held.weight, DTensor):
            raise ValueError(
                f"The weight of '{self.module_name}' is sharded over ranks, so nothing can be merged into it. Save the "
                "adapter, and merge it in one process: PeftModel.from_pretrained(base, path).merge_and_unload()."
            )
        if self.quantization_backend is None and "weight" not in held.base._parameters:
            raise ValueError(
                f"The weight of '{self.module_name}' is computed at each forward (a parametrization), so nothing can "
                "be merged into it. Call torch.nn.utils.parametrize.remove_parametrizations on that layer first."
            )
        weight = self.get_base_weight()
        if not weight.numel():
            raise ValueError(
                f"'{self.module_name}' has no weight to merge into: it was released when another adapter's factors "
                "took its place. Add that with FactoredConfig(keep_base=True), or keep this one unmerged."
            )
        # Deltas are summed before anything is rounded, so that merging is one rounding however many adapters.
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        view = merged.t() if self.fan_in_fan_out else merged
        self.zero_removed_(view, [(name, 1.0) for name in names])
        for name in names:
            self._add_delta_(view, name)
            if safe_merge and not torch.isfinite(merged).all():
                raise broken(name)
        bias = self._merged_bias(held.bias, names, weight.dtype)
        if safe_merge and bias is not None and not torch.isfinite(bias).all():
            raise broken(names[-1])
        self._merge_backup = held
        self._install(merged, weight.dtype)
        if bias is not None:
            held.base.bias = bias
        self.merged_adapters = names

    def _merged_bias(self, own: torch.Tensor | None, names: list[str], dtype: torch.dtype) -> nn.Parameter | None:
        """The bias with what adapters add to it, one where the layer had none; None: none adds anything."""
        changes = [self.bias_change(name) for name in names]
        changes = [change for change in changes if change is not None]
        if not changes:
            return None
        start = torch.zeros_like(changes[0]) if own is None else own.detach()
        merged = sum(changes, start.to(torch.promote_types(start.dtype, torch.float32)))
        if own is None:
            dtype = dtype if dtype.is_floating_point else torch.float32
            return nn.Parameter(merged.to(dtype), requires_grad=False)
        return nn.Parameter(merged.to(own.dtype), requires_grad=own.requires_grad)

    def _install(self, merged: torch.Tensor, dtype: torch.dtype) -> None:
        if self.quantization_backend is None:
            base = self.get_base_layer()
            merged = merged.to(dtype).view(base.weight.shape)
            new = nn.Parameter(merged, requires_grad=base.weight.requires_grad)
            new.__dict__.update(base.weight.__dict__)
            base.weight = new
            return
        self.set_base_weight(merged.to(dtype))
        stored = self.get_base_weight().float()
        error = (stored - merged).norm() / merged.norm().clamp_min(torch.finfo(torch.float32).tiny)
        self.merge_error = float(error)
        _warn_requantised(self.quantization_backend.backend_name)

    def _held(self) -> HeldWeight:
        base = self.get_base_layer()
        return HeldWeight(base, base.weight, _mutable_state(base), getattr(base, "bias", None))

    def _put_back(self, held: HeldWeight) -> None:
        base, weight, attributes, bias = held
        if self.get_base_layer() is not base:  # HQQ puts a new module in place
            self.base_layer = base
        if base.weight is not weight:
            base.weight = weight
        if getattr(base, "bias", None) is not bias:
            base.bias = bias
        for owner, values in attributes:
            owner.__dict__.update(values)


def _mutable_state(base: nn.Module) -> list[tuple[object, dict[str, Any]]]:
    """Attributes that writing a weight changes behind its back: bitsandbytes marks the old 4-bit parameter as
    unquantised, hangs scales on the module, and empties the `state` of 8-bit layers; accelerate's offloading keeps
    the weight in its hook."""
    owners: list[tuple[object, dict]] = [(base.weight, dict(base.weight.__dict__))]
    for owner in (getattr(base, "state", None), getattr(base, "_hf_hook", None)):
        if owner is not None:
            owners.append((owner, dict(owner.__dict__)))
    if "quant_state" in base.__dict__:
        owners.append((base, {"quant_state": base.quant_state}))
    return owners


def warn_of_biases(added: Sequence[str], mend: str) -> None:
    """Warn where merging gave layers biases, by module name, that their architecture has no place for; `mend` says what
    to do instead."""
    if added:
        warnings.warn(
            f"Merging gave {len(added)} layers ('{added[0]}') biases, and this architecture has none there: "
            f"save_pretrained writes them, and from_pretrained drops them. {mend}",
            stacklevel=4,
        )


def refuse_shared_modules(model: nn.Module) -> None:
    """Refuse to merge into a layer that the model also uses under a name without the adapter.

    Raises:
        ValueError: names both.
    """
    adapted = {}
    for layer in (module for module in model.modules() if isinstance(module, AdapterLayer)):
        base = layer.get_base_layer()
        adapted[id(base.module if isinstance(base, ParameterWeight) else base)] = layer.module_name
    for parent_name, parent in model.named_modules():
        if isinstance(parent, (BaseTunerLayer, ParameterHost)):
            continue
        for name, child in parent._modules.items():
            if id(child) in adapted:
                other = f"{parent_name}.{name}".lstrip(".")
                raise ValueError(
                    f"'{adapted[id(child)]}' and '{other}' are one module, and only the first has the adapter: merging "
                    f"would change '{other}' too. Put a copy.deepcopy there before you add the adapter, or keep the "
                    "adapter unmerged."
                )


def refuse_merged(layers: list[AdapterLayer]) -> None:
    """Refuse to read updates while some are part of the base weights.

    Raises:
        ValueError: something is merged into one of the layers.
    """
    for layer in layers:
        if layer.merged:
            raise ValueError(
                f"{layer.merged_adapters} is merged into '{layer.module_name}'; call unmerge_adapter() first."
            )


def embeddings_tied(model: nn.Module) -> bool:
    """Whether a transformers model's head and input embedding are one weight."""
    try:
        ends = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    weights = [getattr(end, "weight", None) for end in ends]
    return weights[0] is not None and weights[0] is weights[1]


def untie_embeddings(model: nn.Module) -> None:
    """Make a transformers model save and load its head and its embedding as two weights."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
