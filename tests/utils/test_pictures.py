"""One heat map for all pictures, and SVG that takes the colours of the page it stands in."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from hf_sparse_peft.utils.pictures import INK, SERIES, heat_map, layer_label, new_figure, says_something, svg_of

pytest.importorskip("matplotlib")


def drawn(*arguments, **options):
    axis = new_figure(4, 3).subplots()
    return axis, heat_map(axis, *arguments, **options)


def test_the_first_row_is_above_and_a_cell_stands_over_its_own_stretch():
    axis, mesh = drawn([[1.0, 2.0], [3.0, math.nan]], ["a", "b"], [0, 5, 20])
    assert axis.yaxis_inverted()
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["a", "b"]
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [0, 5, 20])
    np.testing.assert_array_equal(mesh.get_array().filled(-1), [[1, 2], [3, -1]])
    assert mesh.get_clim() == (0, 3)


def test_named_columns_say_their_numbers_where_there_are_few():
    axis, mesh = drawn([[0.5, 1.0]], ["3"], ["q_proj", "v_proj"], top=2.0, numbers=".1f")
    assert [text.get_text() for text in axis.texts] == ["0.5", "1.0"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["q_proj", "v_proj"]
    assert mesh.get_clim() == (0, 2)
    many, _ = drawn(np.ones((30, 20)), list("a" * 30), ["c"] * 20, numbers="g")
    assert not many.texts


def test_of_many_rows_some_are_named_and_small_values_still_show():
    axis, mesh = drawn(np.arange(300.0).reshape(300, 1), [f"{row}" for row in range(300)], [0, 1], power=0.5, top=300.0)
    assert len(axis.get_yticks()) == 60
    assert mesh.norm(3.0) == pytest.approx(0.1)


def test_numbers_that_are_all_the_same_say_nothing():
    assert not says_something([[0.5, 0.5], [0.5, math.nan]])
    assert not says_something([])
    assert says_something([[0.5, 0.6]])


def test_an_svg_takes_the_ink_of_its_page_and_is_well_formed():
    def draw(figure):
        figure.subplots().plot([0, 1], [1, 0], color=SERIES[1], label="x")

    svg = svg_of(draw, 4, 3, "loss over steps")
    assert ET.fromstring(svg).get("aria-label") == "loss over steps"
    assert "var(--series-2)" in svg
    assert "currentColor" in svg
    assert INK not in svg
    assert SERIES[1] not in svg
    assert not re.search(r"fill: #ffffff", svg)  # no white ground
    assert svg == svg_of(draw, 4, 3, "loss over steps")


def test_layers_are_named_by_number_and_kind():
    assert layer_label("model.layers.3.self_attn.q_proj") == "3.q_proj"
    assert layer_label("score") == "score"
