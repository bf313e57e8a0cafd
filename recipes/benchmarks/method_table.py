"""Every method by name on the demo task, on a dense and on a 4-bit base: does it learn, move, save, load, merge, resume
and leave?

    python recipes/benchmarks/method_table.py
    python recipes/benchmarks/method_table.py --candidates spiel-ag rigl --bases nf4 --steps 250 --examples 3000
    python recipes/benchmarks/method_table.py --steps 24 --examples 96 --batch_size 4 --test_examples 8  # quick

Every method trains with its own Trainer, callbacks and optimizer at the same steps and examples, and at a learning rate
that was not tuned for it: the table shows that methods work, not which is best. Half-way a checkpoint is written, from
which a second run goes on over a fresh base, with the checkpoint's own config; everything that it ends with is compared
with what the first ended with. The trained adapter is exported as a plain LoRA, whose logits on an fp32 base are
compared with the adapter's. The numbers that a method trains on the 8-billion base are counted on the meta device.

One table has a line a run, the other a line a method. They go to the terminal and, as `method_table.json` and
`method_table.md`, to `--output`. Runs that the JSON file has already are kept, so a long table may be made in pieces.
"""

from __future__ import annotations

import copy
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Column, option
from llama import PRESETS, build_base, keep_4bit_layout
from peft import PeftModel, get_peft_model, save_as_lora
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_sparse_peft import methods
from hf_sparse_peft.hub import export_lora

# isort: split
import demo_data  # found by harness
from evaluation import exact_match
from qlora_sparse_lora import RecipeArguments, load_base

from hf_sparse_peft.finetuning import full_fine_tuning, method_defaults

CANDIDATES = {name: f"{name}:every=10" for name in ("lift", "rigl", "set")} | {
    "compacter": "compacter:reduction=24",
    "cuttlefish": "cuttlefish:every=1,first=8",
    "ether": "ether:blocks=4",
    "ether+": "ether+:blocks=4",
    "eva": "eva:r=2,tau=0.8",
    "losia": "losia:every=4",
    "lisa": "lisa:every=6",
    "increlora": "increlora:schedule=[{type: grow_rank, every: 4, warmup: 4, modules: 7}]",
    "rosa": "rosa:warmup=6",
    "smt": "smt:block_size=32,warmup_steps=4",
    "sora": "sora:weight=3.0",
    "vb-lora": "vb-lora:vector_length=64",
}
"""Beside the methods' defaults: moves that fit into sixty steps, where a paper's run is thousands long, and vectors
and ranks that fit into the demo base and small batches."""
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
    Column("after the checkpoint", "late_moves"),
    Column("seconds", "seconds", "{:.0f}"),
    Column("save and load bit-equal", "reload_exact"),
    Column("merge and unmerge exact", "merge_exact"),
    Column("resumed bit-equal", "resume_exact"),
)
PROPERTIES = (
    Column("method", "method"),
    Column("numbers", "trainable", "{:,}"),
    Column("on 8B Llama", "large"),
    Column("file bytes", "file_bytes", "{:,}"),
    Column("leaves as plain LoRA", "export", wrap=True),
    Column("moves", "moves"),
    Column("resumes", "resume_exact", wrap=True),
    Column("NF4 loss", "nf4"),
    Column("NF4 resumes", "nf4_resume", wrap=True),
)
"""Of a method: the numbers trained on the demo base and on an 8-billion Llama; the error of the exported LoRA's logits;
moves before and after the checkpoint; whether a resumed run equals the whole one to the bit; the first and the last
loss on a 4-bit base."""
EXACT = 1e-5
"""Largest difference of logits, over the largest logit, up to which an export is exact in fp32."""
LARGE = "meta-llama-8b"


@dataclass
class TableOptions(harness.Options):
    """Options of this benchmark."""

    candidates: list[str] = option(methods.names(), "methods, with options where wanted")
    bases: list[str] = option(["dense", "nf4"], "of dense and nf4")
    large: bool = option(True, "count the numbers on an 8-billion Llama too")
    steps: int = option(60, "optimizer steps of each run")
    examples: int = option(300, "word problems to train on")
    batch_size: int = option(16, "examples of a step")
    test_examples: int = option(100, "word problems for exact match")
    learning_rate: float = option(3e-3, "for every method but the zeroth-order ones")
    seed: int = option(0, "seed of everything drawn")


class MoveCounter(TrainerCallback):
    """Counts the updates after which a support or a rank mask was another than before, and asks for a checkpoint at
    `save_at`. Stands last."""

    def __init__(self, save_at: int) -> None:
        self.save_at, self.moves, self.late_moves = save_at, 0, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Remember the units."""
        self._units = harness.LivingUnits(model)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Compare with the step before."""
        moved = self._units.moved()
        self.moves += moved
        self.late_moves += moved and state.global_step > self.save_at
        control.should_save = state.global_step == self.save_at


