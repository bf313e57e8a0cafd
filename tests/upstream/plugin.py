"""A pytest plugin that runs peft's tests with configs of one of our tuners; started by `run.py`.

What a test is parametrized over decides: rows with a `config_cls` become rows of ours, models of the Hub become local
stand-ins. A few that name one of peft's configs in their body get ours under that name (`cases.SUITES`). All others,
which are about a method of peft's own, are left out.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import cases
import hub_models
import pytest
import torch
import transformers
from transformers.utils import logging

TUNER = cases.TUNERS[os.environ["UPSTREAM_TUNER"]]
MODELS = Path(os.environ["UPSTREAM_MODELS"])
SUITES = {suite.file: suite for suite in cases.SUITES.values()}
RUN: set[str] = set()  # `module::class::function` whose rows are ours
OUTCOMES: dict[str, dict[str, str]] = {}
GENERIC = functools.partial(TUNER.config_cls, **TUNER.options)
PEFTS_OWN = ("lora_alpha", "alpha", "lora_dropout", "total_step", "r", "init_weights", "init_lora_weights")


def ours(**given):
    """Our config for the options of one of peft's: where and what is saved is kept, sizes are ours."""
    starts_random = False in (given.get("init_weights"), given.get("init_lora_weights"))
    kept = {name: value for name, value in given.items() if name not in PEFTS_OWN}
    if kept.get("bias") == "lora_only":
        kept["bias"] = f"{TUNER.name}_only"
    return TUNER.config_cls(**{**TUNER.options, **(TUNER.random if starts_random else {}), **kept})


# Before peft's tests are imported


def pytest_configure(config) -> None:
    """Stand in for packages and helpers that reach the network or know peft's configs only."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    MODELS.mkdir(exist_ok=True)
    sys.modules["parameterized"] = types.SimpleNamespace(parameterized=types.SimpleNamespace(expand=expand))
    if "diffusers" not in sys.modules:
        sys.modules["diffusers"] = mock.MagicMock(
            StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}), __version__="0.35.0"
        )
    from peft_tests import testing_common, testing_utils

    testing_utils.set_init_weights_false = lambda cls, options: {**options, **TUNER.random}
    testing_utils.hub_online_once = testing_common.hub_online_once = offline
    testing_common._skip_if_conv1d_not_supported = lambda *args: None  # ours take Conv1D
    for name in ("", *(f"For{task}" for task in hub_models.TASKS)):
        cls = getattr(transformers, f"AutoModel{name}")
        cls.from_pretrained = classmethod(functools.partial(_from_pretrained, cls.from_pretrained.__func__))


def _from_pretrained(original, cls, name, *args, **options):
    place = hub_models.local(str(name), MODELS)
    if place is None:
        return original(cls, name, *args, **options)
    model = original(cls, place, *args, **options)
    model.name_or_path = model.config._name_or_path = str(name)  # as if it had come from there
    return model


@contextmanager
def offline(model_id):
    """In the place of `hub_online_once`."""
    yield


def expand(rows, name_func=None, **options):
    """`parameterized.expand` for rows of two configs: one of ours beside each of peft's, or two of ours."""

    def decorate(function):
        rows_of_two = [tuple(row) if isinstance(row, (tuple, list)) else (row,) for row in rows]
        first, second = rows_of_two[0][0], rows_of_two[0][-1]
        if not all(getattr(one, "target_modules", None) for one in (first, second)):  # over something else
            made = [(row, "_".join(map(str, row))) for row in rows_of_two]
        elif type(first) is type(second):
            made = [((mixed(first), mixed(second)), "same")]
        else:
            others = {type(one).__name__: one for row in rows_of_two for one in row}
            others.pop("AdaLoraConfig", None)
            theirs = [(mixed(first), other) for other in others.values()]
            made = [(pair, f"{TUNER.name}_{type(pair[1]).__name__}") for pair in theirs]
        namespace = sys._getframe(1).f_locals
        for row, name in made:
            namespace[f"{function.__name__}_{name}"] = _with(function, row)
        return None

    return decorate


def _with(function, row):
    @functools.wraps(function)
    def call(self):
        return function(self, *row)

    del call.__wrapped__  # or pytest takes its arguments for fixtures
    return call


def mixed(theirs):
    """Our config with the targets of theirs, starting with random values."""
    return TUNER.config_cls(**{**TUNER.options, **TUNER.random, "target_modules": list(theirs.target_modules)})


# Which tests, with what


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc) -> None:
    """Put rows of ours in the place of peft's."""
    definition = metafunc.definition
    rewritten = [_rewritten(mark, metafunc) for mark in definition.own_markers]
    definition.own_markers[:] = [mark for mark, _ in rewritten]
    if any(changed for _, changed in rewritten):
        RUN.add(_place(definition))


