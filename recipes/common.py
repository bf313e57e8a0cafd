"""What the recipes share: options, the base in 4 bits, the method, the run with its figures, and what it leaves.

A recipe is its data, its metric and a config:

    recipe, args = common.begin(__file__, argv, RecipeArguments, TrainingArguments)
    base = common.load_base(AutoModelForCausalLM, name, recipe, args)
    figures = common.fine_tune(__file__, recipe, args, base, data=..., measure=..., shown=..., source=..., defaults=...)
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import _quiet  # noqa: F401
import datasets
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from reporting import print_table
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from hf_sparse_peft import AgedAdamWSpec, RunReportCallback, SparseLoraConfig, SupportTelemetryCallback, hub, methods
from hf_sparse_peft.hub.push import check_base_name
from hf_sparse_peft.methods import Method
from hf_sparse_peft.training import draw_run, draw_support_history
from hf_sparse_peft.training.recipe_files import checked_options, parse_recipe
from hf_sparse_peft.tuners.shared.config import AdapterConfig

HERE = Path(__file__).parent
# Relative, so that an adapter names its base without naming the machine it was trained on.
DEMO_BASE = os.path.join(".", os.path.relpath(HERE / "demo_base"))
SCHEDULE_METHODS = {"regrow": "spiel-ag", "prune": "gradual-pruning", "allocate": "adalora"}
FIRST_RUN_RATE = 0.01
"""Learning rate of full fine-tuning, as a fraction of an adapter's."""
Figures = dict[str, float]


@dataclass
class RecipeArguments:
    """What is trained, on how much."""

    model_name_or_path: str = field(default="", metadata={"help": "Base; empty: a small one that needs no network."})
    base_model: str = field(
        default="", metadata={"help": "Hub id of the base, for the card and those who load a pushed adapter."}
    )
    load_in_4bit: bool = field(default=True, metadata={"help": "NF4 with double quantisation; False: a dense base."})
    adapter: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of SparseLoraConfig."})
    method: str = field(
        default="", metadata={"help": "Method in place of `adapter`: `python -m hf_sparse_peft.methods` lists them."}
    )
    method_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of the method."})
    train_examples: int = field(default=0, metadata={"help": "Examples to train on; 0: all."})
    test_examples: int = field(default=200, metadata={"help": "Examples to measure on; 0: all."})


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


def nf4() -> BitsAndBytesConfig:
    """NF4 with double quantisation, computed in bf16."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_base(auto_class: Any, name: str, recipe: RecipeArguments, args: TrainingArguments, **options: Any):
    """The base, in NF4 and prepared for training, or dense in bf16; `options` go to `from_pretrained`."""
    options = {"dtype": torch.bfloat16, **options}
    model = auto_class.from_pretrained(name, quantization_config=nf4() if recipe.load_in_4bit else None, **options)
    if recipe.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(args.gradient_checkpointing))
    return model


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


def head(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """The first `count` rows; all for 0 or where there are no more."""
    return rows.select(range(min(count, len(rows)))) if count else rows


def choose_method(recipe: RecipeArguments, defaults: Mapping[str, Any], seed: int) -> Method:
    """The method that `recipe` names with its options or, without a name, SparseLora as `recipe.adapter` describes it;
    `defaults` (task, target modules) hold where these say nothing."""
    if not recipe.method:
        options = checked_options(recipe.adapter, SparseLoraConfig, "adapter")
        config = SparseLoraConfig(**{"seed": seed, **defaults, **options})
        if config.has_support and config.optimizer is None:
            config.optimizer = AgedAdamWSpec()
        return Method(config)
    method = methods.get(recipe.method, **{**method_defaults(recipe.method, defaults), **recipe.method_options})
    if "seed" not in recipe.method_options and hasattr(method.config, "seed"):
        method.config.seed = seed
    return method


def method_defaults(name: str, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`defaults` for a method: a language model's task on all linear layers, if None; no targets where norms train."""
    defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"} if defaults is None else defaults
    norms = methods.describe(name).upstream == "LNTuningConfig"
    return {key: value for key, value in defaults.items() if key != "target_modules" or not norms}


def method_card(method: Method) -> dict[str, str | None]:
    """`method` and `paper` of the card: what was asked for by name, or what the adapter's schedules are."""
    if method.info:
        return {"method": method.info.name, "paper": method.paper}
    used = [name for rule, name in SCHEDULE_METHODS.items() if rule in method.config.rule_types]
    papers = [methods.describe(name).paper for name in used]
    return {"method": " + ".join(used) or "sparse-lora", "paper": "; ".join(papers) or None}


def save_adapter(model: PeftModel, folder: Path, **card: Any) -> None:
    """Adapter and card; adapters of upstream's types are saved by peft, with peft's card."""
    if isinstance(model.peft_config["default"], AdapterConfig):
        hub.save_adapter(model, folder, **card)
    else:
        model.save_pretrained(str(folder))


