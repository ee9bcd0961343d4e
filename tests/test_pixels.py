"""The one way from a frame to the network's input."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from busgen_cds import pixels

FRAME = Path(__file__).parent.parent / "busgen_cds" / "demo_images" / "malignant_0.png"
GOLDEN = {"1": "4b73f4c6bd859e22"}  # pixels.VERSION → digest of the golden frame, rounded to 1/200


def test_the_golden_frame_is_prepared_as_this_version_says() -> None:
    """The golden frame has the golden digest of this pixels.VERSION; a change of either needs a new version."""
    square, _ = pixels.prepare(np.asarray(Image.open(FRAME).convert("L")))
    rounded = np.round(square * 200).astype(np.int16)
    assert hashlib.sha256(rounded.tobytes()).hexdigest()[:16] == GOLDEN[pixels.VERSION]


@pytest.mark.parametrize("shape", [(600, 800), (384, 200), (30, 999), (1, 1), (224, 224)])
def test_the_aspect_ratio_is_kept_and_the_skin_stays_on_top(shape: tuple[int, int]) -> None:
    """A frame fills the square along its longer side, starts at the top and is centred from side to side."""
    square, place = pixels.prepare(np.full(shape, 100, np.uint8))
    assert square.shape == (1, pixels.SIZE, pixels.SIZE)
    assert max(place.rows, place.columns) == pixels.SIZE
    inside = square[0, : place.rows, place.left : place.left + place.columns]
    assert np.allclose(inside, 100 / 255, atol=1e-5)
    assert square.sum() == pytest.approx(inside.sum(), rel=1e-6)


def test_calipers_and_text_are_kept_out_of_sight() -> None:
    """A thin white cross is replaced by the tissue around it; a broad bright echo stays."""
    tissue = np.full((224, 224), 90, np.uint8)
    tissue[150:180, 60:160] = 250
    marked = tissue.copy()
    marked[40:51, 45] = marked[45, 40:51] = 255
    seen, _ = pixels.prepare(marked)
    clean, _ = pixels.prepare(tissue)
    assert np.abs(seen - clean).max() < 0.05
    assert clean[0, 165, 110] > 0.95


def test_a_point_goes_there_and_back() -> None:
    """A point of the square is found again in the region, half a pixel exact."""
    place = pixels.Placement(600, 800)
    x, y = place.to_region(place.left + place.columns / 2 - 0.5, place.rows / 2 - 0.5)
    assert (x, y) == (pytest.approx(399.5, abs=0.5), pytest.approx(299.5, abs=0.5))


def test_what_is_not_a_grey_image_is_refused() -> None:
    """Colour, 16-bit and empty arrays are refused with what was expected."""
    for wrong in (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint16), np.zeros((0, 4), np.uint8)):
        with pytest.raises(ValueError, match="grey 8-bit"):
            pixels.prepare(wrong)
