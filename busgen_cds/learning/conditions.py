"""What an image is asked to be: labels, region, box and outline, as the generator's network sees them.

Rules:
- Index 0 of every label means "not said"; a label that is not known by its name is an error, not a guess.
- Boxes are (left, top, right, bottom) as fractions of the image region, whatever its shape.
- An outline travels as its signed distance, clipped, at half the latent's cell: smooth, so that a coarse grid
  still gives a fine contour.
- The box prior is smooth: its bandwidth is the one that explains held-out boxes best, and a draw that lies on a
  training box is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from torch import Tensor

from busgen_cds.errors import Misconfigured
from busgen_cds.pixels import Placement

CELL = 8  # pixels per latent cell
FOLD = 2  # cells of the outline per latent cell, each way
OUTLINE = FOLD**2  # channels of the outline
REACH = 0.1  # of the image's side: the distance at which the outline's plane is saturated
NEAR_COPY = 0.01  # of the region: a box whose every edge is nearer than this to a training box is a copy
MOST_DRAWS = 1000  # of a box, until one is nobody's
BANDWIDTHS = (0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7)  # of the standard deviation, each tried
AT_ONCE = 512  # boxes whose likelihood is asked for: their distances to all others are held
UNTOLD = 0.35  # where no box is held out to tell: wide, for a narrow one replays the training boxes


class Box(NamedTuple):
    """Fractions of the image region."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Vocabulary:
    """The labels that can be said, by condition, in a fixed order."""

    names: Mapping[str, tuple[str, ...]]

    def index(self, labels: Mapping[str, str | None]) -> list[int]:
        """One number per condition; 0 where nothing is said."""
        unknown = set(labels) - set(self.names)
        if unknown:
            raise Misconfigured(f"No condition is named {', '.join(sorted(unknown))}; known: {', '.join(self.names)}.")
        return [self._one(condition, labels.get(condition)) for condition in self.names]

    def _one(self, condition: str, label: str | None) -> int:
        if not label:
            return 0
        try:
            return 1 + self.names[condition].index(label)
        except ValueError:
            known = ", ".join(map(repr, self.names[condition]))
            raise Misconfigured(f"Unknown {condition} {label!r}; this generator knows: {known}.") from None

    def with_label(self, condition: str, label: str) -> Vocabulary:
        """The same, with one more label; indices that were given stay."""
        if label in self.names.get(condition, ()):
            return self
        return Vocabulary({**self.names, condition: (*self.names.get(condition, ()), label)})


