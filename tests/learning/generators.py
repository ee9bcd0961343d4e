"""Tiny generators and tiny data folders: the real code at a size that takes a second."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from busgen_cds.learning import autoencoder, conditions, networks
from busgen_cds.learning.conditions import Box, Vocabulary
from busgen_cds.learning.generator import Card, Generator

SIZE = 64
VOCABULARY = Vocabulary(
    {"pathology": ("normal", "benign", "malignant"), "birads": ("2", "3", "4", "5"), "device": ("A", "B")}
)
CODER = autoencoder.Shape(channels=(32, 32), latent=8, fine=4)
NETWORKS = {
    "unet": networks.Shape(channels=(32, 32), attention=(False, True)),
    "transformer": networks.Shape(kind="transformer", width=64, depth=2),
}


def some_boxes(count: int = 40, seed: int = 0) -> list[Box]:
    rng = np.random.default_rng(seed)
    size, place = rng.uniform(0.2, 0.5, (count, 2)), rng.uniform(0, 1, (count, 2))
    corner = place * (1 - size)
    return [Box(*map(float, (*c, *(c + s)))) for c, s in zip(corner, size, strict=True)]


def tiny(kind: str = "unet", seed: int = 0, awake: bool = True) -> Generator:
    """An untrained generator; awake: its last layer is not zero, so that conditions matter."""
    torch.manual_seed(seed)
    boxes = conditions.fit_boxes({"benign": some_boxes(), "malignant": some_boxes(seed=1)}, {})
    regions = conditions.fit_regions({"A": [1.3, 1.35, 1.4], "B": [0.7, 0.8, 0.9]})
    card = Card(SIZE, CODER, NETWORKS[kind], VOCABULARY, boxes, regions)
    network = networks.build(card.network, VOCABULARY)
    if awake:
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return Generator(card, autoencoder.Autoencoder(CODER), network)


def data_folder(root: Path, patients: int = 12, seed: int = 0) -> Path:
    """A manifest of painted "breasts": layers and speckle, and a dark disc where a lesion is."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(patients):
        pathology = ("normal", "benign", "malignant")[i % 3]
        image, mask = painted(rng, pathology)
        Image.fromarray(image).save(root / f"images/{i}.png")
        Image.fromarray(mask).save(root / f"images/{i}-mask.png")
        split = "val" if i >= patients * 2 // 3 else "train"
        device, birads = "AB"[i % 2], {"normal": "", "benign": "3", "malignant": "5"}[pathology]
        histology = {"normal": "", "benign": "cyst", "malignant": "mucinous carcinoma"}[pathology]
        rows.append(
            {
                "image": f"images/{i}.png",
                "mask": f"images/{i}-mask.png" if pathology != "normal" else "",
                "source": "painted",
                "patient": f"p{i}",
                "pathology": pathology,
                "birads": birads,
                "histology": histology,
                "device": device,
                "split": split,
            }
        )
    with (root / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return root


def painted(rng: np.random.Generator, pathology: str) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = 96, 80
    y, x = np.mgrid[:rows, :columns]
    image = 90 + 40 * np.sin(y / rng.uniform(6, 12)) + rng.normal(0, 12, (rows, columns))
    mask = np.zeros((rows, columns), np.uint8)
    if pathology != "normal":
        cy, cx, r = rng.uniform(30, 60), rng.uniform(25, 55), rng.uniform(10, 18)
        mask[(y - cy) ** 2 + (x - cx) ** 2 < r**2] = 255
        image[mask > 0] = 30 if pathology == "malignant" else 50
    return image.clip(0, 255).astype(np.uint8), mask
