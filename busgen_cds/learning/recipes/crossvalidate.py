"""Patient-wise cross-validation against the radiologists, on all of BUS-BRA: one checkpoint per fold.

Rules: an image is scored by the fold that left its patient out, and every patient must have been left out exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, data, evaluate, export, figures
from busgen_cds.learning.recipes import train_reader


def compare(
    root: Path,
    checkpoints: Sequence[Path],
    cache: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Out-of-fold scores of every BUS-BRA image, against the readers' own BI-RADS."""
    rows = data.read_manifest(root)
    scored: dict[str, float] = {}
    for path in checkpoints:
        fold = _fold(path)
        _, left_out = train_reader.choose(rows, train_reader.Settings(fold=fold))
        images = data.load(root, [row for row in left_out if row.source == "busbra"], cache)
        deployed, _ = export.open_checkpoints([path], mirrored=False)
        for row, score in zip(images.rows, _scores(deployed, images), strict=True):
            if row.image in scored:
                raise Misconfigured(f"{row.image} was left out by two folds: give one checkpoint per fold.")
            scored[row.image] = score
        tell(f"fold {fold[0]} of {fold[1]}: {len(images)} images")
    everything = [row for row in rows if row.source == "busbra" and row.split != "excluded"]
    missing = len(everything) - len(scored)
    if missing:
        raise Misconfigured(f"{missing} images of BUS-BRA were never left out: a fold's checkpoint is missing.")
    images = data.load(root, everything, cache)
    scores = np.array([scored[row.image] for row in everything], np.float64)
    keep = np.ones(len(scores), np.bool_)
    return {
        "auc": figures.auc_interval(scores, images.malignant, images.patients),
        "radiologists": evaluate.radiologists(images, scores, keep),
    }


def _fold(path: Path) -> tuple[int, int]:
    fold = checkpoint.read_run(path)[1]["settings"]["fold"]
    if not fold:
        raise Misconfigured(f"{path} was not trained for a fold: train it with --fold k/n.")
    return int(fold[0]), int(fold[1])


@torch.inference_mode()
def _scores(deployed: export.Deployed, images: data.Images) -> list[float]:
    place = list(deployed.outputs).index("malignancy")
    found: list[float] = []
    for i in range(0, len(images), 16):
        frames = torch.from_numpy(images.image[i : i + 16, None]).float() / 255
        found += deployed(frames)[place].tolist()
    return found
