"""The loop of reinforcement learning: the generator that is patched is the merged model, token for token."""

import re
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "grpo_patches.py"


def figure(output: str, name: str) -> float:
    return float(re.search(rf"{name}.*?([\d.,]+) *│\s*$", output, re.M).group(1).replace(",", ""))


def run(folder, *options):
    done = processes.python(SCRIPT, "--output_dir", folder, *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    return done.stdout


def test_bf16_policy_patches_its_generator_every_second_step(tmp_path):
    small = ["--max_steps", "4", "--patch_every", "2", "--test_examples", "20", "--train_examples", "50"]
    output = run(tmp_path, "--load_in_4bit", "false", *small)
    assert figure(output, "tokens equal to the merged model's") == 160
    assert figure(output, "patches") == 2  # before step 3, and at the end


@pytest.mark.slow
def test_recipe_as_shipped_learns_through_patches(tmp_path):
    output = run(tmp_path)
    assert figure(output, "tokens equal to the merged model's") == 1600
    assert figure(output, "mean reward, first and last five steps") > 0.6
    assert figure(output, "exact match of the generator, %") > 60
    assert figure(output, "exact match when the patch is taken back, %") < 20
