"""`estimate` and `doctor` on the command line."""

import json

import pytest
import tiny

from hf_sparse_peft import Regrow, SparseLoraConfig
from hf_sparse_peft.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().config.save_pretrained(folder)
    return str(folder / "config.json")


@pytest.fixture
def config(tmp_path):
    SparseLoraConfig(
        r=0, density=0.1, target_modules=["q_proj", "v_proj"], schedule=[Regrow(every=50, grow="random")]
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def test_estimate_prints_a_table_or_json_with_options_of_the_method(model, capsys):
    words = ["estimate", model, "--method", "shira", "--bits", "4", "--seq", "16", "density=0.1", "granularity=row"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "training, at its highest" in table
    assert "density=0.1, granularity=row" in table
    assert main([*words, "--json", "--gpu", "24G"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert sum(part["bytes"] for part in found["parts"]) == found["training"]
    assert f"{found['trained_numbers']:,} numbers train" in table


def test_estimate_of_several_processes_tells_what_they_send(model, config, capsys):
    words = ["estimate", model, "--method", "rigl", "--seq", "8", "density=0.1"]
    words += ["--processes", "4", "--sharding", "fsdp2"]
    assert main(words) == 0
    table = capsys.readouterr().out
    for said in ("processes=4, sharding=fsdp2", "gathered layers of the base", "all_gather", "dense gradients"):
        assert said in table
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["when"] for one in found["traffic"]] == ["step"] * 3 + ["move"] * 3


def test_estimate_of_a_config_chooses_what_fits(model, config, capsys):
    assert main(["estimate", model, "--config", config, "--seq", "8", "--gpu", "2G", "--fit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["density"] == 1.0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "--method and --config"),
        (["--method", "shira", "--fit"], 2, "--gpu"),
        (["--method", "no-such"], 1, "no-such"),
        (["--method", "shira", "--bits", "5"], 1, "--bits 5"),
        (["--method", "shira", "--optim", "adamw_9bit"], 1, "--optim adamw_9bit"),
        (["--method", "shira", "--gpu", "lots"], 1, "--gpu lots"),
        (["--method", "shira", "densty=1"], 1, "densty"),
        (["--method", "shira", "--processes", "2", "--sharding", "fsdp1"], 1, "--sharding fsdp1"),
        (["--method", "shira", "--sharding", "ddp"], 1, "--processes 1"),
    ],
)
def test_mistakes_of_estimate_end_in_words_of_flags(model, words, status, message, capsys):
    assert main(["estimate", model, *words]) == status
    assert message in capsys.readouterr().err


def test_doctor_ends_with_1_where_there_is_an_error_and_says_its_mend(model, config, tmp_path, capsys):
    run = tmp_path / "run.yaml"
    run.write_text("max_steps: 200\nuse_cpu: true\n")
    assert main(["doctor", model, config, "--args", str(run), "--bits", "32"]) == 0
    assert "error" not in capsys.readouterr().out
    run.write_text("max_steps: 40\nuse_cpu: true\n")
    assert main(["doctor", model, config, "--args", str(run), "--bits", "32"]) == 1
    assert "1 error" in (said := capsys.readouterr().out)
    assert "Train longer" in said
    assert main(["doctor", model, config, "--args", str(run), "--bits", "32", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert ("error", "Regrow.every") in [(one["severity"], one["field"]) for one in findings]
    assert main(["doctor", model, "no-such-file"]) == 1
    assert "no-such-file" in capsys.readouterr().err
