"""What the recipes share: options, the base in 4 bits, the method, the run with its figures, and what it leaves.

A recipe is its data, its metric and a config:

    recipe, args = common.begin(__file__, argv, RecipeArguments, TrainingArguments)
    base = common.load_base(AutoModelForCausalLM, name, recipe, args)
    figures = common.fine_tune(__file__, recipe, args, base, data=..., measure=..., shown=..., source=..., defaults=...)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import _quiet  # noqa: F401
import datasets
import numpy as np
import torch
from peft import PeftModel
from reporting import print_table
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_sparse_peft import RunReportCallback, SupportTelemetryCallback, finetuning, hub
from hf_sparse_peft.finetuning import AdapterArguments, choose_method, trainer_for
from hf_sparse_peft.finetuning.base import base_options, load_base, prepared  # noqa: F401
from hf_sparse_peft.finetuning.data import head
from hf_sparse_peft.finetuning.run import Figures
from hf_sparse_peft.methods import Method
from hf_sparse_peft.training import draw_run
from hf_sparse_peft.training.recipe_files import parse_recipe
from hf_sparse_peft.tuners.shared.config import AdapterConfig

HERE = Path(__file__).parent
# Relative, so that an adapter names its base without naming the machine it was trained on.
DEMO_BASE = os.path.join(".", os.path.relpath(HERE / "demo_base"))


@dataclass
class RecipeArguments(AdapterArguments):
    """What is trained, on how much; without a base, on a small one that needs no network."""

    base_model: str = field(
        default="", metadata={"help": "Hub id of the base, for the card and those who load a pushed adapter."}
    )


@dataclass
class DataArguments(RecipeArguments):
    """And on which data."""

    dataset_name: str = field(default="", metadata={"help": "Dataset; empty: made by this recipe, without network."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, where it has several."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str = field(default="", metadata={"help": "Split to measure on; empty: a part of `train_split`."})


def begin(script: str, argv: Sequence[str], *types: type) -> tuple[Any, ...]:
    """Options of a YAML file (the one beside `script`, if `argv` names none) and of `argv` over it, as objects of the
    dataclasses `types`, the last of which is `TrainingArguments` or derived from it; sets the seeds.

    Raises:
        SystemExit: a mistake in the options, in one line.
    """
    # transformers asks to be told when bf16 has no GPU to run on.
    below = {"use_cpu": not torch.cuda.is_available()}
    try:
        found = parse_recipe(types, argv, default=Path(script).with_suffix(".yaml"), below=below)
    except ValueError as error:
        raise SystemExit(f"{Path(script).name}: {error}") from error
    set_seed(found[-1].seed)
    return found


def small_base(args: TrainingArguments, model_class: Any, config: Any, *processors: Any) -> str:
    """Folder with a random model of `config` and its tokenizer or processor: what a recipe adapts without network.

    Where the config's are of a fixed standard deviation, the usual 0.02, they get one of 1/sqrt(inputs): so small a
    model would be nearly without a signal.
    """
    folder = Path(args.output_dir) / "base"
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not hasattr(config, "initializer_factor"):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    for part in (model, *processors):
        part.save_pretrained(folder)
    return str(folder)


def load_splits(recipe: DataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows of `dataset_name` to train and to measure on, drawn by seed."""
    load = partial(datasets.load_dataset, recipe.dataset_name, recipe.dataset_config)
    train = load(split=recipe.train_split).shuffle(seed=seed)
    if recipe.test_split:
        test = load(split=recipe.test_split).shuffle(seed=seed)
    else:
        parts = train.train_test_split(test_size=recipe.test_examples or 0.1, seed=seed)
        train, test = parts["train"], parts["test"]
    return head(train, recipe.train_examples), head(test, recipe.test_examples)


def class_count(rows: datasets.Dataset, column: str) -> int:
    """How many classes a column of labels, or of lists of labels, has: as its feature says, or by its largest one."""
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, datasets.ClassLabel):
        return feature.num_classes
    labels = np.concatenate([np.atleast_1d(labels) for labels in rows[column]])
    return int(labels.max()) + 1


def save_adapter(model: PeftModel, folder: Path, adapter_name: str = "default", **card: Any) -> None:
    """Adapter and card; adapters of upstream's types are saved by peft, with peft's card."""
    if isinstance(model.peft_config[adapter_name], AdapterConfig):
        hub.save_adapter(model, folder, adapter_name=adapter_name, **card)
    else:
        model.save_pretrained(str(folder), selected_adapters=[adapter_name])


