"""What every registered method keeps: a new method is tested by being registered."""

import functools

import pytest
import torch
from contract_toolbox import (
    EXCEPTIONS,
    SAVE_AT,
    adapted,
    brings_a_part,
    differences,
    excepted,
    logits,
    reload,
    save_base,
    take_course,
    train,
)

from hf_sparse_peft import methods

# What a method is made of is tested by tests/contracts: every parametrization with every rule, on every base. Here a
# row runs as it is, with its own Trainer, optimizer and callbacks: by default on a dense base, and if it brings a part
# that no row before it has.
EVERY_METHOD = pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if kind == "dense" and name in brings_a_part() else (pytest.mark.slow,))
        for kind in ("dense", "nf4")
        for name in methods.names(upstream=False)
    ],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("courses")
    save_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def course_of(folder):
    return functools.cache(lambda name, kind: take_course(name, kind, folder))


def test_exceptions_are_of_contracts_and_methods_that_exist():
    contracts = {"identity", "loss", "moves"}
    assert {contract for contract, _ in EXCEPTIONS} <= contracts
    assert all(EXCEPTIONS.values())


@EVERY_METHOD
def test_a_fresh_adapter_leaves_every_bit_of_the_output(name, kind, course_of):
    course = course_of(name, kind)
    same = torch.equal(course.logits["start"], course.logits["base"])
    assert same != excepted("identity", name), EXCEPTIONS.get(("identity", name))


@EVERY_METHOD
def test_training_changes_the_adapter_lowers_the_loss_and_stays_finite(name, kind, course_of):
    course = course_of(name, kind)
    tensors = [tensor for tensor in course.state.values() if tensor.is_floating_point()]
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    assert not torch.equal(course.logits["trained"], course.logits["start"])
    before, after = course.losses
    assert after < before or excepted("loss", name)


@EVERY_METHOD
def test_training_leaves_every_bit_of_the_base(name, kind, course_of):
    course = course_of(name, kind)
    assert len(course.base_before) > 10
    assert differences(course.base_before, course.base_after) == []


@EVERY_METHOD
def test_what_the_method_says_moves_moves(name, kind, course_of):
    course = course_of(name, kind)
    config = course.model.peft_config["default"]
    moving = {kind for rule in getattr(config, "rules", []) if "units" in rule.writes for kind in rule.acts_on}
    sides = {"subnet_row": "subnet_rows", "subnet_column": "subnet_columns"}
    buffers = {"support": "support", **sides, "rank": "rank_mask", "kernel": "survivors", "core": "core_mask"}
    ends = tuple(f"lora_{buffers[kind]}.default" for kind in moving & set(buffers))
    if ends:  # where several kinds share a budget, one of them may keep all of its units in so short a run
        held = [key for key in course.start if key.endswith(ends)]
        assert held
        moved = any(not torch.equal(course.start[key], course.state[f"model.{key}"]) for key in held)
        assert moved != excepted("moves", name)


@EVERY_METHOD
def test_a_saved_adapter_gives_the_same_bits_on_a_fresh_base(name, kind, course_of):
    course = course_of(name, kind)
    assert torch.equal(logits(reload(course)), course.logits["trained"])


@EVERY_METHOD
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(name, kind, course_of):
    course = course_of(name, kind)
    model, method = adapted(name, course.folder / "base", kind)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)  # nothing of the checkpoint may be missing from it
    checkpoint = course.run_folder / f"checkpoint-{SAVE_AT}"
    _, resumed = train(name, model, method, course.run_folder, resume=str(checkpoint))
    assert differences(course.state, resumed) == []
