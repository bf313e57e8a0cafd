"""A training loop of one's own with accelerate: `Controller` carries out the rules that a Trainer's callbacks would.

Without arguments it runs offline on the demo base:

    python recipes/accelerate_loop.py

In two processes, each with its own part of every batch, supports move alike; fsdp.yaml shards the base as well:

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/accelerate_loop.py
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import common
import demo_data
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from evaluation import exact_match
from peft import get_peft_model
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_scheduler

from hf_sparse_peft import Controller, leave_adapters_whole, make_optimizer
from hf_sparse_peft.finetuning import method_of_card


@dataclass
class RecipeArguments(common.RecipeArguments):
    """The adapter, and the loop around it."""

    output_dir: str = field(default="runs/accelerate_loop", metadata={"help": "Where adapter and figures go."})
    max_steps: int = field(default=40, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Examples of a micro-batch in a process."})
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "Micro-batches of a step."})
    learning_rate: float = field(default=1e-2, metadata={"help": "At the start; falls along a cosine."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    bf16: bool = field(default=True, metadata={"help": "Autocast to bf16."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Keep inputs of layers only."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave GPUs alone."})
    seed: int = field(default=0, metadata={"help": "Of data, order and supports."})


def main(argv: list[str]) -> common.Figures:
    """Train, measure, save; returns the figures."""
    (recipe,) = common.begin(__file__, argv, RecipeArguments)
    accelerator = Accelerator(
        gradient_accumulation_steps=recipe.gradient_accumulation_steps, cpu=recipe.use_cpu,
        mixed_precision="bf16" if recipe.bf16 else "no", step_scheduler_with_optimizer=False,
    )  # fmt: skip
    set_seed(recipe.seed)
    name = recipe.model_name_or_path or common.DEMO_BASE
    tokenizer = AutoTokenizer.from_pretrained(name)
    train = demo_data.word_problems(recipe.train_examples or 1000, seed=recipe.seed, split="train")
    test = demo_data.word_problems(recipe.test_examples, seed=recipe.seed, split="test")
    loader = DataLoader(
        demo_data.tokenize_pairs(train, tokenizer), batch_size=recipe.batch_size, shuffle=True, drop_last=True,
        collate_fn=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    base = common.load_base(AutoModelForCausalLM, name, recipe, recipe)
    defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    method = common.choose_method(recipe, defaults, recipe.seed)
    model = get_peft_model(base, method.config)
    optimizer = make_optimizer(model, lr=recipe.learning_rate) or torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=recipe.learning_rate
    )
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=recipe.max_steps)
    leave_adapters_whole(model)  # under FSDP2; nothing to do elsewhere
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    losses: list[float] = []
    options = {"accumulation": recipe.gradient_accumulation_steps, "dataloader": loader}
    with Controller(model, optimizer, total_steps=recipe.max_steps, **options) as rules:
        model.train()
        while rules.step < recipe.max_steps:
            batch = next(batches)
            with accelerator.accumulate(model):
                rules.before_step()
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
                optimizer.step()
                if accelerator.sync_gradients:
                    rules.after_step()
                    scheduler.step()
                else:
                    rules.after_micro_batch()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
    figures = {"train_loss": sum(losses) / len(losses), "last_loss": losses[-1], "moves": len(rules.events)}
    accelerator.wait_for_everyone()
    trained = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    trained.compact() if hasattr(trained, "compact") else None
    if accelerator.is_fsdp2:
        register_fsdp_forward_method(trained, "generate")
    figures["exact_match"] = exact_match(trained, tokenizer, test)  # on every rank: each may hold a shard alone
    if accelerator.is_main_process:
        card = {
            "metrics": figures,
            "training_data": "word problems that recipes/demo_data.py generates",
            "notes": f"Trained for {recipe.max_steps} steps by recipes/accelerate_loop.py, seed {recipe.seed}.",
        }
        output = Path(recipe.output_dir)
        common.save_adapter(trained, output / "adapter", **method_of_card(method), **card)
        (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(json.dumps(figures))
    accelerator.end_training()
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
