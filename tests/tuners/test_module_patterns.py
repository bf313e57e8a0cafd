"""Patterns over module names come from files: none of them runs for ever, and harmless ones match what peft's do."""

import json
import re
import threading
import time

import pytest
import tiny
from peft import PeftModel, get_peft_model
from peft.utils.other import get_pattern_key, match_target_against_key
from safetensors.torch import load_file

from hf_sparse_peft import SampleLayers, SparseLoraConfig
from hf_sparse_peft.hub import check_adapter
from hf_sparse_peft.tuners.shared import module_patterns
from hf_sparse_peft.tuners.shared.module_patterns import check_pattern, matches, pattern_key
from hf_sparse_peft.utils.checksums import save_checked

ENDLESS = [
    "(a+)+", "(a*)*", "(a|aa)+", "(.*)*x", r"(\w+\.?)+X", "(x+x+)+y", "(a?)+b", "((a|b)c|d)*e", "(?:(?:a+)b?)*c",
    "(a+){2,}b", r"(a)\1+", "a?" * 40 + "a" * 40, ".*" * 9 + "x", "(?:ab|a|)" * 30 + "x", "(?=(a+)+b)a",
    r"(\w+_)*x", r"([\w.]+\.)*x", r"(\w*\w*\.)*x", r"((\w+\.)*y)*x", r"(\w+\.*)*x", r"([^a]+\.)*x", r"(\.?\w+)*x",
]  # fmt: skip
FIELDS = [
    lambda pattern: {"rank_pattern": {pattern: 2}}, lambda pattern: {"alpha_pattern": {pattern: 2.0}},
    lambda pattern: {"budget": {"type": "by_module", "densities": {pattern: 0.1}}},
    lambda pattern: {"granularity_pattern": {pattern: "row"}},
    lambda pattern: {"target_modules": pattern}, lambda pattern: {"exclude_modules": pattern},
    lambda pattern: {"layers_pattern": pattern, "layers_to_transform": [0]},
    lambda pattern: {"layers_pattern": [pattern], "layers_to_transform": [0]},
    lambda pattern: {"modules_to_save": [pattern]},
    lambda pattern: {"schedule": [{"type": "sample_layers", "layers_pattern": pattern}]},
]  # fmt: skip


@pytest.mark.parametrize("pattern", ENDLESS)
def test_pattern_that_may_run_for_ever_is_refused_before_it_runs(pattern):
    for field in FIELDS:
        options = {"target_modules": ["q_proj"], **field(pattern)}
        (name,) = (name for name in field(pattern) if name != "layers_to_transform")
        begin = time.thread_time()
        with pytest.raises(ValueError, match=name):
            SparseLoraConfig(**options)
        assert time.thread_time() - begin < 0.5


NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.v_proj", "model.visual.blocks.1.attn.qkv", "lm_head",
    "decoder.block.0.layer.1.EncDecAttention.q", "transformer.h.3.mlp.c_proj", "q_proj", "xq_proj", "model_layers_0",
]  # fmt: skip
HARMLESS = [
    "q_proj", r".*\.(q|v)_proj", r"^model\.layers\.\d+\.self_attn.*", "^(?!.*visual).*(?:proj|qkv)$", "lm_head|q_proj",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", r"h\.[0-3]\.mlp\.c_proj", "^q_proj", ".*", r"\w+",
    r"(?:.*?(?:visual|layers).*?(?:attn|mlp).*?(?:q_proj|v_proj|qkv|c_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)", "",
    "model.layers.0", r"self_attn\.[qv]_proj", r"(\w+\.)*q_proj", r"(?:[^.]+\.)*[qv]_proj", r"model(\.\w+)*\.v_proj",
]  # fmt: skip


@pytest.mark.parametrize("pattern", HARMLESS)
def test_harmless_patterns_match_what_pefts_own_matching_matches(pattern):
    check_pattern(pattern, "target_modules")
    for name in NAMES:
        assert matches(pattern, name, "target_modules") == bool(match_target_against_key(pattern, name))
        by_peft = {pattern: 1}.get(get_pattern_key([pattern], name))
        assert {pattern: 1}.get(pattern_key({pattern: 1}, name, "rank_pattern")) == by_peft, name


