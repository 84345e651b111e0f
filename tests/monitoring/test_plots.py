"""Pictures: read back, cell by cell where it can be."""

import math
import re
import struct
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from entropy_regularization.monitoring.charts import Curve, draw_curves, draw_shares
from entropy_regularization.monitoring.plots import colours_of, draw_heatmaps, save_heatmaps

BEFORE = [[1.0, 2.0, 3.0], [0.5, math.nan]]
AFTER = [[1.5, 2.0, 1.0], [4.0, 1.0]]


def draw(before, after=None):
    return draw_heatmaps(before, after, quantity="entropy [nats]", maximum=None, title="t")


def test_maps_show_the_numbers_of_every_head():
    before, after, change = (axes for axes in draw(BEFORE, AFTER).axes if axes.images)
    assert [t.get_text() for t in before.texts] == ["1.00", "2.00", "3.00", "0.50", ""]
    assert [t.get_text() for t in after.texts] == ["1.50", "2.00", "1.00", "4.00", "1.00"]
    assert [t.get_text() for t in change.texts] == ["+0.50", "+0.00", "-2.00", "+3.50", ""]
    assert before.images[0].get_clim() == after.images[0].get_clim() == (0.0, 4.0)
    assert change.images[0].get_clim() == (-3.5, 3.5)
    labels = [axes.get_ylabel() for axes in draw(BEFORE, AFTER).axes if not axes.images]
    assert sorted(labels) == ["change of entropy [nats]", "entropy [nats]"]
    assert before.images[0].get_array().mask.tolist() == [[False] * 3, [False, True, True]]


def test_large_maps_have_no_numbers_in_their_cells():
    (axes,) = (axes for axes in draw([[0.5] * 13] * 2).axes if axes.images)
    assert len(axes.texts) == 0


def test_a_png_is_written(tmp_path):
    path = save_heatmaps(tmp_path / "heatmaps.png", BEFORE, AFTER)
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])
    assert width > 2 * height > 0


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], None, "there is no head to draw"),
        ([[]], None, "there is no head to draw"),
        ([[1.0]], [[1.0, 2.0]], r"before has \[1\] heads in its layers but after has \[2\]"),
    ],
)
def test_maps_of_other_heads_are_refused(before, after, message):
    with pytest.raises(ValueError, match=message):
        draw(before, after)


@pytest.mark.parametrize("wrong", [None, torch.ones(2, 2), 3, [1.0], [["a"]], [torch.ones(2)]])
def test_what_is_no_table_is_refused(wrong, tmp_path):
    with pytest.raises(TypeError, match="before is not one list of numbers per layer; pass for"):
        save_heatmaps(tmp_path / "heatmaps.png", wrong)
    if wrong is not None:
        with pytest.raises(TypeError, match="after is not one list of numbers per layer"):
            save_heatmaps(tmp_path / "heatmaps.png", BEFORE, wrong)
    assert not list(tmp_path.iterdir())


def test_maps_of_two_models_have_their_names():
    figure = draw_heatmaps(
        BEFORE, BEFORE, quantity="q", maximum=1.0, title="t", names=("one", "other")
    )
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert titles == ["one", "other", "other − one"]  # noqa: RUF001


def test_an_end_of_the_colours_is_above_zero():
    for maximum in (-1, 0, math.nan, "x"):
        with pytest.raises(ValueError, match=r"maximum is .*; pass a number above 0, or None"):
            draw_heatmaps(BEFORE, None, quantity="q", maximum=maximum, title="t")


def test_text_on_a_colour_is_readable():
    (dark, on_dark), (light, on_light), missing = colours_of([0, 1, math.nan], 0, 1, "viridis")
    assert (dark, on_dark) == ("#440154", "#ffffff")
    assert (light, on_light) == ("#fde725", "#000000")
    assert missing == ("#d9d9d9", "#000000")


def charts():
    curve = Curve([0, 1, 2], [3.0, math.nan, 1.0], "#0072b2", dashed=True)
    yield draw_curves("a", [curve])
    yield draw_curves("a", [Curve([0], [3.0], "#0072b2")], y_range=(0, 4), percent=True)
    yield draw_shares("a", [0, 1], {"#0072b2": [0.25, 0.5], "#e69f00": [0.75, 0.5]})


def test_charts_are_svg_that_takes_the_colours_of_the_page():
    names = []
    for text in charts():
        root = ElementTree.fromstring(text.replace("<svg ", '<svg xmlns="svg" ', 1))
        assert "width" not in root.attrib
        assert "var(--quiet)" in text
        assert "var(--rule)" in text
        assert "#040506" not in text
        assert "<style" not in text
        here = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
        assert set(here) == set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
        names += here
    assert len(names) == len(set(names)) > 0


def test_a_single_point_is_seen():
    one, _ = (draw_curves("a", [Curve(range(n), [1.0] * n, "#d55e00")]) for n in (1, 5))
    assert "<use" in one
    assert "%" in draw_curves("a", [Curve([0, 1], [0.0, 1.0], "#d55e00")], percent=True)


def test_the_same_chart_is_the_same_text():
    assert list(charts()) == list(charts())
