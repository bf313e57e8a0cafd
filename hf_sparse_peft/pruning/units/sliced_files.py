"""Files of sliced models: weights of unequal blocks, which no config can say, beside what the blocks keep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ...hub.folders import staged_folder
from ...tuners.shared.file_check import CONFIG_FILE, read_json
from ...utils.file_writing import is_temporary
from .kept_axes import cut_structures, full_model, kept_of, model_class
from .kept_units import KeptUnits
from .slicing import slice_model
from .structure import CHANNELS, HEADS, structures_of

KEPT_FILE = "kept_units.safetensors"
"""Beside the weights of a sliced model, and beside adapters that were trained on it."""


def save_sliced(model: nn.Module, folder: str | os.PathLike, **arguments: Any) -> Path:
    """`model.save_pretrained(folder, **arguments)`, with the kept units of `slice_model` in `kept_units.safetensors`.

    A new or empty folder has all of it or nothing. In one that holds something, the kept units go first and come last:
    a process that is killed in between leaves a folder that `load_sliced` refuses, and saving again mends it.

    Returns: the folder, for `load_sliced`; for `from_pretrained` too, where the config says what was cut.

    Raises:
        ValueError: the model was not sliced, or has an adapter.
    """
    kept = kept_units_of(model)
    if kept is None:
        raise ValueError("The model was not sliced; save it by save_pretrained.")
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise ValueError(
            "The model has an adapter. Save the sliced base before get_peft_model, or model.unload() of it; the "
            "adapter by its own save_pretrained, and its kept units by save_kept_units."
        )
    place = Path(folder)
    holds = place.is_dir() and any(not is_temporary(entry) for entry in place.iterdir())
    if holds or arguments.get("push_to_hub"):  # which takes the folder's name for the repository's
        (place / KEPT_FILE).unlink(missing_ok=True)
        model.save_pretrained(place, **arguments)
        kept.save(place / KEPT_FILE)
        return place
    with staged_folder(place) as stage:
        model.save_pretrained(stage, **arguments)
        kept.save(stage / KEPT_FILE)
    return place


def load_sliced(folder: str | os.PathLike, model_class_: type | None = None, **arguments: Any) -> PreTrainedModel:
    """The model that `save_sliced` wrote, by its class's `from_pretrained(folder, **arguments)`.

    The layers are cut before they get weights, so that no more than the small model is ever in memory, and
    `quantization_config` quantises what is left (QLoRAM).

    Args:
        folder: a local folder.
        model_class_: the class to load; None: the one that was saved.
        arguments: for `from_pretrained`.

    Raises:
        ValueError: no or damaged kept units, units that do not belong to the config, or weights of other shapes.
    """
    file = Path(folder) / KEPT_FILE
    if not file.is_file():
        raise ValueError(f"'{folder}' has no {KEPT_FILE}: it is no folder of save_sliced. Use from_pretrained.")
    kept = KeptUnits.load(file)
    config = AutoConfig.from_pretrained(folder)
    cls = model_class_ or model_class(config)
    model, _ = full_model(config)
    if _is_small_already(model, kept):
        loaded = cls.from_pretrained(folder, **arguments)
        loaded.kept_units = kept
        return loaded
    cut_structures(model, kept)

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        slice_model(self, kept)

    sliced = type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
    try:
        loaded, info = sliced.from_pretrained(folder, output_loading_info=True, **arguments)
    except RuntimeError as error:
        raise ValueError(f"'{folder}': its weights do not have the shapes that {KEPT_FILE} says: {error}") from error
    wrong = [*info.get("mismatched_keys", ()), *info.get("missing_keys", ())]
    if wrong:
        raise ValueError(f"'{folder}': '{wrong[0]}' is missing, or has another shape than {KEPT_FILE} says.")
    loaded.__class__ = cls
    return loaded


def _is_small_already(model: nn.Module, kept: KeptUnits) -> bool:
    """Whether the config says what was cut."""
    kinds = [kind for kind in (HEADS, CHANNELS) if any(kept_of(kept, block, kind) is not None for block in kept.blocks)]
    structures = {one.name: one for one in structures_of(model, kinds)} if kinds else {}
    return all(
        block in structures and structures[block].units(kind) == len(kept.blocks[block].units(kind))
        for block in kept.blocks
        for kind in kinds
    )


def save_kept_units(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write the kept units of a sliced model beside an adapter that was trained on it, for `recover_adapter`.

    Raises:
        ValueError: the model was not sliced.
    """
    kept = kept_units_of(model)
    if kept is None:
        raise ValueError("The model was not sliced, so that there are no kept units to save.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    kept.save(Path(folder) / KEPT_FILE)
    return Path(folder) / KEPT_FILE


def kept_units_of(model: nn.Module) -> KeptUnits | None:
    """What `slice_model` kept of a model, below an adapter too; None: it was not sliced."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "kept_units", None)


def find_kept(adapter: Any, folder: Path) -> KeptUnits | None:
    """The kept units of the base that an adapter was trained on: the model's, those beside the adapter, or those beside
    the base that it names, where that is a local folder."""
    if isinstance(adapter, nn.Module):
        return kept_units_of(adapter)
    base = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    for place in (folder, Path(base) if base else folder):
        if (place / KEPT_FILE).is_file():
            return KeptUnits.load(place / KEPT_FILE)
    return None
