"""The command line loads the base as it was trained: with its labels, with its vocabulary."""

import json

import pytest
import tiny
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig, cli
from hf_sparse_peft.utils.checksums import save_checked

IDS = torch.arange(1, 11)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.llama(layers=1).save_pretrained(folder)
    return folder


def saved(model, folder, **options):
    options = {"target_modules": ["q_proj"], "r": 0, "density": 0.1, "granularity": "row", **options}
    adapted = get_peft_model(model, SparseLoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return logits(adapted)


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits


def classifier(base, **options):
    return LlamaForSequenceClassification.from_pretrained(base, **options)


@pytest.mark.parametrize("verb", ["merge", "lora", "shira"])
def test_a_classifier_with_other_labels_leaves_with_them(verb, base, tmp_path, capsys):
    labels = {0: "no", 1: "yes", 2: "maybe"}
    model = classifier(base, num_labels=3, id2label=labels, label2id={v: k for k, v in labels.items()})
    expected = saved(model, tmp_path / "adapter", task_type="SEQ_CLS")
    command = ["merge"] if verb == "merge" else ["export", "--to", verb]
    assert cli.main([*command, str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    if verb == "merge":
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        assert found.config.id2label == labels
    else:
        found = PeftModel.from_pretrained(classifier(base, num_labels=3), tmp_path / "out")
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=1e-5)
    assert cli.main(["inspect", str(tmp_path / "adapter")]) == 0


def test_a_head_of_another_size_in_the_base_gives_way_to_the_trained_one(tmp_path, capsys):
    tiny.llama(LlamaForSequenceClassification, layers=1, num_labels=5).save_pretrained(tmp_path / "base")
    model = classifier(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    expected = saved(model, tmp_path / "adapter", task_type="SEQ_CLS")
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [70, 50])
@pytest.mark.parametrize("verb", ["merge", "lora"])
def test_a_base_with_another_vocabulary_leaves_with_its_embeddings(verb, rows, tied, tmp_path, capsys):
    tiny.llama(layers=1, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(rows)
    expected = saved(model, tmp_path / "adapter", task_type="CAUSAL_LM")
    (tmp_path / "base").rename(tmp_path / "moved")
    command = ["merge"] if verb == "merge" else ["export", "--to", verb]
    command += [str(tmp_path / "adapter"), str(tmp_path / "out"), "--base", str(tmp_path / "moved")]
    assert cli.main(command) == 0, capsys.readouterr().err
    if verb == "merge":
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert found.config.vocab_size == rows
    else:
        resized = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
        resized.resize_token_embeddings(rows)
        found = PeftModel.from_pretrained(resized, tmp_path / "out")
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=1e-5)


def test_a_head_that_nobody_saved_is_named_and_nothing_is_written(base, tmp_path, capsys):
    saved(classifier(base, num_labels=2), tmp_path / "adapter")  # without task_type, no head is trained or saved
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 1
    assert "'score.weight'" in (said := capsys.readouterr().err)
    assert "modules_to_save=['score']" in said
    assert not (tmp_path / "out").exists()


def test_new_rows_that_nobody_saved_are_named(base, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70)
    saved(model, tmp_path / "adapter", task_type="CAUSAL_LM")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_checked({k: v for k, v in load_file(file).items() if "embed" not in k}, file, {"format": "pt"})
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 1
    assert "embed_tokens.weight" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "value"), [("vocab_size", 10**12), ("num_labels", 10**12), ("vocab_size", "70")])
def test_a_size_in_the_config_that_no_tensor_has_allocates_nothing(field, value, base, tmp_path, capsys):
    saved(classifier(base, num_labels=3), tmp_path / "adapter", task_type="SEQ_CLS")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["base_overrides"] == {"num_labels": 3, "vocab_size": tiny.VOCAB}
    config["base_overrides"][field] = value
    file.write_text(json.dumps(config))
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 1
    assert field in capsys.readouterr().err


