"""Sentence embeddings: pairs that belong together move together, by sentence-transformers with a sparse adapter.

Without arguments it runs offline on the demo base: a story and what it comes to.

    python recipes/sentence_embeddings.py

It needs `pip install sentence-transformers` (extra `embeddings`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import common
import datasets
import demo_data
import torch

try:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
except ImportError as error:
    raise SystemExit('This recipe needs sentence-transformers: pip install "hf-sparse-peft[embeddings]".') from error


@dataclass
class RecipeArguments(common.DataArguments):
    """What to train on which pairs, in columns `anchor` and `positive`."""


def load_pairs(recipe: RecipeArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test pairs."""
    if recipe.dataset_name:
        train, test = common.load_splits(recipe, seed)
        return tuple(rows.select_columns(["anchor", "positive"]) for rows in (train, test))
    counts = {"train": recipe.train_examples or 1000, "test": recipe.test_examples}
    pairs = [demo_data.word_problems(count, seed=seed, split=split) for split, count in counts.items()]
    return tuple(rows.map(story_and_end, remove_columns=rows.column_names) for rows in pairs)


def story_and_end(row: dict) -> dict:
    """The story of a word problem, and its end in words."""
    story, _, question = row["prompt"].partition(" How many ")
    name, thing = story.split()[0], question.split()[0]
    return {"anchor": story, "positive": f"{name} has {demo_data.WORDS[int(row['answer'])]} {thing} ."}


@torch.no_grad()
def found_first(embedder: SentenceTransformer, pairs: datasets.Dataset) -> float:
    """Fraction of anchors whose own positive is nearer than those of all others, by cosine."""
    options = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
    anchors, positives = (embedder.encode(list(pairs[column]), **options) for column in ("anchor", "positive"))
    nearest = (anchors @ positives.T).argmax(1).cpu()
    return float((nearest == torch.arange(len(pairs))).float().mean())


def main(argv: list[str]) -> common.Figures:
    """Train; measure how often the right positive is found; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, SentenceTransformerTrainingArguments)
    name = recipe.model_name_or_path or common.DEMO_BASE
    options = {"device": "cpu"} if args.use_cpu else {}
    embedder = SentenceTransformer(name, model_kwargs=common.base_options(recipe, args), **options)
    if embedder.tokenizer.pad_token is None:
        embedder.tokenizer.pad_token = embedder.tokenizer.eos_token
    base = common.prepared(embedder[0].auto_model, recipe, args)
    train, test = load_pairs(recipe, args.seed)

    def around(model):
        embedder[0].model = model
        return embedder

    return common.fine_tune(
        __file__, recipe, args, base,
        data={"train_dataset": train, "eval_dataset": test, "loss": MultipleNegativesRankingLoss(embedder)},
        measure=lambda trainer: {
            **common.evaluated(trainer, "loss"), "found_first": found_first(embedder, test),
        },
        shown={"loss": ("loss of held-out pairs", ".3f"), "found_first": ("right positive is the nearest", ".1%")},
        source=recipe.dataset_name or "stories that recipes/demo_data.py generates, and their ends",
        defaults={"task_type": "FEATURE_EXTRACTION", "target_modules": "all-linear"},
        trainer_class=SentenceTransformerTrainer,
        around=around,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
