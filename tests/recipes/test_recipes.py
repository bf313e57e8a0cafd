"""Each recipe's command runs offline and its training loss is what it was; in full, it also learns what it says."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import processes
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


@dataclass(frozen=True)
class Case:
    """A short run with its mean training loss, and the run as shipped with its own and with what it learns."""

    short: tuple[str, ...]
    loss: float
    shipped_loss: float
    learns: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Figure -> the range that it ends in."""
    slow: bool = False
    """Whether even the short run is kept out of the default suite."""


CASES = {
    "sft_chat": Case(
        short=("max_steps=7", "test_examples=8", "train_examples=300"), loss=0.9217,
        shipped_loss=0.5392, learns={"mean_token_accuracy": (0.7, 1), "loss": (0, 0.8)},
    ),
    "dpo": Case(
        short=("max_steps=4", "train_examples=40", "test_examples=8"), loss=0.6263,
        shipped_loss=0.3804, learns={"rewards/accuracies": (0.9, 1), "rewards/margins": (0.5, 9)},
    ),
    "sequence_classification": Case(
        short=("max_steps=8", "train_examples=80", "test_examples=16"), loss=1.2707,
        shipped_loss=0.3219, learns={"accuracy": (0.85, 1)},
    ),
    "token_classification": Case(
        short=("max_steps=10", "train_examples=160", "test_examples=16"), loss=1.0847,
        shipped_loss=0.8728, learns={"accuracy": (0.68, 1), "recall": (0.3, 1)},
    ),
    "seq2seq": Case(
        short=("max_steps=8", "train_examples=160", "test_examples=8"), loss=4.8757,
        shipped_loss=3.4191, learns={"loss": (0, 3.5)},
    ),
    "image_classification": Case(
        short=("max_steps=8", "train_examples=128", "test_examples=8"), loss=0.7364,
        shipped_loss=0.1132, learns={"accuracy": (0.9, 1)},
    ),
    "speech": Case(
        short=("max_steps=6", "train_examples=64", "test_examples=8"), loss=4.9795,
        shipped_loss=3.54, learns={"token_accuracy": (0.3, 1)},
    ),
    "sentence_embeddings": Case(  # sentence-transformers takes ten seconds to import
        short=("max_steps=3", "train_examples=48", "test_examples=8"), loss=2.3465, slow=True,
        shipped_loss=1.951, learns={"found_first": (0.1, 1)},
    ),
    "accelerate_loop": Case(
        short=("max_steps=8", "train_examples=200", "test_examples=4"), loss=1.1874,
        shipped_loss=0.9683, learns={"exact_match": (25, 100)},
    ),
    "continual": Case(
        short=("max_steps=3", "train_examples=60", "test_examples=4"), loss=4.2634,
        shipped_loss=2.2262, learns={"digits_after_digits": (70, 100), "words_after_words": (10, 100)},
    ),
    "compose_language_task": Case(
        short=("max_steps=3", "language_steps=2", "documents=60", "train_examples=60", "test_examples=4"), loss=1.794,
        slow=True, shipped_loss=0.248, learns={"both_exact_match": (12, 100), "task_english": (80, 100)},
    ),
    "merge_adapters": Case(
        short=("max_steps=3", "train_examples=60", "test_examples=4", "merge=[sum]"), loss=3.78, slow=True,
        shipped_loss=0.88, learns={"adapter of digits: digits": (80, 100), "sum:scale=0.5: things_loss": (0.5, 3.5)},
    ),
}  # fmt: skip
ELSEWHERE = {"qlora_sparse_lora", "grpo_patches", "loram", "federated"}
"""In files of their own."""
ROOM = 0.3
"""Of the loss, for other CPUs."""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a recipe in this process, as its command does from the project's folder; pictures are drawn elsewhere."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(RECIPES))
    import common

    from hf_sparse_peft.finetuning import run

    monkeypatch.setattr(common, "draw_run", lambda *_: None)
    monkeypatch.setattr(common, "RunReportCallback", lambda *_: None)
    monkeypatch.setattr(run, "draw_support_history", lambda *_: None)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process's last Trainer

    def main(name: str, *options: str):
        return importlib.import_module(name).main([f"recipes/{name}.yaml", *options, f"output_dir={tmp_path}"])

    return main