def measure_run(name: str, base: str, options: TableOptions, folder: Path) -> dict[str, Any]:
    """One row: train, evaluate, save, load, merge, resume, and leave as a LoRA."""
    recipe, dense = RecipeArguments(load_in_4bit=base == "nf4"), RecipeArguments(load_in_4bit=False)
    args = _arguments(name, options, folder)
    set_seed(options.seed)

    def fresh_base() -> nn.Module:
        return keep_4bit_layout(load_base(recipe, args)[1])

    tokenizer, frozen = load_base(recipe, args)
    keep_4bit_layout(frozen)

    method = harness.build_method(
        CANDIDATES.get(name, name), seed=options.seed, **method_defaults(name.partition(":")[0])
    )
    model = get_peft_model(frozen, method.config)
    train = demo_data.word_problems(options.examples, seed=options.seed, split="train")
    test = demo_data.word_problems(options.test_examples, seed=options.seed, split="test")
    data = {
        "train_dataset": demo_data.tokenize_pairs(train, tokenizer),
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
    }
    method.prepare(model, full_fine_tuning(lambda: load_base(dense, args)[1], args, **data))
    row = {"trainable": model.get_nb_trainable_parameters()[0]}
    if str(getattr(method.config, "init_lora_weights", "")).startswith("pissa"):  # the base changed at injection
        model.save_pretrained(str(folder / "initial_adapter"))
    row["exact_match_before"] = exact_match(model, tokenizer, test)
    half = options.steps // 2
    counter = MoveCounter(half)
    trainer = harness.make_trainer(method, model, args, [counter], **data)
    began = time.perf_counter()
    trainer.train()
    row["seconds"] = time.perf_counter() - began
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    row |= {"first_loss": losses[0], "last_loss": losses[-1], "moves": counter.moves, "late_moves": counter.late_moves}
    checkpoint = folder / f"checkpoint-{half}"
    row["resume_exact"] = resume(method, fresh_base(), checkpoint, trainer, _arguments(name, options, folder), data)
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    row["exact_match"] = exact_match(model, tokenizer, test)
    row |= check_file(model, folder, fresh_base)
    row["file_bytes"] = (folder / "adapter_model.safetensors").stat().st_size
    return row | (check_export(model.float(), folder, lambda: fresh_base().float()) if base == "dense" else {})


