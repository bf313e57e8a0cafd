"""Loading an adapter with its base, as it was trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftModel

from ..tuners.shared.file_check import CONFIG_FILE, WEIGHTS_FILE
from ..utils.json_text import read_json_text
from .base_model import BaseAs, load_base


def load_adapter(
    path: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    base_as: BaseAs = "trained",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    is_trainable: bool = False,
    **arguments: Any,
) -> PeftModel:
    r"""The base of an adapter with the adapter on it, ready to be used, merged or exported.

    The base gets what the adapter was trained with: labels, rows of the embedding, and with `base_as="trained"` its
    quantisation, :math:`W = \mathrm{dequantise}(\mathrm{quantise}(W_0))` in every quantised layer, from weights of the
    dtype that was quantised then. With `base_as="full"` it is :math:`W_0` in full precision: nearer to the model that
    was pre-trained, and another than the one that the adapter was fitted to.

    Args:
        path: folder or Hub repo of the adapter, of this package or of upstream's.
        base: folder or Hub id of the base; None: the one that the adapter's config names, at its revision.
        base_as: "trained" or "full".
        dtype: of the weights that are not quantised; "auto": as trained, or as stored where nothing was quantised.
        revision: of the adapter's repo.
        is_trainable: whether the adapter trains on.
        arguments: for `from_pretrained` of the base, e.g. `device_map`. A `quantization_config` among them is taken
            instead of what `base_as` says.

    Raises:
        ValueError: no base is named, the base cannot be had as `base_as` asks, a file is missing or damaged, or the
            adapter does not fit the base.
        OSError: a file is missing, or the Hub cannot be reached.
    """
    folder = adapter_folder(path, revision)
    config = read_config(folder)
    named = str(base) if base is not None else config.get("base_model_name_or_path")
    if not named:
        raise ValueError(f"'{path}' does not name its base model; pass base=.")
    if base is None and config.get("revision"):
        arguments.setdefault("revision", config["revision"])  # of the base, as peft's own AutoPeftModel takes it
    trained = load_base(named, config, folder, base_as=base_as, dtype=dtype, **arguments)
    try:
        model = PeftModel.from_pretrained(trained, str(folder), is_trainable=is_trainable)
    except RuntimeError as error:  # torch's word for tensors of another shape
        raise ValueError(f"'{path}' does not fit '{named}': {error}") from error
    model.peft_config["default"].base_model_name_or_path = named  # what was loaded, for the config of an export
    return model if is_trainable else model.eval()


def adapter_folder(path: str | os.PathLike, revision: str | None = None) -> Path:
    """`path` itself if it is a folder, otherwise a copy of that Hub repo's adapter.

    Raises:
        ValueError: neither a folder nor the name of a repo.
    """
    if os.path.isdir(path):
        return Path(path)
    try:
        patterns = [CONFIG_FILE, WEIGHTS_FILE]
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ValueError(f"path='{path}' is neither a folder nor a Hub repo; give one with {CONFIG_FILE}.") from error


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
        ValueError: it is no JSON object.
        OSError: there is none.
    """
    try:
        config = read_json_text(Path(folder, CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{Path(folder, CONFIG_FILE)}' is not JSON: {error}. Fetch or save it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"'{Path(folder, CONFIG_FILE)}' holds no JSON object.")
    return config
