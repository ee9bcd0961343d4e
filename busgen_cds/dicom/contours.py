"""A finding's contour in DICOM's image coordinates, and the same contour as a mask.

A contour's points are pixel centres at whole numbers; DICOM counts from the outer corner of the first pixel
(PS3.3 C.18.6.1.1, C.10.5.1.2), half a pixel further up and left.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from busgen_cds.result import Finding

Point = tuple[float, float]
Mask = NDArray[np.bool_]
_HALF = 0.5


def closed(finding: Finding) -> tuple[Point, ...]:
    """DICOM coordinates, kept within the image; the first point again at the end."""
    rows, columns = finding.source.rows, finding.source.columns
    points = tuple(
        (float(np.float32(min(max(x + _HALF, 0), columns))), float(np.float32(min(max(y + _HALF, 0), rows))))
        for x, y in finding.contour
    )
    return points if points[0] == points[-1] else (*points, points[0])


def mask(finding: Finding) -> Mask:
    """(rows, columns) of the source frame: pixels whose centre lies within the contour, or on it."""
    plane = Image.new("1", (finding.source.columns, finding.source.rows))
    ImageDraw.Draw(plane).polygon([(x, y) for x, y in finding.contour], fill=1, outline=1)
    return np.asarray(plane)
