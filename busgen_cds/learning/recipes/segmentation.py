"""What healthy → lesion images are worth to a segmenter: a U-Net on BUSI, with and without them.

Rules:
- Both arms take the same steps with the same batch; the second draws a share of its images from the generated ones.
- F1 is that of the pixels of each lesion image of the test split, averaged; its interval is over patients.
- The generator may have seen the training split of BUSI and nothing of its test: a manifest with a patient in two
  splits is refused, and so are images that another generator made.
- Image and outline are mirrored by one coin, and never upside down.

Network: BasicUNet of MONAI.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets.basic_unet import BasicUNet
from numpy.typing import NDArray
from torch import nn

from busgen_cds.learning import checkpoint, data, figures
from busgen_cds.learning.recipes import synthesise

NAME, SETTINGS = "generator-segmentation", "settings.json"


@dataclass(frozen=True)
class Settings:
    source: str = "busi"
    steps: int = 600
    batch: int = 12
    size: int = 128
    rate: float = 1e-3
    share: float = 0.5  # of a batch that is generated, in the arm that has generated images
    seeds: int = 3
    features: tuple[int, ...] = (16, 32, 64, 96, 128, 16)


def measure(
    root: Path,
    generated: Path,
    out: Path,
    settings: Settings,
    cache: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Both arms, seed by seed; what was done before is read, not repeated."""
    rows = [row for row in data.read_manifest(root) if row.source == settings.source]
    asked = {k: v for k, v in vars(settings).items() if k != "seeds"} | {
        "images": synthesise.digest(generated),
        "data": data.digest(rows),
    }
    checkpoint.same_work(out / SETTINGS, asked, "results")
    train, test = (data.load(root, [r for r in rows if r.split == s], cache, settings.size) for s in ("train", "test"))
    made_rows = [row for row in data.read_manifest(generated) if row.source == synthesise.SOURCE]
    made = data.load(generated, made_rows, None, settings.size)
    test = test.pick(test.lesion == 1)
    found: dict[str, list[list[float]]] = {"real": [], "real+generated": []}
    for seed in range(settings.seeds):
        for name in found:
            kept = out / f"{name}-{seed}.json"
            if not kept.exists():
                tell(f"{name}, seed {seed}")
                network = train_one(train, made if name != "real" else None, settings, seed)
                out.mkdir(parents=True, exist_ok=True)
                checkpoint.write_text(kept, json.dumps(f1(network, test).tolist()))
            found[name].append(json.loads(kept.read_text(encoding="utf-8")))
    return summary(found, test.patients, settings)


def train_one(real: data.Images, made: data.Images | None, s: Settings, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = BasicUNet(spatial_dims=2, in_channels=1, out_channels=1, features=s.features, norm="batch")
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), s.rate, weight_decay=1e-4)
    from_made = round(s.share * s.batch) if made is not None else 0
    for step in range(s.steps):
        for group in optimiser.param_groups:
            group["lr"] = s.rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / s.steps))
        rng = np.random.default_rng((seed, step))
        image, mask = _draw(real, s.batch - from_made, rng)
        if made is not None and from_made:
            more, outline = _draw(made, from_made, rng)
            image, mask = torch.cat([image, more]), torch.cat([mask, outline])
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(image.to(memory_format=torch.channels_last))
        loss = _loss(logits.float(), mask)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return network.eval()


def _draw(images: data.Images, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    index = rng.integers(0, len(images), count)
    image = torch.from_numpy(images.image[index])[:, None].float() / 255
    mask = torch.from_numpy(images.mask[index])[:, None].float() / 255
    coin = torch.from_numpy(rng.random(count) < 0.5)[:, None, None, None]
    image, mask = torch.where(coin, image.flip(-1), image), torch.where(coin, mask.flip(-1), mask)
    gain = torch.from_numpy(rng.uniform(0.8, 1.2, count)).float()[:, None, None, None]
    return (image * gain).clamp(0, 1), (mask > 0.5).float()


def _loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    shown = logits.sigmoid()
    overlap = 2 * (shown * mask).sum((1, 2, 3)) + 1
    dice = 1 - overlap / (shown.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + dice.mean()


@torch.inference_mode()
def f1(network: nn.Module, images: data.Images) -> NDArray[np.float64]:
    """F1 of the pixels of each image, which is Dice."""
    found = []
    for i in range(0, len(images), 32):
        logits = network(torch.from_numpy(images.image[i : i + 32])[:, None].float() / 255)
        found.append(figures.dice((logits[:, 0] > 0).numpy(), images.mask[i : i + 32] > 127))
    return np.concatenate(found)


def summary(found: dict[str, list[list[float]]], patients: NDArray[np.str_], settings: Settings) -> dict[str, Any]:
    """Mean F1 of each arm and their paired difference, over seeds and patients."""
    arms = {name: np.mean(runs, axis=0) for name, runs in found.items()}
    gain = figures.mean_interval(arms["real+generated"] - arms["real"], patients)
    return {
        "settings": dataclasses.asdict(settings),
        "images": len(patients),
        "f1": {name: figures.mean_interval(values, patients)._asdict() for name, values in arms.items()},
        "each seed": {name: [float(np.mean(run)) for run in runs] for name, runs in found.items()},
        "gain": gain._asdict(),
    }


def write(found: dict[str, Any], out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{NAME}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# What healthy → lesion images are worth to a segmenter",
        "",
        f"U-Net on {found['settings']['source'].upper()}, {found['images']} lesion images of its test split,"
        f" {found['settings']['seeds']} seeds, {found['settings']['steps']} steps for each arm.",
        "",
        "| arm | F1 (95 % interval) | each seed |",
        "|---|---|---|",
    ]
    for name, value in found["f1"].items():
        seeds = ", ".join(f"{x:.3f}" for x in found["each seed"][name])
        lines.append(f"| {name} | {figures.Interval(**value)} | {seeds} |")
    lines += ["", f"Gain: {figures.Interval(**found['gain']).signed} (bar: at least +0.026, interval above 0).", ""]
    (out / f"{NAME}.md").write_text("\n".join(lines), encoding="utf-8")
    return out / f"{NAME}.md"
