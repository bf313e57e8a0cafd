"""`recipes/loram.py` in short form, on the demo base: what it leaves loads on the full base with peft alone."""

import importlib
import json
from pathlib import Path

import processes
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
SHORT = ("max_steps=2", "train_examples=40", "test_examples=4", "documents=200", "calibration_rows=8",
         "held_out_rows=2")  # fmt: skip

PEFT_ALONE = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("recipes/demo_base"), sys.argv[1])
assert not [name for name in sys.modules if name.startswith("hf_sparse_peft")]
down = model.get_base_model().model.layers[0].mlp.down_proj
assert down.lora_A["default"].weight.shape == (8, 512)
print("kept columns", int((down.lora_A["default"].weight != 0).any(0).sum()))
"""


@pytest.fixture
def main(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))

    def run(*options):
        return importlib.import_module("loram").main(["recipes/loram.yaml", *options, f"output_dir={tmp_path}"])

    return run


def test_the_adapter_of_the_pruned_base_loads_on_the_full_one_with_peft_alone(main, tmp_path):
    figures = main(*SHORT, "alignment_steps=1", "alignment_rate=1e-5")
    assert figures["small_numbers"] == 1_107_648  # of 1,697,472: half of 4 x 3 x 512 x 192 is gone
    assert figures["recovered_text_loss"] == pytest.approx(figures["full_text_loss"], abs=0.1)
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    done = processes.python("-c", PEFT_ALONE, str(tmp_path / "adapter"), check=True, cwd=ROOT)
    assert "kept columns 256" in done.stdout


@pytest.mark.slow
def test_a_base_with_zeros_and_one_in_four_bits_are_trained_too(main, tmp_path):
    figures = main(*SHORT, "prune=masked", "alignment_steps=1")
    assert figures["small_numbers"] == figures["full_numbers"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert (again.model.layers[0].mlp.down_proj.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    PeftModel.from_pretrained(again, str(tmp_path / "small_adapter"))
    figures = main(*SHORT, "load_in_4bit=true", "alignment_steps=0", "patterns=[rows,heads]")
    assert torch.isfinite(torch.tensor(figures["recovered_text_loss"]))


@pytest.mark.slow
def test_run_as_shipped_learns_on_half_of_the_channels_what_the_full_base_then_does(main):
    figures = main()
    assert figures["full_exact_match"] < 10
    assert figures["trained_exact_match"] > 80
    assert figures["recovered_exact_match"] > 80
