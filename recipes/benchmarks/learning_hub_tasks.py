"""Tasks of `learning.py` for people with GPUs: Llama-3.2-1B on data sets of the Hub, and what all its tasks are called.

    python recipes/benchmarks/learning.py --task gsm8k --bits nf4 --candidates lora hybrid
    python recipes/benchmarks/learning.py --task metamath --base meta-llama/Llama-3.2-3B --bits bf16

None of these was run for the project's own tables: their configurations are tested on stand-ins, without the Hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset
from learning_tasks import ColaTask, E2ETask, LanguageTask, Sst2Task, TwoTasks, WordTask
from torch import nn

# isort: split
from evaluation import exact_match  # found by harness


class Source(NamedTuple):
    """A split of a data set on the Hub, and how a row of it is a prompt and an answer."""

    name: str
    config: str | None
    split: str
    pair: Callable[[dict[str, Any]], tuple[str, str]]


def _question(asked: str, answered: str) -> Callable[[dict[str, Any]], tuple[str, str]]:
    return lambda row: (f"Question: {row[asked]}\nAnswer:", " " + row[answered])


GSM8K = Source("openai/gsm8k", "main", "train", _question("question", "answer"))
METAMATH = Source("meta-math/MetaMathQA", None, "train", _question("query", "response"))
COMMONSENSE = Source("zwhe99/commonsense_170k", None, "train", lambda row: (row["instruction"] + "\n", row["output"]))


class HubTask(LanguageTask):
    """Answers on a causal language model of the Hub; exact match of what greedy generation ends with.

    The KL divergence is that to the model without its adapter; there is none in full fine-tuning and for PiSSA, which
    changes the base.
    """

    default_base = "meta-llama/Llama-3.2-1B"
    metric = "exact match of the final number, %"
    batch, max_length, new_tokens, final_number = 8, 512, 256, True
    source, test_source = GSM8K, GSM8K._replace(split="test")
    held_back = 0
    """Rows that are kept from training, for data sets without a split to test on."""

    def pairs(self, n: int, split: str, seed: int) -> Dataset:
        """`n` rows of the data set (0: all) in an order of the seed; test rows in one order."""
        source = self.test_source if split == "test" else self.source
        rows = datasets.load_dataset(source.name, source.config, split=source.split)
        if self.held_back:
            cut = len(rows) - min(self.held_back, len(rows) // 5)
            rows = rows.shuffle(seed=0).select(range(cut, len(rows)) if split == "test" else range(cut))
        rows = rows.shuffle(seed=seed)
        pairs = [source.pair(row) for row in rows.select(range(min(n or len(rows), len(rows))))]
        return Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in pairs])

    def held_out_text(self) -> Dataset:
        """WikiText-2's test split."""
        text = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        return text.filter(lambda row: len(row["text"]) > 200)

    def of_base(self, model: nn.Module, rows: Dataset) -> Iterator[torch.Tensor] | None:
        """Log-probabilities over a large vocabulary are not kept: the base is the model without its adapter."""
        configs = getattr(model, "peft_config", {}).values()
        changed = any(str(getattr(config, "init_lora_weights", "")).startswith("pissa") for config in configs)
        return self._without_adapter(model, rows) if configs and not changed else None

    def _without_adapter(self, model: nn.Module, rows: Dataset) -> Iterator[torch.Tensor]:
        answers = self.answers(model, rows)
        while True:
            with model.disable_adapter():  # not across a yield: the caller runs the adapter in between
                found = next(answers, None)
            if found is None:
                return
            yield found[0]

    def score(self, model: nn.Module) -> dict[str, float]:
        """Figures as of every language task, but for exact match, which is that of generated answers."""
        found = super().score(model)
        side = self.tokenizer.padding_side
        for name, half in zip(("choose", "score"), self.test_pairs, strict=True):
            found[name] = exact_match(
                model, self.tokenizer, half, self.batch, self.new_tokens, final_number=self.final_number
            )
        self.tokenizer.padding_side = side  # that of training
        return found


class MetaMathTask(HubTask):
    """MetaMathQA, scored on GSM8K's test questions."""

    source = METAMATH


class CommonsenseTask(HubTask):
    """Commonsense-170k; 2,000 of its rows are the test."""

    metric, new_tokens, final_number = "exact match, %", 32, False
    source = test_source = COMMONSENSE
    held_back = 2000


TASKS = {"words": WordTask, "two-tasks": TwoTasks, "e2e": E2ETask, "cola": ColaTask, "sst2": Sst2Task}
TASKS |= {"gsm8k": HubTask, "metamath": MetaMathTask, "commonsense": CommonsenseTask}
