"""README is executed, not believed."""

import re
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import transformers
import yaml
from transformers import TrainingArguments

from hf_sparse_peft import methods

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.+?)```", README, re.S)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """What a reader has before the first example: a model folder, arguments, data."""
    monkeypatch.chdir(tmp_path)
    tiny.llama(hidden=64, layers=1).save_pretrained("base")
    rows = torch.randint(0, 64, (64, 8), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = {"max_steps": 26, "per_device_train_batch_size": 1, "use_cpu": True, "report_to": "none"}
    return {
        "name": "base",
        "args": TrainingArguments("out", save_strategy="no", disable_tqdm=True, **arguments),
        "dataset": datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}),
    }


def test_readme_examples_run_one_after_the_other_as_written(reader):
    for number, block in enumerate(blocks("python")):
        if "methods.get(" in block:  # the methods example starts from a base of its own
            reader["base"] = transformers.AutoModelForCausalLM.from_pretrained(reader["name"])
        if "from hf_sparse_peft.hub import" in block:  # lossless LoRA export is for structured halves
            reader["model"] = lora_exportable()
        exec(compile(block, f"README block {number}", "exec"), reader)
    assert Path("as-lora/adapter_model.safetensors").exists()
    assert Path("as-dense-model/model.safetensors").exists()


def lora_exportable():
    from peft import get_peft_model

    from hf_sparse_peft import SparseLoraConfig

    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    return get_peft_model(base, SparseLoraConfig(granularity="row", density=0.05, target_modules="all-linear"))


def test_method_table_in_readme_is_the_registrys():
    table = re.search(r"<!-- method table -->\n(.+?)\n<!-- end of method table -->", README, re.S).group(1)
    assert table == methods.markdown_table(), "run `python -m hf_sparse_peft.methods` and paste its output"


@pytest.mark.parametrize("marker", ["run", "test"])
def test_both_commands_are_single_lines_that_install_torch_first_and_only_constrained_versions(marker):
    command = re.search(rf"<!-- {marker} command -->\s*```bash\n(.+?)\n```", README, re.S).group(1)
    assert "\n" not in command
    assert command.startswith("pip install -c constraints.txt torch==2.13.0 && pip install -c constraints.txt -e ")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_yaml_header_is_the_command_that_launches_it(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#   python ")]
    assert len(header) == 1
    script, named = header[0].split()[2:4]
    assert (ROOT / script).exists()
    assert named == f"recipes/{path.name}"


@pytest.mark.parametrize("path", [path for path in RECIPES if "qlora" in path.name], ids=lambda path: path.name)
def test_yaml_options_are_known_to_the_recipe_and_build_a_config(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import json

    import qlora_sparse_lora

    from hf_sparse_peft import SparseLoraConfig

    extra = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    recipe, args = qlora_sparse_lora.parse([str(path), *extra])
    config = SparseLoraConfig(**json.loads(recipe.adapter))
    assert [rule.part_type for rule in config.schedule][:3] == ["prune", "regrow", "allocate"]
    assert args.learning_rate == yaml.safe_load(path.read_text())["learning_rate"]