def outline_planes(mask: NDArray[np.uint8]) -> Tensor:
    """A lesion mask (S, S), 0..255 → its signed distance (OUTLINE, S/8, S/8) in -1..1, positive inside."""
    inside = mask > 127
    if not inside.any():
        return torch.full((OUTLINE, len(mask) // CELL, len(mask) // CELL), -1.0)
    distance = distance_transform_edt(inside) - distance_transform_edt(~inside)
    distance = np.where(inside, distance - 0.5, distance + 0.5) / (REACH * len(mask))
    plane = torch.from_numpy(distance).float().clamp(-1, 1)[None, None]
    return F.pixel_unshuffle(F.avg_pool2d(plane, CELL // FOLD), FOLD)[0]


def outline_mask(planes: Tensor) -> Tensor:
    """(N, OUTLINE, h, w) → (N, 8h, 8w) bool."""
    plane = F.pixel_shuffle(planes.float(), FOLD)
    return F.interpolate(plane, scale_factor=CELL / FOLD, mode="bilinear", align_corners=False)[:, 0] > 0


def box_of(mask: NDArray[np.uint8], placement: Placement) -> Box | None:
    """The box around a mask in the square, as fractions of the region."""
    rows, columns = np.nonzero(mask > 127)
    if not len(rows):
        return None
    left, right = (
        (columns.min() - placement.left) / placement.columns,
        (columns.max() + 1 - placement.left) / placement.columns,
    )
    return Box(float(left), float(rows.min() / placement.rows), float(right), float((rows.max() + 1) / placement.rows))


def in_cells(box: Box, placement: Placement) -> tuple[float, float, float, float]:
    """The box in latent cells of the square: left, top, right, bottom."""
    x, y = placement.columns / CELL, placement.rows / CELL
    left = placement.left / CELL
    return left + box.left * x, box.top * y, left + box.right * x, box.bottom * y


def cover(left: float, top: float, right: float, bottom: float, cells: int) -> Tensor:
    """How much of each cell (cells, cells) a rectangle covers: soft, so that it may move by less than a cell."""
    at = torch.arange(cells)
    across = (torch.clamp(at + 1, max=right) - torch.clamp(at, min=left)).clamp(0, 1)
    down = (torch.clamp(at + 1, max=bottom) - torch.clamp(at, min=top)).clamp(0, 1)
    return down[:, None] * across[None]


def region_plane(placement: Placement) -> Tensor:
    """Where in the square the image region lies."""
    return cover(*in_cells(Box(0, 0, 1, 1), placement), placement.size // CELL)


# The box prior


@dataclass(frozen=True)
class BoxPrior:
    """A kernel density over boxes, one per pathology, in coordinates where every box is possible and none leaves."""

    boxes: Mapping[str, NDArray[np.float32]] = field(repr=False)  # pathology → (N, 4) training boxes
    bandwidth: Mapping[str, float]

    def draw(self, pathology: str, rng: np.random.Generator) -> Box:
        """A box from the density that is nobody's box."""
        if pathology not in self.boxes:
            raise Misconfigured(f"No boxes are known for {pathology!r}; known: {', '.join(self.boxes)}.")
        known = self.boxes[pathology]
        points = _open(known)
        width = self.bandwidth[pathology] * points.std(0)
        for _ in range(MOST_DRAWS):
            point = points[rng.integers(len(points))] + width * rng.standard_normal(4)
            box = _close(point[None])[0]
            if not is_copy(box, known):
                return Box(*map(float, box))
        raise Misconfigured(
            f"The boxes that are known for {pathology!r} are all alike, and any that is drawn is a training image's:"
            " give a box or a mask, or train on more images."
        )


def is_copy(box: NDArray[np.float32], known: NDArray[np.float32]) -> bool:
    return bool((np.abs(known - box).max(1) < NEAR_COPY).any())


def fit_boxes(boxes: Mapping[str, Sequence[Box]], held_out: Mapping[str, Sequence[Box]]) -> BoxPrior:
    """The bandwidth that gives held-out patients' boxes the highest likelihood; a wide one where none is held out."""
    arrays = {name: np.array(b, np.float32).reshape(-1, 4) for name, b in boxes.items() if len(b)}
    chosen = dict.fromkeys(arrays, UNTOLD)
    for name in arrays:
        if other := held_out.get(name):
            known, unseen = arrays[name], np.array(other, np.float32).reshape(-1, 4)
            chosen[name] = max(BANDWIDTHS, key=lambda h: log_likelihood(known, unseen, h))
    return BoxPrior(arrays, chosen)


def log_likelihood(known: NDArray[np.float32], other: NDArray[np.float32], bandwidth: float) -> float:
    """Mean log density of other boxes under the kernel density of the known ones."""
    points, queries = _open(known), _open(other)
    width = bandwidth * np.maximum(points.std(0), 1e-3)
    total = 0.0
    for i in range(0, len(queries), AT_ONCE):
        exponent = -0.5 * cdist(queries[i : i + AT_ONCE] / width, points / width, "sqeuclidean")
        total += float(logsumexp(exponent, axis=1).sum())
    return float(total / len(queries) - np.log(len(points)) - np.log(width).sum() - 2 * np.log(2 * np.pi))


def _open(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """(left, top, right, bottom) → log-odds of width and height, and of the place within what they leave free."""
    b = np.clip(boxes.astype(np.float64), 0.0, 1.0)
    size = np.clip(b[:, 2:] - b[:, :2], 0.01, 0.99)
    place = np.clip(b[:, :2] / (1 - size), 0.01, 0.99)
    both = np.concatenate([size, place], 1)
    return np.asarray(np.log(both / (1 - both)), np.float64)


def _close(points: NDArray[np.float64]) -> NDArray[np.float32]:
    both = 1 / (1 + np.exp(-points))
    size, place = both[:, :2], both[:, 2:]
    corner = place * (1 - size)
    return np.concatenate([corner, corner + size], 1).astype(np.float32)


@dataclass(frozen=True)
class RegionPrior:
    """Height over width of a device's images, as quantiles: drawn between them, never as one patient's value."""

    quantiles: Mapping[str, tuple[float, ...]]  # device ("" = any) → log aspect at even steps of probability

    def draw(self, device: str | None, rng: np.random.Generator) -> float:
        known = self.quantiles.get(device or "", self.quantiles[""])
        at = rng.uniform(0, len(known) - 1)
        return float(np.exp(np.interp(at, np.arange(len(known)), known)))


def fit_regions(aspects: Mapping[str, Sequence[float]], steps: int = 10) -> RegionPrior:
    """Quantiles from the 2nd to the 98th percentile, so that no single image sets an end."""
    everything = [a for values in aspects.values() for a in values]
    at = np.linspace(2, 98, steps + 1)
    quantiles = {name: np.percentile(np.log(values), at) for name, values in {**aspects, "": everything}.items()}
    return RegionPrior({name: tuple(float(q) for q in values) for name, values in quantiles.items()})


def placement(aspect: float, size: int) -> Placement:
    """The region of an image with this height over width."""
    return Placement(1000, max(1, round(1000 / aspect)), size)