def _arguments(name: str, options: TableOptions, folder: Path) -> TrainingArguments:
    return harness.training_arguments(
        options,
        folder,
        LEARNING_RATES.get(name.partition(":")[0], options.learning_rate),
        options.seed,
        per_device_train_batch_size=options.batch_size,
        warmup_steps=min(10, options.steps // 10),
        logging_steps=max(1, options.steps // 6),
    )


def resume(
    method: methods.Method, base: nn.Module, checkpoint: Path, whole: Trainer, args: TrainingArguments, data: dict
) -> str:
    """Whether a run that goes on from `checkpoint` ends with what the `whole` one ended with, to the last bit: "yes",
    "no" with the number of tensors that differ, or the error."""
    try:
        model = PeftModel.from_pretrained(base, str(checkpoint), is_trainable=True)
        trainer = harness.make_trainer(method, model, args, **data)
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except Exception as error:
        return f"refused: {_brief(error)}"
    left, right = _state(whole), _state(trainer)
    equal = [name for name in left if name in right and torch.equal(left[name], right[name])]
    others = len(set(left) | set(right)) - len(equal)
    return "yes" if not others else f"no: {others} of {len(left)} tensors"


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor of a trainer's model and optimizer, by name."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    found, names = dict(model.state_dict()), {parameter: name for name, parameter in model.named_parameters()}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor | int | float):
                found[f"optimizer {key} of {names[parameter]}"] = torch.as_tensor(value)
    return found


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(2, 34, device=model.device).view(2, 16)).logits


def check_file(model: PeftModel, folder: Path, fresh_base: Any) -> dict[str, str]:
    """Whether saving and loading, and merging and unmerging, keep the model's outputs bit for bit."""
    trained = _logits(model)
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(fresh_base(), str(folder))
    reloaded = torch.equal(_logits(loaded), trained)
    try:
        loaded.merge_adapter()
        loaded.unmerge_adapter()
        unmerged = "yes" if torch.equal(_logits(loaded), trained) else "no"
    except NotImplementedError:  # upstream's AdaLoRA, LoHa and others on a 4-bit base
        unmerged = "not implemented"
    except ValueError as error:  # no change of the weight: modules behind layers
        unmerged = f"refused: {_brief(error)}"
    return {"reload_exact": "yes" if reloaded else "no", "merge_exact": unmerged}


def check_export(model: PeftModel, folder: Path, fresh_base: Any) -> dict[str, Any]:
    """`export_error`, the largest difference of logits over the largest logit between the model and a plain LoRA made
    of its adapter; or `export_refused`, why there is none, and `dense_error`, the same of the merged model, where
    something merges."""
    trained = _logits(model)

    def error_of(left: nn.Module) -> float:
        return float((_logits(left) - trained).abs().max() / trained.abs().max())

    try:
        _leave(model, folder / "as_lora", folder / "initial_adapter")
        loaded = PeftModel.from_pretrained(fresh_base(), str(folder / "as_lora"))
    except Exception as error:
        refused = {"export_refused": _brief(error)}
        try:
            return {**refused, "dense_error": error_of(copy.deepcopy(model).merge_and_unload())}
        except (NotImplementedError, ValueError):
            return refused
    return {"export_error": error_of(loaded)}


def _leave(model: PeftModel, path: Path, initial_adapter: Path) -> None:
    """Write a plain LoRA: by this package, or for upstream's adapters by peft, at the adapter's own rank."""
    config = model.peft_config["default"]
    if not type(config).__module__.startswith("peft.") or config.peft_type.value == "ADALORA":
        export_lora(model, path)
    elif config.peft_type.value != "LORA":
        save_as_lora(path, model, rank=getattr(config, "r", 8))
    else:
        changed = initial_adapter if initial_adapter.exists() else None
        model.save_pretrained(str(path), path_initial_model_for_weight_conversion=changed and str(changed))


def _brief(error: Exception) -> str:
    """An error's first sentence, without the module that it names."""
    text = re.sub(r"^'[^']*' ", "", str(error).strip().splitlines()[0] if str(error).strip() else "")
    return f"{type(error).__name__}: " * (not isinstance(error, ValueError)) + text.split(". ")[0].rstrip(".")


def count_large(name: str) -> dict[str, Any]:
    """The numbers that train on an 8-billion Llama, without its weights."""
    config = harness.build_method(name, **method_defaults(name.partition(":")[0])).config
    model = get_peft_model(build_base(PRESETS["llama-8b"], "bf16", "meta"), config, low_cpu_mem_usage=True)
    return {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Fill the table with what is asked for and not there yet; returns all rows of this setting."""
    options = harness.parse(TableOptions, __doc__, argv)
    for name in options.candidates:
        methods.describe(name.partition(":")[0])  # a misspelt name stops before the first run
    chosen = ("steps", "examples", "batch_size", "test_examples", "seed", "learning_rate")
    rows = harness.Rows(options, "method_table", {name: getattr(options, name) for name in chosen})
    heading = f"{options.steps} steps of {options.batch_size} of {options.examples} word problems, "
    heading += f"seed {options.seed}, learning rate {options.learning_rate:g} (not tuned), torch {torch.__version__}."
    for name in options.candidates:
        for base in options.bases:
            folder = rows.folder / "adapters" / f"{name.replace(':', '-')}-{base}"
            rows.measure(partial(measure_run, name, base, options, folder), go_on=True, method=name, base=base)
        if options.large:
            rows.measure(partial(count_large, name), go_on=True, method=name, base=LARGE)
        found = sorted((row for row in rows.rows if row["setting"] == rows.setting), key=_place)
        runs, properties = [row for row in found if row["base"] != LARGE], summaries(found)
        tables = [harness.markdown(COLUMNS, runs), harness.markdown(PROPERTIES, properties)]
        (rows.folder / "method_table.md").write_text("\n".join([f"{heading}\n", *tables]))
    print(f"{heading}\n\n{tables[0]}")
    harness.print_table("Each method", PROPERTIES, properties)
    return found


def summaries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a method, of its rows on all bases."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["base"]] = row
    return [_summary(by_base) for by_base in found.values()]


def _summary(by_base: dict[str, dict[str, Any]]) -> dict[str, Any]:
    dense, nf4, large = (by_base.get(base, {}) for base in ("dense", "nf4", LARGE))
    line = {"method": next(iter(by_base.values()))["method"], **nf4, **dense, "nf4_resume": nf4.get("resume_exact")}
    if "moves" in line:
        line["moves"] = f"{line['moves'] - line['late_moves']} / {line['late_moves']}"
    for key, row, form in (("large", large, "{trainable:,}"), ("nf4", nf4, "{first_loss:.2f}, {last_loss:.2f}")):
        line[key] = form.format_map(row) if row and "error" not in row else row.get("error")
    if "export_error" in line:
        line["export"] = ("yes, {:.0e}" if line["export_error"] <= EXACT else "no, {:.0e}").format(line["export_error"])
    elif "export_refused" in line:
        line["export"] = f"refused: {line['export_refused']}"
        if "dense_error" in line:
            line["export"] += f" (dense: {line['dense_error']:.0e})"
    else:
        line["export"] = line.get("error")
    return line


def _place(row: dict[str, Any]) -> tuple[str, str]:
    return row["method"], row["base"]


if __name__ == "__main__":
    main()
