"""From a network's raw answers on `val` to probabilities, thresholds and a gate.

Rules:
- Everything here is fitted on `val` of the arm, and on nothing else.
- The gate learns from in-domain embeddings alone; how far it must reach is set by in-domain frames (2 % declined).
- A study's pooling is fitted on simulated studies of `val` patients, so that more frames do not mean more suspicion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import save

from busgen_cds.birads import Pooling
from busgen_cds.bundle import Calibration, Thresholds
from busgen_cds.learning import augment, data, figures

SENSITIVITY = 0.98  # what a "3" may not cost, on `val`
DECLINED = 0.01  # of in-domain frames: half of what is allowed, since `val` is small
TEXTURE = 96  # the first part of the embedding: means of the stride-16 features
FRAMES = (1, 2, 5, 20, 60, 300)
Run = Callable[[NDArray[np.float32]], Mapping[str, NDArray[np.float32]]]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Readings:
    """The network's raw answers to some images; one entry per image."""

    mask: NDArray[Any]  # (N, h, w) probabilities
    presence: Floats
    malignancy: Floats
    heat: NDArray[np.float32]  # (N, h, w)
    embedding: NDArray[np.float32]  # (N, D)
    spread: Floats


def read(
    run: Run, images: NDArray[np.uint8], batch: int = 16, tell: Callable[[int], None] = lambda n: None
) -> Readings:
    """Run the network over prepared 8-bit images (N, S, S)."""
    parts = []
    for i in range(0, len(images), batch):
        parts.append(run(np.asarray(images[i : i + batch, None] / 255, np.float32)))
        tell(min(i + batch, len(images)))
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return Readings(
        np.asarray(joined["mask"][:, 0], np.float16),
        joined["presence"].astype(np.float64),
        joined["malignancy"].astype(np.float64),
        joined["heat"],
        joined["embedding"],
        joined["spread"].astype(np.float64),
    )


def cached(run: Run, images: NDArray[np.uint8], folder: Path, network: str) -> Readings:
    """The same, kept on disk under a name that changes with the network's digest and with the images."""
    seen = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    path = folder / f"readings-{network[:16]}-{seen[:16]}.npz"
    if not path.exists():
        found = read(run, images)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **found.__dict__)
        partial.replace(path)
    with np.load(path) as arrays:
        return Readings(**{name: arrays[name] for name in arrays.files})


def fit(readings: Readings, images: data.Images) -> Calibration:
    """Platt's line on the malignancy logit, each image of `val` once."""
    scale, offset = figures.platt(readings.malignancy, images.malignant)
    return Calibration(
        scale, offset, prevalence=float(images.malignant.mean()), uncertainty=_noise(readings, images, scale)
    )


def _noise(readings: Readings, images: data.Images, scale: float) -> float:
    """How far the calibrated logits of one patient's images lie apart: what another view would have said."""
    logits, patients = readings.malignancy * scale, images.patients
    gaps = [logits[patients == name] for name in np.unique(patients)]
    squares = [float(g.var(ddof=1)) for g in gaps if len(g) > 1]
    return float(np.sqrt(np.mean(squares))) if squares else 0.5


def presence_threshold(readings: Readings, images: data.Images) -> float:
    """Where sensitivity plus specificity for a lesion is best, but never below 98 % sensitivity: a lesion that is not
    seen cannot be judged, and on an unknown scanner this threshold is the first to fail."""
    score, truth = 1 / (1 + np.exp(-readings.presence)), images.lesion
    keeps = figures.threshold_at_sensitivity(score, truth, SENSITIVITY)
    if not (truth == 0).any():
        return min(0.5, keeps)
    candidates = np.unique(np.r_[score[score <= keeps], keeps])
    gains = [figures.sensitivity(score, truth, t) + figures.specificity(score, truth, t) for t in candidates]
    best = candidates[np.isclose(gains, max(gains))]
    return float(np.median(best))


def mask_threshold(readings: Readings, images: data.Images) -> float:
    """The cut of the mask with the best mean Dice over lesions whose outline is drawn."""
    drawn = (images.lesion == 1) & (images.masked == 1)
    truth = half(images.mask[drawn])
    cuts = np.arange(0.25, 0.76, 0.05)
    means = [float(figures.dice(readings.mask[drawn] > cut, truth).mean()) for cut in cuts]
    return float(round(cuts[int(np.argmax(means))], 2))