@pytest.mark.parametrize("pattern", [r"(\w+\.)*x", r"(\.\w*)*x", r"a(\.[^.]+)*(\.\w+)*x"])
def test_repeated_parts_with_a_mark_between_them_are_matched_in_bounded_time_by_re_too(pattern):
    check_pattern(pattern, "target_modules")
    begin = time.thread_time()
    for name in ("a." * 100 + "a", "." * 200, "a" * 200, ".".join(["layers_self_attn"] * 15)):
        assert re.fullmatch(pattern, name) is None
    assert time.thread_time() - begin < 0.5


def test_one_exact_pattern_for_each_of_many_modules_stays_quick():
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(50) for expert in range(100)]
    begin = time.thread_time()
    config = SparseLoraConfig(rank_pattern={f"^{name}": 1 + place % 7 for place, name in enumerate(names)})
    assert [config.rank_of(name) for name in names] == [1 + place % 7 for place in range(len(names))]
    assert time.thread_time() - begin < 2
    assert SparseLoraConfig(rank_pattern={"^lin": 3}).rank_of("block.lin") == 8


def test_first_matching_key_counts():
    patterns = {"v_proj": 1, r".*\.0\..*": 2, "q_proj": 3}
    assert [pattern_key(patterns, name, "rank_pattern") for name in NAMES[:2]] == [r".*\.0\..*", "v_proj"]
    assert pattern_key(patterns, "lm_head", "rank_pattern") is None


SLOW = ".*a.*a.*a.*a.*a[b-z]"


def test_slow_matching_is_stopped_in_any_thread(monkeypatch):
    monkeypatch.setattr(module_patterns, "SECONDS", 0.1)
    seen = []

    def run():
        with pytest.raises(ValueError, match=r"exclude_modules.*longer than") as error:
            matches(SLOW, "a" * 3000, "exclude_modules")
        seen.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert seen


def test_many_matches_that_are_slow_together_are_stopped(monkeypatch):
    monkeypatch.setattr(module_patterns, "SECONDS", 0.1)
    begin = time.thread_time()
    names = ["a" * 400 + str(number) for number in range(1000)]
    with pytest.raises(ValueError, match=r"rank_pattern.*longer than"):
        [pattern_key({SLOW: 1}, name, "rank_pattern") for name in names]
    assert time.thread_time() - begin < 2


def test_file_with_long_names_and_many_repeats_is_refused_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module_patterns, "SECONDS", 0.1)
    get_peft_model(
        tiny.llama(layers=1), SparseLoraConfig(r=2, density=0.05, target_modules=["q_proj"])
    ).save_pretrained(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    renamed = {k.replace("model.layers.0.self_attn.q_proj", "a" * 3000): v for k, v in load_file(weights).items()}
    save_checked(renamed, weights, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "rank_pattern": {SLOW: 2}}))
    begin = time.thread_time()
    for read in (check_adapter, lambda place: PeftModel.from_pretrained(tiny.llama(layers=1), place)):
        with pytest.raises(ValueError, match="rank_pattern"):
            read(tmp_path)
    assert time.thread_time() - begin < 5


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "a{99999999999}", "(" * 5000, "a" * 20_000])
def test_what_is_no_pattern_is_refused_by_its_option(pattern):
    with pytest.raises(ValueError, match="alpha_pattern"):
        SparseLoraConfig(alpha_pattern={pattern: 1.0})


def test_names_of_layers_and_heads_are_names():
    assert SparseLoraConfig(target_modules=["q"], layers_pattern="", layers_to_transform=[0]).layers_pattern == ""
    assert SampleLayers(layers_pattern="model.layers").layers_pattern == "model.layers"
    SparseLoraConfig(modules_to_save=["score", "model.norm"])
    for name in ("a|b", ".*", "a..b", "a b"):
        with pytest.raises(ValueError, match="modules_to_save"):
            SparseLoraConfig(modules_to_save=[name])
