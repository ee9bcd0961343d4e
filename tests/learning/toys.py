"""Made-up images and manifests: a dark disc is benign, a dark star is malignant, nothing is normal."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from busgen_cds.learning import augment
from busgen_cds.learning.reader import Shape
from busgen_cds.learning.recipes.train_reader import Settings

SIZE = 64
COLUMNS = (
    "image", "mask", "source", "patient", "pathology", "birads", "histology", "device", "view", "doppler", "marks",
    "split", "note",
)  # fmt: skip


def settings(**changes: object) -> Settings:
    """A run of seconds."""
    small: dict[str, object] = {
        "sources": ("toy",), "steps": 4, "batch": 4, "size": SIZE, "warm_size": SIZE, "warm_part": 0.0,
        "report_every": 2, "save_every": 2, "warm_up": 1, "half": False, "threads": 1, "shape": Shape(width=16),
    }  # fmt: skip
    return Settings(**{**small, **changes})  # type: ignore[arg-type]


def picture(kind: str, seed: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """A speckled square and the outline of what it shows."""
    rng = np.random.default_rng(seed)
    image = 110 + 25 * rng.standard_normal((size, size))
    y, x = np.mgrid[:size, :size] - rng.integers(size // 2 - 8, size // 2 + 8, 2)[:, None, None]
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    reach = {"normal": 0.0, "benign": 12.0, "malignant": 12.0}[kind] + (
        4 * np.cos(6 * angle) if kind == "malignant" else 0
    )
    mask = radius < reach if kind != "normal" else np.zeros((size, size), bool)
    image[mask] -= 70
    return np.clip(image, 0, 255).astype(np.uint8), mask


def records(count: int = 12) -> list[dict[str, str]]:
    """Rows of a manifest: two thirds train, the rest val; every class in both."""
    rows = []
    for i in range(count):
        kind = ("normal", "benign", "malignant")[i % 3]
        row = dict.fromkeys(COLUMNS, "")
        row |= {
            "image": f"{i}.png",
            "source": "toy",
            "patient": f"p{i}",
            "pathology": kind,
            "device": f"scanner {i % 2}",
        }
        row |= {
            "split": "train" if i < 2 * count // 3 else "val",
            "birads": {"benign": "3", "malignant": "5"}.get(kind, ""),
        }
        row["mask"] = "" if kind == "normal" else f"{i}-mask.png"
        rows.append(row)
    return rows


def write(root: Path, rows: list[dict[str, str]]) -> Path:
    """The folder that a recipe reads."""
    root.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        kind = row["pathology"] if row["pathology"] in ("normal", "benign", "malignant") else "benign"
        image, mask = picture(kind, i)
        Image.fromarray(image).save(root / row["image"])
        if row["mask"]:
            Image.fromarray(mask).save(root / row["mask"])
    with (root / "manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return root


GENTLE = augment.Strength(angle=0, zoom=0, aspect=0, shift=0, focus=0, erase=0, marks=0, heal=0)
