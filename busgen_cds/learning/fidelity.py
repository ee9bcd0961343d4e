"""How real generated images are: distances of their features, and a judge that tries to tell them apart.

Rules:
- A distance is shown beside its floor: the same distance between two halves of the real images, parted by patient,
  at the same number of images. A Fréchet distance is biased at few images; without the floor it means nothing.
- The judge sees real images that were only resized, never passed through the autoencoder; reconstructions are judged
  apart and tell how much the autoencoder gives away.
- All images meet the same resize and the same JPEG, so that no file format tells them apart.
- A judge that cannot tell slightly blurred real images from sharp ones (AUC below 0.9) concludes nothing.
- The networks that judge have seen real images only.

Fréchet: Heusel et al. 2017 (arXiv 1706.08500). Kernel: Bińkowski et al. 2018 (arXiv 1801.01401).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import nn

from busgen_cds.learning import figures
from busgen_cds.learning.embed import Embedding, Squares, Vectors
from busgen_cds.learning.encoders import DEEP, Encoder
from busgen_cds.learning.figures import Interval

QUALITY = 90  # of the JPEG that every image meets
BLUR = 0.7  # pixels: the standard deviation that a judge must notice
NOTICES = 0.9


def frechet(a: Vectors, b: Vectors) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½)."""
    mean = ((a.mean(0) - b.mean(0)).astype(np.float64) ** 2).sum()
    one, other = _root(a), _root(b)
    # C_a C_b has the eigenvalues of M Mᵀ with M = R_b R_aᵀ: their roots are M's singular values
    roots = np.linalg.svd(other @ one.T, compute_uv=False).sum()
    return float(max(0.0, mean + (one**2).sum() + (other**2).sum() - 2 * roots))


def _root(vectors: Vectors) -> NDArray[np.float64]:
    """R with RᵀR the covariance; as few rows as there are images, where those are fewer than features."""
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    return np.asarray(np.linalg.qr(centred / np.sqrt(len(vectors) - 1), mode="r"))


def kernel(a: Vectors, b: Vectors) -> float:
    """The unbiased squared maximum mean discrepancy with the kernel (x·y / d + 1)³."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)

    def k(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)

    aa, bb, n, m = k(a64, a64), k(b64, b64), len(a), len(b)
    same = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(same - 2 * k(a64, b64).mean())


RINGS, SECTORS = 16, 3


def spectral(real: torch.Tensor, made: torch.Tensor) -> float:
    """Mean absolute difference of the mean spectra of two sets of images (N, 1, S, S)."""
    return float((spectra(real).mean(0) - spectra(made).mean(0)).abs().mean())


def spectra(images: torch.Tensor) -> torch.Tensor:
    """(N, 1, S, S) → (N, bins): the logarithm of each image's power by frequency, and by its direction."""
    side = images.shape[-1]
    window = torch.hann_window(side, device=images.device)
    centred = images[:, 0].float() - images.float().mean((1, 2, 3))[:, None, None]
    power = torch.view_as_real(torch.fft.rfft2(centred * window[:, None] * window)).square().sum(-1).flatten(1)
    place, count = _bins(side)
    total = power.new_zeros(len(power), len(count)).index_add(1, place.to(images.device), power)
    return (total / count.to(images.device) + 1e-8).log()


@functools.cache
def _bins(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which ring and direction each frequency belongs to, and how many belong to each."""
    down, across = torch.fft.fftfreq(side)[:, None].abs(), torch.fft.rfftfreq(side)[None]
    ring = (torch.hypot(down, across) * 2 * RINGS).long().clamp(max=RINGS - 1)
    sector = (torch.atan2(down, across.expand_as(ring)) * SECTORS / (torch.pi / 2 + 1e-6)).long()
    place = (ring * SECTORS + sector).flatten()
    return place, torch.bincount(place, minlength=RINGS * SECTORS).clamp(min=1)


DISTANCES: dict[str, Callable[[Vectors, Vectors], float]] = {"frechet": frechet, "kernel": kernel}


def halves(patients: NDArray[np.str_], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two halves of equal size that share no patient."""
    names = np.random.default_rng(seed).permutation(np.unique(patients))
    first = np.isin(patients, names[: len(names) // 2])
    one, other = np.flatnonzero(first), np.flatnonzero(~first)
    count = min(len(one), len(other))
    rng = np.random.default_rng((seed, 1))
    return rng.permutation(one)[:count], rng.permutation(other)[:count]


def compare(
    real: Squares, patients: NDArray[np.str_], made: Squares, embeddings: Mapping[str, Embedding], seeds: int = 5
) -> dict[str, Any]:
    """Each distance in each embedding: generated to real, real to real, and their ratio, over several partitions."""
    found: dict[str, Any] = {}
    for name, embedding in embeddings.items():
        ours, theirs = embedding(real), embedding(made)
        for title, distance in DISTANCES.items():
            values, floors = [], []
            for seed in range(seeds):
                one, other = (half[: len(theirs)] for half in halves(patients, seed))
                chosen = np.random.default_rng((seed, 2)).permutation(len(theirs))[: len(one)]
                values.append(distance(theirs[chosen], ours[one]))
                floors.append(distance(ours[other], ours[one]))
            found[f"{title} ({name})"] = {
                "images": len(one),
                "generated": float(np.mean(values)),
                "generated_sd": float(np.std(values)),
                "floor": float(np.mean(floors)),
                "floor_sd": float(np.std(floors)),
                "ratio": float(np.mean(values) / np.mean(floors)) if np.mean(floors) > 0 else None,
            }
    return found


# The judge


@dataclass(frozen=True)
class Judging:
    steps: int = 150
    batch: int = 32
    rate: float = 3e-4
    seed: int = 0


def through_jpeg(images: Squares) -> Squares:
    """What every image goes through before a judge sees it."""
    made = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=QUALITY)
        made.append(np.asarray(Image.open(file)))
    return np.stack(made)


def blurred(images: Squares) -> Squares:
    return np.stack([np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(BLUR))) for i in images])


