"""What every combination of a parametrization, a base and a rule keeps."""

import functools
import warnings

import pytest
import torch
from courses import (
    EVERY_PAIR,
    EVERY_PART,
    EXCEPTIONS,
    RULES,
    SAVE_AT,
    adapted,
    differences,
    logits,
    reloaded,
    rule_names,
    take_course,
    train,
)


@pytest.fixture(scope="module")
def course_of(tmp_path_factory):
    return functools.cache(lambda *case: take_course(tmp_path_factory.mktemp("course"), *case))


def excepted(contract: str, *parts: str | None) -> bool:
    return any((contract, part) in EXCEPTIONS for part in parts)


def test_every_rule_of_the_package_has_options_for_its_course():
    assert sorted({name.split(":")[0] for name in RULES}) == rule_names()


@EVERY_PAIR
def test_a_fresh_adapter_leaves_every_bit_of_the_output(parametrization, base, rule, course_of):
    course = course_of(parametrization, base, rule)
    same = torch.equal(course.logits["start"], course.logits["base"])
    assert same != excepted("identity", parametrization, rule)


@EVERY_PAIR
def test_training_changes_the_adapter_stays_finite_and_leaves_every_bit_of_the_base(
    parametrization, base, rule, course_of
):
    course = course_of(parametrization, base, rule)
    assert all(torch.isfinite(t).all() for t in course.state.values() if t.is_floating_point())
    assert not torch.equal(course.logits["trained"], course.logits["start"])
    assert len(course.bits[0]) > 10
    assert differences(*course.bits) == []
    assert torch.equal(course.logits["disabled"], course.logits["base"])


@EVERY_PAIR
def test_a_saved_adapter_gives_the_same_bits_and_unmerging_restores_them(parametrization, base, rule, course_of):
    course = course_of(parametrization, base, rule)
    model = reloaded(course, base)
    assert torch.equal(logits(model), course.logits["trained"])
    if excepted("merging", parametrization):
        with pytest.raises(ValueError, match="no change of it"):
            model.merge_adapter()
        assert torch.equal(logits(model), course.logits["trained"])
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # re-rounding to 4 bits, told once a process
        model.merge_adapter()
    merged = logits(model)
    if base in ("fp32", "conv1d"):
        assert torch.allclose(merged, course.logits["trained"], rtol=1e-4, atol=1e-4) != excepted(
            "merge", parametrization, rule
        )
    assert not torch.equal(merged, course.logits["base"])
    model.unmerge_adapter()
    assert torch.equal(logits(model), course.logits["trained"])


@EVERY_PAIR
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(parametrization, base, rule, course_of):
    course = course_of(parametrization, base, rule)
    model = adapted(parametrization, base, rule)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)  # nothing of the checkpoint may be missing from it
    resumed = train(model, course.folder, resume=str(course.folder / f"checkpoint-{SAVE_AT}"))
    assert differences(course.state, resumed) == []


def agree(case, tmp_path, left: dict, right: dict) -> None:
    """Two runs agree to rounding, and in every bit of what is not a float (supports, masks, ages)."""
    one, two = (train(adapted(*case), tmp_path / "run", steps=6, repeated=4, **options) for options in (left, right))
    assert one.keys() == two.keys()
    for key in one:
        if not one[key].is_floating_point():
            assert torch.equal(one[key], two[key]), key
        elif key.startswith("model."):
            distance = (one[key] - two[key]).abs().max() if one[key].numel() else 0.0
            assert distance <= 2e-4 + 1e-3 * one[key].abs().max(), f"{key}: {distance}"


RATES = {"mask by scores": 10.0, "channel bits": 10.0, "singular vectors": 0.1}


def sgd(rate: float, model, args) -> torch.optim.Optimizer:
    """Updates of the gradients' own size."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)


@EVERY_PART
def test_two_micro_batches_are_one_batch_and_checkpointing_changes_nothing(parametrization, base, rule, tmp_path):
    case = (parametrization, base, rule)
    kept = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **kept}
    # Adam's first updates are all of one size, also those of gradients that are nearly 0: the last bit of a gradient
    # would say which way they go, and which scores are best.
    rate = RATES.get(parametrization)
    plain = {"optimizer": functools.partial(sgd, rate)} if rate else {}
    left, right = ({}, kept) if excepted("accumulation", rule) else (small, {})
    agree(case, tmp_path, {**left, **plain}, {**right, **plain})