def fine_tune(
    script: str,
    recipe: RecipeArguments,
    args: TrainingArguments,
    base: nn.Module,
    *,
    data: dict[str, Any],
    measure: Callable[[Trainer], Figures],
    shown: dict[str, tuple[str, str]],
    source: str,
    defaults: Mapping[str, Any],
    trainer_class: type[Trainer] = Trainer,
    load_dense: Callable[[], PreTrainedModel] | None = None,
    around: Callable[[PeftModel], nn.Module] = lambda model: model,
    gradient_share: bool = False,
) -> Figures:
    """Train an adapter on `base`; measure before and after; write adapter, card, pictures and `figures.json`; print a
    table.

    Args:
        data: what `trainer_class` takes beside model, arguments, callbacks and optimizer.
        measure: figures of the model in a Trainer.
        shown: figure -> its row in the table, and the format of its value.
        source: where the training data are from, for the card: a dataset's name or a sentence.
        defaults: options of the config that hold where the recipe has none.
        load_dense: the base without quantisation, for the method that learns from full fine-tuning.
        around: gives the model that is trained, where the adapted one is a part of it.
        gradient_share: whether to record what of the gradient supports see, for one more product in recorded steps.

    Raises:
        ValueError: the method is unknown or needs another Trainer; a push would name the base by a path.
    """
    method = choose_method(recipe, defaults, args.seed)
    every = max(1, int(args.logging_steps))
    telemetry = SupportTelemetryCallback(every, gradient_share=gradient_share)
    done = finetuning.fine_tune(
        method, base, args, data=data, measure=measure, trainer_class=trainer_class, load_dense=load_dense,
        around=around, telemetry=telemetry, report=RunReportCallback(every),
        card={
            "base_model": recipe.base_model or None, "evaluated_on": source,
            "training_data": [source] if source.count("/") == 1 and " " not in source else source,
            "notes": f"Trained by recipes/{Path(script).name}, seed {args.seed}.",
        },
    )  # fmt: skip
    if not args.process_index:
        report(done, telemetry, shown)
    return done.figures


def make_trainer(method: Method, model: nn.Module, args: TrainingArguments, data: dict[str, Any]) -> Trainer:
    """A Trainer with the method's callbacks and its optimizer."""
    optimizers = (method.optimizer(model, args), None)
    return trainer_for(method)(model=model, args=args, **data, callbacks=method.callbacks(model), optimizers=optimizers)


def report(done: finetuning.FineTuned, telemetry: SupportTelemetryCallback, shown: dict[str, tuple[str, str]]) -> None:
    """Draw the run and print its table."""
    figures, output = done.figures, done.folder.parent
    name = done.method.info.name if done.method.info else "SparseLora"
    title = f"{name}, seed {done.trainer.args.seed}"
    draw_run(done.trainer.state.log_history, telemetry.history, output / "report.png", title)
    rows = [("trainable numbers", f"{figures['trainable_before']:,}", f"{figures['trainable']:,}")]
    for figure, (label, form) in shown.items():
        rows.append((label, format(figures[f"{figure}_before"], form), format(figures[figure], form)))
    rows += [
        ("time of a step, ms", "", f"{1000 * figures['seconds_per_step']:.0f}"),
        ("adapter file, bytes", "", f"{figures['adapter_bytes']:,}"),
        ("LoRA of as many numbers in fp32, bytes", "", f"{4 * figures['trainable']:,}"),
    ]
    four_bit = getattr(done.model, "is_loaded_in_4bit", False)
    print_table(rows, title=f"{name} on a 4-bit base" if four_bit else name)
    pictures = f"{output / 'report.png'}, {output / 'support.png'}"
    print(f"adapter and card: {done.folder}\nreport: {output / 'report.html'}\npictures: {pictures}")
    if not (telemetry.history[-1]["density"] or telemetry.history[-1]["rank"]):
        print("This method has neither a support nor ranks, so the pictures show none.")


def evaluated(trainer: Trainer, *names: str) -> Figures:
    """Figures of `trainer.evaluate()` under their names without "eval_"."""
    found = trainer.evaluate()
    return {name: float(found[f"eval_{name}"]) for name in names}
