"""Shapes in pictures: pieces, outlines and their measures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from busgen_cds import geometry


def ellipse(rows: int = 60, columns: int = 80, rx: float = 20, ry: float = 10) -> np.ndarray:
    y, x = np.mgrid[:rows, :columns]
    return np.asarray(1 - np.hypot((x - 40) / rx, (y - 30) / ry))


def test_an_ellipse_is_measured() -> None:
    """The axes and area of an outlined ellipse are those of the ellipse."""
    measures = geometry.measure(geometry.outline(ellipse(), 0.0), 0.1, 0.1)
    assert measures.long_axis == pytest.approx(4, rel=0.01)
    assert measures.short_axis == pytest.approx(2, rel=0.01)
    assert measures.area == pytest.approx(2 * np.pi, rel=0.01)
    assert (measures.width, measures.height) == (pytest.approx(4, rel=0.01), pytest.approx(2, rel=0.01))


def test_spacing_has_two_directions() -> None:
    """A circle in pixels that are twice as tall as wide is an upright ellipse."""
    measures = geometry.measure(geometry.outline(ellipse(rx=10, ry=10), 0.0), 0.2, 0.1)
    assert (measures.long_axis, measures.short_axis) == (pytest.approx(4, rel=0.01), pytest.approx(2, rel=0.01))
    assert measures.height > measures.width


def test_an_outline_is_closed_and_simplified() -> None:
    """The first point is the last; fewer points stay within the tolerance, and the area with them."""
    line = geometry.outline(ellipse(), 0.0)
    short = geometry.simplify(line, 0.3)
    assert line[0] == line[-1] and short[0] == short[-1]
    assert len(short) < len(line) / 2
    whole, less = geometry.measure(line, 1, 1), geometry.measure(short, 1, 1)
    assert less.area == pytest.approx(whole.area, rel=0.03)


def test_the_longest_outline_is_taken_and_nothing_gives_nothing() -> None:
    """Of several lines the one around most is taken; a field below the level has none."""
    field = np.zeros((20, 20))
    field[2:4, 2:4], field[8:16, 6:17] = 1, 1
    points = np.asarray(geometry.outline(field, 0.5))
    assert points.min(0).tolist() == [5.5, 7.5]
    assert points.max(0).tolist() == [16.5, 15.5]
    assert geometry.outline(np.zeros((5, 5)), 0.5) == ()


def test_pieces_are_connected_and_the_largest_comes_first() -> None:
    """Corners connect; pieces come by size."""
    mask = np.zeros((10, 10), bool)
    mask[2, 2] = mask[3, 3] = True
    mask[7:9, 6:9] = True
    assert [int(piece.sum()) for piece in geometry.pieces(mask)] == [6, 2]


@settings(max_examples=60, deadline=None)
@given(arrays(bool, (12, 13), elements=st.booleans()), st.integers(1, 3))
def test_growing_and_shrinking(mask: np.ndarray, radius: int) -> None:
    """Growing never loses a pixel, shrinking never gains one, and each is the other's mirror."""
    grown, shrunk = geometry.dilate(mask, radius), geometry.erode(mask, radius)
    assert (grown >= mask).all()
    assert (shrunk <= mask).all()
    assert (shrunk == ~geometry.dilate(~mask, radius)).all()


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, (9, 11), elements=st.floats(0, 1)))
def test_every_field_has_a_closed_outline_or_none(field: np.ndarray) -> None:
    """Whatever the field, an outline is closed and lies around the field."""
    line = geometry.outline(field, 0.5)
    if not line:
        assert not (field > 0.5).any()
        return
    assert line[0] == line[-1]
    points = np.asarray(line)
    assert (points >= -1).all() and (points[:, 0] <= 11).all() and (points[:, 1] <= 9).all()
    assert geometry.measure(line, 1, 1).area <= 11 * 13


@settings(max_examples=40, deadline=None)
@given(arrays(bool, (10, 10), elements=st.booleans()))
def test_pieces_share_nothing_and_leave_nothing(mask: np.ndarray) -> None:
    """The pieces of a mask are the mask, each pixel once."""
    pieces = geometry.pieces(mask)
    assert sum((piece.astype(int) for piece in pieces), np.zeros_like(mask, int)).tolist() == mask.astype(int).tolist()
