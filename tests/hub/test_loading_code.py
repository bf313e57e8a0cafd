"""The code on a card loads the adapter, whatever its task: it is run as it is printed."""

import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from huggingface_hub import HfApi
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

from hf_sparse_peft import SparseLoraConfig, hub
from hf_sparse_peft.hub.base_model import base_class_name, pipeline_of
from hf_sparse_peft.utils import installation

IDS = torch.arange(1, 11)[None]
SIZES = {"vocab_size": tiny.VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
IMAGES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def llama_of(head):
    return lambda: tiny.llama(getattr(transformers, head), layers=1, num_labels=3)


def vision():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=5, **IMAGES))


TASKS = {
    "CAUSAL_LM": (llama_of("LlamaForCausalLM"), {}),
    "SEQ_CLS": (llama_of("LlamaForSequenceClassification"), {}),
    "TOKEN_CLS": (llama_of("LlamaForTokenClassification"), {}),
    "QUESTION_ANS": (lambda: tiny.llama(transformers.LlamaForQuestionAnswering, layers=1), {}),
    "FEATURE_EXTRACTION": (llama_of("LlamaModel"), {}),
    "SEQ_2_SEQ_LM": (lambda: T5ForConditionalGeneration(T5Config(**SIZES)), {"target_modules": ["q", "v"]}),
    "images": (vision, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    "none": (llama_of("LlamaForCausalLM"), {}),
}
PIPELINES = {
    "CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering", "FEATURE_EXTRACTION": "feature-extraction", "SEQ_2_SEQ_LM": None,
    "images": "image-classification", "none": "text-generation",
}  # fmt: skip


def filled(model, **options):
    """`model` with an adapter, all of whose trained numbers are random."""
    adapted = get_peft_model(
        model, SparseLoraConfig(**{"r": 2, "density": 0.1, "target_modules": ["q_proj"], **options})
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


@torch.no_grad()
def output(model):
    model = model.eval()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "pixel_values" in inspect.signature(base.forward).parameters:
        return model(pixel_values=torch.linspace(-1, 1, 192).view(1, 3, 8, 8)).logits
    both = {"decoder_input_ids": IDS} if base.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **both)[0]


def run_code(card, place):
    """What the card's first block of Python leaves in `model`."""
    code = str(card).partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code.replace('"path/or/repo-of-this-adapter"', repr(str(place))), names)
    return names["model"]


def run_leaving_code(card, names, folder, monkeypatch):
    """The two blocks below "Without hf-sparse-peft", one after the other, in `folder`."""
    monkeypatch.chdir(folder)
    section = str(card).partition("## Without hf-sparse-peft")[2].partition("## What it changes")[0]
    for code in re.findall(r"```python\n(.+?)```", section, re.S):
        exec(code, names)
    return names["model"]


@pytest.mark.parametrize("task", TASKS)
def test_the_printed_code_gives_the_outputs_that_were_trained(task, tmp_path, monkeypatch):
    make, options = TASKS[task]
    make().save_pretrained(tmp_path / "base")
    model = type(make()).from_pretrained(tmp_path / "base")
    adapted = filled(model, task_type=task if task.isupper() else None, **options)
    hub.save_adapter(adapted, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    loaded = run_code(card, tmp_path / "adapter")
    assert torch.equal(output(loaded), output(adapted))
    assert hub.adapter_card(adapted).data.pipeline_tag == PIPELINES[task]
    dense = run_leaving_code(card, {"model": loaded}, tmp_path, monkeypatch)
    assert (tmp_path / "as-dense" / "config.json").is_file()
    assert not hasattr(dense, "peft_config")
    torch.testing.assert_close(output(dense), output(adapted), atol=1e-5, rtol=1e-4)
    # The command line and merges load by the same rule.
    assert type(hub.load_adapter(tmp_path / "adapter").get_base_model()) is type(loaded.get_base_model())


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "images", "none"])
def test_an_exact_lora_leaves_and_loads_as_it_is_printed(task, tmp_path, monkeypatch):
    make, options = TASKS[task]
    make().save_pretrained(tmp_path / "base")
    model = type(make()).from_pretrained(tmp_path / "base")
    task_type = task if task.isupper() else None
    adapted = filled(model, task_type=task_type, granularity="row", **options)
    card = hub.adapter_card(adapted)
    names = {"model": adapted}
    alone = run_leaving_code(card, names, tmp_path, monkeypatch)
    assert "import hf_sparse_peft " not in str(card).partition("## Without hf-sparse-peft")[2]
    assert alone.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(output(alone), output(adapted), atol=1e-5, rtol=1e-4)


