"""What a run is drawn as: each table once, at its own steps, and a sentence in place of a picture that says nothing."""

import numpy as np
import pytest

from hf_sparse_peft.training import draw_run, draw_support_history
from hf_sparse_peft.training.panels import budget_flow, curve_panels, measure_panels, over_time, unit_panels
from hf_sparse_peft.utils.pictures import new_figure

pytest.importorskip("matplotlib")
COLOURS = ["C0"] * 6


def record(step, density=(0.1, 0.2), rank=(), churn=(), support=(10, 20), **fields):
    names = ["model.layers.0.q_proj", "model.layers.1.v_proj"]
    values = {"density": density, "rank": rank, "churn": churn, "numbers/support": support}
    return {"step": step, **{key: dict(zip(names, one, strict=False)) for key, one in values.items()}, **fields}


def by_title(panels):
    return {panel.title: panel for panel in panels}


def test_a_record_is_drawn_up_to_its_step_and_the_first_churn_is_none():
    history = [record(0, churn=(0, 0)), record(10, churn=(0.5, 0.1)), record(25, churn=(0.2, 0.0))]
    layers, edges, values = over_time(history, "density", 100)
    assert layers == ["model.layers.0.q_proj", "model.layers.1.v_proj"]
    np.testing.assert_allclose(edges, [-10 / 3, 0, 10, 25])
    np.testing.assert_allclose(values, [[10] * 3, [20] * 3])
    _, edges, values = over_time(history, "churn")
    np.testing.assert_allclose(edges, [0, 10, 25])
    np.testing.assert_allclose(values, [[0.5, 0.2], [0.1, 0.0]])


def test_flat_tables_are_said_and_not_drawn():
    history = [record(step, density=(0.1, 0.1), rank=(2, 4), churn=(0, 0)) for step in (0, 5, 10)]
    panels = by_title(unit_panels(history, COLOURS))
    assert panels["rank"].draw is not None
    assert panels["density"].draw is None
    assert panels["density"].instead == "density: living units: 10 % of the weight's in every layer at every record"
    assert panels["churn"].instead.endswith("0 % of the living in every layer at every record")
    assert "30 at every record" in panels["budget"].instead
    rounded = unit_panels([record(step, density=(0.1, 0.1004)) for step in (0, 5)], COLOURS)
    assert by_title(rounded)["density"].instead.startswith("density: living units: 10 to 10.04 % of the weight's in")


def test_the_budget_flows_between_kinds_of_units_and_modules():
    history = [record(0, support=(100, 50)), record(10, support=(60, 90))]
    history[1]["numbers/rank"] = {"model.layers.0.q_proj": 7}
    steps, groups = budget_flow(history)
    assert steps == [0, 10]
    assert groups == {"support of q_proj": [100, 60], "support of v_proj": [50, 90], "rank of q_proj": [0, 7]}
    assert by_title(unit_panels(history, COLOURS))["budget"].draw is not None


def test_of_many_bands_those_that_move_least_are_one():
    history = [
        {"step": step, "numbers/support": {f"layers.0.m{at}": 100 + at * step for at in range(20)}} for step in (0, 10)
    ]
    axis = new_figure(4, 3).subplots()
    by_title(unit_panels(history, COLOURS))["budget"].draw(axis)
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert len(names) == 6
    assert names == ["15 others", *(f"support of m{at}" for at in range(15, 20))]


def test_losses_share_a_panel_and_each_measure_has_its_own_without_those_of_speed():
    log = [
        {"step": step, "loss": 1 / step, "eval_loss": 2 / step, "eval_accuracy": step / 9, "eval_runtime": step}
        for step in (1, 2, 3)
    ]
    panels = by_title(curve_panels([*log, {"step": 3, "train_runtime": 7.0}], COLOURS))
    assert set(panels) == {"loss", "accuracy"}
    axis = new_figure(4, 3).subplots()
    panels["loss"].draw(axis)
    assert [line.get_label() for line in axis.lines] == ["training", "evaluation"]


def test_losses_that_are_not_finite_are_left_out_of_their_curve():
    log = [{"step": step, "loss": loss} for step, loss in ((1, 3.0), (2, float("nan")), (3, 1.0))]
    axis = new_figure(4, 3).subplots()
    by_title(curve_panels(log, COLOURS))["loss"].draw(axis)
    assert axis.lines[0].get_xdata().tolist() == [1, 3]


def test_time_and_memory_stand_beside_what_was_estimated():
    records = [{"step": step, "seconds": 0.01 * step, "gpu_bytes": 3e9} for step in (1, 2)]
    panels = by_title(measure_panels(records, {"seconds": 0.02, "gpu_bytes": 4e9}, COLOURS))
    axis = new_figure(4, 3).subplots()
    panels["time of a step"].draw(axis)
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [10, 20])
    assert axis.lines[1].get_ydata()[0] == pytest.approx(20)
    said = panels["memory of the GPU, highest so far"].instead
    assert said == "memory of the GPU, highest so far: measured 3 GB, estimated 4"
    assert len(panels) == 2


def test_both_pictures_draw_density_from_the_same_table(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "hf_sparse_peft.training.panels.heat_map", lambda axis, values, rows, edges, **_: drawn.append((values, edges))
    )
    history = [record(step, density=(0.1 + step / 100, 0.2)) for step in (0, 5, 10)]
    draw_support_history(history, tmp_path / "support.png")
    draw_run([{"step": 1, "loss": 2.0}, {"step": 9, "loss": 1.0}], history, tmp_path / "run.png")
    assert len(drawn) == 2
    for one, other in zip(*drawn, strict=True):
        np.testing.assert_array_equal(one, other)
    assert draw_run([], [], tmp_path / "nothing.png").exists()
