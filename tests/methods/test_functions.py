"""Methods that are functions: the table has all of them, and what it says to call can be called."""

import ast
import inspect
import json
import re

import pytest

import hf_sparse_peft
from hf_sparse_peft import cli, federated, merging, methods, pruning
from hf_sparse_peft.preflight import method_rows
from hf_sparse_peft.pruning import PruningMethod
from hf_sparse_peft.utils.parts import part_types

ROWS = {"one_shot_pruned": "essential-sparsity"}
"""Functions of methods that are entered as rows with a config."""


def listed():
    return {part for info in methods.FUNCTIONS.values() for part in info.parts}


def test_every_pruning_method_has_an_entry_of_its_own_name():
    own = {name: part for name, part in part_types(PruningMethod).items() if part.__module__.startswith("hf_sparse")}
    assert {"wanda", "oba", "hessian_saliency"} <= own.keys()
    for name, part in own.items():
        assert part in methods.FUNCTIONS[name.replace("_", "-")].parts


def test_every_public_function_that_cites_a_paper_has_an_entry():
    cites = re.compile(r"[A-Z]\w+(?: et al\.| and [A-Z]\w+), (?:19|20)\d\d")
    public = {name: getattr(room, name) for room in (pruning, merging, federated) for name in room.__all__}
    cited = {n for n, f in public.items() if inspect.isfunction(f) and cites.search(inspect.getdoc(f))}
    assert {"compensate", "laser", "block_influence", "sparse_soup", "greedy_soup", "fedavg"} <= cited
    assert {name for name in cited if public[name] not in listed()} == set(ROWS)
    assert set(ROWS.values()) <= set(methods.names())


@pytest.mark.parametrize("info", methods.FUNCTIONS.values(), ids=lambda info: info.name)
def test_what_is_to_be_called_exists_with_these_arguments(info):
    calls = [node for node in ast.walk(ast.parse(info.call, mode="eval")) if isinstance(node, ast.Call)]
    assert calls
    room = getattr(hf_sparse_peft, info.room)
    for call in calls:
        called = getattr(room, call.func.id)
        given = {word.arg: None for word in call.keywords}
        inspect.signature(called).bind(*call.args, **given)
    text = info.call + info.does
    public = {part: name for name, part in vars(room).items() if callable(part)}
    assert any(public[part] in text or getattr(part, "part_type", "?") in text for part in info.parts)
    assert info.paper
    assert info.name not in methods.names()


def test_a_function_taken_for_a_row_is_told_what_to_call():
    for ask in (methods.get, methods.describe):
        with pytest.raises(ValueError, match=r"method 'eora' is a function .*compensate\(model, dense, data"):
            ask("eora")


def test_the_command_lists_them_behind_the_rows_and_alone(capsys, monkeypatch):
    monkeypatch.setattr(
        "hf_sparse_peft.cli.methods.method_rows", lambda names, **options: method_rows(names or ["shira"])
    )
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = lines.index(str(methods.functions_table()).splitlines()[0])
    assert len(lines) == head + 1 + len(methods.FUNCTIONS)
    assert cli.main(["methods", "--functions", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(methods.FUNCTIONS)
    assert cli.main(["methods", "--functions", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == methods.functions_markdown()
    assert cli.main(["methods", "wanda"]) == 1
    assert 'method="wanda"' in capsys.readouterr().err
