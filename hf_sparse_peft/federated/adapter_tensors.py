"""The tensors of an adapter, read from a model and written to it whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from ..tuners import adapter_layers
from .messages import check_finite, check_tensors_like


def adapter_tensors(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """Copies of what a file of the adapter would hold, on the CPU: its tensors, masks and supports, heads and biases,
    by the names in such a file. State of rules that still run is not among them.

    Raises:
        ValueError: no such adapter.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is none of the model's: {sorted(model.peft_config)}.")
    held = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    kinds = {type(layer) for layer in adapter_layers(model)}
    return {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in sorted(held.items())
        if not any(kind.is_training_state(name.rpartition(".")[2]) for kind in kinds)
    }


@torch.no_grad()
def write_adapter_tensors(
    model: PeftModel, tensors: Mapping[str, Tensor], adapter_name: str = "default", sender: str = "server"
) -> None:
    """Give the adapter these tensors, all of them or, where one is refused, none.

    Raises:
        ValueError: names, shapes or dtypes are not the adapter's, a number is not finite, or a support or mask is not
            valid; names `sender` and the tensor.
    """
    before = adapter_tensors(model, adapter_name)
    check_tensors_like(tensors, before, sender)
    check_finite(tensors, sender)
    try:
        # Copies: the loaders cast in the mapping they are given.
        set_peft_model_state_dict(model, dict(tensors), adapter_name=adapter_name)
    except BaseException:
        set_peft_model_state_dict(model, before, adapter_name=adapter_name)
        raise