def half(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(N, S, S) 8-bit outline → (N, S/2, S/2)."""
    n, s, _ = mask.shape
    return np.asarray(mask.reshape(n, s // 2, 2, s // 2, 2).mean((2, 4), dtype=np.float32) > 127)


def thresholds(readings: Readings, images: data.Images, calibration: Calibration, domain: float) -> Thresholds:
    rule_out = figures.threshold_at_sensitivity(readings.malignancy, images.malignant, SENSITIVITY)
    return Thresholds(
        rule_out=calibration.probability(rule_out) - 1e-6,
        presence=presence_threshold(readings, images),
        mask=mask_threshold(readings, images),
        domain=domain,
        uncertainty=0.49,
    )


@dataclass(frozen=True)
class Gate:
    """Mahalanobis distance of an embedding from those seen in training (Lee et al. 2018).

    Only the embedding's stride-16 part is weighed: the deepest features answer "how suspicious?" and have learnt not
    to see what makes a picture strange; on made-up outliers of `val` they hardly tell noise from a breast.
    """

    mean: NDArray[np.float32]  # (D,)
    whiten: NDArray[np.float32]  # (D, K)

    @classmethod
    def fit(cls, embeddings: NDArray[np.float32], kept: int = 32, shrink: float = 0.2) -> Gate:
        """Principal directions, each divided by its spread; weak directions are held away from zero."""
        mean = embeddings.mean(0)
        weighed = (embeddings - mean)[:, :TEXTURE]
        _, values, directions = np.linalg.svd(weighed, full_matrices=False)
        spread = values[:kept] ** 2 / max(1, len(embeddings) - 1)
        whiten = np.zeros((len(mean), len(spread)), np.float32)
        whiten[:TEXTURE] = directions[:kept].T / np.sqrt(spread + shrink * spread.mean())
        return cls(mean.astype(np.float32), whiten)

    def distance(self, embeddings: NDArray[np.float32]) -> Floats:
        return np.asarray(np.linalg.norm((embeddings - self.mean) @ self.whiten, axis=1), np.float64)

    def to_bytes(self) -> bytes:
        return bytes(save({"mean": np.ascontiguousarray(self.mean), "whiten": np.ascontiguousarray(self.whiten)}))


def views(images: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Each image as other scanners might have shown it: other gains and grain, then a coarser matrix as well."""
    generator = torch.Generator().manual_seed(seed)
    strength = augment.Strength(blur=0.7)
    found = []
    for i in range(0, len(images), 32):
        image = torch.from_numpy(images[i : i + 32, None]).float() / 255
        size = image.shape[-1]
        half_ = F.interpolate(image, size=(size // 2, size // 2), mode="bilinear", antialias=True)
        coarse = F.interpolate(half_, size=(size, size), mode="bilinear")
        which = torch.rand(len(image), generator=generator) < 0.33
        image = torch.where(which[:, None, None, None], coarse, image)
        found.append((augment.weather(image, generator, strength)[:, 0] * 255).round().byte().numpy())
    return np.concatenate(found)


def reach(plain: Floats, seen_elsewhere: Floats, declined: float = DECLINED) -> float:
    """The distance beyond which a share of `val` would be declined, as it is or as another scanner shows it."""
    return float(max(np.quantile(plain, 1 - declined) * 1.05, np.quantile(seen_elsewhere, 1 - declined)))


@dataclass(frozen=True)
class Simulated:
    """Frames of simulated studies: which patient each shows, and what was read."""

    scores: list[Floats]  # per patient: calibrated log-odds of the frames of one sweep
    malignant: list[bool]


def sweep(images: data.Images, index: NDArray[np.int64], frames: int, seed: int) -> NDArray[np.uint8]:
    """Frames that a small movement of the probe might have given of one patient's images."""
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(index, frames)
    gentle = augment.Strength(angle=4, zoom=0.08, aspect=0.03, shift=0.04, focus=0, gamma=0.06, gain=0.08, blur=0.2)
    image = torch.from_numpy(images.image[chosen])[:, None].float() / 255
    mask = torch.from_numpy(images.mask[chosen])[:, None].float() / 255
    moved, _ = augment.move(image, mask, generator, gentle, images.image.shape[-1])
    moved = augment.weather(moved, generator, gentle)
    moved[0] = image[0]  # one frame as it was acquired
    return np.asarray((moved[:, 0] * 255).round().numpy(), np.uint8)


def simulate(
    run: Run, images: data.Images, calibration: Calibration, patients: int = 40, frames: int = 60, seed: int = 0
) -> Simulated:
    """One sweep per patient, mirror images left out (the probe does not turn round)."""
    names = np.unique(images.patients)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(names)[:patients]
    scores, malignant = [], []
    for k, name in enumerate(chosen):
        index = np.flatnonzero(images.patients == name)
        found = read(run, sweep(images, index, frames, seed * 1000 + k))
        scores.append(calibration.scale * found.malignancy + calibration.offset)
        malignant.append(bool(images.malignant[index].max()))
    return Simulated(scores, malignant)


def studies(simulated: Simulated, frames: int, repeats: int = 20, seed: int = 1) -> list[tuple[Floats, bool]]:
    """Studies of n frames, drawn from each patient's sweep."""
    rng = np.random.default_rng(seed)
    made = []
    for scores, malignant in zip(simulated.scores, simulated.malignant, strict=True):
        for _ in range(repeats):
            made.append((rng.choice(scores, frames, replace=frames > len(scores)), malignant))
    return made


def highest(simulated: Simulated, frames: int) -> tuple[Floats, NDArray[np.int64]]:
    """Each study's highest score before any correction, and its truth."""
    made = studies(simulated, frames)
    return np.array([s.max() for s, _ in made]), np.array([int(m) for _, m in made])


def pooling(simulated: Simulated, threshold: float) -> Pooling:
    """The shift per number of frames that keeps the specificity of one frame at a threshold of log-odds.

    Where no study without a malignant lesion is at hand nothing is known of it, and nothing is taken off.
    """
    singles, truth = highest(simulated, 1)
    if truth.all():
        return Pooling(frames=FRAMES, shift=(0.0,) * len(FRAMES))
    wanted = figures.specificity(singles, truth, threshold)
    shifts = [0.0]
    for count in FRAMES[1:]:
        scores, truth = highest(simulated, count)
        others = np.sort(scores[truth == 0])
        at = np.quantile(others, wanted)
        shifts.append(max(shifts[-1], float(at) - threshold))
    return Pooling(frames=FRAMES, shift=tuple(round(s, 4) for s in shifts))
