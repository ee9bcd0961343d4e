"""Shapes in pictures: connected pieces, outlines and their measures, in numpy alone.

Points are (x, y) with pixel centres at whole numbers. An outline is closed: its first point is also its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]
Outline = tuple[Point, ...]


class Measures(NamedTuple):
    """In the unit of the spacing they were taken with."""

    long_axis: float
    short_axis: float
    area: float
    width: float
    height: float


def pieces(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The 8-connected pieces of a mask, largest first."""
    labels = np.zeros(mask.shape, np.int32)
    found = 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start] == 0:
            found += 1
            _flood(mask, labels, (int(start[0]), int(start[1])), found)
    sizes = np.bincount(labels.ravel(), minlength=found + 1)[1:]
    return [labels == 1 + int(i) for i in np.argsort(-sizes, kind="stable")]


def _flood(mask: NDArray[np.bool_], labels: NDArray[np.int32], start: tuple[int, int], label: int) -> None:
    rows, columns = mask.shape
    labels[start] = label
    waiting = [start]
    while waiting:
        row, column = waiting.pop()
        for r in range(max(0, row - 1), min(rows, row + 2)):
            for c in range(max(0, column - 1), min(columns, column + 2)):
                if mask[r, c] and labels[r, c] == 0:
                    labels[r, c] = label
                    waiting.append((r, c))


def box_sum(values: NDArray[Any], radius: int) -> NDArray[np.float64]:
    """The sum over the square of 2 radius + 1 around each pixel; outside counts as nothing."""
    total = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    np.cumsum(np.cumsum(values, 0, dtype=np.float64), 1, out=total[1:, 1:])
    rows, columns = (np.arange(n) for n in values.shape)
    top, bottom = np.maximum(rows - radius, 0), np.minimum(rows + radius + 1, values.shape[0])
    left, right = np.maximum(columns - radius, 0), np.minimum(columns + radius + 1, values.shape[1])
    across = total[bottom] - total[top]
    return np.asarray(across[:, right] - across[:, left])


def dilate(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    return box_sum(mask, radius) > 0.5


def erode(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """What lies deeper than the radius; the border of the picture does not wear away."""
    return ~dilate(~mask, radius)


def outline(field: NDArray[Any], level: float) -> Outline:
    """The longest closed line at which a field crosses a level (marching squares), or nothing.

    Lorensen and Cline 1987, in two dimensions; each corner pair that differs is cut by linear interpolation.
    """
    padded = np.pad(np.asarray(field, np.float64), 1, constant_values=min(0.0, level) - 1.0)
    padded[1:-1, 1:-1] = field
    follow = _crossings(padded > level)
    best: list[Point] = []
    while follow:
        edge = start = next(iter(follow))
        loop: list[Point] = []
        while edge in follow:
            loop.append(_cut(padded, edge, level))
            edge = follow.pop(edge)
        if edge == start and _area(loop) > _area(best):
            best = loop
    return (*((x - 1, y - 1) for x, y in best), (best[0][0] - 1, best[0][1] - 1)) if best else ()


Edge = tuple[int, int, int]  # row, column, and 0 for the edge to the right neighbour, 1 for the one below

# Corners of a cell, by bit: 1 upper left, 2 upper right, 4 lower right, 8 lower left.
# Sides: 0 top, 1 right, 2 bottom, 3 left. Each line runs with the inside on its right.
_LINES: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((3, 0),), 2: ((0, 1),), 3: ((3, 1),), 4: ((1, 2),), 5: ((3, 0), (1, 2)), 6: ((0, 2),), 7: ((3, 2),),
    8: ((2, 3),), 9: ((2, 0),), 10: ((0, 1), (2, 3)), 11: ((2, 1),), 12: ((1, 3),), 13: ((1, 0),), 14: ((0, 3),),
}  # fmt: skip


def _crossings(inside: NDArray[np.bool_]) -> dict[Edge, Edge]:
    """From each crossed edge to the next one along the line."""
    corners = inside.astype(np.int8)
    kind = corners[:-1, :-1] + 2 * corners[:-1, 1:] + 4 * corners[1:, 1:] + 8 * corners[1:, :-1]
    follow: dict[Edge, Edge] = {}
    for r, c in zip(*np.nonzero((kind > 0) & (kind < 15)), strict=True):
        row, column = int(r), int(c)
        sides: tuple[Edge, ...] = ((row, column, 0), (row, column + 1, 1), (row + 1, column, 0), (row, column, 1))
        for a, b in _LINES[int(kind[r, c])]:
            follow[sides[a]] = sides[b]
    return follow


def _cut(field: NDArray[np.float64], edge: Edge, level: float) -> Point:
    row, column, down = edge
    here, there = field[row, column], field[row + down, column + 1 - down]
    part = float((level - here) / (there - here))
    return (float(column), row + part) if down else (column + part, float(row))


def _area(loop: Sequence[Point]) -> float:
    if len(loop) < 3:
        return 0.0
    x, y = np.asarray(loop, np.float64).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def simplify(line: Outline, tolerance: float) -> Outline:
    """Fewer points, none of those left out farther off than the tolerance (Ramer 1972, Douglas and Peucker 1973)."""
    if len(line) < 5:
        return line
    points = np.asarray(line)
    far = int(np.argmax(((points - points[0]) ** 2).sum(1)))  # a closed line is two lines between its far ends
    keep = {0, far, len(points) - 1}
    spans = [(0, far), (far, len(points) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        off = _distances(points[first + 1 : last], points[first], points[last])
        worst = int(np.argmax(off))
        if off[worst] > tolerance:
            middle = first + 1 + worst
            keep.add(middle)
            spans += [(first, middle), (middle, last)]
    return tuple(line[i] for i in sorted(keep))


def _distances(
    points: NDArray[np.float64], start: NDArray[np.float64], end: NDArray[np.float64]
) -> NDArray[np.float64]:
    along = end - start
    length = float(np.hypot(*along))
    off = points - start
    if length == 0:
        return np.asarray(np.hypot(off[:, 0], off[:, 1]))
    return np.asarray(abs(off[:, 0] * along[1] - off[:, 1] * along[0]) / length)


def measure(line: Outline, row_spacing: float, column_spacing: float) -> Measures:
    """The longest diameter, the widest extent square to it, and the area."""
    points = np.asarray(line, np.float64) * (column_spacing, row_spacing)
    apart = points[:, None] - points[None]
    distance = np.hypot(apart[..., 0], apart[..., 1])
    i, j = np.unravel_index(int(np.argmax(distance)), distance.shape)
    long_axis = float(distance[i, j])
    along = apart[i, j] / max(long_axis, 1e-9)
    across = points @ np.asarray([-along[1], along[0]])
    width, height = np.ptp(points, axis=0)
    return Measures(
        long_axis, float(np.ptp(across)), _area([(x, y) for x, y in points[:-1]]), float(width), float(height)
    )
