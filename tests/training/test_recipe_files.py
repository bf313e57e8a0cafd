"""Options of runs in YAML files: their types arrive, and mistakes are said in the file's own words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from transformers import TrainingArguments

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.training.recipe_files import checked_options, parse_recipe, read_overrides, read_recipe, read_yaml


@dataclass
class Options:
    density: float = 0.1
    name: str | None = None
    kind: Literal["text", "number"] = "text"
    adapter: dict[str, Any] = field(default_factory=dict)


def parsed(tmp_path, text, *words):
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: {tmp_path}\n{text}")
    return parse_recipe((Options, TrainingArguments), [str(file), *words], below={"use_cpu": True})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01), ("1.0e-2", 0.01), ("-1E+3", -1000.0), (".5", 0.5), ("3.", 3.0), ("1e3", 1000.0), ("12", 12),
        ("010", 10), ("-7", -7), ("true", True), ("no", "no"), ("on", "on"), ("null", None), ("", None), ("~", None),
        ("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("e5", "e5"), ("1e", "1e"), ("'1e-2'", "1e-2"),
        ("{a: [1e-3, x]}", {"a": [0.001, "x"]}),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = read_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_numbers_arrive_as_numbers_at_every_depth(tmp_path):
    adapter = "adapter: {schedule: [{type: orthogonality, weight: 1e-1}]}"
    text = f"density: 1e-2\nlearning_rate: 3e-4\nsave_strategy: no\n{adapter}"
    options, args = parsed(tmp_path, text)
    assert (options.density, args.learning_rate) == (0.01, 3e-4)
    assert options.adapter["schedule"][0]["weight"] == 0.1
    assert args.save_strategy == "no"
    assert args.use_cpu


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("densty: 0.1", [], "run.yaml': there is no option 'densty'. Did you mean density"),
        ("zzz: 0.1", [], "there is no option 'zzz'. Known are .*density.*learning_rate"),
        ("density: many", [], "run.yaml': density='many' is of the wrong type: it takes a finite number"),
        ("max_steps: 1.5", [], "max_steps=1.5 is of the wrong type: it takes an integer"),
        ("bf16: yes", [], "bf16='yes' is of the wrong type: it takes true or false"),
        ("kind: digits", [], "kind='digits' is out of range: it takes 'text' or 'number'"),
        ("density: 0.1\ndensity: 0.2", [], "'density' is there twice, again in line 3"),
        ("density: [", [], "this is no YAML"),
        ("", ["max_steps=few"], "max_steps='few' is of the wrong type: it takes an integer"),
        ("", ["--lerning_rate", "1e-4"], "there is no option 'lerning_rate'. Did you mean learning_rate"),
        ("", ["1e-4"], "'1e-4' is no option"),
        ("", ["density.r=3"], "density={'r': 3} is of the wrong type"),
        ("extends: missing.yaml", [], "There is no file '.*missing.yaml'"),
        ("extends: run.yaml", [], "extends itself: run.yaml -> run.yaml"),
    ],
)
def test_a_mistake_names_file_key_value_and_mend(tmp_path, text, words, said):
    with pytest.raises(ValueError, match=said):
        parsed(tmp_path, text, *words)


def test_a_list_instead_of_options_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- density")
    with pytest.raises(ValueError, match=r"list.yaml' holds list. It takes lines of `option: value`"):
        read_recipe(tmp_path / "list.yaml")


def test_a_command_line_stands_over_the_file_key_by_key(tmp_path):
    words = ["density=1e-3", "--max-steps", "7", "--name", "12", "adapter.r=4", "--disable_tqdm", "--seed=5"]
    options, args = parsed(tmp_path, "density: 0.5\nadapter: {r: 8, density: 0.1}", *words)
    assert (options.density, args.max_steps, args.disable_tqdm, args.seed) == (0.001, 7, True, 5)
    assert options.name == "12"  # a field that takes strings gets the word
    assert options.adapter == {"r": 4, "density": 0.1}
    assert read_overrides(["--adapter", '{"r": 1}']) == {"adapter": '{"r": 1}'}


def test_a_file_extends_another_one_key_by_key(tmp_path):
    (tmp_path / "base.yaml").write_text("density: 0.5\nmax_steps: 3\nadapter: {r: 8, schedule: [regrow]}")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\nmax_steps: 4\nadapter: {schedule: []}")
    assert read_recipe(tmp_path / "run.yaml") == {"density": 0.5, "max_steps": 4, "adapter": {"r": 8, "schedule": []}}


def test_names_of_a_config_are_checked_before_it_is_made():
    assert checked_options({"r": 4}, SparseLoraConfig, "adapter") == {"r": 4}
    with pytest.raises(ValueError, match=r"adapter: there is no option 'densty'. Did you mean density"):
        checked_options({"densty": 4}, SparseLoraConfig, "adapter")


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit):
        parse_recipe((Options, TrainingArguments), ["--help"])
    shown = capsys.readouterr().out
    assert "--density" in shown
    assert "--learning_rate" in shown
