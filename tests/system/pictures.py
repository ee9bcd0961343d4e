"""Screenshots against those that a person has looked at and accepted.

`BUSGEN_ACCEPT_PICTURES=1` writes the accepted ones anew: look at each of them before committing. One that differs is
left in build/pictures beside its name.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

ACCEPTED = Path(__file__).parent / "accepted"
DIFFERING = Path(__file__).parents[2] / "build" / "pictures"
VIEWPORT = (288, 160, 1240, 790)  # of the whole page: the image and what is drawn on it, without menus and messages
SMALL = (476, 315)
TILE = 28  # pixels of the small picture
TOLERANCE = 12.0  # mean difference within one tile, of 255: fonts and scaling may move, contours and pictures may not


def check(screenshot: Image.Image, name: str) -> None:
    """The viewport must look as it was accepted."""
    seen = screenshot.crop(VIEWPORT).resize(SMALL, Image.Resampling.LANCZOS)
    path = ACCEPTED / f"{name.replace(' ', '-')}.jpg"
    if os.environ.get("BUSGEN_ACCEPT_PICTURES") == "1":
        ACCEPTED.mkdir(exist_ok=True)
        seen.save(path, quality=90, subsampling=0)
        return
    worst = difference(seen, Image.open(path))
    if worst > TOLERANCE:
        DIFFERING.mkdir(parents=True, exist_ok=True)
        seen.save(DIFFERING / f"{name}.jpg", quality=90, subsampling=0)
        raise AssertionError(f"{name} differs from what was accepted by {worst:.0f} of 255: see {DIFFERING}")


def difference(seen: Image.Image, accepted: Image.Image) -> float:
    """The mean difference in the tile that differs most."""
    bright = [np.asarray(picture.convert("L"), np.float32) for picture in (seen, accepted)]
    apart = np.abs(bright[0] - bright[1])
    rows, columns = apart.shape[0] // TILE, apart.shape[1] // TILE
    tiles = apart[: rows * TILE, : columns * TILE].reshape(rows, TILE, columns, TILE)
    return float(tiles.mean((1, 3)).max())
