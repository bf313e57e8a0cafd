"""Which names an adapter may have. Names become parts of tensor names, attributes of modules and folders."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_RESERVED = {"__base__", "base_layer", "modules_to_save", "original_module"}


def check_adapter_name(name: object, prefix: str, model: nn.Module | None = None) -> None:
    """Refuse a name that breaks saving or loading half-way.

    `prefix` is the tuner's. With `model`, the name must also differ from every part of its tensors' names: upstream
    tells adapters apart by these parts, so that an adapter 'mlp' beside another one would take its MLPs out of files.

    Raises:
        ValueError: names the adapter name and what is accepted.
    """
    accepted = "Give a name of letters, digits, '_' and '-', such as 'default' or 'v1_0'."
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"adapter_name={name!r} is no name. {accepted}")
    if "." in name:
        raise ValueError(f"adapter_name={name!r} has a dot, which separates the parts of tensor names. {accepted}")
    if "/" in name or "\\" in name or not name.isprintable() or name != name.strip():
        raise ValueError(f"adapter_name={name!r} cannot name a folder, which it does in saved models. {accepted}")
    if name in _RESERVED or name.startswith(prefix):
        raise ValueError(f"adapter_name={name!r} is taken by peft or the tuner's own tensors. {accepted}")
    if hasattr(nn.ParameterDict, name) or hasattr(nn.Module(), name):
        raise ValueError(f"adapter_name={name!r} is taken by torch's own modules; choose another name. {accepted}")
    if model is not None:
        layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
        known = {adapter for layer in layers for adapter in layer._get_available_adapters()}
        tensors = (key for named in (model.named_parameters(), model.named_buffers()) for key, _ in named)
        if name not in known and any(name in key.split(".") for key in tensors if name in key):
            raise ValueError(
                f"adapter_name={name!r} is the name of a module or tensor of the model, and files of other adapters "
                f"would lose it. {accepted}"
            )
