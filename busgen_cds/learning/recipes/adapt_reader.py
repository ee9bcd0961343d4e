"""Adapt a reader that is there already to a site's few cases: its last weights alone, or all of them for a few steps.

Rules:
- It begins from one member of the reader in use, and gives one member back: its shape never changes.
- `head`: the malignancy logit is a linear function of features pooled under the attention, so that its weights can be
  fitted exactly, held to what they were. How tightly is chosen among the site's own patients, each left out in turn;
  where nothing helps, nothing changes.
- `fine-tune`: every weight, a few steps at a low rate. With generated images in every batch (the release's, and the
  site generator's) the reader does not forget; without them it is plain fine-tuning.
- What comes out is a mean of the weights before and after (`kept`: the share of those before).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor, nn

from busgen_cds.learning import augment, checkpoint, data
from busgen_cds.learning.reader import MALIGNANCY, Evidence, Reader, Shape, attend, up
from busgen_cds.learning.recipes import train_reader

Method = Literal["head", "fine-tune"]
PULLS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # towards the weights as they were
Floats = NDArray[np.float64]
Member = tuple[dict[str, Tensor], dict[str, Any]]  # averaged weights, and the notes of the run


@dataclass(frozen=True)
class Settings:
    method: Method = "fine-tune"
    steps: int = 48
    batch: int = 16
    size: int = 160  # pixels; the reader has seen both this size and its own in training
    rate: float = 1e-4
    encoder_rate: float = 5e-5
    average: float = 0.95
    generated: float = 0.5  # of every batch, where there are generated images
    kept: float = 0.0  # share of the weights before
    still: int = 0  # blocks of the encoder that learn nothing
    anchor: float = 0.0  # of the way back to the weights before, after every step
    strength: float = 1.0  # of the augmentation
    seed: int = 0
    threads: int = 1


def open_member(path: Path) -> Member:
    tensors, notes = checkpoint.read(path)
    return checkpoint.part(tensors, "average."), notes


def reader_of(member: Member) -> Reader:
    weights, notes = member
    reader = Reader(Shape(**notes["settings"]["shape"] | {"tasks": _tasks(weights)}))
    reader.load_state_dict(weights)
    return reader.eval()


def _tasks(weights: dict[str, Tensor]) -> dict[str, int]:
    """The further heads, as the weights show them."""
    biases = {name: value for name, value in weights.items() if name.startswith("heads.") and name.endswith(".bias")}
    return {name.split(".")[1]: len(value) for name, value in biases.items() if name.split(".")[1] != MALIGNANCY}


def write_member(path: Path, weights: dict[str, Tensor], notes: dict[str, Any]) -> Path:
    checkpoint.write(path, {f"average.{name}": value for name, value in weights.items()}, notes)
    return path


def adapt(
    start: Path,
    root: Path,
    sources: Sequence[str],
    out: Path,
    settings: Settings,
    generated: Path | None = None,
    cache: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """A member from `start` and the images of `root` that are for training; returns its checkpoint."""
    if settings.method == "head":
        rows = [row for row in data.read_manifest(root) if row.source in sources and row.split == "train"]
        member, told = fit_head(open_member(start), data.load(root, rows, cache))
    else:
        member, told = fine_tuned(start, root, sources, out, settings, generated, cache, tell), {}
    before, notes = open_member(start)
    weights = mixed(before, member, settings.kept)
    adapted = {"method": settings.method, "steps": settings.steps, "kept": settings.kept, "seed": settings.seed}
    notes = notes | {"adapted": adapted | told}
    notes["settings"] = notes["settings"] | {"sources": sorted({*notes["settings"]["sources"], *sources})}
    return write_member(out / train_reader.CHECKPOINT.replace("reader", "member"), weights, notes)


def mixed(before: dict[str, Tensor], after: dict[str, Tensor], kept: float) -> dict[str, Tensor]:
    """Wortsman et al. 2022: weights between the two are often better than either, and forget less."""
    return {name: torch.lerp(after[name].float(), before[name].float(), kept) for name in before}


# All weights


def fine_tuned(
    start: Path,
    root: Path,
    sources: Sequence[str],
    out: Path,
    settings: Settings,
    generated: Path | None,
    cache: Path | None,
    tell: Callable[[str], None],
) -> dict[str, Tensor]:
    shape = Shape(**open_member(start)[1]["settings"]["shape"])
    how = recipe(sources, settings, generated is not None, shape)
    path = train_reader.train(
        root,
        out,
        how,
        None,
        start,
        cache,
        lambda report: tell(f"step {report.step}: loss {report.loss:.3f}"),
        generated,
    )
    return open_member(path)[0]


def recipe(sources: Sequence[str], settings: Settings, generated: bool, shape: Shape) -> train_reader.Settings:
    return train_reader.Settings(
        sources=tuple(sources),
        seed=settings.seed,
        steps=settings.steps,
        batch=settings.batch,
        size=settings.size,
        warm_size=settings.size,
        rate=settings.rate,
        encoder_rate=settings.encoder_rate,
        warm_up=max(1, settings.steps // 6),
        average=settings.average,
        report_every=settings.steps,
        save_every=max(1, settings.steps // 4),
        threads=settings.threads,
        generated=settings.generated if generated else 0.0,
        still=settings.still,
        anchor=settings.anchor,
        shape=shape,
        strength=augment.Strength().scaled(settings.strength),
    )


# The last weights


@torch.inference_mode()
def pooled(reader: Reader, images: NDArray[np.uint8], batch: int = 16) -> tuple[Floats, Floats]:
    """(N, D) features under the attention, of which the malignancy logit is linear; and that logit."""
    parts, logits = [], []
    for i in range(0, len(images), batch):
        taps = reader.encoder(torch.from_numpy(images[i : i + batch, None]).float() / 255)
        p4, p8, p16 = reader._decode(taps)
        attention = attend(reader.mask(p4).float(), reader.shape.floor, reader.shape.quantum)  # (n, 1, h, w)
        features = [reader.tower[0](p8), reader.tower[1](p16), taps[-1]]
        grid = attention.shape[-2:]
        part = torch.cat([(up(f, grid) * attention).sum((2, 3)) for f in features], 1)
        parts.append(part.double().numpy())
        logits.append(_head(reader)(features, attention)[0][:, 0].double().numpy())
    return np.concatenate(parts), np.concatenate(logits)


def _head(reader: Reader) -> Evidence:
    head = reader.heads[MALIGNANCY]
    assert isinstance(head, Evidence)
    return head


def fit_head(member: Member, images: data.Images) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Other weights for malignancy, fitted to these images and held to what they were."""
    reader = reader_of(member)
    features, logit = pooled(reader, images.image)
    change, pull = fitted(features, logit, images.malignant, images.patients)
    weights = dict(member[0])
    first = 0
    for k, conv in enumerate(_head(reader).maps):
        assert isinstance(conv, nn.Conv2d)
        step = torch.from_numpy(change[first : first + conv.in_channels]).float()
        first += conv.in_channels
        name = f"heads.{MALIGNANCY}.maps.{k}.weight"
        weights[name] = weights[name] + step[None, :, None, None]
    weights[f"heads.{MALIGNANCY}.bias"] = weights[f"heads.{MALIGNANCY}.bias"] + float(change[-1])
    return weights, {"pull": pull}


