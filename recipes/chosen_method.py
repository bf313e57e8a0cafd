"""The method that a recipe trains: one of the package's by name, or the adapter that its YAML describes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_sparse_peft import AgedAdamWSpec, SparseLoraConfig, hub, methods
from hf_sparse_peft.methods import Method

SCHEDULE_METHODS = {"regrow": "spiel-ag", "prune": "gradual-pruning", "allocate": "adalora"}
FIRST_RUN_RATE = 0.01
"""Learning rate of full fine-tuning, as a fraction of an adapter's."""


def chosen_method(name: str, options: dict[str, Any], adapter: dict[str, Any], seed: int) -> Method:
    """`methods.get(name, **options)` on all linear layers, or, without a name, SparseLora as `adapter` describes it."""
    if not name:
        config = SparseLoraConfig(**{"task_type": "CAUSAL_LM", "seed": seed, **adapter})
        if config.has_support and config.optimizer is None:
            config.optimizer = AgedAdamWSpec()
        return Method(config)
    method = methods.get(name, **{**common_options(name), **options})
    if "seed" not in options and hasattr(method.config, "seed"):
        method.config.seed = seed
    return method


def common_options(name: str) -> dict[str, Any]:
    """What every method of a language model is given: its task, and all linear layers but where norms train."""
    norms = methods.describe(name).upstream == "LNTuningConfig"
    return {"task_type": "CAUSAL_LM", **({} if norms else {"target_modules": "all-linear"})}


def method_card(method: Method) -> dict[str, str | None]:
    """`method` and `paper` of the card: what was asked for by name, or what the adapter's schedules are."""
    if method.info:
        return {"method": method.info.name, "paper": method.paper}
    used = [name for rule, name in SCHEDULE_METHODS.items() if rule in method.config.rule_types]
    papers = [methods.describe(name).paper for name in used]
    return {"method": " + ".join(used) or "sparse-lora", "paper": "; ".join(papers) or None}


def save_adapter(model: PeftModel, folder: Path, **card: Any) -> None:
    """Adapter and card; adapters that are not sparse_lora are saved by peft, with peft's card."""
    if isinstance(model.peft_config["default"], SparseLoraConfig):
        hub.save_adapter(model, folder, **card)
    else:
        model.save_pretrained(str(folder))


def first_run(
    load_base: Callable[[], PreTrainedModel], args: TrainingArguments, **data: Any
) -> Callable[[], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """For `Method.prepare`: full fine-tuning of a dense base on the recipe's own data, steps and seed, at a hundredth
    of the adapter's learning rate; `data` are Trainer's dataset and collator."""

    def run() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        base = load_base()
        before = {name: tensor.detach().cpu().clone() for name, tensor in base.state_dict().items()}
        own = copy.copy(args)
        own.output_dir, own.save_strategy = str(Path(args.output_dir) / "first_run"), SaveStrategy.NO
        own.learning_rate = args.learning_rate * FIRST_RUN_RATE
        Trainer(model=base, args=own, **data).train()
        return before, base.cpu().state_dict()

    return run
