"""`eval` hands the loaded adapter to lm-eval: a stand-in for its interface here, the real one where it is installed."""

import json
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_peft import cli, hub
from hf_sparse_peft.tuners import adapter_layers


@pytest.fixture
def stand_in(monkeypatch):
    """A module with the calls of lm-eval that are used; remembers what it was given."""
    seen = {}

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            seen.update(pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size)

    class TaskManager:
        def __init__(self, include_path=None):
            seen["folder"] = include_path

        def match_tasks(self, names):
            return [name for name in names if name in ("sums", "words")]

    def simple_evaluate(**options):
        seen.update(options)
        numbers = {"alias": "sums", "acc,none": 0.25, "acc_stderr,none": 0.1}
        numbers |= {"em,strict-match": 0.5, "em_stderr,strict-match": "N/A"}
        return {
            "results": dict.fromkeys(options["tasks"], numbers),
            "n-samples": {task: {"original": 40, "effective": 4} for task in options["tasks"]},
            "versions": dict.fromkeys(options["tasks"], 1.0),
        }

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_the_loaded_adapter_and_every_option_reach_the_harness(stand_in, adapter, tmp_path, capsys):
    options = ["--limit", "4", "--num-fewshot", "2", "--batch-size", "8", "--chat-template", "--task-folder", "mine"]
    command = ["eval", str(adapter("both")), "--tasks", "sums, words", *options, "--out", str(tmp_path / "out.json")]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"]["words"] == {"acc": 0.25, "em,strict-match": 0.5}
    assert found["errors"]["sums"] == {"acc": 0.1}
    assert found["examples"] == {"sums": 4, "words": 4}
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert len(adapter_layers(stand_in["pretrained"])) == 4
    assert not stand_in["pretrained"].training
    assert stand_in["tokenizer"].eos_token is not None
    given = {key: stand_in[key] for key in ("tasks", "limit", "num_fewshot", "batch_size", "folder")}
    assert given == {"tasks": ["sums", "words"], "limit": 4, "num_fewshot": 2, "batch_size": 8, "folder": "mine"}
    assert stand_in["apply_chat_template"] is True


def test_the_table_has_a_line_for_each_metric_and_unknown_tasks_are_named(stand_in, adapter, capsys):
    assert cli.main(["eval", str(adapter("both")), "--tasks", "sums"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "metric", "value", "standard", "error", "examples"]
    assert lines[1].split() == ["sums", "acc", "0.25", "0.1", "4"]
    assert lines[2].split() == ["sums", "em,strict-match", "0.5", "-", "4"]
    assert cli.main(["eval", str(adapter("both")), "--tasks", "sums,sms"]) == 1
    assert "--tasks sms is no task of lm-eval" in capsys.readouterr().err
    assert cli.main(["eval", str(adapter("both")), "--tasks", "sums", "--batch-size", "0"]) == 2


def test_without_lm_eval_the_message_says_how_to_get_it_before_a_base_is_loaded(adapter, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("hf_sparse_peft.cli.options.load_adapter", lambda *a, **k: pytest.fail("loaded"))
    assert cli.main(["eval", str(adapter("both")), "--tasks", "sums"]) == 1
    assert "pip install 'hf-sparse-peft[eval]'" in capsys.readouterr().err


def test_the_real_harness_scores_an_adapter_as_its_own_logits_do(base, adapter, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the extra `eval`")
    rows = [{"question": f"Tom has {n} apples .", "choices": [" 12", " red"], "gold": n % 2} for n in range(2, 8)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{tmp_path}/rows.json'}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\nmetadata: {version: 1.0}\n"
    )
    command = ["eval", str(adapter("both")), "--tasks", "sums", "--task-folder", str(tmp_path), "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    model, tokenizer = hub.load_adapter(adapter("both")), AutoTokenizer.from_pretrained(base)
    assert not adapter_layers(AutoModelForCausalLM.from_pretrained(base))
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            texts = (row["question"], row["question"] + choice)
            prompt, whole = (tokenizer(text, return_tensors="pt").input_ids for text in texts)
            with torch.no_grad():
                logs = model(input_ids=whole).logits[0].log_softmax(-1)
            places = range(prompt.shape[1], whole.shape[1])
            scores.append(sum(float(logs[at - 1, whole[0, at]]) for at in places))
        right += int(scores[1] > scores[0]) == row["gold"]
    assert found["scores"]["sums"]["acc"] == pytest.approx(right / len(rows))
    assert found["examples"]["sums"] == len(rows)
