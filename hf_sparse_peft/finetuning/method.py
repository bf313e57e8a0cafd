"""The method that a run's options name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .. import methods
from ..methods import Method
from ..training.optimizers import AgedAdamWSpec
from ..training.recipe_files import checked_options
from ..tuners import SparseLoraConfig
from .options import AdapterArguments

_METHODS_OF_RULES = {"regrow": "spiel-ag", "prune": "gradual-pruning", "allocate": "adalora"}
FIRST_RUN_RATE = 0.01
"""Learning rate of full fine-tuning, as a fraction of an adapter's."""


def choose_method(options: AdapterArguments, defaults: Mapping[str, Any], seed: int) -> Method:
    """`methods.get(options.method, **options.method_options)` or, without a name, SparseLora as `options.adapter`
    describes it. `defaults` (task, target modules) and `seed` hold where these say nothing.

    Raises:
        ValueError: an unknown method or option, and names those that are alike; a method that leaves another base.
    """
    if not options.method:
        given = checked_options(options.adapter, SparseLoraConfig, "adapter")
        config = SparseLoraConfig(**{"seed": seed, **defaults, **given})
        if config.has_support and config.optimizer is None:
            config.optimizer = AgedAdamWSpec()
        return Method(config)
    if methods.describe(options.method).changes_base:
        raise ValueError(
            f"method={options.method!r} leaves a smaller base beside its adapter, and this run saves adapters alone. "
            "Train it in Python, as 'Smaller bases' in docs/pruning.md shows."
        )
    method = methods.get(options.method, **{**method_defaults(options.method, defaults), **options.method_options})
    if "seed" not in options.method_options and hasattr(method.config, "seed"):
        method.config.seed = seed
    return method


def method_defaults(name: str, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`defaults` for a method: a language model's task on all linear layers, if None; no targets where norms train or
    the method keeps its paper's places."""
    defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"} if defaults is None else defaults
    info = methods.describe(name)
    placed = info.keeps_places or info.upstream == "LNTuningConfig"
    return {key: value for key, value in defaults.items() if key != "target_modules" or not placed}


def method_of_card(method: Method) -> dict[str, str | None]:
    """`method` and `paper` of the card: what was asked for by name, or what the adapter's schedules are."""
    if method.info:
        return {"method": method.info.name, "paper": method.paper}
    used = [name for rule, name in _METHODS_OF_RULES.items() if rule in method.config.rule_types]
    papers = [methods.describe(name).paper for name in used]
    return {"method": " + ".join(used) or "sparse-lora", "paper": "; ".join(papers) or None}


def full_fine_tuning(
    load_dense: Callable[[], PreTrainedModel], args: TrainingArguments, **data: Any
) -> Callable[[], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """For `Method.prepare`: full fine-tuning of a dense base on the run's own data, steps and seed, at a hundredth of
    the adapter's learning rate; `data` are Trainer's dataset and collator."""

    def run() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        base = load_dense()
        before = {name: tensor.detach().cpu().clone() for name, tensor in base.state_dict().items()}
        own = copy.copy(args)
        own.output_dir, own.save_strategy = str(Path(args.output_dir) / "first_run"), SaveStrategy.NO
        own.learning_rate = args.learning_rate * FIRST_RUN_RATE
        Trainer(model=base, args=own, **data).train()
        return before, base.cpu().state_dict()

    return run
