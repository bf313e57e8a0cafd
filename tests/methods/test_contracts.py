"""What every registered method keeps, on a dense and on a 4-bit base: a new method is tested by being registered."""

import functools

import pytest
import torch
from contract_toolbox import (
    EXCEPTIONS,
    FIRST_MICRO_BATCH,
    SAVE_AT,
    adapted,
    covering_methods,
    differences,
    excepted,
    logits,
    reload,
    save_base,
    take_course,
    train,
)

from hf_sparse_peft import methods

BASES = ("dense", "nf4")


def marked(name: str, kind: str):
    """Every method on the dense base, and methods that have every part between them on 4-bit; the rest is slow."""
    quick = kind == "dense" or name in covering_methods()
    return pytest.param(name, kind, marks=() if quick else (pytest.mark.slow,))


EVERY_METHOD_ON_EVERY_BASE = pytest.mark.parametrize(
    ("name", "kind"), [marked(name, kind) for kind in BASES for name in methods.names()]
)
# Accumulation and checkpointing are the engine's and the rules': one method for each part, dense, tells them.
EVERY_PART = pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if kind == "dense" and name in covering_methods() else (pytest.mark.slow,))
        for kind in BASES
        for name in methods.names()
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
    contracts = {"identity", "loss", "accumulation", "checkpointing", "resume", "merge", "unmerge"}
    assert {contract for contract, _ in EXCEPTIONS} <= contracts
    assert all(EXCEPTIONS.values())


@EVERY_METHOD_ON_EVERY_BASE
def test_a_fresh_adapter_leaves_every_bit_of_the_output(name, kind, course_of):
    course = course_of(name, kind)
    same = torch.equal(course.logits["start"], course.logits["base"])
    assert same != excepted("identity", name), EXCEPTIONS.get(("identity", name))


@EVERY_METHOD_ON_EVERY_BASE
def test_training_changes_the_adapter_lowers_the_loss_and_stays_finite(name, kind, course_of):
    course = course_of(name, kind)
    tensors = [tensor for tensor in course.state.values() if tensor.is_floating_point()]
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    assert not torch.equal(course.logits["trained"], course.logits["start"])
    before, after = course.losses
    assert after < before or excepted("loss", name)


@EVERY_METHOD_ON_EVERY_BASE
def test_training_leaves_every_bit_of_the_base(name, kind, course_of):
    course = course_of(name, kind)
    assert len(course.base_before) > 10
    assert differences(course.base_before, course.base_after) == []


@EVERY_METHOD_ON_EVERY_BASE
def test_what_the_method_says_moves_moves(name, kind, course_of):
    course = course_of(name, kind)
    config = course.model.peft_config["default"]
    for option, buffer in (("regrow", "support"), ("prune", "support"), ("rank_allocation", "rank_mask")):
        if option in config.asked_schedules:
            changed = [k for k, v in course.start.items() if k.endswith(f"sparse_lora_{buffer}.default")]
            assert changed
            assert any(not torch.equal(course.start[k], course.state[f"model.{k}"]) for k in changed), option


@EVERY_METHOD_ON_EVERY_BASE
def test_a_saved_adapter_gives_the_same_bits_on_a_fresh_base(name, kind, course_of):
    course = course_of(name, kind)
    assert torch.equal(logits(reload(course)), course.logits["trained"])


@EVERY_METHOD_ON_EVERY_BASE
def test_disabling_gives_the_base(name, kind, course_of):
    course = course_of(name, kind)
    assert torch.equal(course.logits["disabled"], course.logits["base"])


@EVERY_METHOD_ON_EVERY_BASE
@pytest.mark.filterwarnings("ignore:.*4-bit")
def test_unmerging_restores_every_bit_and_merging_gives_the_same_output(name, kind, course_of):
    course = course_of(name, kind)
    model = reload(course)
    model.merge_adapter()
    merged = logits(model)
    if kind == "dense":
        assert torch.allclose(merged, course.logits["trained"], rtol=1e-4, atol=1e-4) != excepted("merge", name)
    assert not torch.equal(merged, course.logits["base"])
    model.unmerge_adapter()
    assert torch.equal(logits(model), course.logits["trained"]) != excepted("unmerge", name)


@EVERY_METHOD_ON_EVERY_BASE
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(name, kind, course_of):
    course = course_of(name, kind)
    model, method = adapted(name, course.folder / "base", kind)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)  # nothing of the checkpoint may be missing from it
    checkpoint = course.run_folder / f"checkpoint-{SAVE_AT}"
    _, resumed = train(name, model, method, course.run_folder, resume=str(checkpoint))
    assert differences(course.state, resumed) == []


def agree(name, folder, kind, left: dict, right: dict) -> None:
    """Two runs agree to rounding, and in every bit of what is not a float (supports, masks, ages)."""
    states = []
    for options in (left, right):
        model, method = adapted(name, folder / "base", kind)
        states.append(train(name, model, method, folder / "agree", max_steps=6, **options)[1])
    one, two = states
    assert one.keys() == two.keys()
    for key in one:
        if not one[key].is_floating_point():
            assert torch.equal(one[key], two[key]), key
        elif key.startswith("model."):
            distance = (one[key] - two[key]).abs().max() if one[key].numel() else 0.0
            assert distance <= 2e-4 + 1e-3 * one[key].abs().max(), f"{key}: {distance}"


@EVERY_PART
def test_two_micro_batches_are_one_batch_of_their_size(name, kind, folder):
    if excepted("accumulation", name):
        pytest.skip(EXCEPTIONS["accumulation", name])
    alike = name in FIRST_MICRO_BATCH
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "alike": alike}
    agree(name, folder, kind, small, {"per_device_train_batch_size": 4, "alike": alike})


@EVERY_PART
def test_gradient_checkpointing_changes_nothing(name, kind, folder):
    if excepted("checkpointing", name):
        pytest.skip(EXCEPTIONS["checkpointing", name])
    kept = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    agree(name, folder, kind, kept, {})