class Judge(nn.Module):
    """Real or not: the reader's encoder, from ImageNet where its weights are at hand, with one output."""

    def __init__(self, init: Path | None) -> None:
        super().__init__()
        self.encoder = Encoder()
        if init is not None:
            self.encoder.start_from(init)
        self.head = nn.Linear(DEEP + 32, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.encoder(images)
        # texture speaks at stride 8, shape at stride 32
        found = torch.cat([features[1].float().mean((2, 3)), features[-1].float().mean((2, 3))], 1)
        return self.head(found)[:, 0]  # type: ignore[no-any-return]


def told_apart(
    real: Squares, patients: NDArray[np.str_], other: Squares, init: Path | None, settings: Judging
) -> Interval:
    """The AUC of a judge on images that it was not trained on; half of the patients teach it, half test it."""
    real, other = through_jpeg(real), through_jpeg(other)
    teach, test = halves(patients, settings.seed)
    order = np.random.default_rng((settings.seed, 3)).permutation(len(other))
    learn, ask = order[: len(order) // 2], order[len(order) // 2 :]
    judge = _train(real[teach], other[learn], init, settings)
    scores = np.concatenate([_scores(judge, other[ask]), _scores(judge, real[test])])
    truth = np.r_[np.ones(len(ask), np.int64), np.zeros(len(test), np.int64)]
    groups = np.concatenate([np.array([f"made {i}" for i in ask]), patients[test]])
    return figures.auc_interval(scores, truth, groups)


def paired(
    real: Squares,
    patients: NDArray[np.str_],
    change: Callable[[Squares], Squares],
    init: Path | None,
    settings: Judging,
) -> Interval:
    """The same judge on real images and their own changed selves, no patient both taught and tested."""
    teach, test = halves(patients, settings.seed)
    plain, other = through_jpeg(real), through_jpeg(change(real))
    judge = _train(plain[teach], other[teach], init, settings)
    scores = np.concatenate([_scores(judge, other[test]), _scores(judge, plain[test])])
    truth = np.r_[np.ones(len(test), np.int64), np.zeros(len(test), np.int64)]
    return figures.auc_interval(scores, truth, np.concatenate([patients[test], patients[test]]))


def _train(real: Squares, other: Squares, init: Path | None, s: Judging) -> Judge:
    torch.manual_seed(s.seed)
    judge = Judge(init)
    optimiser = torch.optim.AdamW(judge.parameters(), s.rate, weight_decay=1e-2)
    rng = np.random.default_rng((s.seed, 4))
    half = s.batch // 2
    for step in range(s.steps):
        for group in optimiser.param_groups:
            group["lr"] = s.rate * min(1, (step + 1) / 20) * (1 - step / s.steps)
        picked = np.concatenate([real[rng.integers(0, len(real), half)], other[rng.integers(0, len(other), half)]])
        batch = _batch(picked)
        batch = torch.where(torch.from_numpy(rng.random(len(batch)) < 0.5)[:, None, None, None], batch.flip(-1), batch)
        truth = torch.cat([torch.zeros(half), torch.ones(half)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.binary_cross_entropy_with_logits(judge(batch), truth)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return judge.eval()


@torch.inference_mode()
def _scores(judge: Judge, images: Squares) -> NDArray[np.float64]:
    return np.concatenate([judge(_batch(images[i : i + 64])).numpy() for i in range(0, len(images), 64)]).astype(float)


def _batch(images: Squares) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images))[:, None].float() / 255
