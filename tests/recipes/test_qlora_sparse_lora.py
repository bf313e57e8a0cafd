"""The main job: it runs offline as it stands, learns, forgets little, and leaves an adapter that loads."""

import json
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

ROOT = Path(__file__).parents[2]
SHORT = ["--max_steps", "40", "--test_examples", "64", "--logging_steps", "5"]
# Options of a run, its mean training loss at seed 0, and the points of exact match that it is to gain. A quarter of the
# loss is room for other CPUs.
RUNS = {"40 steps": (SHORT, 0.902, 20), "60 steps": (["--max_steps", "60"], 0.680, 40), "as shipped": ([], 0.23, 40)}
"""Arguments, mean training loss, points of exact match. As shipped, the loss rises for a while about step 100, as far
as the rounding of bf16 sums has it: 0.206 with one order of sums, 0.256 with another, of one end."""
NEW_INTERPRETER = ("60 steps", "as shipped")

RELOAD = """
import sys, torch
from transformers import BitsAndBytesConfig
from peft import AutoPeftModelForCausalLM
import hf_sparse_peft
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
# prepare_model_for_kbit_training widened everything that is not quantised to fp32; so does this dtype.
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=nf4, dtype=torch.float32)
with torch.no_grad():
    torch.save(model.eval()(input_ids=torch.arange(2, 34).view(2, 16)).logits, sys.argv[2])
"""

DEMO = """
import json, sys, torch
sys.path.insert(0, "recipes")
import qlora_sparse_lora as recipe
trained = []
from hf_sparse_peft import hub
save = hub.save_adapter
hub.save_adapter = lambda model, *args, **kwargs: (trained.append(model), save(model, *args, **kwargs))[1]
figures = recipe.main(["--output_dir", sys.argv[1], "--disable_tqdm", "true", *sys.argv[2:]])
json.dump(figures, open(sys.argv[1] + "/figures.json", "w"))
with torch.no_grad():
    torch.save(trained[0].eval()(input_ids=torch.arange(2, 34).view(2, 16)).logits, sys.argv[1] + "/logits.pt")
"""


@pytest.fixture(
    scope="module", params=[pytest.param(run, marks=[pytest.mark.slow] * (run != "40 steps")) for run in RUNS]
)
def demo(request, tmp_path_factory):
    """The demo with its own YAML, in a process of its own from the project's folder, as README's command runs it."""
    output = tmp_path_factory.mktemp("demo")
    command = ["-c", DEMO, str(output), *RUNS[request.param][0]]
    if request.param in NEW_INTERPRETER:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    else:
        done = processes.python(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return output, json.loads((output / "figures.json").read_text()), done


def test_demo_learns_the_task_in_points_of_exact_match(demo, request):
    _, figures, _ = demo
    gain = RUNS[request.node.callspec.params["demo"]][2]
    assert figures["exact_match"] - figures["exact_match_before"] >= gain


def test_demo_training_loss_has_not_drifted(demo, request):
    _, figures, _ = demo
    expected = RUNS[request.node.callspec.params["demo"]][1]
    assert figures["train_loss"] == pytest.approx(expected, rel=0.25)


def test_demo_forgets_little_of_what_the_base_knew(demo):
    _, figures, _ = demo
    assert figures["held_out_loss"] - figures["held_out_loss_before"] < 0.8


def test_demo_leaves_adapter_card_and_picture_and_prints_its_table(demo):
    output, figures, done = demo
    assert (output / "adapter" / "adapter_model.safetensors").stat().st_size == figures["adapter_bytes"]
    assert "import hf_sparse_peft" in (output / "adapter" / "README.md").read_text()
    assert (output / "report.png").stat().st_size > 10_000
    assert "exact match" in done.stdout
    assert "LoRA of as many numbers" in done.stdout


def test_demo_shows_a_newcomer_no_warning_and_no_missing_package(demo):
    _, _, done = demo
    assert "Warning" not in done.stderr
    assert "Failed to load" not in done.stderr


def test_demo_supports_and_ranks_moved(demo):
    output, figures, _ = demo
    records = [json.loads(line) for line in (output / "support_log.jsonl").read_text().splitlines()]
    assert len({tuple(record["rank"].values()) for record in records}) > 2
    assert len({tuple(record["density"].values()) for record in records}) > 2
    assert figures["trainable"] < 0.7 * figures["trainable_before"]


def test_adapter_file_is_no_bigger_than_the_promise_over_lora(demo):
    _, figures, _ = demo
    assert figures["adapter_bytes"] <= 1.45 * 4 * figures["trainable"]


def test_another_process_reproduces_the_trained_logits_bit_for_bit(demo, tmp_path):
    output, _, _ = demo
    target = tmp_path / "logits.pt"
    processes.python("-c", RELOAD, output / "adapter", target, cwd=ROOT, check=True)
    assert torch.equal(torch.load(target, weights_only=True), torch.load(output / "logits.pt", weights_only=True))
