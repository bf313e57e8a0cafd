"""Reading what is to be examined; what cannot be read is a finding itself."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import TrainingArguments

from .. import methods
from ..training.recipe_files import read_recipe
from ..tuners import SparseLoraConfig
from ..utils.option_types import check_value
from .findings import Finding, from_message
from .memory import adapter_config

_ARGUMENTS = {field.name: field for field in dataclasses.fields(TrainingArguments)}


def read_adapter_config(given: Any) -> tuple[PeftConfig | None, list[Finding]]:
    """The config of an adapter: a config, a method or its name, a dict, an `adapter_config.json` or its folder; None
    where it cannot be made, and what was said.

    Raises:
        TypeError: none of these.
    """
    if isinstance(given, (PeftConfig, methods.Method)) or (
        isinstance(given, str) and given in (*methods.names(), "lora")
    ):
        return adapter_config(given)[1], []
    if isinstance(given, (str, Path)):
        file = Path(given)
        file = file / "adapter_config.json" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(
                f"adapter_config={str(given)!r} is neither a file, a folder with an adapter_config.json nor a method's "
                "name (methods.names())."
            )
        given = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else read_recipe(file)
    if not isinstance(given, Mapping):
        raise TypeError(
            f"adapter_config is a {type(given).__name__}. Pass a config, a method or its name, a dict, or a file."
        )
    options = dict(given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            kind = options.get("peft_type")
            made = PeftConfig.from_peft_type(**options) if kind else SparseLoraConfig(**options)
        except (ValueError, TypeError, KeyError) as error:
            return None, [from_message("error", str(error), "adapter_config")]
    return made, [from_message("error", str(one.message), "adapter_config") for one in caught]


def read_arguments(given: Any) -> tuple[TrainingArguments | None, list[Finding]]:
    """The arguments of a run: those of a Trainer, a dict of them, a YAML file; None where they cannot be made, and what
    was said."""
    if given is None or isinstance(given, TrainingArguments):
        return given, []
    options = dict(read_recipe(given) if isinstance(given, (str, Path)) else given)
    found, own = [], {}
    for name, value in options.items():
        if name in _ARGUMENTS:
            own[name] = value
            continue
        close = difflib.get_close_matches(name, _ARGUMENTS, n=1, cutoff=0.8)
        if close:
            found.append(
                Finding("error", name, f"TrainingArguments has no {name}: it has no effect.", f"Was {close[0]} meant?")
            )
    own = {"output_dir": "runs", "report_to": [], **own}
    try:
        for name in ("max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size"):
            if name in own:
                check_value(own[name], {"max_steps": int, "per_device_train_batch_size": int}.get(name, float), name)
        return TrainingArguments(**own), found
    except (ValueError, TypeError) as error:
        return None, [*found, from_message("error", str(error), "training_arguments")]


def steps_of(arguments: TrainingArguments | None, examples: int | None) -> int | None:
    """Optimizer steps of a run, None where nobody can say."""
    if arguments is None:
        return None
    if arguments.max_steps > 0:
        return arguments.max_steps
    if examples is None:
        return None
    a_step = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    return math.ceil(arguments.num_train_epochs * math.ceil(examples / a_step))
