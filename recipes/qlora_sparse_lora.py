"""QLoRA-style fine-tuning with SparseLora: a 4-bit base, a support that moves and ranks that move.

Without arguments it runs offline on the demo base beside it, in a few minutes on two CPU cores:

    python recipes/qlora_sparse_lora.py

With a YAML file, and options that override it, it is an ordinary fine-tuning script:

    python recipes/qlora_sparse_lora.py recipes/qlora_sparse_lora_llama1b.yaml --learning_rate 1e-4

Any method of the package takes the adapter's place, in YAML or as

    python recipes/qlora_sparse_lora.py --method spiel-ag --method_options '{"density": 0.02}'
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import _quiet  # noqa: F401
import demo_data
import torch
import yaml
from chosen_method import chosen_method, first_run, method_card, save_adapter
from datasets import Dataset, load_dataset
from evaluation import exact_match, text_loss
from peft import get_peft_model, prepare_model_for_kbit_training
from reporting import draw_report, print_table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hf_sparse_peft import SparseLoraConfig, SupportTelemetryCallback
from hf_sparse_peft.hub import push_to_hub
from hf_sparse_peft.training import draw_support_history

HERE = Path(__file__).parent
# Relative, so that the adapter names its base without naming the machine it was trained on.
DEMO_BASE = os.path.join(".", os.path.relpath(HERE / "demo_base"))
DEMO_YAML = HERE / "qlora_sparse_lora.yaml"


@dataclass
class RecipeArguments:
    """What to fine-tune on what."""

    model_name_or_path: str = field(default="", metadata={"help": "Base model; empty: the demo base beside this file."})
    dataset_name: str = field(default="", metadata={"help": "Dataset of prompts and answers; empty: the demo's."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the text before the answer."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the text to learn."})
    train_examples: int = field(default=0, metadata={"help": "Examples to train on; 0: all."})
    test_examples: int = field(default=200, metadata={"help": "Examples held out for exact match."})
    max_new_tokens: int = field(default=8, metadata={"help": "Longest answer to generate in the evaluation."})
    load_in_4bit: bool = field(default=True, metadata={"help": "NF4 with double quantisation; False: a bf16 base."})
    adapter: str = field(default="{}", metadata={"help": "SparseLoraConfig as a mapping in YAML, or JSON."})
    method: str = field(
        default="", metadata={"help": "Method in place of `adapter`: `python -m hf_sparse_peft.methods` lists them."}
    )
    method_options: str = field(default="{}", metadata={"help": "The method's options as a mapping in YAML, or JSON."})


def parse(argv: list[str]) -> tuple[RecipeArguments, TrainingArguments]:
    """Options of a YAML file (the demo's, if none is named), overridden by the command line."""
    path = Path(argv.pop(0)) if argv and argv[0].endswith((".yaml", ".yml")) else DEMO_YAML
    options = yaml.safe_load(path.read_text())
    for nested in ("adapter", "method_options"):
        options[nested] = json.dumps(options.get(nested, {}))
    parser = HfArgumentParser((RecipeArguments, TrainingArguments))
    # transformers asks to be told when bf16 has no GPU to run on.
    parser.set_defaults(use_cpu=not torch.cuda.is_available(), **options)
    return parser.parse_args_into_dataclasses(argv)


def load_base(recipe: RecipeArguments, args: TrainingArguments):
    """Tokenizer and base model, quantised and prepared for training."""
    name = recipe.model_name_or_path or DEMO_BASE
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.bfloat16, quantization_config=quantization if recipe.load_in_4bit else None
    )
    if recipe.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    return tokenizer, model


