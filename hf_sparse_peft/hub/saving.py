"""Saving adapters of this package, with their card: every file whole, whatever happens in between."""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftMixedModel, PeftModel, peft_model
from transformers import PreTrainedModel, modeling_utils

from ..training.run_record import RunRecord
from ..training.support_picture import draw_run
from ..tuners.shared.config import AdapterConfig
from ..tuners.shared.file_check import CONFIG_FILE, OPTIONS, WEIGHTS_FILE, read_adapter
from ..utils.checksums import save_checked
from ..utils.file_length import read_safetensors
from ..utils.file_writing import whole_file
from .card import adapter_card
from .folders import ADAPTER_FILES, staged_files, staged_folder

PICTURE = "training.png"
"""Name of the run's picture beside the card."""


def save_adapter(
    model: PeftModel,
    path: str | os.PathLike,
    *,
    adapter_name: str = "default",
    base_model: str | None = None,
    run: RunRecord | None = None,
    **card_arguments: Any,
) -> Path:
    """Write `adapter_model.safetensors`, `adapter_config.json` and the card `README.md` into the folder `path`.

    A new folder appears whole or not at all. An adapter of this type that is there is replaced file by file; other
    files beside it stay. Files lie in `path` itself whatever the adapter's name. `base_model` names the base in card
    and config, in place of the name that the config has: what its users load. With `run`, the record of the run, its
    picture lies beside the card (`training.png`, needs matplotlib). `card_arguments` are the others of `adapter_card`.
    Returns the folder.

    Raises:
        ValueError: `model` is no PeftModel with an adapter of this package of that name, or `path` is a file or a
            folder that holds something else than an adapter of its type.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"model is a {type(model).__name__}, not a PeftModel. Wrap the base with get_peft_model; adapters of a "
            "plain transformers model are saved by its own save_pretrained."
        )
    if run is not None:
        card_arguments = {"run": run, "picture": PICTURE, **card_arguments}
    card = adapter_card(model, adapter_name=adapter_name, base_model=base_model, **card_arguments)
    with staged_folder(path, model.peft_config[adapter_name].peft_type.value) as stage:
        model.save_pretrained(str(stage), selected_adapters=[adapter_name])
        if adapter_name != "default":  # peft puts other names into a folder of their own
            inner = stage / adapter_name
            for file in list(inner.iterdir()):
                os.replace(file, stage / file.name)
            shutil.rmtree(inner)
        missing = [name for name in ADAPTER_FILES if not (stage / name).is_file()]
        if missing:
            raise ValueError(f"peft wrote no {missing[0]} for adapter '{adapter_name}'; is this the main process?")
        if base_model:
            _name_base(stage / ADAPTER_FILES[0], base_model)
        if run is not None and card_arguments["picture"] == PICTURE:
            draw_run(run.log, run.support, stage / PICTURE, run.title)
        write_card(card, stage)
    return Path(path)


def _name_base(file: Path, base_model: str) -> None:
    # Only now: while it writes the weights, peft compares the vocabulary with that of the base that the config names.
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": base_model}, indent=2, sort_keys=True))


def write_card(card: ModelCard, folder: Path) -> None:
    """Write `README.md`; a disk that has no room for it costs the card, not the adapter beside it."""
    try:
        with whole_file(folder / "README.md") as file:
            card.save(file)
    except OSError as error:
        warnings.warn(f"The adapter has no card: README.md could not be written ({error}).", stacklevel=3)


def write_checksums(path: str | os.PathLike) -> Path:
    """Check an adapter folder whose weights another program wrote, without checksums, and write them.

    Loaders refuse weights of an adapter of this package without checksums: nobody can tell whether their values are
    those that were saved. Whoever wrote them on purpose says so by this call. Returns the folder.

    Raises:
        ValueError: as of `check_adapter`; weights that have checksums, too, have to match them.
    """
    folder = Path(path)
    config = read_adapter(folder / CONFIG_FILE, folder / WEIGHTS_FILE, checked=False).config
    tensors, metadata = read_safetensors(folder / WEIGHTS_FILE)
    with whole_file(folder / WEIGHTS_FILE) as file:
        save_checked(tensors, file, {"format": "pt", **metadata, **_described(config)})
    return folder


def register_saving() -> None:
    """Let `PeftModel.save_pretrained` write adapters of this package into a temporary folder first and rename file by
    file: peft writes weights and config in place, and a run that is killed meanwhile leaves half a file in its newest
    checkpoint. Pickled weights (`safe_serialization=False`) are refused with a ValueError. Transformers' own
    `save_pretrained`, of a model with an adapter of this package, writes checksums too. Other adapters are saved as
    before; the second call does nothing."""
    _register_saving_of_transformers()
    original = PeftModel.save_pretrained
    if getattr(original, "_whole_files", False):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        selected = given.get("selected_adapters") or list(self.peft_config)
        ours = any(isinstance(self.peft_config.get(name), AdapterConfig) for name in selected)
        if ours and not given.get("safe_serialization", True):
            raise ValueError(
                "safe_serialization=False writes adapter_model.bin, which is pickled: no loader of this package reads "
                "it, because reading it runs what is in it. Leave safe_serialization at True."
            )
        if not ours or not given.get("is_main_process", True) or os.path.isfile(save_directory):
            original(self, save_directory, *args, **kwargs)
            return
        with staged_files(Path(save_directory)) as stage, _saving(self, stage):
            card = Path(save_directory) / "README.md"
            if card.is_file():
                shutil.copyfile(card, stage / card.name)
            original(self, str(stage), *args, **kwargs)

    save_pretrained._whole_files = True
    PeftModel.save_pretrained = save_pretrained
    # peft gives no way to add to the metadata of the file.
    peft_model.safe_save_file = functools.partial(_save_weights, peft_model.safe_save_file)


def _register_saving_of_transformers() -> None:
    original = PreTrainedModel.save_pretrained
    if getattr(original, "_with_checksums", False):
        return

    @functools.wraps(original)
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        with _saving(self, Path(save_directory)):
            return original(self, save_directory, *args, **kwargs)

    save_pretrained._with_checksums = True
    PreTrainedModel.save_pretrained = save_pretrained
    modeling_utils.safe_save_file = functools.partial(_save_weights, modeling_utils.safe_save_file)


_SAVING: ContextVar[tuple[Any, Path] | None] = ContextVar("model being saved, and where to", default=None)


@contextmanager
def _saving(model: PeftModel | PeftMixedModel | PreTrainedModel, folder: Path) -> Iterator[None]:
    token = _SAVING.set((model, folder))
    try:
        yield
    finally:
        _SAVING.reset(token)


def _save_weights(original: Callable, tensors: dict[str, Any], file: str | os.PathLike, *args: Any, **kwargs: Any):
    """`safe_save_file` of peft and transformers; with checksums of tensors and options where an adapter of this package
    is saved."""
    config = _config_of(Path(file).parent) if _SAVING.get() is not None else None
    if not isinstance(config, AdapterConfig):
        return original(tensors, file, *args, **kwargs)
    metadata = inspect.signature(original).bind(tensors, file, *args, **kwargs).arguments.get("metadata") or {}
    return save_checked(tensors, file, {**metadata, **_described(config)})


def _config_of(folder: Path) -> Any:
    """Config of the adapter whose weights are written into that folder, as a part of what is being saved."""
    model, whole = _SAVING.get()
    if isinstance(model, PreTrainedModel):  # one with adapters of its own, or the base of a PeftModel
        own = getattr(model, "_hf_peft_config_loaded", False)
        return model.peft_config[model.active_adapters()[0]] if own else None
    inside = folder.relative_to(whole).as_posix()
    return model.peft_config.get("default" if inside == "." else inside)


def _described(config: AdapterConfig) -> dict[str, str]:
    return {OPTIONS: json.dumps(config.option_checksums(), sort_keys=True)}
