"""JSON out of files takes no longer than its length, whatever stands in it."""

import json
import time

import pytest

from hf_sparse_peft.utils.json_text import DEEPEST, read_json_text


def test_text_is_read_as_json_reads_it():
    for value in ({"a": [1, {"b": ']}[{\\" \\'}]}, [], "x", 3, None, {"\u20ac[": "\n"}):
        for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
            assert read_json_text(text) == value


@pytest.mark.parametrize("text", ["", "{", "]", '"', b"\xff", '"\\', "[1,]"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError):
        read_json_text(text)


def test_name_that_comes_twice_in_one_object_is_refused():
    assert read_json_text('[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match="'a' comes twice"):
        read_json_text('{"b": {"a": 1, "a": 1}}')


def test_nesting_has_a_bound_that_strings_do_not_count_for():
    assert read_json_text("[" * DEEPEST + "]" * DEEPEST)
    assert read_json_text(json.dumps("[" * 1000)) == "[" * 1000
    with pytest.raises(ValueError, match="nests more than 64 deep"):
        read_json_text("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))
    with pytest.raises(ValueError, match="nests"):
        read_json_text('{"a": ' * 90 + "1" + "}" * 90)


@pytest.mark.parametrize("text", [
    "[" + ",".join(["[" * 900 + "]" * 900] * 2000) + "]", '"' + '\\"' * 1_000_000, "[" * 3_000_000, "]" * 3_000_000,
    '"' * 2_000_001,
], ids=["lists of lists", "quotes", "open", "closed", "strings"])  # fmt: skip
def test_megabytes_that_are_no_config_are_refused_in_time(text):
    begin = time.process_time()
    with pytest.raises(ValueError):
        read_json_text(text)
    assert time.process_time() - begin < 3