def first_run(
    load_dense: Callable[[], PreTrainedModel], args: TrainingArguments, **data: Any
) -> Callable[[], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """For `Method.prepare`: full fine-tuning of a dense base on the recipe's own data, steps and seed, at a hundredth
    of the adapter's learning rate; `data` are Trainer's dataset and collator."""

    def run() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        base = load_dense()
        before = {name: tensor.detach().cpu().clone() for name, tensor in base.state_dict().items()}
        own = copy.copy(args)
        own.output_dir, own.save_strategy = str(Path(args.output_dir) / "first_run"), SaveStrategy.NO
        own.learning_rate = args.learning_rate * FIRST_RUN_RATE
        Trainer(model=base, args=own, **data).train()
        return before, base.cpu().state_dict()

    return run


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

    Raises:
        SystemExit: the method needs a Trainer that is not `trainer_class`.
    """
    push, args.push_to_hub = args.push_to_hub, False  # once, at the end, and not by every checkpoint
    try:
        method = choose_method(recipe, defaults, args.seed)
    except ValueError as error:
        raise SystemExit(f"{Path(script).name}: {error}") from error
    model = get_peft_model(base, method.config)
    if push and isinstance(method.config, AdapterConfig):
        try:
            check_base_name(model, base_model=recipe.base_model or None)
        except ValueError as error:
            raise SystemExit(f"{Path(script).name}: {error} Here that is --base_model owner/name.") from error
    if not args.resume_from_checkpoint:  # which brings what was prepared
        method.prepare(model, load_dense and first_run(load_dense, args, **data))
    model.print_trainable_parameters()
    every = max(1, int(args.logging_steps))
    telemetry, report = SupportTelemetryCallback(every, gradient_share=True), RunReportCallback(every)
    trainer = trainer_for(method, trainer_class)(
        model=model,
        args=args,
        **data,
        callbacks=[*method.callbacks(model), telemetry, report],
        optimizers=(method.optimizer(model, args), None),
    )
    telemetry.attach(trainer)
    figures = {f"{name}_before": value for name, value in measure(trainer).items()}
    trainable_before = model.get_nb_trainable_parameters()[0]
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    # Training leaves its autocast around forward; the model is measured and shipped without it, as it was before.
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if hasattr(model, "compact"):  # adapters of other types have nothing that died
        model.compact()
    measured = measure(trainer)
    figures |= measured | {
        "train_loss": result.training_loss,
        "seconds_per_step": result.metrics["train_runtime"] / result.global_step,
        "trainable_before": trainable_before,
        "trainable": model.get_nb_trainable_parameters()[0],
    }
    if not args.process_index:
        card: dict[str, Any] = {"base_model": recipe.base_model or None}
        card["training_data"] = [source] if source.count("/") == 1 and " " not in source else source
        card["metrics"] = {name: round(value, 4) for name, value in measured.items()}
        card["evaluated_on"], card["run"] = source, report.record
        card["notes"] = (
            f"Trained for {trainer.state.global_step} steps by recipes/{Path(script).name}, seed {args.seed}."
        )
        finish(model, method, trainer, telemetry, figures, shown, push, card)
    return figures


def trainer_for(method: Method, trainer_class: type[Trainer]) -> type[Trainer]:
    """The recipe's Trainer, or the one that the method needs in the place of a plain one."""
    needed = method.trainer_class
    if issubclass(trainer_class, needed):
        return trainer_class
    if trainer_class is Trainer:
        return needed
    raise SystemExit(f"{method.info.name} trains with {needed.__name__}, this recipe with {trainer_class.__name__}.")


def finish(
    model: PeftModel,
    method: Method,
    trainer: Trainer,
    telemetry: SupportTelemetryCallback,
    figures: Figures,
    shown: dict[str, tuple[str, str]],
    push: bool,
    card: dict[str, Any],
) -> None:
    """Write adapter, card, pictures and `figures.json`; print the table; upload."""
    output, args = Path(trainer.args.output_dir), trainer.args
    folder = output / "adapter"
    card = {**method_card(method), **card}
    save_adapter(model, folder, **card)
    figures["adapter_bytes"] = (folder / "adapter_model.safetensors").stat().st_size
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    name = card["method"] if method.info else "SparseLora"
    title = f"{name}, seed {args.seed}"
    draw_run(trainer.state.log_history, telemetry.history, output / "report.png", title)
    draw_support_history(telemetry.history, output / "support.png", title)
    rows = [("trainable numbers", f"{figures['trainable_before']:,}", f"{figures['trainable']:,}")]
    for figure, (label, form) in shown.items():
        before = figures.get(f"{figure}_before")
        rows.append((label, "" if before is None else format(before, form), format(figures[figure], form)))
    rows += [
        ("time of a step, ms", "", f"{1000 * figures['seconds_per_step']:.0f}"),
        ("adapter file, bytes", "", f"{figures['adapter_bytes']:,}"),
        ("LoRA of as many numbers in fp32, bytes", "", f"{4 * figures['trainable']:,}"),
    ]
    four_bit = getattr(model, "is_loaded_in_4bit", False)
    print_table(rows, title=f"{name} on a 4-bit base" if four_bit else name)
    pictures = f"{output / 'report.png'}, {output / 'support.png'}"
    print(f"adapter and card: {folder}\nreport: {output / 'report.html'}\npictures: {pictures}")
    if not (telemetry.history[-1]["density"] or telemetry.history[-1]["rank"]):
        print("This method has neither a support nor ranks, so the pictures show none.")
    if push:
        repo, options = args.hub_model_id or output.name, {"private": args.hub_private_repo, "token": args.hub_token}
        ours = isinstance(method.config, AdapterConfig)
        hub.push_to_hub(model, repo, **options, **card) if ours else model.push_to_hub(repo, **options)


def evaluated(trainer: Trainer, *names: str) -> Figures:
    """Figures of `trainer.evaluate()` under their names without "eval_"."""
    found = trainer.evaluate()
    return {name: float(found[f"eval_{name}"]) for name in names}