def test_the_code_on_the_card_loads_a_classifier_with_its_labels(base, tmp_path):
    expected = saved(classifier(base, num_labels=3), tmp_path / "adapter", task_type="SEQ_CLS")
    card = (tmp_path / "adapter" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("path/or/repo-of-this-adapter", "adapter")
    names = {}
    exec(code.replace('"adapter"', repr(str(tmp_path / "adapter"))), names)
    assert torch.equal(logits(names["model"]), expected)


@pytest.mark.parametrize("head", ["LlamaForTokenClassification", "LlamaForQuestionAnswering"])
@pytest.mark.parametrize("config", [SparseLoraConfig, KernelLoraConfig])
def test_heads_that_peft_adds_for_a_task_are_trained_saved_and_merged(head, config, tmp_path, capsys):
    labels, task = (2, "QUESTION_ANS") if "Question" in head else (5, "TOKEN_CLS")
    tiny.llama(getattr(transformers, head), layers=1).save_pretrained(tmp_path / "base")
    model = getattr(transformers, head).from_pretrained(
        tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": task}
    adapted = get_peft_model(model, config(**options))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad and "modules_to_save.default" in name]
    assert trained
    adapted.add_adapter("second", config(**options))
    adapted.delete_adapter("second")
    adapted.save_pretrained(tmp_path / "adapter")
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    merged = getattr(transformers, head).from_pretrained(tmp_path / "out")
    name = "score" if "Token" in head else "qa_outputs"
    assert torch.equal(
        getattr(merged, name).weight, getattr(adapted.base_model.model, name).modules_to_save["default"].weight
    )


def test_a_resized_base_whose_embeddings_are_trained_whole_is_saved_once_and_merged(base, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70)
    heads = ["embed_tokens", "lm_head"]
    expected = saved(model, tmp_path / "adapter", task_type="CAUSAL_LM", modules_to_save=heads)
    keys = [key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "q_proj" not in key]
    assert sorted(keys) == ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("damage", [b"", b"xx", b"\xff" * 64])
def test_damaged_weights_of_the_base_are_named_and_nothing_is_written(damage, tmp_path, capsys):
    saved(tiny.llama(layers=1), tmp_path / "adapter")
    tiny.llama(layers=1).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(damage)
    command = ["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    assert cli.main(command) == 1
    assert f"'{tmp_path / 'base'}' are damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bool", "complex64", "nn"])
def test_a_dtype_that_no_model_is_loaded_in_is_refused(dtype, base, tmp_path, capsys):
    saved(tiny.llama(layers=1), tmp_path / "adapter")
    command = ["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), "--base", str(base), "--dtype", dtype]
    assert cli.main(command) == 1
    assert f"--dtype {dtype} is no dtype" in capsys.readouterr().err


def test_the_base_is_loaded_at_the_revision_that_was_trained(tmp_path, monkeypatch, capsys):
    saved(tiny.llama(layers=1), tmp_path / "adapter", revision="v2")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "someone/base"}))
    asked = []

    def no_network(kind, name, **options):
        asked.append((name, options.get("revision")))
        raise OSError("no network")

    monkeypatch.setattr(AutoConfig, "from_pretrained", classmethod(no_network))
    for more in ([], ["--base", "someone/other"]):  # what the user names has revisions of its own
        assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), *more]) == 1
    assert asked == [("someone/base", "v2"), ("someone/other", None)]


@pytest.mark.parametrize("to", ["lora", "shira"])
def test_a_kernel_adapter_leaves_in_formats_of_upstream(to, tmp_path, capsys):
    tiny.llama(layers=1).save_pretrained(tmp_path / "base")
    config = KernelLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny.llama(layers=1), config).save_pretrained(tmp_path / "adapter")
    folders = [str(tmp_path / "adapter"), str(tmp_path / "out")]
    rank = ["--rank", "8"] if to == "lora" else []  # fitted by SVD: no rank equals a kernel's update
    assert cli.main(["export", *folders, "--to", to, "--base", str(tmp_path / "base"), *rank]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
