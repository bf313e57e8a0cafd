"""`MaskedLoraModel`: injects and checks masked LoRAs."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from ...sparsity import unpack_bits
from ..shared.base_weight import dense_weight
from ..shared.file_check import file_being_loaded
from ..shared.model import AdapterModel, AdapterPlan
from ..shared.quantised import backend_of
from .config import MaskedLoraConfig
from .layer import MASK, MaskedLoraLayer
from .linear import MaskedLoraLinear
from .stored_mask import StoredMask


class MaskedLoraModel(AdapterModel):
    r"""Masked adapters, :math:`W' = M \odot (W + D)`, on dense and quantised linears.

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    tuner_layer_cls = MaskedLoraLayer
    linear_cls = MaskedLoraLinear

    def plan(self, peft_config: MaskedLoraConfig, model: nn.Module, targets: dict[str, Any]) -> AdapterPlan:
        """Nothing to decide.

        Raises:
            ValueError: zeros of a quantised base, of one that adapters are merged into, or of one without any, are to
                be the mask; a file's mask is of another base.
        """
        for name, base in targets.items():
            cols, rows = _get_in_out_features(base)
            for part in (peft_config.update, peft_config.masking):
                part.check_weight(rows, cols, name)
            if peft_config.n_of_m is not None and cols % peft_config.n_of_m[1]:
                raise ValueError(
                    f"n_of_m={peft_config.n_of_m}: groups of {peft_config.n_of_m[1]} do not divide the {cols} inputs "
                    f"of '{name}'. Name the module in exclude_modules, or set n_of_m=None."
                )
        merged = any(isinstance(module, BaseTunerLayer) and module.merged_adapters for module in model.modules())
        quantisation = get_quantization_kwargs(model)
        file = file_being_loaded()
        if file is not None and not file.renamed and not merged and not peft_config.masks_base:
            for name, base in targets.items():
                held = file.modules.get(name, {}).get(MASK)
                _check_mask(held, peft_config.n_of_m, name, base, backend_of(base, **quantisation))
        if peft_config.masks_base and not merged:
            for name, base in targets.items():
                backend = backend_of(base, **quantisation)
                if not getattr(backend, "supports_merge", True):
                    raise ValueError(
                        f"'{name}' is quantised by {backend.backend_name}, whose weight cannot be read, and a mask "
                        "that moves masks the base too. Load the base dense or in 4 bits, or leave the module out."
                    )
        if file is not None:
            return AdapterPlan(sizes={name: sizes for name, (_, _, sizes) in file.sizes.items()})
        if peft_config.mask != "zeros" or peft_config.masking.computes_mask:
            return AdapterPlan()
        if merged:
            raise ValueError(
                "mask='zeros': adapters are merged into this base, and its zeros are not its own. Call "
                "model.unmerge_adapter() first."
            )
        for name, base in targets.items():
            if backend_of(base, **quantisation) is not None:
                raise ValueError(
                    f"mask='zeros': '{name}' is quantised, where weights that were kept are 0 too. Set mask='given', "
                    "and call set_masks(model, report.masks) with what prune_model returned."
                )
        weights = [base.weight for base in targets.values() if not base.weight.is_meta]
        if weights and all(bool((weight != 0).all()) for weight in weights):
            raise ValueError(
                "mask='zeros': no target of this base has a zero, and the adapter would be a plain LoRA at a dense "
                "matrix's price. Prune the base first (hf_sparse_peft.pruning.prune_model), or take "
                "SparseLoraConfig(r=..., density=0)."
            )
        return AdapterPlan()


@torch.no_grad()
def _check_mask(mask: torch.Tensor | None, n_of_m: list[int] | None, name: str, base: nn.Module, backend: Any) -> None:
    """Is the base 0 where the mask of a file has nothing to keep? A mask that is not known yet or has another size is
    for others to judge, and some quantised weights nobody can read."""
    if mask is None or not mask.any() or not getattr(backend, "supports_merge", True):
        return
    if any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers())):
        return
    weight = dense_weight(base, backend)
    stored = StoredMask(weight.numel(), n_of_m)
    if mask.shape != stored.shape:
        return
    kept = unpack_bits(stored.bits(mask.to(weight.device)), weight.numel()).view(weight.shape)
    if bool(weight.masked_fill(kept, 0).any()):
        raise ValueError(
            f"'{name}' of this base is not 0 where the adapter's mask has it pruned, so it is not the base that the "
            "adapter was trained on. Load that: the model that prune_model left."
        )
