"""Every method by name on the demo task, on a dense and on a 4-bit base: does it learn, move, save, load and merge?

    python recipes/benchmarks/method_table.py
    python recipes/benchmarks/method_table.py --methods spiel-ag rigl --bases nf4 --steps 250 --examples 3000

Every method trains with its own Trainer, callbacks and optimizer at the same steps and examples, and at a learning rate
that was not tuned for it: the table shows that methods work, not which is best. It goes to the terminal and, as
`method_table.json` and `method_table.md`, to `--output`. Runs that are in the JSON file already are kept, so a long
table may be made in pieces (`--again` repeats them).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import demo_data
import torch
from chosen_method import chosen_method, first_run
from evaluation import exact_match
from peft import PeftModel, get_peft_model
from qlora_sparse_lora import RecipeArguments, load_base
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments, set_seed

from hf_sparse_peft import methods
from hf_sparse_peft.tuners.sparse_lora import sparse_layers

BASES = ("dense", "nf4")
OPTIONS: dict[str, dict[str, Any]] = {"lift": {"interval": 10}, "rigl": {"interval": 10}, "set": {"interval": 10}}
"""Beside the methods' defaults: moves that fit into sixty steps, where a paper's run is thousands long."""
LEARNING_RATES = {"mezo": 1e-3, "sparse-mezo": 1e-3}
"""Zeroth-order steps are as large as the projected gradient says: 3e-3 is too much for them."""
COLUMNS = (
    ("method", "method", "{}"),
    ("base", "base", "{}"),
    ("exact match before, %", "exact_match_before", "{:.0f}"),
    ("after, %", "exact_match", "{:.0f}"),
    ("training loss first", "first_loss", "{:.3f}"),
    ("last", "last_loss", "{:.3f}"),
    ("trainable numbers", "trainable", "{:,}"),
    ("moves", "moves", "{}"),
    ("seconds", "seconds", "{:.0f}"),
    ("save and load bit-equal", "reload_exact", "{}"),
    ("merge and unmerge exact", "merge_exact", "{}"),
)


class MoveCounter(TrainerCallback):
    """Counts the updates after which a support or a rank mask was another than before."""

    def __init__(self) -> None:
        self.moves, self._seen = 0, None

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Compare with the step before; list it behind the callbacks that move."""
        before, self._seen = self._seen, moving_state(model)
        if before is not None:
            self.moves += any(not torch.equal(*pair) for pair in zip(before, self._seen, strict=True))


def moving_state(model) -> list[torch.Tensor]:
    """Copies of what says which units and components live."""
    names = ("sparse_lora_support", "sparse_lora_rank_mask")
    return [t.clone() for layer in sparse_layers(model) for name in names for t in getattr(layer, name).values()]


def training_arguments(name: str, options: argparse.Namespace, folder: Path) -> TrainingArguments:
    """The demo's own, shortened."""
    return TrainingArguments(
        str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=LEARNING_RATES.get(name, options.learning_rate),
        lr_scheduler_type="cosine",
        warmup_steps=min(10, options.steps // 10),
        logging_steps=max(1, options.steps // 6),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )


def measure(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: train, evaluate, save, load, merge."""
    folder = options.output / "adapters" / f"{name}-{kind}"
    args, recipe = training_arguments(name, options, folder), RecipeArguments(load_in_4bit=kind == "nf4")
    set_seed(options.seed)
    tokenizer, base = load_base(recipe, args)
    method = chosen_method(name, OPTIONS.get(name, {}), {}, options.seed)
    model = get_peft_model(base, method.config)
    train = demo_data.word_problems(options.examples, seed=options.seed, split="train")
    test = demo_data.word_problems(options.test_examples, seed=options.seed, split="test")
    data = {
        "train_dataset": demo_data.tokenize_pairs(train, tokenizer),
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
    }
    dense = RecipeArguments(load_in_4bit=False)
    method.prepare(model, first_run(lambda: load_base(dense, args)[1], args, **data))
    row = {"method": name, "base": kind, "trainable": model.get_nb_trainable_parameters()[0]}
    row["exact_match_before"] = exact_match(model, tokenizer, test)
    counter = MoveCounter()
    trainer = method.trainer_class(
        model=model,
        args=args,
        **data,
        callbacks=[*method.callbacks(model), counter],
        optimizers=(method.optimizer(model, args), None),
    )
    began = time.perf_counter()
    trainer.train()
    row["seconds"] = time.perf_counter() - began
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    row |= {"first_loss": losses[0], "last_loss": losses[-1], "moves": counter.moves}
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    row["exact_match"] = exact_match(model, tokenizer, test)
    ids = torch.arange(2, 34, device=model.device).view(2, 16)
    trained = logits(model, ids)
    model.save_pretrained(str(folder))
    _, fresh = load_base(recipe, args)
    loaded = PeftModel.from_pretrained(fresh, str(folder))
    row["reload_exact"] = yes_no(torch.equal(logits(loaded, ids), trained))
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    row["merge_exact"] = yes_no(torch.equal(logits(loaded, ids), trained))
    return row


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits without dropout."""
    return model.eval()(input_ids=ids).logits


def yes_no(holds: bool) -> str:
    """`holds` as the table says it."""
    return "yes" if holds else "no"


def markdown(rows: list[dict[str, Any]], heading: str) -> str:
    """The rows as a table; a row that failed says why."""
    lines = [heading, "", f"| {' | '.join(title for title, *_ in COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in sorted(rows, key=lambda row: (row["method"], row["base"])):
        cells = [form.format(row[key]) if key in row else "" for _, key, form in COLUMNS]
        if "error" in row:
            cells[2] = f"failed: {row['error']}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> list[dict[str, Any]]:
    """Fill the table with what is asked for and not there yet; returns all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=methods.names(), help="which methods; default: all")
    parser.add_argument("--bases", nargs="*", default=BASES, choices=BASES, help="which bases; default: both")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--examples", type=int, default=300, help="word problems to train on")
    parser.add_argument("--test_examples", type=int, default=100, help="word problems for exact match")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="for every method but the zeroth-order ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/method_table"), help="folder for table and adapters")
    parser.add_argument("--again", action="store_true", help="repeat runs that the table has already")
    options = parser.parse_args(argv)
    for name in options.methods:
        methods.describe(name)  # a misspelt name stops before the first run
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "method_table.json"
    setting = {"steps": options.steps, "examples": options.examples, "seed": options.seed, "lr": options.learning_rate}
    rows = json.loads(file.read_text()) if file.exists() else []
    heading = f"{options.steps} steps of 16 of {options.examples} word problems, seed {options.seed}, learning rate "
    heading += f"{options.learning_rate:g} (not tuned), torch {torch.__version__}."
    for name in options.methods:
        for kind in options.bases:
            same = [row for row in rows if (row["method"], row["base"], row["setting"]) == (name, kind, setting)]
            if same and not options.again and "error" not in same[0]:
                continue
            try:
                row = measure(name, kind, options)
            except Exception as error:
                traceback.print_exc()
                row = {"method": name, "base": kind, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            rows = [old for old in rows if (old["method"], old["base"]) != (name, kind)] + [{**row, "setting": setting}]
            file.write_text(json.dumps(rows, indent=1))
            (options.output / "method_table.md").write_text(markdown(rows, heading))
            print(json.dumps(row), flush=True)
    print(markdown(rows, heading))
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
