"""Loading adapters whole or not at all, by upstream's own calls: `PeftModel.from_pretrained`, `PeftModel.load_adapter`
and transformers' `load_adapter` and `add_adapter`.

They read files after they have changed the model, leave what they changed when a file is refused, unpickle, and
transformers assigns tensors past all checks of peft's. So each is led through here: for an adapter of this package the
file is read and checked first, the call runs with the file at hand, and when it fails the model is put back. Other
adapters are loaded as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftMixedModel, PeftModel, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .file_check import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    AdapterFile,
    check_tensors,
    file_being_loaded,
    loading,
    model_class,
    read_adapter,
    read_json,
    read_tensors,
)
from .names import check_adapter_name
from .registration import TUNERS
from .rollback import unchanged_on_error

_HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only")


def guard_loading() -> None:
    """Lead upstream's loading calls through the checks; does nothing the second time."""
    if getattr(PeftModel.load_adapter, "_checks_files", False):
        return
    from_pretrained = PeftModel.from_pretrained.__func__
    PeftModel.from_pretrained = classmethod(_guarded(from_pretrained, _from_pretrained))
    PeftMixedModel.from_pretrained = classmethod(_guarded(PeftMixedModel.from_pretrained.__func__, _from_pretrained))
    PeftModel.load_adapter = _guarded(PeftModel.load_adapter, _load_adapter)
    PeftAdapterMixin.load_adapter = _guarded(PeftAdapterMixin.load_adapter, _load_into_transformers)
    PeftAdapterMixin.add_adapter = _guarded(PeftAdapterMixin.add_adapter, _add_to_transformers)


def _guarded(original: Callable, replacement: Callable) -> Callable:
    @functools.wraps(original)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        return replacement(original, self, *args, **kwargs)

    call._checks_files = True
    return call


def _from_pretrained(original, cls, model, model_id, adapter_name="default", *args, **kwargs):
    file = _open(model_id, kwargs)
    if file is None:
        return original(cls, model, model_id, adapter_name, *args, **kwargs)
    check_adapter_name(adapter_name, model_class(file.config.peft_type).prefix, model)
    with _whole_or_not(model, file, kwargs.get("key_mapping")):
        return original(cls, model, model_id, adapter_name, *args, **kwargs)


def _load_adapter(original, self, model_id, adapter_name, *args, **kwargs):
    if file_being_loaded() is not None:  # from_pretrained, which has checked the file
        return original(self, model_id, adapter_name, *args, **kwargs)
    held = self.peft_config.get(adapter_name)
    file = _open(model_id, kwargs, held)
    if file is None:
        return original(self, model_id, adapter_name, *args, **kwargs)
    if held is not None and held.peft_type != file.config.peft_type:
        raise ValueError(
            f"'{file.path}' holds a {file.config.peft_type.value} adapter, and adapter_name={adapter_name!r} is of "
            f"type {held.peft_type.value} here. Load it under another name."
        )
    if held is None:
        check_adapter_name(adapter_name, model_class(file.config.peft_type).prefix, self)
    with _whole_or_not(self, file, kwargs.get("key_mapping")):
        return original(self, model_id, adapter_name, *args, **kwargs)


def _load_into_transformers(original, self, peft_model_id=None, adapter_name=None, *args, **kwargs):
    given = {**_known(kwargs.get("load_config")), **kwargs, **(kwargs.get("adapter_kwargs") or {})}
    place = peft_model_id or given.get("pretrained_model_name_or_path")
    config, tensors = given.get("peft_config"), given.get("adapter_state_dict")
    if isinstance(config, PeftConfig) and tensors is not None:
        file = check_tensors(tensors, config, "adapter_state_dict") if model_class(config.peft_type) else None
    else:
        file = _open(place, given) if place is not None else None
    if file is None:
        return original(self, peft_model_id, adapter_name, *args, **kwargs)
    if given.get("use_safetensors") is False:
        raise ValueError(f"use_safetensors=False asks for a pickled file, and those are never read: '{file.path}'.")
    name = adapter_name or "default"
    check_adapter_name(name, model_class(file.config.peft_type).prefix, self)
    with _whole_or_not(self, file, None):
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in file.tensors.items()}
        try:
            found = original(self, peft_model_id, adapter_name, *args, **kwargs)
        except RuntimeError:  # a head of another shape, which the hooks name
            if name in getattr(self, "peft_config", {}):
                set_peft_model_state_dict(self, tensors, adapter_name=name)
            raise
        # Assigned past peft's hooks until here: loaded again through them, so that all is checked, values are fp32
        # masters and heads are in their places.
        set_peft_model_state_dict(self, tensors, adapter_name=name)
        return found


