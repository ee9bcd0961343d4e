"""The one way from a frame to the network's input, shared by training and by the engine.

Rules:
- The aspect ratio is kept (letter-box), and an image is never flipped vertically: skin is at the top.
- Every frame is brought to one scale before anything is judged in pixels, so that the same mark
  looks the same whatever the scanner's matrix was.
- Thin, near-white structures (burned-in text, calipers, rulers) are replaced by their surroundings.
- A change of anything here is a new VERSION; an engine refuses a bundle made with another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = "1"
SIZE = 224

MARK_BRIGHTNESS = 212  # of 255: brighter than nearly all tissue at this scale
MARK_CONTRAST = 110  # of 255: height above the surroundings that few echoes reach
MARK_SKIRT = 60  # of 255: the softer rest of a stroke, taken only beside a certain mark
MARK_REACH = 3  # pixels that a mark may grow along its own skirt
MARK_RADIUS = 3  # pixels of the input: strokes of text and calipers are thinner than 7

Grey = NDArray[np.uint8]
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Placement:
    """Where a frame's region lies in the model's square input."""

    height: int
    width: int
    size: int = SIZE

    @property
    def scale(self) -> float:
        return self.size / max(self.height, self.width)

    @property
    def rows(self) -> int:
        return max(1, min(self.size, round(self.height * self.scale)))

    @property
    def columns(self) -> int:
        return max(1, min(self.size, round(self.width * self.scale)))

    @property
    def top(self) -> int:
        return 0  # the skin stays at the upper edge

    @property
    def left(self) -> int:
        return (self.size - self.columns) // 2

    def crop(self, grid: NDArray[Any]) -> NDArray[Any]:
        """The part of a square output grid (any resolution that divides the input) that shows the region."""
        step = self.size / grid.shape[-1]
        left, right = self.left / step, (self.left + self.columns) / step
        bottom = self.rows / step
        return grid[..., : max(1, round(bottom)), int(left) : max(int(left) + 1, round(right))]

    def to_region(self, x: float, y: float) -> tuple[float, float]:
        """A point of the input (pixel centres at whole numbers) as a point of the region."""
        return (
            (x + 0.5 - self.left) * self.width / self.columns - 0.5,
            (y + 0.5 - self.top) * self.height / self.rows - 0.5,
        )


def prepare(grey: Grey, size: int = SIZE) -> tuple[Plane, Placement]:
    """A grey B-mode region → (1, size, size) in 0..1, and where the region lies in it."""
    if grey.ndim != 2 or grey.dtype != np.uint8 or 0 in grey.shape:
        raise ValueError(f"expected a grey 8-bit image, got {grey.dtype} {grey.shape}")
    placement = Placement(grey.shape[0], grey.shape[1], size)
    small = resize(grey.astype(np.float32), placement.rows, placement.columns)
    clean = suppress_marks(small)
    square = np.zeros((1, size, size), np.float32)
    square[0, : placement.rows, placement.left : placement.left + placement.columns] = clean / 255
    return square, placement


def suppress_marks(image: Plane) -> Plane:
    """Replace thin near-white structures by the tissue around them."""
    around = _slide(_slide(image, np.minimum), np.maximum)  # grey opening
    height = image - around
    marks = (image > MARK_BRIGHTNESS) & (height > MARK_CONTRAST)
    if not marks.any():
        return image
    for _ in range(MARK_REACH):
        marks |= (_slide(marks.astype(np.float32), np.maximum, radius=1) > 0) & (height > MARK_SKIRT)
    return np.where(marks, around, image)


def resize(image: Plane, rows: int, columns: int) -> Plane:
    """Separable triangle-filter resampling, wide enough when shrinking not to alias."""
    tall = _resample(image, rows)
    return np.ascontiguousarray(_resample(np.ascontiguousarray(tall.T), columns).T)


def _resample(image: Plane, new: int) -> Plane:
    """Along the first axis, tap by tap: a matrix product would differ between machines, and wake all their cores."""
    sources, weights = _taps(len(image), new)
    total = np.zeros((new, image.shape[1]), np.float32)
    for source, weight in zip(sources.T, weights.T, strict=True):
        total += weight[:, None] * image[source]
    return total


@lru_cache(maxsize=256)
def _taps(old: int, new: int) -> tuple[NDArray[np.intp], Plane]:
    """For each new row, the old rows that make it and their weights, each (new, taps)."""
    ratio = old / new
    centres = (np.arange(new) + 0.5) * ratio - 0.5
    distance = np.abs(np.arange(old)[None] - centres[:, None]) / max(ratio, 1)
    weights = np.clip(1 - distance, 0, None)
    weights /= weights.sum(1, keepdims=True)
    width = int((weights > 0).sum(1).max())
    first = np.minimum((weights > 0).argmax(1), old - width)
    sources = first[:, None] + np.arange(width)
    return sources, np.asarray(np.take_along_axis(weights, sources, 1), np.float32)


def _slide(image: Plane, pick: np.ufunc, radius: int = MARK_RADIUS) -> Plane:
    """A square running minimum or maximum, one axis after the other."""
    for axis in (0, 1):
        padded = np.pad(image, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        views = np.lib.stride_tricks.sliding_window_view(padded, 2 * radius + 1, axis=axis)
        image = pick.reduce(views, axis=-1)
    return image