def load_pairs(recipe: RecipeArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Training and test pairs with columns `prompt` and `answer`."""
    if not recipe.dataset_name:
        train = demo_data.word_problems(recipe.train_examples or 3000, seed=seed, split="train")
        return train, demo_data.word_problems(recipe.test_examples, seed=seed, split="test")
    data = load_dataset(recipe.dataset_name, split="train").shuffle(seed=seed)
    data = data.select_columns([recipe.prompt_column, recipe.answer_column])
    data = data.rename_columns({recipe.prompt_column: "prompt", recipe.answer_column: "answer"})
    split = data.train_test_split(test_size=recipe.test_examples, seed=seed)
    count = recipe.train_examples or len(split["train"])
    return split["train"].select(range(count)), split["test"]


def main(argv: list[str]) -> dict[str, float]:
    """Fine-tune, evaluate before and after, write the adapter, its card and the picture; returns the figures."""
    recipe, args = parse(argv)
    push, args.push_to_hub = args.push_to_hub, False  # once, at the end, and not by every checkpoint
    set_seed(args.seed)
    tokenizer, base = load_base(recipe, args)
    method = chosen_method(recipe.method, json.loads(recipe.method_options), json.loads(recipe.adapter), args.seed)
    model = get_peft_model(base, method.config)
    train, test = load_pairs(recipe, args.seed)
    dense = replace(recipe, load_in_4bit=False)
    data = {
        "train_dataset": demo_data.tokenize_pairs(train, tokenizer),
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
    }
    if not args.resume_from_checkpoint:  # which brings what was prepared
        method.prepare(model, first_run(lambda: load_base(dense, args)[1], args, **data))
    model.print_trainable_parameters()
    trainable_before = model.get_nb_trainable_parameters()[0]
    held_out = demo_data.chunk_text(demo_data.pretraining_text(200, seed=0, split="heldout"), tokenizer)

    def measure() -> tuple[float, float]:
        score = exact_match(model, tokenizer, test, max_new_tokens=recipe.max_new_tokens)
        return score, text_loss(model, held_out)

    match_before, loss_before = measure()
    telemetry = SupportTelemetryCallback(every=max(1, int(args.logging_steps)), gradient_share=True)
    trainer = method.trainer_class(
        model=model,
        args=args,
        **data,
        callbacks=[*method.callbacks(model), telemetry],
        optimizers=(method.optimizer(model, args), None),
    )
    telemetry.attach(trainer)
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    # Training leaves its autocast around forward; the model is measured and shipped without it, as it was before.
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if hasattr(model, "compact"):  # adapters of other types have nothing that died
        model.compact()
    match_after, loss_after = measure()
    figures = {
        "exact_match_before": match_before,
        "exact_match": match_after,
        "held_out_loss_before": loss_before,
        "held_out_loss": loss_after,
        "train_loss": result.training_loss,
        "seconds_per_step": result.metrics["train_runtime"] / result.global_step,
        "trainable_before": trainable_before,
        "trainable": model.get_nb_trainable_parameters()[0],
    }
    source = recipe.dataset_name or "word problems that recipes/demo_data.py generates"
    return finish(model, method, trainer, telemetry, figures, args, push, source)


def finish(model, method, trainer, telemetry, figures: dict, args: TrainingArguments, push: bool, data: str) -> dict:
    """Write the adapter, its card and the picture; print the table."""
    output = Path(args.output_dir)
    folder = output / "adapter"
    metrics = {key: round(value, 4) for key, value in figures.items() if key != "seconds_per_step"}  # the machine's
    card = {
        **method_card(method),
        "metrics": metrics,
        "training_data": data,
        "notes": f"Trained for {trainer.state.global_step} steps by recipes/qlora_sparse_lora.py, seed {args.seed}.",
    }
    save_adapter(model, folder, **card)
    figures["adapter_bytes"] = (folder / "adapter_model.safetensors").stat().st_size
    lora_bytes = 4 * figures["trainable"]  # a LoRA file is its fp32 numbers
    name = card["method"] if method.info else "SparseLora"
    title = f"{name}, seed {args.seed}"
    draw_report(output / "report.png", trainer.state.log_history, telemetry.history, title)
    draw_support_history(telemetry.history, output / "support.png", title)
    moving = telemetry.history[-1]["density"] or telemetry.history[-1]["rank"]
    print_table(
        [
            ("trainable numbers", f"{figures['trainable_before']:,}", f"{figures['trainable']:,}"),
            ("exact match, %", f"{figures['exact_match_before']:.1f}", f"{figures['exact_match']:.1f}"),
            (
                "loss on held-out pretraining text",
                f"{figures['held_out_loss_before']:.3f}",
                f"{figures['held_out_loss']:.3f}",
            ),
            ("time of a step, ms", "", f"{1000 * figures['seconds_per_step']:.0f}"),
            ("adapter file, bytes", "", f"{figures['adapter_bytes']:,}"),
            ("LoRA of as many numbers in fp32, bytes", "", f"{lora_bytes:,}"),
        ],
        title=f"{name} on a 4-bit base" if getattr(model, "is_loaded_in_4bit", False) else name,
    )
    print(f"adapter and card: {folder}\npictures: {output / 'report.png'}, {output / 'support.png'}")
    if not moving:
        print("This method has neither a support nor ranks, so the pictures show none.")
    if push:
        repo, options = args.hub_model_id or output.name, {"private": args.hub_private_repo, "token": args.hub_token}
        ours = isinstance(method.config, SparseLoraConfig)
        push_to_hub(model, repo, **options, **card) if ours else model.push_to_hub(repo, **options)
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
