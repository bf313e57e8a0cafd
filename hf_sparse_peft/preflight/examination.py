"""Looking at a run's settings before it begins."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import PretrainedConfig, TrainerCallback, TrainingArguments

from ..tuners.shared.live_run import current_trainer
from .checks import CHECKS, Case, check_versions
from .dry_run import adapt_on_meta
from .findings import Diagnosis, Finding, diagnosis_of, from_message
from .meta_base import meta_base, read_model_config
from .settings import read_adapter_config, read_arguments, steps_of


def doctor(
    model: Any,
    adapter_config: Any,
    training_arguments: TrainingArguments | dict[str, Any] | str | None = None,
    *,
    bits: int | None = None,
    examples: int | None = None,
    callbacks: Iterable[TrainerCallback] | None = None,
) -> Diagnosis:
    """What is wrong with the settings of a run, without weights, data or a GPU: each finding with its mend.

    The adapter is made on the meta device and runs there once, and its rules begin a run of that length, so that they
    say themselves what does not fit. Looked at are: targets that match nothing, experts and attention that are left
    out, weights that are shared, layers that do not run; densities that leave a layer without a unit; schedules that
    are longer than the run or round to nothing; a missing runner, another Trainer; optimizers whose state cannot follow
    moves; sharded runs; gradient checkpointing; numbers that start in 16 bits; methods for dense bases on quantised
    ones; versions; options that nobody knows.

    Args:
        model: a transformers model or config, a `config.json` or its folder, a Hub id.
        adapter_config: a config, a method or its name, a dict, an `adapter_config.json` or its folder.
        training_arguments: a Trainer's, a dict of them, or a YAML file; None: what concerns the run is left out.
        bits: of the base's linear layers (4, 8, 16, 32); None: by the model config's `quantization_config` and dtype.
        examples: of the training data, for runs that are counted in epochs.
        callbacks: of the run, where they are known.

    Raises:
        ValueError: no such file, method or architecture.
        TypeError: something else than these.
    """
    base_config = read_model_config(model)
    config, found = read_adapter_config(adapter_config)
    arguments, said = read_arguments(training_arguments)
    found += said
    if config is not None:
        bits = bits_of(base_config) if bits is None else bits
        found += _examine(base_config, config, arguments, steps_of(arguments, examples), bits, callbacks)
    return diagnosis_of(found)


def _examine(
    base_config: PretrainedConfig,
    config: PeftConfig,
    arguments: TrainingArguments | None,
    steps: int | None,
    bits: int,
    callbacks: Iterable[Any] | None,
) -> list[Finding]:
    found = list(check_versions(config))
    base = meta_base(base_config, bits, config)
    try:
        if hasattr(config, "check_runnable"):
            config.check_runnable()
        adapted, told = adapt_on_meta(base, config)
    except (ValueError, TypeError) as error:
        return [*found, from_message("error", str(error), "target_modules")]
    # peft says that some weight is tied, `check_shared_weights` says which.
    told = [message for message in told if "tie_word_embeddings" not in message]
    found += [from_message("warning", message, "target_modules") for message in told]
    case = Case(base, config, adapted, arguments, steps, bits, callbacks)
    return found + [finding for check in CHECKS for finding in check(case)]


def bits_of(config: PretrainedConfig) -> int:
    """Bits that a model of this config is loaded in: by its `quantization_config`, else its dtype."""
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    for bits in (4, 8):
        if stored.get(f"load_in_{bits}bit"):
            return bits
    return 32 if "32" in str(getattr(config, "dtype", None)) else 16


class DoctorCallback(TrainerCallback):
    """`doctor` at the start of a run: warns once, with every error and warning that it finds in the model's active
    adapters and the Trainer's arguments and callbacks.

        Trainer(model=model, args=args, callbacks=[*callbacks_for(model), DoctorCallback()])

    A few seconds at the start of a run, and nothing of the model is touched. `diagnosis` has all findings, notes too.
    """

    def __init__(self) -> None:
        self.diagnosis: Diagnosis | None = None

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Examine the run and warn."""
        if self.diagnosis is not None or model is None or not state.is_world_process_zero:
            return
        trainer = current_trainer()
        callbacks = None if trainer is None else trainer.callback_handler.callbacks
        try:
            self.diagnosis = diagnosis_of(_of_live_model(model, args, state.max_steps, callbacks))
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:  # never in the way of a run
            warnings.warn(f"DoctorCallback could not examine this model: {error}", stacklevel=2)
            return
        found = self.diagnosis.of("error", "warning")
        if found:
            warnings.warn("Before this run:\n" + "\n".join(f"- {finding}" for finding in found), stacklevel=2)


def _of_live_model(model: nn.Module, args: TrainingArguments, steps: int, callbacks: Any) -> list[Finding]:
    while not hasattr(model, "peft_config") and hasattr(model, "module"):
        model = model.module
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    bits = next((bits for bits in (4, 8) if getattr(base, f"is_loaded_in_{bits}bit", False)), None)
    base_config, configs = read_model_config(base), getattr(model, "peft_config", {})
    found: list[Finding] = []
    for name in getattr(model, "active_adapters", None) or configs:
        if not configs[name].inference_mode:
            found += _examine(base_config, configs[name], args, steps, bits or bits_of(base_config), callbacks)
    return found