def _add_to_transformers(original, self, adapter_config, adapter_name=None):
    model_cls = model_class(getattr(adapter_config, "peft_type", None))
    if model_cls is None:
        return original(self, adapter_config, adapter_name)
    check_adapter_name(adapter_name or "default", model_cls.prefix, self)
    with unchanged_on_error(self):
        return original(self, adapter_config, adapter_name)


@contextmanager
def _whole_or_not(model: nn.Module, file: AdapterFile, key_mapping: Mapping[str, str] | None) -> Iterator[None]:
    # Where upstream renames modules of older architectures, only the last check knows their names.
    renamed = bool(key_mapping or getattr(model, "_checkpoint_conversion_mapping", None))
    try:
        with unchanged_on_error(model), loading(replace(file, renamed=renamed)):
            yield
    except KeyError as error:  # how upstream says that a head is not in the file
        key = error.args[0] if error.args else None
        if not isinstance(key, str) or key in file.tensors:
            raise
        raise ValueError(f"'{key}' is missing from '{file.path}'; the file is incomplete.") from error
    except TypeError as error:  # a module that the config beside the file names, and that no adapter can be on
        raise ValueError(f"The adapter of '{file.path}' does not fit this model: {error}") from error


def _known(load_config: Any) -> dict[str, Any]:
    return {} if load_config is None else {**vars(load_config), **(load_config.download_kwargs or {})}


def _open(model_id: Any, options: Mapping[str, Any], held: PeftConfig | None = None) -> AdapterFile | None:
    """The adapter in that folder or repository, read and checked; None if it is none of this package.

    `held` is the config of the adapter that is loaded into: it stands in for one that is not beside the weights.
    """
    config_file = _find(model_id, CONFIG_FILE, options)
    if config_file is None:
        ours = held is not None and model_class(held.peft_type) is not None
        weights = _find(model_id, WEIGHTS_FILE, options) if ours else None
        return None if weights is None else check_tensors(read_tensors(weights), held, weights)
    found, weights = read_json(config_file).get("peft_type"), _find(model_id, WEIGHTS_FILE, options)
    if model_class(found) is None:
        _check_other(found, config_file, weights)
        return None
    return read_adapter(config_file, weights or config_file.with_name(WEIGHTS_FILE))


def _check_other(peft_type: Any, config_file: Path, weights: Path | None) -> None:
    """Refuse a type that no tuner has, and tensors of this package's tuners under the type of another: upstream would
    leave them out and load an adapter of random values."""
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"'{config_file}' has peft_type={peft_type!r}, and no tuner that is installed and imported has that name. "
            "Use the config saved with the adapter."
        )
    try:
        with safe_open(weights, framework="pt") as opened:
            keys = list(opened.keys())
    except (SafetensorError, OSError, TypeError):  # none there, or one that upstream has its own words for
        return
    prefixes = tuple(model_cls.prefix for model_cls in TUNERS.values())
    ours = [key for key in keys if key.rpartition(".")[2].startswith(prefixes)]
    if ours:
        raise ValueError(
            f"'{ours[0]}' in '{weights}' is no tensor of a {peft_type} adapter, which '{config_file}' says it is. Use "
            "the config saved with the file."
        )


def _find(model_id: Any, name: str, options: Mapping[str, Any]) -> Path | None:
    folder = Path(model_id, options.get("subfolder") or "")
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    asked = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
    try:
        return Path(hf_hub_download(str(model_id), name, **asked))
    except (OSError, ValueError):  # no such file or repository, or no way to it: upstream says so in its words
        return None
