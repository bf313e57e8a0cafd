"""README is executed, not believed."""

import re
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import transformers
from transformers import TrainingArguments

from hf_sparse_peft import methods

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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
