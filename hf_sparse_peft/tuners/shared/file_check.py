"""Reading an adapter's files whole, and checking them against each other, before anything is built for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ...utils.checksums import CHECKSUMS
from ...utils.file_length import read_safetensors
from ...utils.json_text import read_json_text
from ...utils.parts import UnknownPart
from .config import AdapterConfig
from .registration import TUNERS
from .tensor_checks import check_module, check_numbers

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", SAFETENSORS_WEIGHTS_NAME
PREFIX = "base_model.model."
LONGEST_SIDE = 2**31
"""No weight has as many rows or columns."""
OPTIONS = "options"
"""Key of the metadata of weights: the CRC-32 of each option that they were saved with, as JSON."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that was read and found whole."""

    path: Path | str
    """What errors name: the weights' file."""
    config: AdapterConfig
    modules: dict[str, dict[str, torch.Tensor]]
    """Module name in the base -> name of the tuner's tensor -> the tensor."""
    sizes: dict[str, tuple[int, int, Any]]
    """Module name -> rows and columns of its weight, and what the tuner's `tensor_specs` takes as sizes."""
    others: dict[str, torch.Tensor]
    """By key: heads, biases, embeddings, state of running schedules."""
    renamed: bool = False
    """Whether upstream gives modules of an older architecture other names on the way into the model."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by the file's keys."""
        own = {tensor_key(name, kind): t for name, held in self.modules.items() for kind, t in held.items()}
        return {**own, **self.others}


_LOADED: ContextVar[AdapterFile | None] = ContextVar("adapter file being loaded", default=None)


def file_being_loaded() -> AdapterFile | None:
    """The file that this thread is loading an adapter from: an injection for it makes what it holds, nothing else."""
    return _LOADED.get()


@contextmanager
def loading(file: AdapterFile | None) -> Iterator[None]:
    """Within the block, `file` is the one being loaded."""
    token = _LOADED.set(file)
    try:
        yield
    finally:
        _LOADED.reset(token)


def tensor_key(name: str, kind: str) -> str:
    """Key of a tensor of the module `name` in an adapter file."""
    return ".".join(part for part in ("base_model.model", name, kind) if part)


def model_class(peft_type: Any) -> Any:
    """The tuner of this package with that `peft_type`, if it is one."""
    return TUNERS.get(peft_type) if isinstance(peft_type, str) else None


def read_adapter(config_file: Path, weights_file: Path, *, checked: bool = True) -> AdapterFile:
    """Read both files and check them, without a base model; with `checked`, checksums have to be there.

    Raises:
        ValueError: a file is missing, truncated, unreadable or damaged, or they do not belong together; names the file
            and the option or tensor.
    """
    config = read_config(config_file)
    tensors, metadata = _read_weights(weights_file, checked)
    file = check_tensors(tensors, config, weights_file)
    _check_belongs(config, config_file, metadata, weights_file)
    return file


def _check_belongs(config: AdapterConfig, config_file: Path, metadata: Mapping[str, str], weights_file: Path) -> None:
    """Compare the options with those that the tensors were saved with, if the file says so.

    Raises:
        ValueError: an option is another; names it.
    """
    if OPTIONS not in metadata:
        return
    here = config.option_checksums()
    try:
        saved = dict(read_json_text(metadata[OPTIONS]))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"'{weights_file}' does not say which options it was saved with: its metadata has '{OPTIONS}'={error}. "
            "Fetch or save it again."
        ) from error
    known = {one.name for one in fields(config)}
    for name in sorted(known & {*here, *saved}):
        if isinstance(getattr(config, name), UnknownPart):
            continue  # what it is is not known here
        if here.get(name) != saved.get(name):
            raise ValueError(
                f"'{config_file}' has {name}={getattr(config, name, None)!r}, and the tensors of '{weights_file.name}' "
                "beside it were saved with another: one of the two files was changed or is of another save. Put the "
                "config back that was saved with them; to use another option on purpose, pass config= when loading."
            )


