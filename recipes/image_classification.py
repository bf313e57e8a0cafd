"""Classification of pictures: a vision transformer with a sparse adapter and a head that trains whole.

Without arguments it runs offline on a small random ViT: which colour is noise tinted with?

    python recipes/image_classification.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import common
import datasets
import numpy as np
import torch
from PIL import Image
from sequence_classification import accuracy
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)


@dataclass
class RecipeArguments(common.DataArguments):
    """What to classify."""

    image_column: str = field(default="image", metadata={"help": "Column of the picture."})
    label_column: str = field(default="label", metadata={"help": "Column of the class, a number from 0 on."})


def load_pictures(recipe: RecipeArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test rows."""
    if recipe.dataset_name:
        return common.load_splits(recipe, seed)
    rng, count = np.random.default_rng(seed), (recipe.train_examples or 256) + recipe.test_examples
    labels = rng.integers(3, size=count)
    pixels = rng.integers(0, 230, size=(count, 32, 32, 3))
    pixels[np.arange(count), :, :, labels] += 25
    pictures = [Image.fromarray(picture.astype(np.uint8)) for picture in pixels]
    columns = {recipe.image_column: pictures, recipe.label_column: labels.tolist()}
    rows = datasets.Dataset.from_dict(columns).cast_column(recipe.image_column, datasets.Image())
    return rows.select(range(count - recipe.test_examples)), rows.select(range(count - recipe.test_examples, count))


def small_vit(args: TrainingArguments, classes: int) -> str:
    """A vision transformer for pictures of 32 x 32."""
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        num_labels=classes,
    )  # fmt: skip
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return common.small_base(args, ViTForImageClassification, config, processor)


def main(argv: list[str]) -> common.Figures:
    """Train and measure; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, TrainingArguments)
    args.remove_unused_columns = False  # pictures become pixels when they are drawn
    train, test = load_pictures(recipe, args.seed)
    classes = common.class_count(train, recipe.label_column)
    name = recipe.model_name_or_path or small_vit(args, classes)
    processor = AutoImageProcessor.from_pretrained(name)
    options = {"num_labels": classes, "ignore_mismatched_sizes": True}
    base = common.load_base(AutoModelForImageClassification, name, recipe, args, **options)

    def collate(rows):
        pictures = [row[recipe.image_column].convert("RGB") for row in rows]
        return {
            "pixel_values": processor(pictures, return_tensors="pt")["pixel_values"].to(base.dtype),
            "labels": torch.tensor([row[recipe.label_column] for row in rows]),
        }

    return common.fine_tune(
        __file__, recipe, args, base,
        data={
            "train_dataset": train, "eval_dataset": test, "data_collator": collate, "compute_metrics": accuracy,
        },
        measure=lambda trainer: common.evaluated(trainer, "loss", "accuracy"),
        shown={"loss": ("loss of held-out pictures", ".3f"), "accuracy": ("accuracy", ".1%")},
        source=recipe.dataset_name or "tinted noise, drawn by recipes/image_classification.py",
        defaults={
            "target_modules": r".*encoder\.layer.*(query|key|value|dense)|.*layers\.\d+.*(proj|fc1|fc2)",
            "modules_to_save": ["classifier"],
        },
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
