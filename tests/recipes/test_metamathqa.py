"""Experiments for peft's MetaMathQA comparison: read, counted and trained as its harness does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from hf_sparse_peft.sparsity import Numbers
from hf_sparse_peft.tuners import adapter_layers

FOLDER = Path(__file__).parents[2] / "recipes" / "metamathqa"
EXPERIMENTS = sorted(file.parent for file in (FOLDER / "experiments").glob("*/*/adapter_config.json"))
NUMBERS = 9_175_040  # rank 32 on q_proj and v_proj
LLAMA_3B = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip


def name_of(folder):
    return str(folder.relative_to(FOLDER / "experiments"))


def trained_numbers(folder):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_3B))
        model = get_peft_model(model, PeftConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)
    return model.get_nb_trainable_parameters()[0]


COUNTED = ["rank3-and-entries", "snell-rank6"]
"""By default; the others take seconds each."""


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(one, marks=() if one.name.endswith(tuple(COUNTED)) else pytest.mark.slow, id=name_of(one))
        for one in EXPERIMENTS
    ],
)
def test_an_experiment_trains_as_many_numbers_as_the_table_says_and_at_most_loras(folder):
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if f"`{name_of(folder)}`" in line)
    said = int(row.rsplit("|", 2)[1].replace(",", ""))
    assert trained_numbers(folder) == said
    assert 0.98 * NUMBERS < said <= NUMBERS


def test_the_table_names_every_experiment_and_each_lies_where_the_harness_wants_it():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(EXPERIMENTS) >= 10
    for folder in EXPERIMENTS:
        assert f"`{name_of(folder)}`" in table
        assert folder.parts[-3] == "experiments"  # ./experiments/<peft-method>/<experiment-name>
        given = json.loads((folder / "adapter_config.json").read_text())
        assert given["peft_type"].lower() == folder.parts[-2]


def scaled_down(folder):
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(getattr(config, "budget", None), Numbers):
        config.budget = Numbers(500 if config.pattern is not None else 3000, config.budget.count_factors)
        config.block_size = 8
    config.r = min(config.r, 4)
    if getattr(config, "criterion", None) is not None and hasattr(config.criterion, "rank"):
        config.criterion = type(config.criterion)(rank=4)
    return config


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=name_of)
def test_an_experiment_trains_in_the_harness_loop(folder, recwarn, tmp_path):
    """AdamW over all parameters, cosine with warm-up, clipping, evaluation in between, one file at the end."""
    model = get_peft_model(tiny.base("bf16", layers=1), scaled_down(folder), autocast_adapter_dtype=True)
    start = {key: p.clone() for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=4)
    ids = torch.stack([sample["input_ids"] for sample in tiny.TokenData(samples=4)])
    with model.disable_adapter():
        model.eval()(ids)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    model.eval().generate(input_ids=ids[:1, :3], max_new_tokens=2, pad_token_id=0)
    moved = [key for key, value in start.items() if not torch.equal(value, dict(model.named_parameters())[key])]
    assert len(moved) == len(start)
    told = [str(w.message) for w in recwarn if "trains without the callback" in str(w.message)]
    assert bool(told) == ("moving" in folder.name)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


HARNESS = {
    "utils.py": """
import torch
def get_optimizer_and_scheduler(model, *, max_steps, **options):
    return torch.optim.AdamW(model.parameters(), **options), None
""",
    "run.py": """
import sys, torch, tiny
from utils import get_optimizer_and_scheduler
from peft import PeftConfig, get_peft_model
from test_metamathqa import scaled_down
from pathlib import Path
config = scaled_down(Path(sys.argv[-1]))
config.schedule = [type(config.schedule[0])(every=2, grow=type(config.schedule[0].grow)(steps=1), fraction=0.5)]
model = get_peft_model(tiny.llama(layers=1), config)
first = [m.units("default").clone() for m in model.modules() if hasattr(m, "units")]
optimizer, _ = get_optimizer_and_scheduler(model, max_steps=5, lr=1e-2)
ids = torch.stack([sample["input_ids"] for sample in tiny.TokenData(samples=4)])
model.eval()(ids)
model.train()
for _ in range(5):
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
now = [m.units("default") for m in model.modules() if hasattr(m, "units")]
print("moved", sum(not torch.equal(a, b) for a, b in zip(first, now)), "of", len(now), config.training_finished)
""",
}


@pytest.mark.slow
def test_rules_run_in_the_harness_by_the_launcher(tmp_path):
    for name, text in HARNESS.items():
        (tmp_path / name).write_text(text)
    moving = next(folder for folder in EXPERIMENTS if "moving" in folder.name)
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), str(moving)], cwd=tmp_path, capture_output=True, text=True,
        env={**__import__("os").environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}:"
             f"{Path(__file__).parents[2]}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "moved 7 of 7" in done.stdout


def test_a_launched_loop_moves_supports(tmp_path):
    sys.path.insert(0, str(FOLDER))
    try:
        from run import with_rules
    finally:
        sys.path.remove(str(FOLDER))
    moving = next(folder for folder in EXPERIMENTS if "moving" in folder.name)
    config = scaled_down(moving)
    rule = config.schedule[0]
    config.schedule = [type(rule)(every=2, grow=type(rule.grow)(steps=1), fraction=0.5)]
    model = get_peft_model(tiny.llama(layers=1), config)
    first = [layer.units("default").clone() for layer in adapter_layers(model)]
    make = with_rules(lambda model, *, max_steps, **options: (torch.optim.AdamW(model.parameters(), **options), None))
    optimizer, _ = make(model, max_steps=5, lr=1e-2)
    ids = torch.stack([sample["input_ids"] for sample in tiny.TokenData(samples=4)])
    model.eval()(ids)
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(not torch.equal(a, b.units("default")) for a, b in zip(first, adapter_layers(model), strict=True))
    assert model.peft_config["default"].training_finished
