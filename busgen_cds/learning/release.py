"""The release filter: no generated image leaves that lies too near to a training image.

Rules:
- "Too near" is nearer than the nearest hundredth of held-out patients' images lie to the training images.
- A training image counts in every view that the generator learns from, and each view mirrored as well: a copy of a
  close-up lies far from the whole.
- An adapter's filter is its generator's, with the adapter's own images.
- What is kept of the training images is a projection of their latents to a few numbers, from which no image comes
  back; the filter travels with the generator, so that who has no training data releases safely too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, embed
from busgen_cds.learning.autoencoder import Autoencoder
from busgen_cds.learning.embed import Embedding, Squares, Vectors
from busgen_cds.pixels import Grey

FILE = "release.safetensors"
DIMENSIONS = 64
PERCENTILE = 1.0


@dataclass(frozen=True)
class Filter:
    mean: Vectors = field(repr=False)  # (D,)
    axes: Vectors = field(repr=False)  # (D, K)
    points: Vectors = field(repr=False)  # (N, K): training images, and their mirror images
    threshold: float

    def distance(self, vectors: Vectors) -> NDArray[np.float32]:
        """How far each image lies from the nearest training image."""
        return embed.nearest((vectors - self.mean) @ self.axes, self.points)[0]

    def passes(self, vectors: Vectors) -> NDArray[np.bool_]:
        return self.distance(vectors) >= self.threshold

    def including(self, vectors: Vectors) -> Filter:
        """The same filter, to which these images are training images too."""
        return dataclasses.replace(self, points=np.concatenate([self.points, (vectors - self.mean) @ self.axes]))

    def save(self, path: Path) -> None:
        tensors = {"mean": self.mean, "axes": self.axes, "points": self.points}
        half = {name: torch.from_numpy(np.asarray(array)).half() for name, array in tensors.items()}
        checkpoint.write(path, half, {"threshold": self.threshold})


def build(embedding: Embedding, train: Squares, held_out: Squares) -> Filter:
    """Learn the filter from training images in all their views, and held-out patients' images."""
    if not len(held_out):
        raise Misconfigured("The release filter needs held-out images to know how near is too near.")
    vectors = both_ways(embedding, train)
    mean = vectors.mean(0)
    _, _, rotation = np.linalg.svd(vectors - mean, full_matrices=False)
    axes = rotation[:DIMENSIONS].T
    points = (vectors - mean) @ axes
    away = embed.nearest((embedding(held_out) - mean) @ axes, points)[0]
    return Filter(mean, axes, points, float(np.percentile(away, PERCENTILE)))


def both_ways(embedding: Embedding, images: Squares) -> Vectors:
    return np.concatenate([embedding(images), embedding(embed.mirrored(images))])


def clear(gate: Filter, coder: Autoencoder, images: Sequence[Grey], size: int) -> NDArray[np.bool_]:
    """Which of some generated images, of any shapes, may leave."""
    return gate.passes(embed.latent(coder)(embed.squares(images, size)))


def of(generator: Path, adapter: Path | None = None) -> Filter | None:
    """The filter beside a generator, or beside its adapter's file where there is one; None: it has none."""
    path = (generator if adapter is None else adapter.parent) / FILE
    return load(path) if path.exists() else None


def load(path: Path) -> Filter:
    tensors, notes = checkpoint.read(path)
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    return Filter(arrays["mean"], arrays["axes"], arrays["points"], float(notes["threshold"]))
