"""Loading an adapter folder together with its base model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..tuners.shared.file_check import CONFIG_FILE
from .base_model import load_base


def load_adapter(path: str | os.PathLike, base: str | None = None, **arguments: Any) -> PeftModel:
    """The adapter in the folder `path`, of this package or of upstream peft, on its base model, in evaluation mode.

    The base gets the labels and the embedding rows that it was trained with, which `AutoPeftModel` leaves to its
    caller, and the revision that the adapter's config names, unless `base` is given.

    Args:
        path: adapter folder.
        base: Hub id or folder of the base model; None: what the adapter's config names.
        arguments: go on to the base's `from_pretrained` (`dtype`, `quantization_config`, `device_map`, ...).

    Raises:
        ValueError: no base model is named, the adapter does not fit it, or what `load_base` refuses.
        OSError: a file is missing.
    """
    folder = Path(path)
    config = read_config(folder)
    base_name = base or config.get("base_model_name_or_path")
    if not base_name:
        raise ValueError(f"'{folder}' does not name its base model; pass --base.")
    if not base and config.get("revision"):
        arguments["revision"] = config["revision"]  # of the base, as peft's own AutoPeftModel takes it
    trained = load_base(base_name, config, folder, **arguments)
    try:
        model = PeftModel.from_pretrained(trained, str(folder)).eval()
    except RuntimeError as error:  # torch's word for tensors of another shape
        raise ValueError(f"'{folder}' does not fit '{base_name}': {error}") from error
    model.peft_config["default"].base_model_name_or_path = base_name  # what was loaded, for the config of an export
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
        ValueError: it is no JSON object.
        OSError: there is none.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"'{folder / CONFIG_FILE}' holds no JSON object.")
    return config
