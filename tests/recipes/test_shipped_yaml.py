"""Every YAML in `recipes/` runs, with small stand-ins for what it names on the Hub."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import datasets
import pytest
import stand_ins
from transformers import TrainingArguments

from hf_sparse_peft import methods
from hf_sparse_peft.training.recipe_files import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "accelerate")
SHORT = {
    "max_steps": 2, "logging_steps": 1, "train_examples": 8, "test_examples": 2, "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 1, "disable_tqdm": "true", "max_new_tokens": 2,
    "forgetting_rows": 2, "forgetting_length": 64, "max_target_length": 4,
}  # fmt: skip
"""What makes a run short; options that a recipe does not have are left out."""
SMALLER = {
    "blocks": ["method_options.block_size=16", "method_options.warmup_steps=1"],
    "kernel": ["method_options.r=4"],
    "sparse_low_rank": ["method_options.warmup=1", "max_steps=3"],
    "sparse_moving": ["max_steps=7"],
    "qlora_sparse_lora_llama1b": ["max_steps=7"],
    "sparsifying": ["max_steps=24"],
    "token_classification_xlmr": ["max_steps=7"],
    "image_classification_vit": ["max_steps=7", "dataloader_num_workers=0"],
    "tiny_core": ["method_options.r=4"],
    "structured_forms": ["method_options.rows=8", "method_options.cols=4"],
}
"""Options of single files that a model of 64 columns, or a run of two steps, cannot have."""
OWN = tuple(path for path in FILES if path.with_suffix(".py").exists())
"""Those beside a script of their name run, as they are, in tests of their own."""


DRAWN = "qlora_sparse_lora_llama1b"
"""The one whose pictures are drawn, a second each."""


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


def launched(path: Path) -> tuple[str, str]:
    """Script and file of the one command in a YAML's header."""
    header = [line.removeprefix("#").split() for line in path.read_text().splitlines() if line.startswith("#   ")]
    assert len(header) == 1, "one line of the header is the command"
    assert header[0][0] == "python"
    return header[0][1], header[0][2]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_header_says_what_it_is_and_is_the_command_that_launches_it(path):
    script, named = launched(path)
    assert (RECIPES.parent / script).is_file()
    assert RECIPES.parent / named == path
    assert len(path.read_text().splitlines()[0]) > 30


def test_every_family_of_methods_has_a_yaml_that_names_one_of_its_methods():
    families = {path.stem for path in Path(methods.__file__).parent.glob("*.py")}
    families -= {"__init__", "__main__", "functions", "registry"}
    families -= {"whole_weights"}  # no adapter: the scripts that read YAML train one
    named = {path.stem: read_recipe(path)["method"] for path in (RECIPES / "methods").glob("*.yaml")}
    assert named.keys() == families
    for family, method in named.items():
        assert methods.describe(method).build.__wrapped__.__module__.rpartition(".")[2] == family


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder of the stand-in of a model, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model") / name.rpartition("/")[2]
            stand_ins.MODELS[name](made[name])
        return made[name]

    return folder


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.setattr(datasets, "load_dataset", stand_ins.load_dataset)


def case(path: Path):
    # sentence-transformers takes ten seconds to import
    return pytest.param(path, marks=[pytest.mark.slow] * path.stem.startswith("sentence_embeddings"), id=name_of(path))


@pytest.mark.parametrize("path", [case(path) for path in FILES if path not in OWN])
def test_yaml_runs_on_stand_ins_of_its_model_and_data(path, offline, models, tmp_path, monkeypatch):
    options = read_recipe(path)
    recipe = importlib.import_module(Path(launched(path)[0]).stem)
    known = {field.name for field in dataclasses.fields(recipe.RecipeArguments)}
    known |= {field.name for field in dataclasses.fields(TrainingArguments)}
    short = [f"{name}={value}" for name, value in SHORT.items() if name in known]
    if base := options.get("model_name_or_path"):
        short.append(f"model_name_or_path={models(base)}")
    import common

    from hf_sparse_peft.finetuning import run

    if path.stem != DRAWN:
        monkeypatch.setattr(common, "draw_run", lambda *_: None)
        monkeypatch.setattr(common, "RunReportCallback", lambda *_: None)
        monkeypatch.setattr(run, "draw_support_history", lambda *_: None)
    figures = recipe.main([str(path), *short, *SMALLER.get(path.stem, []), f"output_dir={tmp_path}"])
    assert figures["train_loss"] > 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "figures.json").is_file()
    assert not options.get("forgetting_dataset") or figures["held_out_loss"] > 0


def test_the_stand_in_refuses_what_the_hub_refuses():
    with pytest.raises(ValueError, match="Config name is missing"):
        stand_ins.load_dataset("openai/gsm8k", split="train")
    with pytest.raises(ValueError, match="Unknown split"):
        stand_ins.load_dataset("openai/gsm8k", "main", split="validation")


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))


@pytest.mark.parametrize(
    ("written", "right", "same"),
    [
        ("so 3 + 4 = 7", "a\n#### 7", True),
        ("#### 1,200 dollars", "#### 1200", True),
        ("it is 12.50", "#### 12.5", True),
        ("7 or 8", "#### 7", False),
        ("-7", "#### 7", False),
        ("#### 7 of 9", "#### 7", True),
        ("no idea", "#### 7", False),
    ],
)
def test_worked_solutions_are_compared_by_the_number_they_end_with(recipes, written, right, same):
    import evaluate

    metric = evaluate.load(str(RECIPES / "exact_match"))
    found = metric.compute(predictions=[written], references=[right], final_number=True)
    assert found["exact_match"] == 100.0 * same


def test_chat_template_is_applied_and_its_start_token_is_there_once(recipes, models):
    import demo_data
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models("meta-llama/Llama-3.2-1B-Instruct"))
    pairs = datasets.Dataset.from_dict({"prompt": ["How many ?"], "answer": ["Ten ."]})
    rows = demo_data.tokenize_pairs(demo_data.in_chat_template(pairs, tokenizer), tokenizer)
    ids = rows[0]["input_ids"]
    assert tokenizer.decode(ids).split() == ["<s>", "[user]", "How", "many", "?", "[assistant]", "Ten", ".</s>"]
    assert ids.count(tokenizer.bos_token_id) == 1
    plain = AutoTokenizer.from_pretrained(RECIPES / "demo_base")
    with pytest.raises(ValueError, match="has no chat template"):
        demo_data.in_chat_template(pairs, plain)


def test_long_rows_are_cut_and_rows_without_an_answer_left_out(recipes):
    import demo_data
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "demo_base")
    pairs = datasets.Dataset.from_dict({"prompt": ["Tom has 7 apples .", "Tom " * 50], "answer": [" 7 8 9", " 7"]})
    whole = demo_data.tokenize_pairs(pairs, tokenizer)
    length = len(whole[0]["input_ids"]) - 2
    cut = demo_data.tokenize_pairs(pairs, tokenizer, max_length=length)
    assert len(cut) == 1
    assert cut[0]["input_ids"] == whole[0]["input_ids"][:length]
    assert cut[0]["labels"] == whole[0]["labels"][:length]
    with pytest.raises(ValueError, match="cuts the answer off every one of 2 rows"):
        demo_data.tokenize_pairs(pairs, tokenizer, max_length=2)
