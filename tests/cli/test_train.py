"""`train`: what a YAML file describes is trained, measured and left; mistakes in it are named."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_peft import cli, hub
from hf_sparse_peft.finetuning import AdapterArguments, TextArguments, choose_method, measures, read_options
from hf_sparse_peft.finetuning.data import tokenize_pairs, tokenize_texts
from hf_sparse_peft.tuners import adapter_layers

RECIPES = Path(__file__).parents[2] / "recipes"
RUN = """\
model_name_or_path: {base}
data_files: [{rows}]
output_dir: {out}
adapter: {{r: 2, density: 1e-2, criterion: random, target_modules: [q_proj, up_proj]}}
test_examples: 8
max_new_tokens: 2
max_steps: 12
per_device_train_batch_size: 8
learning_rate: 2e-2
logging_steps: 4
save_strategy: "no"
disable_tqdm: true
"""


@pytest.fixture
def recipe(base, tmp_path):
    """A recipe over rows of prompts and answers, all with the one answer."""
    rows = [
        {"prompt": f"Tom has {n} apples . Answer :", "answer": " 12", "text": f"Tom has {n} ."} for n in range(2, 20)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 4))
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(base=base, rows=tmp_path / "rows.jsonl", out=tmp_path / "out"))
    return file


def test_figures_are_those_of_the_model_that_is_left(recipe, base, tmp_path, capsys):
    assert cli.main(["train", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "test_loss" in shown
    assert f"adapter and card: {tmp_path / 'out' / 'adapter'}" in shown
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["test_loss"] < figures["test_loss_before"] - 0.5
    assert {"exact_match", "exact_match_before", "train_loss", "trainable", "adapter_bytes"} <= figures.keys()
    assert (tmp_path / "out" / "support.png").stat().st_size > 5_000
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "rows.jsonl" in card
    assert "test_loss" in card
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["density"] == 0.01
    assert config["optimizer"]["type"] == "aged_adamw"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learnin_rate=1e-3"], "Did you mean learning_rate"),
        (["adapter.densty=0.1"], "Did you mean density"),
        (["max_steps=many"], "max_steps"),
        (["max_length=-1"], "max_length"),
        (["method=rigel"], "rigl"),
        (["answer_column=reply"], "answer_column='reply' is no column"),
        (["data_files=[nowhere.json]"], "there is no file 'nowhere.json'"),
        (["data_files=[rows.xyz]"], "files of one kind"),
        (["dataset_name=some/data"], "Name one of dataset_name"),
        (["model_name_or_path="], "name the base model"),
        (["chat_template=true"], "has no chat template"),
        (["oops"], "oops=VALUE"),
    ],
)
def test_a_mistake_is_named_before_a_base_is_loaded(words, said, recipe, capsys, monkeypatch):
    monkeypatch.setattr("hf_sparse_peft.finetuning.recipe.load_base", lambda *a: pytest.fail("loaded"))
    assert cli.main(["train", str(recipe), *words]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_a_recipe_of_a_script_is_sent_to_its_script(tmp_path, capsys):
    file = tmp_path / "dpo.yaml"
    file.write_text("# DPO\n#   python recipes/dpo.py recipes/dpo.yaml\nbeta: 0.1\n")
    assert cli.main(["train", str(file)]) == 1
    assert "python recipes/dpo.py recipes/dpo.yaml" in capsys.readouterr().err


def test_shipped_recipes_for_prompts_and_answers_are_understood():
    options, args = read_options([str(RECIPES / "qlora_sparse_lora_llama1b.yaml")])
    assert options.dataset_name == "openai/gsm8k"
    assert args.learning_rate == 2e-4
    assert choose_method(options, {}, 3).config.seed == 3


def test_modules_behind_layers_stand_where_their_paper_has_them_unless_targets_are_named():
    defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    houlsby = AdapterArguments(method="houlsby")
    assert choose_method(houlsby, defaults, 0).config.target_modules == {"o_proj", "down_proj"}
    assert choose_method(AdapterArguments(method="ssf"), defaults, 0).config.target_modules == "all-linear"
    houlsby.method_options = {"target_modules": ["o_proj"]}
    assert choose_method(houlsby, defaults, 0).config.target_modules == {"o_proj"}


def test_options_are_listed_with_what_they_take(capsys):
    assert cli.main(["train", "--options"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in TextArguments.__dataclass_fields__)
    assert "an integer >= 0" in shown


@pytest.mark.slow
def test_texts_and_a_method_by_name_and_overrides_with_dashes(recipe, tmp_path, capsys):
    words = ["text_column=text", "--method", "shira", "method_options.density=0.02", "--load_in_4bit=false"]
    assert cli.main(["train", str(recipe), *words, "max_steps=4"]) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert "exact_match" not in figures
    assert figures["test_loss"] < figures["test_loss_before"]
    assert "shira" in (tmp_path / "out" / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(recipe, tmp_path, capsys):
    words = ["max_new_tokens=0", "save_strategy=steps", "save_steps=3", "max_steps=6", "load_in_4bit=false"]
    assert cli.main(["train", str(recipe), *words, f"output_dir={tmp_path / 'whole'}"]) == 0
    (tmp_path / "whole" / "checkpoint-6").rename(tmp_path / "away")
    first = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    again = [*words, f"output_dir={tmp_path / 'whole'}", "resume_from_checkpoint=true"]
    assert cli.main(["train", str(recipe), *again]) == 0
    second = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_a_method_that_warms_up_gets_its_run(recipe, tmp_path):
    words = ["method=lt-sft", "max_steps=4", "max_new_tokens=0"]
    assert cli.main(["train", str(recipe), *words]) == 0
    assert hub.check_adapter(tmp_path / "out" / "adapter").parameters > 0


def test_the_loss_is_that_of_the_answers_alone(base, adapter):
    tokenizer = AutoTokenizer.from_pretrained(base)
    import datasets
    from transformers import DataCollatorForSeq2Seq

    pairs = datasets.Dataset.from_dict({"prompt": ["Tom has 2 apples .", "a"], "answer": [" 12", " red blue"]})
    rows = tokenize_pairs(pairs, tokenizer)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter("both")).eval()
    assert adapter_layers(model)
    total = count = 0
    for row in rows:
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for at, label in enumerate(row["labels"]):
            if label != -100:
                total, count = total - float(logs[at - 1, label]), count + 1
    found = measures.mean_loss(model, rows, DataCollatorForSeq2Seq(tokenizer), batch_size=2)
    assert found == pytest.approx(total / count, rel=1e-5)
    cut = tokenize_texts(datasets.Dataset.from_dict({"text": ["Tom has 2 apples ."]}), tokenizer, max_length=3)
    assert len(cut[0]["input_ids"]) == 3
    assert cut[0]["labels"] == cut[0]["input_ids"]
