"""`methods`: what it says of a method is what building and exporting it shows."""

import json
import warnings

import pytest
import tiny
from peft import get_peft_model

from hf_sparse_peft import cli, hub, methods
from hf_sparse_peft.preflight import families, method_rows
from hf_sparse_peft.tuners import adapter_layers

SHOWN = ("shira", "rosa", "edora", "sora", "paca", "intrinsic-dimension", "dora", "loha", "flora", "ssf", "houlsby")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config.json of a tiny Llama whose sides every method's defaults fit."""
    folder = tmp_path_factory.mktemp("config")
    tiny.llama(hidden=256, layers=2).config.save_pretrained(folder)
    return folder / "config.json"


def test_every_method_is_listed_with_its_family(capsys):
    assert cli.main(["methods", "--family", "sparse-moving", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"rigl", "spiel-ag"} <= {row["name"] for row in rows}
    assert {row["family"] for row in rows} == {"sparse-moving"}
    assert all(row["trained"] is None and row["moves"] and row["paper"] for row in rows)
    assert sum(len(_names(family)) for family in families()) == len(methods.names())


def _names(family):
    ending = f".{family.replace('-', '_')}"
    return [name for name in methods.names() if methods.describe(name).build.__module__.endswith(ending)]


@pytest.mark.parametrize("name", SHOWN)
def test_trained_numbers_are_those_of_the_real_model(name, config):
    (row,) = method_rows([name], model=config)
    method = methods.get(name, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny.llama(hidden=256, layers=2), method.config)
    assert row.problem == ""
    assert row.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [name for name in SHOWN if methods.describe(name).upstream is None])
def test_what_leaves_as_a_lora_leaves_without_an_error(name, tmp_path):
    (row,) = method_rows([name])
    model = get_peft_model(tiny.llama(hidden=256, layers=1), methods.get(name, task_type="CAUSAL_LM").config)
    layers = adapter_layers(model)
    only = {"LoRA": None, "DoRA": None, "LoRA and patch": "low_rank"}
    if row.leaves_as not in only:
        assert row.leaves_as in ("SHiRA or patch", "dense", "nothing")
        pieces = [piece for layer in layers for piece in layer.pieces("default")]
        assert all(piece.exact_rank in (None, 0) for piece in pieces)
        return
    pieces = [piece for layer in layers for piece in layer.pieces("default")]
    if not any(piece.exact_rank for piece in pieces):
        return  # nothing to export before it has trained
    done = hub.export_lora(model, tmp_path / "lora", only=only[row.leaves_as])
    assert max(done.errors.values()) < 1e-5
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["use_dora"] == (row.leaves_as == "DoRA")


def test_4_bit_support_is_what_the_cost_says():
    for name in methods.names():
        info = methods.describe(name)
        assert info.four_bit != ("dense bases only" in info.cost), name


def test_the_table_counts_on_request_and_says_what_does_not_fit(config, capsys):
    assert cli.main(["methods", "shira", "smt", "--model", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-1] == "trained"
    assert lines[1].split()[0] == "shira"
    assert lines[2].split()[-1] == "-"
    assert lines[3].startswith("smt: ")
    assert "block_size=256 does not divide" in lines[3]


def test_unknown_names_are_refused_with_those_that_are_known(capsys):
    assert cli.main(["methods", "--family", "fast"]) == 1
    assert "--family fast is unknown; choose one of ['blocks'" in capsys.readouterr().err
    assert cli.main(["methods", "rigel"]) == 1
    assert "'rigel' is unknown" in capsys.readouterr().err


def test_markdown_is_the_table_of_the_documentation(capsys):
    assert cli.main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == methods.markdown_table()
