"""Colour in an ultrasound picture: a tint, writing and calipers, or flow and stiffness laid over the tissue.

Rules:
- A tint (one colour for each grey level, all over) is a matter of taste and is dropped.
- Thin coloured marks are replaced by the grey around them: the network must never read them.
- Broad colour is Doppler or elastography: what lies beneath cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from busgen_cds import geometry
from busgen_cds.dicom.decode import Chroma, Picture
from busgen_cds.study import Region

STRONG = 28  # of 128: colour that no JPEG and no worn-out grey map makes
BROAD = 3  # pixels: marks are thinner than 2 x 3 + 1
MAX_MARKED = 0.03  # share of the tissue that writing may cover
MAX_BROAD = 0.0015  # share of the tissue that is deep inside colour
TINT_LEVELS = 16
FILL = (4, 10, 40)  # pixels: how far around a mark the grey is taken from, wider where there is none


def coloured(picture: Picture) -> NDArray[np.bool_] | None:
    """Where the colour differs strongly from the picture's own tint; None: nowhere."""
    if picture.chroma is None:
        return None
    strong = _strong(picture.chroma)
    if strong.mean() > MAX_MARKED:
        strong = _strong(picture.chroma - _tint(picture.grey, picture.chroma))
    return strong if strong.any() else None


def covers(strong: NDArray[np.bool_] | None, region: Region) -> bool:
    """Is there more colour over the tissue than writing and calipers make?"""
    if strong is None:
        return False
    tissue = strong[region.top : region.bottom, region.left : region.right]
    if tissue.mean() > MAX_MARKED:
        return True
    return bool(geometry.erode(tissue, BROAD).mean() > MAX_BROAD) if tissue.any() else False


def without_marks(
    grey: NDArray[np.uint8], strong: NDArray[np.bool_] | None, regions: Sequence[Region]
) -> NDArray[np.uint8]:
    """In the tissue, each marked pixel becomes the mean of the unmarked ones around it."""
    if strong is None:
        return grey
    filled = grey.copy()
    for left, top, right, bottom in regions:
        _fill(filled[top:bottom, left:right], strong[top:bottom, left:right])
    return filled


def _fill(grey: NDArray[np.uint8], strong: NDArray[np.bool_]) -> None:
    """In place, and only the part of the picture that the marks need."""
    if not strong.any():
        return
    rows, columns = (np.flatnonzero(strong.any(axis)) for axis in (1, 0))
    reach = FILL[-1]
    part = np.s_[max(0, rows[0] - reach) : rows[-1] + reach + 1, max(0, columns[0] - reach) : columns[-1] + reach + 1]
    waiting = geometry.dilate(strong[part], 2)  # the soft edge of a stroke, and its shadow
    known = ~waiting
    clean = np.where(known, grey[part], 0)
    for radius in FILL:
        count = geometry.box_sum(known, radius)
        ready = waiting & (count > 0)
        grey[part][ready] = np.rint(geometry.box_sum(clean, radius)[ready] / count[ready])
        waiting &= ~ready
        if not waiting.any():
            return


def _strong(chroma: Chroma) -> NDArray[np.bool_]:
    blue, red = chroma[..., 0], chroma[..., 1]  # at most 180 each: the squares' sum would leave 16 bits
    return np.asarray(np.hypot(blue, red, dtype=np.float32) > STRONG)


def _tint(grey: NDArray[np.uint8], chroma: Chroma) -> Chroma:
    """The middle colour of each grey level, as a picture."""
    level = grey // (256 // TINT_LEVELS)
    thin, colours = level[::2, ::2], chroma[::2, ::2]
    table = np.zeros((TINT_LEVELS, 2), np.int16)
    for i in np.unique(thin):
        table[i] = np.median(colours[thin == i], axis=0)
    return table[level]
