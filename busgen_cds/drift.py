"""Are the studies that come in still like those the bundle was taken into use with? Pure figures, no decisions.

Rules:
- A difference counts only when it is large (a stated limit) and more than chance gives (one in a thousand weeks).
- Images are compared by the network's own embeddings: the maximum mean discrepancy with a Gaussian kernel, through
  random Fourier features, so that a week is a sum of vectors and no image, and no embedding of one, is kept.
- Each study counts once, with the mean of its images: frames of one clip are not independent.

PSI: Σ (o − r) ln(o / r) over the shares of each bin. MMD: Gretton et al., A kernel two-sample test, JMLR 13 (2012).
Random features: Rahimi and Recht, Random features for large-scale kernel machines, NIPS 2007.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

FEATURES = 256
BINS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)  # of a study's score: the edges between them
CATEGORIES = ("none", "3", "4A", "4B", "4C", "5", "declined")
RARE = 3.09  # standard deviations: one in a thousand, one-sided


@dataclass(frozen=True)
class Sums:
    """Some studies, added up."""

    studies: int = 0
    declined: int = 0
    scores: tuple[int, ...] = (0,) * (len(BINS) + 1)
    categories: tuple[int, ...] = (0,) * len(CATEGORIES)
    features: Vector = field(default_factory=lambda: np.zeros(FEATURES), repr=False)  # sum over studies
    squares: float = 0.0  # sum of the squared lengths of each study's vector

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.studies + other.studies,
            self.declined + other.declined,
            tuple(a + b for a, b in zip(self.scores, other.scores, strict=True)),
            tuple(a + b for a, b in zip(self.categories, other.categories, strict=True)),
            self.features + other.features,
            self.squares + other.squares,
        )

    @property
    def declines(self) -> float:
        return self.declined / max(1, self.studies)


def one(category: str, score: float | None, vector: Vector) -> Sums:
    """One study: its category (or “none”, “declined”), its score if it has one, and its images' features."""
    bins = [0] * (len(BINS) + 1)
    if score is not None:
        bins[sum(score > edge for edge in BINS)] = 1
    found = tuple(int(category == each) for each in CATEGORIES)
    return Sums(1, int(category == "declined"), tuple(bins), found, vector, float(vector @ vector))


def features(embeddings: NDArray[np.float32]) -> Vector:
    """Whitened embeddings (N, K) of one study → the mean of their random Fourier features, (FEATURES,)."""
    if len(embeddings) == 0:
        return np.zeros(FEATURES)
    if not np.isfinite(embeddings).all():
        raise ValueError("an embedding is not a number")  # one of them in a sum would silence it for ever
    directions, phases = _projection(embeddings.shape[1])
    # cos(w·x + b), w ~ N(0, 1/σ²): its inner products are exp(−|x − y|² / 2σ²); σ² = K, half the mean squared distance
    waves = np.cos(embeddings.astype(np.float64) @ directions + phases)
    return np.asarray(np.sqrt(2 / FEATURES) * waves.mean(0), np.float64)


@cache
def _projection(dimensions: int) -> tuple[Vector, Vector]:
    """The same for every site and for ever: sums of different weeks must add up."""
    made = np.random.Generator(np.random.PCG64(20121))
    directions = made.standard_normal((dimensions, FEATURES)) / math.sqrt(dimensions)
    return directions, made.uniform(0, 2 * math.pi, FEATURES)


@dataclass(frozen=True)
class Figure:
    """One difference: how large, how large it may be, and how much of it chance alone would give."""

    name: str
    value: float
    limit: float
    chance: float

    @property
    def alarming(self) -> bool:
        return self.value > self.limit and self.value > self.chance


@dataclass(frozen=True)
class Limits:
    """From how many studies on, and how much, a week may differ."""

    studies: int = 30
    scores: float = 0.2  # PSI: the usual “significant change”
    categories: float = 0.2
    declines: float = 0.1  # of the share of declined studies
    images: float = 0.02  # MMD², of 1 at most


def figures(reference: Sums, observed: Sums, limits: Limits) -> tuple[Figure, ...]:
    """What differs; nothing where either side has too few studies to tell."""
    if min(reference.studies, observed.studies) < limits.studies:
        return ()
    declines, by_chance = _declines(reference, observed)
    return (
        _population("scores", reference.scores, observed.scores, limits.scores),
        _population("categories", reference.categories, observed.categories, limits.categories),
        Figure("declined", declines, limits.declines, by_chance),
        _images(reference, observed, limits.images),
    )


def psi(reference: Sequence[int], observed: Sequence[int]) -> float:
    """Population stability index; half a study in each bin keeps empty ones finite."""
    r, o = (np.asarray(counts, np.float64) + 0.5 for counts in (reference, observed))
    r, o = r / r.sum(), o / o.sum()
    return float(((o - r) * np.log(o / r)).sum())


def mmd(reference: Sums, observed: Sums) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy."""
    return float(_gap(reference, observed) - _noise(reference) - _noise(observed))


def _population(name: str, reference: Sequence[int], observed: Sequence[int], limit: float) -> Figure:
    # without a change, PSI / (1/n + 1/m) is about χ² with one degree of freedom less than bins in use
    used = sum(a + b > 0 for a, b in zip(reference, observed, strict=True))
    scale = 1 / max(1, sum(reference)) + 1 / max(1, sum(observed))
    return Figure(name, psi(reference, observed), limit, scale * _chi_square(max(1, used - 1)))


def _chi_square(freedom: int) -> float:
    """Its 99.9th percentile (Wilson and Hilferty)."""
    part = 2 / (9 * freedom)
    return float(freedom * (1 - part + RARE * math.sqrt(part)) ** 3)


def _declines(reference: Sums, observed: Sums) -> tuple[float, float]:
    both = reference + observed
    spread = both.declines * (1 - both.declines) * (1 / reference.studies + 1 / observed.studies)
    return abs(observed.declines - reference.declines), RARE * math.sqrt(spread)


def _images(reference: Sums, observed: Sums, limit: float) -> Figure:
    # Without a change the squared gap of the means is a sum of many small χ², of mean `noise`. Its spread depends on
    # how many directions carry it; a few carry most, so the limit is that of χ² with four.
    noise = _noise(reference) + _noise(observed)
    return Figure("images", mmd(reference, observed), limit, noise * (_chi_square(4) / 4 - 1))


def _gap(reference: Sums, observed: Sums) -> float:
    apart = reference.features / reference.studies - observed.features / observed.studies
    return float(apart @ apart)


def _noise(sums: Sums) -> float:
    """The squared error of the mean vector that sampling alone gives."""
    mean = sums.features / sums.studies
    variance = max(0.0, sums.squares / sums.studies - float(mean @ mean))
    return variance / max(1, sums.studies - 1)