def read_json(file: Path) -> dict[str, Any]:
    """The options in `adapter_config.json`.

    Raises:
        ValueError: it is not there, or no JSON object.
    """
    if not file.is_file():
        raise ValueError(f"'{file.parent}' has no {file.name}; is this an adapter folder?")
    try:
        given = read_json_text(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not JSON: {error}. Fetch or save it again.") from error
    if not isinstance(given, dict):
        raise ValueError(f"'{file}' holds a {type(given).__name__} where an object of options is due.")
    return given


def read_config(file: Path) -> AdapterConfig:
    """The config in `adapter_config.json`; options that this release does not know are its `unknown_options`.

    Raises:
        ValueError: no such file, no JSON object, another tuner's, or an option out of range; names the file.
    """
    given = read_json(file)
    found = given.get("peft_type")
    if model_class(found) is None:
        raise ValueError(
            f"'{file}' has peft_type={found!r}, and this package reads {', '.join(sorted(TUNERS))}. peft's "
            "own adapters are read by peft alone."
        )
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[found]
    try:
        return cls(**given)
    except ValueError as error:
        raise ValueError(f"In '{file}': {error}") from error


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: the file is missing, truncated or unreadable. Pickled files are never read.
    """
    return _read_weights(file)[0]


def _read_weights(file: Path, checked: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not file.is_file():
        raise ValueError(
            f"'{file.parent}' has no {file.name}: copy or save it again. An adapter_model.bin is pickled and never "
            "read, because reading it runs what is in it; have it saved with safetensors."
        )
    tensors, metadata = read_safetensors(file)
    if checked and CHECKSUMS not in metadata:
        raise ValueError(
            f"The metadata of '{file}' has no checksums ('{CHECKSUMS}'): nobody can tell whether its tensors are those "
            "that were saved. Fetch or save it again; if another program wrote it on purpose, "
            f"hub.write_checksums({str(file.parent)!r}) makes it an adapter of this package."
        )
    return tensors, metadata


def check_tensors(tensors: Mapping[str, torch.Tensor], config: AdapterConfig, source: Path | str) -> AdapterFile:
    """Check a file's tensors against its config: nothing that is not the adapter's, nothing missing or damaged.

    Raises:
        ValueError: names `source` and the tensor.
    """
    model_cls = model_class(config.peft_type)
    layer_cls = model_cls.tuner_layer_cls
    modules: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        path, _, kind = key.rpartition(".")
        if isinstance(source, Path) and not key.startswith(PREFIX):
            raise ValueError(
                f"'{key}' in '{source}' has no place in an adapter file, whose tensors are named '{PREFIX}...'. Save "
                "the adapter again with save_pretrained."
            )
        name = "" if path == "base_model.model" else path.removeprefix(PREFIX)
        if kind in layer_cls.saved_names:
            modules.setdefault(name, {})[kind] = tensor
        elif kind.startswith(model_cls.prefix) and not layer_cls.is_training_state(kind):
            raise ValueError(f"'{key}' in '{source}' is no tensor that this release knows. Update hf-sparse-peft.")
        else:
            others[key] = tensor
            check_numbers(tensor, key, source, trained=False)
    if not modules:
        raise ValueError(f"'{source}' holds no tensor of a {config.peft_type.value} adapter; is it another's file?")
    for key in others:
        if not layer_cls.is_training_state(key.rpartition(".")[2]) and not _travels_along(key, config, modules):
            raise ValueError(
                f"'{key}' in '{source}' is not the adapter's: its config trains no such tensor (modules_to_save="
                f"{config.modules_to_save}, bias={config.bias!r}), and loading it would replace a weight of the base. "
                "Use the config saved with the file, or save the adapter again."
            )
    sizes = {name: _check_module(layer_cls, name, modules[name], config, source) for name in sorted(modules)}
    file = AdapterFile(source, config, modules, sizes, others)
    model_cls.check_file(file)
    return file


def _check_module(
    layer_cls: Any, name: str, held: dict[str, torch.Tensor], config: AdapterConfig, source: Path | str
) -> tuple[int, int, Any]:
    """Rows, columns and sizes of the module of that name, all of its tensors checked.

    Raises:
        ValueError: names `source` and the tensor.
    """
    try:
        rows, cols, sizes = layer_cls.read_sizes(config, name, held)
        if not (0 <= rows < LONGEST_SIDE and 0 <= cols < LONGEST_SIDE):
            raise ValueError(f"the tensors of '{name}' say that its weight is {rows} x {cols}; the file is damaged.")
        specs = layer_cls.tensor_specs(config, name, rows, cols, sizes)
        check_module(held, specs, partial(tensor_key, name), source)
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"In '{source}': {error}") from error
    return rows, cols, sizes


def is_head(key: str, modules_to_save: list[str] | None) -> bool:
    """Whether the key belongs to a module that `modules_to_save` names, as upstream looks for them."""
    parts = key.removeprefix(PREFIX).split(".")
    places = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(place.endswith(name) for place in places for name in modules_to_save or ())


def _travels_along(key: str, config: AdapterConfig, modules: Mapping[str, Any]) -> bool:
    path, _, kind = key.rpartition(".")
    name = path.removeprefix(PREFIX)
    if kind == "bias" and config.bias == "all":
        return True
    if kind == "bias" and config.bias != "none" and name.endswith("base_layer"):
        return name.removesuffix("base_layer").removesuffix(".") in modules
    if key in (config.saved_base_weights or ()):
        return True
    inside = {"original_module", "base_layer"} & set(key.split("."))
    return not inside and is_head(key, config.modules_to_save)
