"""What the recipes measure before and after: exact match of generated answers, and loss on text (forgetting)."""

from __future__ import annotations

from pathlib import Path

import evaluate
import torch
from datasets import Dataset
from tqdm.auto import tqdm

METRIC = Path(__file__).parent / "exact_match"


@torch.no_grad()
def exact_match(
    model, tokenizer, pairs: Dataset, batch_size: int = 100, max_new_tokens: int = 8, final_number: bool = False
) -> float:
    """Percent of `prompt`s whose greedy continuation is the `answer`, or ends with the same number (`final_number`), by
    the metric beside this file."""
    model.eval()
    tokenizer.padding_side = "left"
    predictions = []
    for start in tqdm(range(0, len(pairs), batch_size), desc="Generating", delay=3):
        batch = tokenizer(
            pairs[start : start + batch_size]["prompt"], return_tensors="pt", padding=True, return_token_type_ids=False
        ).to(model.device)
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
        predictions += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    score = evaluate.load(str(METRIC)).compute(
        predictions=predictions, references=pairs["answer"], final_number=final_number
    )
    return score["exact_match"]


@torch.no_grad()
def text_loss(model, chunks: Dataset, batch_size: int = 16) -> float:
    """Mean loss in nats per token on rows of `input_ids`, all of one length."""
    model.eval()
    total = 0.0
    for start in range(0, len(chunks), batch_size):
        ids = torch.tensor(chunks[start : start + batch_size]["input_ids"], device=model.device)
        total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    return total / len(chunks)