def test_every_recipe_with_a_yaml_of_its_name_is_here():
    named = {path.stem for path in RECIPES.glob("*.yaml") if path.with_suffix(".py").exists()}
    assert named == set(CASES) | ELSEWHERE


def short_cases():
    return [pytest.param(name, marks=[pytest.mark.slow] * case.slow, id=name) for name, case in CASES.items()]


@pytest.mark.parametrize("name", short_cases())
def test_short_run_has_the_loss_it_had_and_leaves_adapter_card_and_figures(name, run, tmp_path):
    figures = run(name, *CASES[name].short)
    assert figures["train_loss"] == pytest.approx(CASES[name].loss, rel=ROOM)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert f"recipes/{name}.py" in (tmp_path / "adapter" / "README.md").read_text()
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["train_loss"] == figures["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_run_as_shipped_learns(name, run):
    figures = run(name)
    assert figures["train_loss"] == pytest.approx(CASES[name].shipped_loss, rel=ROOM)
    for figure, (least, most) in CASES[name].learns.items():
        assert least <= figures[figure] <= most, figure


@pytest.mark.slow
def test_an_adapter_a_task_forgets_nothing_of_the_first(run, tmp_path):
    short = ("max_steps=12", "train_examples=200", "test_examples=20")
    figures = run("continual", "strategy=two", *short)
    assert figures["digits_after_digits"] > 0
    assert figures["forgotten"] == 0
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_launch_file_is_read_by_accelerate_and_names_itself(kind):
    path = RECIPES / "accelerate" / f"{kind}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    command = next(line for line in path.read_text().splitlines() if line.startswith("#   "))
    assert f"--config_file recipes/accelerate/{kind}.yaml recipes/" in command
    assert all((ROOT / word).is_file() for word in command.split() if word.startswith("recipes/"))


def test_moves_are_refused_under_fsdp_before_the_first_step(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="cannot move under FSDP"):
        run("accelerate_loop", *CASES["accelerate_loop"].short)


@pytest.mark.slow
def test_loop_runs_in_two_processes_that_move_alike(tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/ddp.yaml"]
    short = [*CASES["accelerate_loop"].short, f"output_dir={tmp_path}"]
    processes.python(*launch, "recipes/accelerate_loop.py", *short, check=True, cwd=ROOT)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["moves"] == 3
    assert figures["last_loss"] < figures["train_loss"]


@pytest.mark.slow
def test_loop_trains_evaluates_and_saves_over_a_sharded_base(tmp_path):
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    fsdp |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    code = (
        "import sys, fsdp_on_cpu, accelerate_loop; from accelerate.state import AcceleratorState; fsdp_on_cpu.allow(); "
        "accelerate_loop.main(sys.argv[1:]); assert AcceleratorState().distributed_type == 'FSDP'"
    )
    paths = os.pathsep.join([str(RECIPES), str(ROOT / "tests"), str(ROOT)])
    short = [*CASES["accelerate_loop"].short, f"output_dir={tmp_path}"]
    processes.ranks(2, "-c", code, *short, timeout=300, env={**fsdp, "PYTHONPATH": paths})
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["moves"] == 3
    assert figures["last_loss"] < figures["train_loss"]
    assert "exact_match" in figures
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_packed_conversations_do_not_see_each_other(monkeypatch):
    """What `sft_chat.py` says of packing, on the kernels of this machine."""
    monkeypatch.syspath_prepend(str(RECIPES))
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = AutoModelForCausalLM.from_pretrained(RECIPES / "demo_base", dtype=torch.float32).eval()
    first, second = list(range(5, 25)), list(range(60, 72))
    row = {"input_ids": first + second, "seq_lengths": [len(first), len(second)]}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0, len(first) :]
        alone = model(input_ids=torch.tensor([second])).logits[0]
        seen = model(input_ids=torch.tensor([first + second])).logits[0, len(first) :]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert (seen - alone).abs().max() > 0.1
