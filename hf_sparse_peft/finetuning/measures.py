"""What a run measures before and after: exact match of generated answers, and losses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARK = "####"


@torch.no_grad()
def generated_answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], batch_size: int = 16, max_new_tokens: int = 8
) -> list[str]:
    """Greedy continuations of the prompts, without special tokens."""
    model.eval()
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    answers = []
    try:
        for start in tqdm(range(0, len(prompts), batch_size), desc="Generating", delay=3):
            words = list(prompts[start : start + batch_size])
            batch = tokenizer(words, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
            output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
            answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    finally:
        tokenizer.padding_side = side
    return answers


def exact_match(
    predictions: Sequence[str], references: Sequence[str], answer_format: Literal["text", "final_number"] = "text"
) -> float:
    """Percent of predictions that equal their reference after stripping outer white space or, with "final_number", end
    with the same number: the first one behind the last "####", as answers of GSM8K have it, or without that the last.
    A string without a number matches nothing."""
    if answer_format == "text":
        hits = [one.strip() == other.strip() for one, other in zip(predictions, references, strict=True)]
    else:
        numbers = [(final_number(one), final_number(two)) for one, two in zip(predictions, references, strict=True)]
        hits = [one is not None and one == two for one, two in numbers]
    return 100.0 * sum(hits) / len(hits) if hits else 0.0


def final_number(text: str) -> float | None:
    """The number that a worked answer ends with; None without one."""
    _, mark, end = text.rpartition(_MARK)
    found = _NUMBER.findall(end if mark else text)
    return float(found[0 if mark else -1].replace(",", "")) if found else None


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Dataset, collator: Any, batch_size: int = 16) -> float:
    """Mean loss in nats over all labels that are not -100, of rows with `input_ids` and `labels`."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collator([rows[at] for at in range(start, min(start + batch_size, len(rows)))]).to(model.device)
        labels = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + model(**batch).loss.item() * labels, count + labels
    return total / max(count, 1)