def test_a_base_with_a_head_of_another_size_gives_way_to_the_adapters_own(tmp_path):
    vision().save_pretrained(tmp_path / "base")
    model = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=7, ignore_mismatched_sizes=True)
    adapted = filled(model, target_modules=["q_proj"], modules_to_save=["classifier"])
    hub.save_adapter(adapted, tmp_path / "adapter")
    loaded = run_code((tmp_path / "adapter" / "README.md").read_text(), tmp_path / "adapter")
    assert output(loaded).shape == (1, 7)
    assert torch.equal(output(loaded), output(adapted))


def test_a_base_whose_vocabulary_was_resized_is_resized_again(tmp_path):
    tiny.llama(layers=1).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    adapted = filled(model, task_type="CAUSAL_LM")
    hub.save_adapter(adapted, tmp_path / "adapter")
    card = hub.adapter_card(adapted)  # the config knows of the embeddings since they were saved
    assert torch.equal(output(run_code(card, tmp_path / "adapter")), output(adapted))


class Net(nn.Module):
    """No model of transformers."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)


def test_the_code_for_a_model_of_ones_own_says_whose_it_is():
    text = str(hub.adapter_card(filled(Net())))
    assert f"base = ...  # the Net of {Net.__module__} that was trained" in text
    assert "AutoModel" not in text


def test_which_class_loads_a_base_follows_from_task_then_training_then_architecture():
    trained = {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}
    assert base_class_name({"task_type": "SEQ_CLS", **trained}, ["LlamaModel"]) == "AutoModelForSequenceClassification"
    assert base_class_name(trained, ["LlamaModel"]) == "LlamaForCausalLM"
    wrapped = {"auto_mapping": {"base_model_class": "FSDPLlamaForCausalLM"}}  # a class made while training
    assert base_class_name(wrapped, ["LlamaForCausalLM"]) == "LlamaForCausalLM"
    with pytest.raises(ValueError, match=r"task_type, auto_mapping.*architectures"):
        base_class_name({"task_type": None}, None)
    assert pipeline_of("Net") is None


def test_the_name_given_for_the_base_is_in_card_and_config_and_the_model_keeps_its_own(tmp_path):
    tiny.llama(layers=1).save_pretrained(tmp_path / "base")
    adapted = filled(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM")
    hub.save_adapter(adapted, tmp_path / "adapter", base_model="me/base")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == "me/base"
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model_relation: adapter" in card
    assert str(tmp_path) not in card + (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


def test_a_pushed_adapter_names_no_path_of_this_machine(tmp_path, monkeypatch):
    tiny.llama(layers=1).save_pretrained(tmp_path / "base")
    adapted = filled(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM")
    sent = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))

    def upload(self, folder_path, **_):
        sent.append(json.loads(Path(folder_path, "adapter_config.json").read_text()))

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    for push in (lambda: hub.push_to_hub(adapted, "me/x"), lambda: adapted.push_to_hub("me/x")):
        with pytest.raises(ValueError, match=r"is a path of this machine.*base_model='owner/name'"):
            push()
    with pytest.raises(ValueError, match=r"base_model='\./base' is a path of this machine"):
        hub.push_to_hub(adapted, "me/x", base_model="./base")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    adapted.peft_config["default"].base_model_name_or_path = "models/llama"  # a folder that could be a Hub id
    with pytest.raises(ValueError, match="is a path of this machine"):
        hub.push_to_hub(adapted, "me/x")
    assert sent == []
    hub.push_to_hub(adapted, "me/x", base_model="me/base")
    assert sent[0]["base_model_name_or_path"] == "me/base"


@pytest.mark.parametrize("links", [None, ["Repository, https://git.example/me/hf-sparse-peft"]])
def test_cards_and_configs_say_how_to_install_from_the_repository(links, monkeypatch):
    class Metadata:
        def get_all(self, name):
            return links

    monkeypatch.setattr(installation.importlib.metadata, "metadata", lambda name: Metadata())
    text = str(hub.adapter_card(filled(tiny.llama(layers=1))))
    wanted = "pip install -e ." if links is None else "pip install git+https://git.example/me/hf-sparse-peft"
    assert f"```bash\n{wanted}\n```" in text
    assert ("It is run in a clone" in text) == (links is None)
    assert wanted in installation.install_phrase()
    assert "pip install hf-sparse-peft" not in text
