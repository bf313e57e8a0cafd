"""`recipes/self_training.py` in short form, on the demo base."""

import json
from pathlib import Path

import processes
from peft import PeftConfig

import hf_sparse_peft  # noqa: F401  (registers the config)

SCRIPT = Path(__file__).parents[2] / "recipes" / "self_training.py"


def test_students_of_a_teacher_learn_from_rows_without_labels(tmp_path):
    sizes = ["--steps", "10", "--labels", "30", "--label_steps", "16", "--sessions", "1", "--size", "16"]
    rows = ["--unlabelled", "60", "--test_examples", "60"]
    done = processes.python(SCRIPT, *sizes, *rows, "--output_dir", str(tmp_path), check=True)
    first, second = json.loads((tmp_path / "figures.json").read_text())
    assert set(first) == {"session", "accuracy"}
    assert 0 < second["weighted"] < 1  # some examples help, and some do not
    assert second["accuracy"] > 0.6
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).form.activation == "identity"
    assert "30 labels, 60 rows without" in done.stdout
