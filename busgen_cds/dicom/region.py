"""Where in a frame the tissue is: as the scanner says, or as the pixels show.

Rules:
- What the scanner says is believed as far as it lies inside the frame; black margins are cut off it.
- A dual screen has two regions. Colour flow, M-mode and spectra are no tissue.
- Millimetres come from the scanner or not at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from busgen_cds import geometry
from busgen_cds.study import Region, Spacing

# PS3.3 C.8.5.5.1.1 and C.8.5.5.1.2
TWO_DIMENSIONAL, M_MODE, SPECTRAL, WAVEFORM = 1, 2, 3, 4
TISSUE, COLOUR_FLOW, ECG = 1, 2, 10
CENTIMETRES = 3

MIN_SIDE = 48  # pixels: below it a region shows no lesion
MIN_SHARE = 0.06  # of the frame that tissue found in the pixels must fill
SPACINGS = (0.005, 1.5)  # millimetres per pixel between which a calibration is believable
LIT = 6  # of 255: how far a pixel must stand off the background to be drawn on
GUTTER = 3  # pixels between the halves of a dual screen
FAN_ROWS = 12  # cells: a lower picture has no shape to judge
SECTOR = 0.5  # a picture whose top is narrower than this part of its width is a sector

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Stated:
    """What SequenceOfUltrasoundRegions says of a frame."""

    tissue: tuple[tuple[Region, Spacing | None], ...] = ()
    flow: tuple[Region, ...] = ()
    curve: str = ""  # M-mode or spectrum, if the frame has one
    heart_trace: bool = False


def stated(header: Dataset, rows: int, columns: int) -> Stated:
    tissue: list[tuple[Region, Spacing | None]] = []
    flow: list[Region] = []
    curve, heart_trace = "", False
    for item in header.get("SequenceOfUltrasoundRegions") or ():
        spatial, kind = _number(item, "RegionSpatialFormat"), _number(item, "RegionDataType")
        heart_trace |= spatial == WAVEFORM and kind == ECG
        curve = {M_MODE: "M-mode", SPECTRAL: "spectral Doppler"}.get(int(spatial or 0), curve)
        box = _box(item, rows, columns)
        if spatial != TWO_DIMENSIONAL or box is None:
            continue
        if kind == TISSUE and not any(_overlap(box, other) > 0.8 for other, _ in tissue):
            tissue.append((box, _spacing(item)))
        elif kind == COLOUR_FLOW:
            flow.append(box)
    return Stated(tuple(tissue), tuple(flow), curve, heart_trace)


def readable(said: Stated) -> tuple[tuple[Region, Spacing | None], ...]:
    """The tissue regions that no colour box reaches into."""
    return tuple(pair for pair in said.tissue if not any(_overlap(flow, pair[0]) > 0.05 for flow in said.flow))


def spacing_of_frame(header: Dataset) -> Spacing | None:
    """Pixel Spacing, where the regions do not say it: already in millimetres, row first (PS3.3 10.7.1.1)."""
    try:
        row, column = (float(part) for part in header.PixelSpacing)
    except (AttributeError, TypeError, ValueError):
        return None
    return _believable(row, column)


def trimmed(grey: Grey, region: Region) -> Region | None:
    """The region without the black bands around its tissue; nothing when it is all black."""
    left, top, right, bottom = region
    lit = grey[top:bottom, left:right] > LIT
    rows, columns = (np.flatnonzero(lit.mean(axis) > 0.02) for axis in (1, 0))
    if len(rows) == 0 or len(columns) == 0:
        return None
    inner = Region(left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1)
    return inner if _large_enough(inner) else None


def found(grey: Grey) -> tuple[Region, ...]:
    """The tissue as the pixels show it: large, filled and speckled, where writing and rulers are thin and sparse."""
    lit = _lit(grey)
    solid, cell = _solid(grey, lit)
    boxes = [_exact(lit, _dense_box(piece, cell), cell) for piece in geometry.pieces(solid)[:4]]
    boxes = [box for box in boxes if box.width * box.height >= MIN_SHARE / 4 * grey.size]
    if len(boxes) > 1 and _side_by_side(*boxes[:2]):
        boxes = boxes[:2]
    elif boxes:
        boxes = [_joined(*boxes)]
    boxes = [box for box in boxes if box.width * box.height >= MIN_SHARE * grey.size]
    regions = _halves(lit, boxes[0]) if len(boxes) == 1 else boxes
    return tuple(sorted(region for region in regions if _large_enough(region)))


def is_sector(grey: Grey, region: Region) -> bool:
    """Does the picture fan out from a narrow top, as a curved or phased probe draws it?"""
    left, top, right, bottom = region
    tissue = grey[top:bottom, left:right]
    solid, _ = _solid(tissue, tissue > LIT)
    fan = next(iter(geometry.pieces(solid)), solid)
    fan = fan[fan.any(1)]
    if len(fan) < FAN_ROWS:
        return False
    spans = [_span(fan, depth) for depth in (0.03, 0.15, 0.25, 0.35)]
    widest = max(b - a for a, b in (_span(fan, depth) for depth in (0.45, 0.55, 0.65, 0.75, 0.85)))
    # each step down must widen on both sides: a shadow or a dark corner is not that regular
    fans = all(low[0] < high[0] and low[1] > high[1] for high, low in pairwise(spans))
    return fans and spans[0][1] - spans[0][0] < SECTOR * widest


def _span(solid: NDArray[np.bool_], depth: float) -> tuple[int, int]:
    """The first and the last column that is filled at a depth (0 top, 1 bottom)."""
    columns = np.flatnonzero(solid[round(depth * (len(solid) - 1))])
    return (int(columns[0]), int(columns[-1])) if len(columns) else (0, 0)


def _lit(grey: Grey) -> NDArray[np.bool_]:
    return np.asarray(abs(grey.astype(np.int16) - _background(grey)) > LIT)


def _solid(grey: Grey, lit: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], int]:
    """On a coarse grid, where the picture is filled and speckled over more than a stroke; and the size of a cell."""
    cell = max(4, round(min(grey.shape) / 75))
    tissue = (_cells(lit, cell).mean((1, 3)) > 0.5) & (_cells(grey, cell).std((1, 3)) > 1.0)
    return geometry.dilate(geometry.erode(np.pad(tissue, 1), 1), 1)[1:-1, 1:-1], cell


def _box(item: Dataset, rows: int, columns: int) -> Region | None:
    edges = [_number(item, f"RegionLocation{name}") for name in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
    if any(edge is None for edge in edges):
        return None
    x0, y0, x1, y1 = (int(edge or 0) for edge in edges)
    box = Region(max(0, x0), max(0, y0), min(columns, x1 + 1), min(rows, y1 + 1))  # the last pixel belongs to it
    return box if _large_enough(box) else None


def _spacing(item: Dataset) -> Spacing | None:
    """PS3.3 C.8.5.5.1.15 to 18: the size of a pixel, in cm when the unit code is 3; its sign is a direction."""
    units = [_number(item, f"PhysicalUnits{axis}Direction") for axis in ("Y", "X")]
    row, column = (_number(item, f"PhysicalDelta{axis}") for axis in ("Y", "X"))
    if units != [CENTIMETRES, CENTIMETRES] or row is None or column is None:
        return None
    return _believable(abs(row) * 10, abs(column) * 10)


def _believable(row: float, column: float) -> Spacing | None:
    low, high = SPACINGS
    believable = all(math.isfinite(side) and low <= side <= high for side in (row, column))
    return Spacing(row, column) if believable and 0.25 <= row / column <= 4 else None


def _number(item: Dataset, name: str) -> float | None:
    try:
        number = float(item[name].value)
    except (KeyError, TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _large_enough(region: Region) -> bool:
    return region.width >= MIN_SIDE and region.height >= MIN_SIDE


def _overlap(a: Region, b: Region) -> float:
    """Which part of the smaller one lies in the other."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    return max(0, width) * max(0, height) / min(a.width * a.height, b.width * b.height)


