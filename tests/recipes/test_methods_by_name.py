"""The recipe and the method table train any method by name."""

import json
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = ["--max_steps", "6", "--train_examples", "64", "--test_examples", "4", "--disable_tqdm", "true"]


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    for folder in (RECIPES / "benchmarks", RECIPES):
        monkeypatch.syspath_prepend(str(folder))
    for name in (
        "demo_data",
        "evaluation",
        "reporting",
        "common",
        "qlora_sparse_lora",
        "harness",
        "llama",
        "method_table",
    ):
        sys.modules.pop(name, None)


def test_the_recipe_trains_a_method_by_name_with_its_options(recipes, tmp_path, capsys):
    import qlora_sparse_lora

    options = json.dumps({"density": 0.03, "every": 3, "steps": 2})
    named = ["--method", "spiel-ag", "--method_options", options, "--output_dir", str(tmp_path)]
    figures = qlora_sparse_lora.main([*SHORT, *named, "--logging_steps", "2"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["density"], config["r"], config["schedule"][0]["every"]) == (0.03, 0, 3)
    assert "Ansell et al., 2024" in (tmp_path / "adapter" / "README.md").read_text()
    assert figures["trainable"] > 0
    log = [json.loads(line) for line in (tmp_path / "support_log.jsonl").read_text().splitlines()]
    assert max(log[1]["churn"].values()) > 0.9  # the first move replaces everything
    assert log[-1]["model"]["gradient_share"] > 0
    assert (tmp_path / "support.png").stat().st_size > 10_000
    assert "neither a support nor ranks" not in capsys.readouterr().out


def test_a_yaml_file_names_a_method_too(recipes, tmp_path):
    import qlora_sparse_lora

    file = tmp_path / "named.yaml"
    file.write_text(f"output_dir: {tmp_path}\nmethod: shira\nmethod_options: {{density: 0.03}}\nmax_steps: 2\n")
    figures = qlora_sparse_lora.main([str(file), *SHORT, "--max_steps=1"])
    assert figures["trainable"] == figures["trainable_before"] > 0
    assert "Bhardwaj et al., 2024" in (tmp_path / "adapter" / "README.md").read_text()


def test_the_method_table_keeps_what_it_has_and_says_what_each_method_did(recipes, tmp_path, capsys):
    import method_table

    short = ["--candidates", "spiel-ag", "--bases", "nf4", "--steps", "6", "--examples", "32", "--test_examples", "4"]
    large, run = method_table.main([*short, "--output", str(tmp_path)])
    assert (run["moves"], run["late_moves"]) == (1, 1)  # after step 5 of 20, and the checkpoint is after step 3
    assert (run["reload_exact"], run["merge_exact"], run["resume_exact"]) == ("yes", "yes", "yes")
    assert run["trainable"] > 0
    assert run["file_bytes"] == (tmp_path / "adapters/spiel-ag-nf4/adapter_model.safetensors").stat().st_size
    assert large["trainable"] == 69_793_152  # 1 % of each of 224 weights, rounded
    table = (tmp_path / "method_table.md").read_text()
    assert "| spiel-ag | nf4 |" in table
    assert "| 0 / 1 | yes |" in table
    assert json.loads((tmp_path / "method_table.json").read_text()) == {"rows": [run, large]}
    assert method_table.main([*short, "--output", str(tmp_path)]) == [large, run]
    with pytest.raises(ValueError, match="unknown"):
        method_table.main(["--candidates", "no-such-method", "--output", str(tmp_path)])


@pytest.mark.parametrize(("name", "leaves"), [("sora", "yes, "), ("shira", "refused: has a support of entry units")])
def test_the_method_table_says_whether_a_method_leaves_as_a_plain_lora(name, leaves, recipes, tmp_path):
    import method_table

    short = ["--candidates", name, "--bases", "dense", "--large", "false", "--steps", "2", "--examples", "32"]
    rows = method_table.main([*short, "--test_examples", "2", "--output", str(tmp_path)])
    assert [row["resume_exact"] for row in rows] == ["yes"]
    assert method_table.summaries(rows)[0]["export"].startswith(leaves)


@pytest.mark.slow
def test_recipe_and_table_make_the_run_that_a_method_learns_from(recipes, tmp_path):
    import method_table
    import qlora_sparse_lora

    figures = qlora_sparse_lora.main([*SHORT, "--method", "rl-subnetwork", "--output_dir", str(tmp_path / "recipe")])
    assert figures["trainable"] > 0
    assert figures["train_loss"] > 0
    short = [
        "--large",
        "false",
        "--candidates",
        "rl-subnetwork",
        "--bases",
        "nf4",
        "--steps",
        "4",
        "--examples",
        "32",
        "--test_examples",
        "4",
    ]
    (row,) = method_table.main([*short, "--output", str(tmp_path / "table")])
    assert (row["reload_exact"], row["merge_exact"]) == ("yes", "yes")
    assert row["trainable"] > 0
