"""Every method by name on the demo task, on a dense and on a 4-bit base: does it learn, move, save, load and merge?

    python recipes/benchmarks/method_table.py
    python recipes/benchmarks/method_table.py --candidates spiel-ag rigl --bases nf4 --steps 250 --examples 3000

Every method trains with its own Trainer, callbacks and optimizer at the same steps and examples, and at a learning rate
that was not tuned for it: the table shows that methods work, not which is best. It goes to the terminal and, as
`method_table.json` and `method_table.md`, to `--output`. Runs that are in the JSON file already are kept, so a long
table may be made in pieces.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Column, option
from peft import PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, TrainerCallback, set_seed

from hf_sparse_peft import methods

# isort: split
import demo_data  # found by harness
from chosen_method import common_options, first_run
from evaluation import exact_match
from qlora_sparse_lora import RecipeArguments, load_base

CANDIDATES = {name: f"{name}:every=10" for name in ("lift", "rigl", "set")}
"""Beside the methods' defaults: moves that fit into sixty steps, where a paper's run is thousands long."""
LEARNING_RATES = {"mezo": 1e-3, "sparse-mezo": 1e-3}
"""Zeroth-order steps are as large as the projected gradient says: 3e-3 is too much for them."""
COLUMNS = (
    Column("method", "method"),
    Column("base", "base"),
    Column(
        "exact match before, %",
        lambda row: f"failed: {row['error']}" if "error" in row else f"{row['exact_match_before']:.0f}",
    ),
    Column("after, %", "exact_match", "{:.0f}"),
    Column("training loss first", "first_loss", "{:.3f}"),
    Column("last", "last_loss", "{:.3f}"),
    Column("trainable numbers", "trainable", "{:,}"),
    Column("moves", "moves"),
    Column("seconds", "seconds", "{:.0f}"),
    Column("save and load bit-equal", "reload_exact"),
    Column("merge and unmerge exact", "merge_exact"),
)


@dataclass
class TableOptions(harness.Options):
    """Options of this benchmark."""

    candidates: list[str] = option(methods.names(), "methods, with options where wanted")
    bases: list[str] = option(["dense", "nf4"], "of dense and nf4")
    steps: int = option(60, "optimizer steps of each run")
    examples: int = option(300, "word problems to train on")
    test_examples: int = option(100, "word problems for exact match")
    learning_rate: float = option(3e-3, "for every method but the zeroth-order ones")
    seed: int = option(0, "seed of everything drawn")


class MoveCounter(TrainerCallback):
    """Counts the updates after which a support or a rank mask was another than before. Stands last."""

    moves = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Remember the units."""
        self._units = harness.LivingUnits(model)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Compare with the step before."""
        self.moves += self._units.moved()


def measure(name: str, base: str, options: TableOptions, folder: Path) -> dict[str, Any]:
    """One row: train, evaluate, save, load, merge."""
    args = harness.training_arguments(
        options,
        folder,
        LEARNING_RATES.get(name.partition(":")[0], options.learning_rate),
        options.seed,
        per_device_train_batch_size=16,
        warmup_steps=min(10, options.steps // 10),
        logging_steps=max(1, options.steps // 6),
    )
    recipe, dense = RecipeArguments(load_in_4bit=base == "nf4"), RecipeArguments(load_in_4bit=False)
    set_seed(options.seed)
    tokenizer, frozen = load_base(recipe, args)
    method = harness.build_method(
        CANDIDATES.get(name, name), seed=options.seed, **common_options(name.partition(":")[0])
    )
    model = get_peft_model(frozen, method.config)
    train = demo_data.word_problems(options.examples, seed=options.seed, split="train")
    test = demo_data.word_problems(options.test_examples, seed=options.seed, split="test")
    data = {
        "train_dataset": demo_data.tokenize_pairs(train, tokenizer),
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
    }
    method.prepare(model, first_run(lambda: load_base(dense, args)[1], args, **data))
    row = {"trainable": model.get_nb_trainable_parameters()[0]}
    row["exact_match_before"] = exact_match(model, tokenizer, test)
    counter = MoveCounter()
    trainer = harness.make_trainer(method, model, args, [counter], **data)
    began = time.perf_counter()
    trainer.train()
    row["seconds"] = time.perf_counter() - began
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    row |= {"first_loss": losses[0], "last_loss": losses[-1], "moves": counter.moves}
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    row["exact_match"] = exact_match(model, tokenizer, test)
    return row | check_file(model, folder, lambda: load_base(recipe, args)[1])


def check_file(model: PeftModel, folder: Path, fresh_base: Any) -> dict[str, str]:
    """Whether saving and loading, and merging and unmerging, keep the model's outputs bit for bit."""

    @torch.no_grad()
    def logits(of: PeftModel) -> torch.Tensor:
        return of.eval()(input_ids=torch.arange(2, 34, device=of.device).view(2, 16)).logits

    trained = logits(model)
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(fresh_base(), str(folder))
    reloaded = torch.equal(logits(loaded), trained)
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    unmerged = torch.equal(logits(loaded), trained)
    return {"reload_exact": "yes" if reloaded else "no", "merge_exact": "yes" if unmerged else "no"}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Fill the table with what is asked for and not there yet; returns all rows of this setting."""
    options = harness.parse(TableOptions, __doc__, argv)
    for name in options.candidates:
        methods.describe(name.partition(":")[0])  # a misspelt name stops before the first run
    setting = {name: getattr(options, name) for name in ("steps", "examples", "test_examples", "seed", "learning_rate")}
    rows = harness.Rows(options, "method_table", setting)
    heading = f"{options.steps} steps of 16 of {options.examples} word problems, seed {options.seed}, learning rate "
    heading += f"{options.learning_rate:g} (not tuned), torch {torch.__version__}."
    for name in options.candidates:
        for base in options.bases:
            folder = rows.folder / "adapters" / f"{name.replace(':', '-')}-{base}"
            rows.measure(partial(measure, name, base, options, folder), go_on=True, method=name, base=base)
            found = sorted((row for row in rows.rows if row["setting"] == rows.setting), key=_place)
            table = f"{heading}\n\n{harness.markdown(COLUMNS, found)}"
            (rows.folder / "method_table.md").write_text(table)
    print(table)
    return found


def _place(row: dict[str, Any]) -> tuple[str, str]:
    return row["method"], row["base"]


if __name__ == "__main__":
    main()
