"""What the tuners share in reading adapter files: missing tensors, and state that only training needs."""

from __future__ import annotations

import torch

from .adapter_layer import AdapterLayer


def present(state_dict: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """The tensor of that key.

    Raises:
        ValueError: the file has none.
    """
    if key not in state_dict:
        raise ValueError(
            f"'{key}' is missing from the adapter file; it is incomplete, or its config targets other modules now."
        )
    return state_dict[key]


def settle_training_state(
    state_dict: dict[str, torch.Tensor], prefix: str, layer: AdapterLayer, adapter_name: str
) -> None:
    """Fit the file's training state to the layer's: a run that goes on gets its own, nobody else does."""
    trained = any(
        adapter_name in held and held[adapter_name].requires_grad
        for held in (getattr(layer, kind) for kind in layer.adapter_layer_names)
    )
    for kind in layer.training_state_names:
        key, held = f"{prefix}{kind}.{adapter_name}", getattr(layer, kind)
        # The file's own names for a buffer that the layer does not have (any more), which upstream cannot map.
        for unmapped in (f"{prefix}{kind}", f"base_model.model.{prefix}{kind}"):
            if unmapped in state_dict:
                state_dict[key] = state_dict.pop(unmapped)
        if adapter_name not in held and trained and key in state_dict:
            layer.allocate_training_state(adapter_name)  # a finished run freed it, and goes on from a checkpoint
        if adapter_name not in held:
            state_dict.pop(key, None)
        elif key not in state_dict:
            state_dict[key] = torch.zeros_like(held[adapter_name])
