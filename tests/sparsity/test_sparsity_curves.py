"""Schedules: end points, formulas, windows."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_peft.sparsity import Constant, Cosine, Cubic, Linear, Window, make_curve

positive = st.floats(1e-6, 1e6)
progress = st.floats(0.0, 1.0)
moving = st.sampled_from(["cosine", "cubic", "exponential", "linear"])


@given(moving, positive, positive)
def test_end_points_are_exact(name, start, end):
    schedule = make_curve(name, start, end)
    assert schedule(0.0) == start
    assert schedule(1.0) == end
    assert schedule(0) == start


@given(moving, positive, positive, progress, progress)
def test_values_move_one_way_between_the_end_points(name, start, end, a, b):
    schedule = make_curve(name, start, end)
    early, late = schedule(min(a, b)), schedule(max(a, b))
    slack = 1e-9 * max(start, end)
    assert min(start, end) - slack <= early <= max(start, end) + slack
    assert (late - early) * (1 if end >= start else -1) >= -slack


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_formulas_hold(p):
    assert make_curve("constant", 0.3, 0.3)(p) == 0.3
    assert make_curve("linear", 2.0, 0.5)(p) == pytest.approx(2.0 - 1.5 * p)
    assert make_curve("cosine", 0.3, 0.0)(p) == pytest.approx(0.15 * (1 + math.cos(math.pi * p)))
    assert make_curve("cubic", 0.0, 0.9)(p) == pytest.approx(0.9 - 0.9 * (1 - p) ** 3)
    assert make_curve("exponential", 1.0, 0.01)(p) == pytest.approx(0.01**p)


def test_rigl_fraction_starts_at_alpha_and_ends_at_zero():
    schedule = make_curve("cosine", 0.3, 0.0, end_at=0.75)
    assert schedule(0.0) == 0.3
    assert schedule(0.375) == pytest.approx(0.15)
    assert schedule(0.75) == schedule(1.0) == 0.0


@given(moving, positive, positive, progress)
def test_a_window_holds_still_outside_and_rescales_inside(name, start, end, p):
    inner, windowed = make_curve(name, start, end), make_curve(name, start, end, begin=0.2, end_at=0.8)
    if p <= 0.2:
        assert windowed(p) == start
    elif p >= 0.8:
        assert windowed(p) == end
    else:
        assert windowed(p) == pytest.approx(inner((p - 0.2) / 0.6), rel=1e-6)


def test_schedules_are_values_that_compare_and_hash():
    assert Cubic(0.0, 0.5) == Cubic(0.0, 0.5)
    assert len({Linear(0, 1), Linear(0, 1), Cosine(0, 1)}) == 2
    assert make_curve("linear", 0, 1) == Linear(0, 1)
    assert make_curve("linear", 0, 1, 0.1, 0.9) == Window(Linear(0, 1), 0.1, 0.9)


@pytest.mark.parametrize("p", [-0.01, 1.01, float("nan")])
@pytest.mark.parametrize("schedule", [Constant(1.0), Linear(0, 1), Window(Linear(0, 1), 0.1, 0.2)])
def test_progress_outside_training_is_refused(schedule, p):
    with pytest.raises(ValueError, match=r"progress=.* \[0, 1\]"):
        schedule(p)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", 0, 1), "schedule='step'.*constant, cosine, cubic"),
        (("exponential", 1.0, 0.0), "exponential.*linear"),
        (("exponential", 1.0, -1.0), "exponential"),
        (("linear", 0, 1, 0.5, 0.5), r"0\.5"),
        (("linear", 0, 1, -0.1, 0.5), r"-0\.1"),
        (("linear", 0, 1, 0.0, 1.5), r"1\.5"),
    ],
)
def test_schedules_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_curve(*arguments)
