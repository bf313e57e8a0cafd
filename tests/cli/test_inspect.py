"""`inspect`: what it counts, groups and draws."""

import json

import pytest
from safetensors.torch import load_file

from hf_sparse_peft import cli, hub


@pytest.mark.parametrize("kind", ["entries", "both", "factors", "kernel", "core", "subnet"])
def test_groups_and_modules_count_the_same_numbers(kind, adapter, capsys):
    assert cli.main(["inspect", str(adapter(kind)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {group["name"]: group["modules"] for group in found["groups"]} == {"q_proj": 2, "up_proj": 2}
    for key in ("parameters", "bytes"):
        assert sum(group[key] for group in found["groups"]) == sum(module[key] for module in found["modules"])
    weights = [(m["density"], m["rows"] * m["cols"]) for m in found["modules"]]
    assert found["density"] == pytest.approx(sum(d * n for d, n in weights) / sum(n for _, n in weights))


def test_the_table_has_a_line_for_each_kind_and_on_request_for_each_module(adapter, capsys):
    assert cli.main(["inspect", str(adapter("both"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["modules", "shape", "support", "rank", "density", "parameters", "bytes"]
    assert sorted(line.split()[:3] for line in lines[1:3]) == [["2", "x", "q_proj"], ["2", "x", "up_proj"]]
    assert lines[3].startswith("4 modules")
    assert cli.main(["inspect", str(adapter("both")), "--modules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [m.name for m in hub.check_adapter(adapter("both")).modules]


def test_bytes_are_those_of_the_tensors_in_the_file(adapter):
    report = hub.check_adapter(adapter("both"))
    tensors = load_file(adapter("both") / "adapter_model.safetensors")
    assert sum(group.bytes for group in report.groups()) == sum(tensor.nbytes for tensor in tensors.values())


def test_plot_draws_what_there_is_and_refuses_what_there_is_not(adapter, tmp_path, capsys):
    for kind, of in (("both", []), ("both", ["--of", "rank"]), ("factors", []), ("core", ["--of", "parameters"])):
        file = tmp_path / f"{kind}{len(of)}.png"
        assert cli.main(["inspect", str(adapter(kind)), "--plot", str(file), *of]) == 0
        assert file.stat().st_size > 5_000
    capsys.readouterr()
    command = ["inspect", str(adapter("entries")), "--plot", str(tmp_path / "no.png"), "--of", "rank"]
    assert cli.main(command) == 1
    assert "--of rank is nothing that this adapter has" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()
    assert cli.main(["inspect", str(adapter("entries")), "--of", "rank"]) == 2
