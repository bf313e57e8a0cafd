"""`MaskedLoraModel`: injects and checks masked LoRAs."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..shared.file_check import file_being_loaded
from ..shared.model import AdapterModel, AdapterPlan
from .config import MaskedLoraConfig
from .layer import MaskedLoraLayer, MaskedLoraLinear


class MaskedLoraModel(AdapterModel):
    r"""Masked LoRAs, :math:`\Delta W = s\,M \odot (B A)`, on dense and quantised linears.

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    tuner_layer_cls = MaskedLoraLayer
    linear_cls = MaskedLoraLinear

    def plan(self, peft_config: MaskedLoraConfig, model: nn.Module, targets: dict[str, Any]) -> AdapterPlan:
        """Nothing to decide.

        Raises:
            ValueError: zeros of a quantised base, or of one without any, are to be the mask.
        """
        if file_being_loaded() is not None or peft_config.mask != "zeros":
            return AdapterPlan()
        for name, base in targets.items():
            weight = base.weight
            if not weight.is_floating_point():
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