def _joined(large: Region, *others: Region) -> Region:
    """One picture that a black cyst or shadow cuts across: the pieces that lie above one another belong together."""
    columns = [(min(large.right, box.right) - max(large.left, box.left)) / box.width for box in others]
    whole = [large, *(box for box, share in zip(others, columns, strict=True) if share > 0.6)]
    left, top, right, bottom = zip(*whole, strict=True)
    return Region(min(left), min(top), max(right), max(bottom))


def _background(grey: Grey) -> int:
    """The commonest value along the edge of the screen; black when no value is common."""
    edge = np.concatenate([grey[:4].ravel(), grey[-4:].ravel(), grey[:, :4].ravel(), grey[:, -4:].ravel()])
    counts = np.bincount(edge, minlength=256)
    return int(counts.argmax()) if counts.max() > 0.3 * len(edge) else 0


def _cells(values: NDArray[Any], cell: int) -> NDArray[np.float32]:
    """(rows, columns) → (cell rows, cell, cell columns, cell); what does not fill a cell is left out."""
    rows, columns = values.shape[0] // cell, values.shape[1] // cell
    return values[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell).astype(np.float32)


def _dense_box(piece: NDArray[np.bool_], cell: int) -> Region:
    """The rows and columns that the piece really fills, in pixels."""
    rows, columns = (piece.sum(axis) for axis in (1, 0))
    high = np.flatnonzero(rows >= 0.25 * rows.max())
    wide = np.flatnonzero(columns >= 0.25 * columns.max())
    return Region(int(wide[0]) * cell, int(high[0]) * cell, (int(wide[-1]) + 1) * cell, (int(high[-1]) + 1) * cell)


def _exact(lit: NDArray[np.bool_], box: Region, cell: int) -> Region:
    """Each edge moved out to the last row or column that is mostly drawn on, within a cell."""
    left, top, right, bottom = box
    rows, columns = lit[:, left:right].mean(1) > 0.3, lit[top:bottom].mean(0) > 0.3
    top, bottom = _grown(rows, top, bottom, cell)
    left, right = _grown(columns, left, right, cell)
    return Region(left, top, right, bottom)


def _grown(drawn: NDArray[np.bool_], first: int, end: int, reach: int) -> tuple[int, int]:
    low, high = max(0, first - reach), min(len(drawn), end + reach)
    while first > low and drawn[first - 1]:
        first -= 1
    while end < high and drawn[end]:
        end += 1
    return first, end


def _side_by_side(a: Region, b: Region) -> bool:
    """The halves of a dual screen: of one height, one beside the other."""
    apart = a.right <= b.left or b.right <= a.left
    return apart and min(a.height, b.height) > 0.6 * max(a.height, b.height)


def _halves(lit: NDArray[np.bool_], box: Region) -> list[Region]:
    """Two regions where an empty gutter runs down the middle of a wide one."""
    share = lit[box.top : box.bottom, box.left : box.right].mean(0)
    middle = slice(int(0.4 * box.width), int(0.6 * box.width))
    empty = np.flatnonzero(share[middle] < 0.02) + middle.start
    if len(empty) < GUTTER:
        return [box]
    return [box._replace(right=box.left + int(empty[0])), box._replace(left=box.left + int(empty[-1]) + 1)]