def fitted(
    features: Floats, logit: Floats, truth: NDArray[np.int64], patients: NDArray[np.str_]
) -> tuple[Floats, float | None]:
    """What to add to the weights (and, last, to the bias); and the pull, None where only the bias moves."""
    spread = features.std(0)
    spread = (spread + spread.mean() + 1e-6) * math.sqrt(len(spread))  # a pull means the same at any width
    scaled = features / spread
    costs = {pull: _left_out(scaled, logit, truth, patients, pull) for pull in (*PULLS, math.inf)}
    chosen = min(costs, key=lambda pull: costs[pull])
    change = logistic(scaled, logit, truth, chosen)
    return np.r_[change[:-1] / spread, change[-1]], None if math.isinf(chosen) else chosen


def _left_out(
    features: Floats, logit: Floats, truth: NDArray[np.int64], patients: NDArray[np.str_], pull: float
) -> float:
    """Mean log-loss on each patient when fitted without that patient, classes alike."""
    signs, weight = _classes(truth)
    total = 0.0
    for name in np.unique(patients):
        fold, rest = np.flatnonzero(patients == name), np.flatnonzero(patients != name)
        if len(np.unique(truth[rest])) < 2:
            continue
        change = logistic(features[rest], logit[rest], truth[rest], pull)
        margin = signs[fold] * (logit[fold] + features[fold] @ change[:-1] + change[-1])
        total += float((weight[fold] * np.logaddexp(0, -margin)).sum())
    return total


def _classes(truth: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Signs, and weights that give each class a half."""
    positive = truth > 0
    weight = np.where(positive, 0.5 / max(1, positive.sum()), 0.5 / max(1, (~positive).sum()))
    return np.where(positive, 1.0, -1.0), weight


def logistic(features: Floats, logit: Floats, truth: NDArray[np.int64], pull: float) -> Floats:
    """Logistic regression on what is added to a known logit; the change kept small, the bias hardly held."""
    signs, weight = _classes(truth)
    design = np.ones((len(logit), 1)) if math.isinf(pull) else np.c_[features, np.ones(len(features))]
    held = np.r_[np.full(design.shape[1] - 1, pull), 1e-3]

    def cost(change: Floats) -> tuple[float, Floats]:
        margin = signs * (logit + design @ change)
        slope = -signs * weight / (1 + np.exp(np.clip(margin, -50, 50)))
        total = (weight * np.logaddexp(0, -margin)).sum() + 0.5 * (held * change**2).sum()
        return float(total), design.T @ slope + held * change

    found = optimize.minimize(cost, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return np.r_[np.zeros(features.shape[1]), found.x] if math.isinf(pull) else np.asarray(found.x)


# Reading


@torch.inference_mode()
def scores(reader: Reader, images: NDArray[np.uint8], batch: int = 16) -> Floats:
    """The malignancy logit of each image (N, S, S)."""
    found = []
    for i in range(0, len(images), batch):
        shown = torch.from_numpy(images[i : i + batch, None]).float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            found.append(reader(shown.to(memory_format=torch.channels_last)).malignancy.double().numpy())
    return np.concatenate(found)
