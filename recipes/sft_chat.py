"""Supervised fine-tuning on conversations: a chat template, loss on the assistant's turns, packing, a 4-bit base; trl.

Without arguments it runs offline on the demo base, with word problems as conversations:

    python recipes/sft_chat.py

Rows are packed by trl's best-fit-decreasing: conversations of one row do not see each other, because transformers makes
a block-diagonal mask of their positions, and what is longer than `max_length` is cut.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import common
import datasets
import demo_data
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
"""For a tokenizer that has none: turns one after the other, the assistant's closed by the end token."""


@dataclass
class RecipeArguments(common.DataArguments):
    """What to fine-tune on what."""

    messages_column: str = field(default="messages", metadata={"help": "Column with the turns: role and content."})


def load_conversations(recipe: RecipeArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test rows with a column `messages`."""
    if recipe.dataset_name:
        columns = {recipe.messages_column: "messages"}
        train, test = (rows.select_columns(list(columns)) for rows in common.load_splits(recipe, seed))
        return train.rename_columns(columns), test.rename_columns(columns)
    counts = {"train": recipe.train_examples or 1000, "test": recipe.test_examples}
    pairs = [demo_data.word_problems(count, seed=seed, split=split) for split, count in counts.items()]
    return tuple(rows.map(as_messages, remove_columns=rows.column_names) for rows in pairs)


def as_messages(row: dict) -> dict:
    """A prompt and its answer as two turns."""
    turns = (("user", row["prompt"]), ("assistant", row["answer"]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def main(argv: list[str]) -> common.Figures:
    """Fine-tune; measure the held-out conversations before and after; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, SFTConfig)
    name = recipe.model_name_or_path or common.DEMO_BASE
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    base = common.load_base(AutoModelForCausalLM, name, recipe, args)
    train, test = load_conversations(recipe, args.seed)
    return common.fine_tune(
        __file__, recipe, args, base,
        data={"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer},
        measure=lambda trainer: common.evaluated(trainer, "loss", "mean_token_accuracy"),
        shown={
            "loss": ("loss of held-out answers", ".3f"),
            "mean_token_accuracy": ("their tokens predicted right", ".1%"),
        },
        source=recipe.dataset_name or "word problems that recipes/demo_data.py generates, as conversations",
        defaults={"task_type": "CAUSAL_LM", "target_modules": "all-linear"},
        trainer_class=SFTTrainer,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