def _rewritten(mark, metafunc):
    if mark.name != "parametrize":
        return mark, False
    names = mark.args[0]
    names = tuple(one.strip() for one in names.split(",")) if isinstance(names, str) else tuple(names)
    rows = _rows(names, mark.args[1], metafunc)
    if rows is None:
        return mark, False
    return pytest.mark.parametrize(",".join(names), rows).mark, names[0] != "model_id" or len(names) > 1


def _rows(names, theirs, metafunc):
    """Rows of ours for those names, or None: the tests are about something else, or the rows stay."""
    where = metafunc.module.__name__.rpartition(".")[2]
    if names == ("model_id",):
        return [one for one in theirs if one.endswith(cases.MODELS) and hub_models.local(one, MODELS)]
    if "prompt_learning" in metafunc.function.__name__ or (where == "test_initialization" and names != ("config",)):
        return None
    if names == ("test_name", "model_id", "config_cls", "config_kwargs"):
        return cases.custom_cases(TUNER)
    if names == ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"):
        return cases.pairs_of_adapters(TUNER)
    if names == ("model_id", "config_cls", "config_kwargs"):
        return cases.parameter_cases(TUNER, "trl-internal-testing/tiny-GptOssForCausalLM")
    if names == ("config_cls", "config_kwargs") and where != "test_low_level_api":
        task = next((one[1].get("task_type") for one in theirs if isinstance(one[1], dict)), None)
        return [(TUNER.config_cls, {**TUNER.options, "task_type": task})]
    if names == ("config_cls",) and metafunc.cls.__name__ == "TestPeftCustomModel":
        return [] if "add_weighted" in metafunc.function.__name__ else [pytest.param(GENERIC, id=TUNER.name)]
    if names == ("settings",):
        options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
        return [(TUNER.config_cls(**TUNER.options, **options), {})]
    if names == ("config",) and metafunc.cls.__name__ == "TestHotSwapping":
        return [ours(init_weights=False, target_modules=["lin0"])]
    return None


def _place(node) -> str:
    parts = [node.module.__name__.rpartition(".")[2], *([node.cls.__name__] if node.cls else [])]
    return "::".join([*parts, node.originalname or node.name])


def _substituted(item) -> bool:
    where, _, name = _place(item).partition("::")
    leaves_out = SUITES[where].leaves_out
    return name.startswith(SUITES[where].substituted or ("-",)) and not any(
        part in item.name or part in item.fixturenames for part in leaves_out
    )


def pytest_collection_modifyitems(config, items) -> None:
    """Leave out what is about peft's own methods."""
    stays, leaves = [], []
    for item in items:
        (stays if _place(item) in RUN or _substituted(item) else leaves).append(item)
    items[:] = stays
    OUTCOMES.update({item.nodeid: {"outcome": "left out", "reason": ""} for item in leaves})
    module = sys.modules.get("peft_tests.test_torch_compile")
    if module is not None:
        module.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda name: hub_models.tokenizer())
        module.load_dataset_english_quotes = hub_models.quotes
        module.TestTorchCompileCausalLM.model_id = "peft-internal-testing/wide-random-OPTForCausalLM"


@pytest.fixture(autouse=True)
def _configs_of_ours(request, monkeypatch):
    if _substituted(request.node):
        for name in SUITES[request.module.__name__.rpartition(".")[2]].replaces:
            monkeypatch.setattr(request.module, name, ours)


# What came of them


def pytest_runtest_logreport(report) -> None:
    """Keep the outcome; of a failure, the last line of its error."""
    if report.outcome == "failed":
        error = getattr(report.longrepr, "reprcrash", None)
        last = f"{Path(error.path).name}:{error.lineno}: {error.message}" if error else str(report.longrepr)[-300:]
        OUTCOMES[report.nodeid] = {"outcome": "failed", "reason": " ".join(last.split())[:300]}
    elif report.outcome == "skipped" or report.when == "call":
        reason = str(report.longrepr[2]) if report.outcome == "skipped" else ""
        OUTCOMES.setdefault(report.nodeid, {"outcome": report.outcome, "reason": reason.removeprefix("Skipped: ")})


def pytest_collectreport(report) -> None:
    """A file that could not be imported is a failure."""
    if report.failed:
        OUTCOMES[report.nodeid] = {"outcome": "failed", "reason": str(report.longrepr)[-600:]}


def pytest_sessionfinish(session) -> None:
    """Hand the outcomes to `run.py`."""
    Path(os.environ["UPSTREAM_RESULT"]).write_text(json.dumps(OUTCOMES))
