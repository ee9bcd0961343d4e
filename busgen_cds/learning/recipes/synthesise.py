"""Make any number of images with masks and labels, shard by shard; what is too near to a training image is dropped.

Rules:
- A shard is a folder, complete or absent; a run that was stopped goes on with the shards that are missing, and every
  image is what it would have been.
- Pathology follows the mix that was asked for, and device is drawn evenly whatever the pathology: what a scanner is
  must not tell what a lesion is.
- The manifest is one that `train` reads; its source is "synthetic" and nobody is its patient.

Under `torchrun` every process makes its share of the shards.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from busgen_cds.errors import Misconfigured
from busgen_cds.learning import data, embed, processes, release
from busgen_cds.learning.generator import Generator, Sample, Sampling, Wish

MANIFEST = "manifest.csv"
SUMMARY = "generated.json"
SOURCE = data.GENERATED
STRIDE = 1 << 20  # candidates that one shard may draw from
MOST_TRIES = 10  # images made for one released: beyond that the generator copies
COLUMNS = (
    *("image", "mask", "source", "patient", "pathology", "birads", "histology"),
    *("device", "view", "doppler", "marks", "split", "note"),
)


@dataclass(frozen=True)
class Settings:
    count: int = 1000
    seed: int = 0
    mix: Mapping[str, float] = field(default_factory=lambda: {"benign": 0.5, "malignant": 0.5})
    devices: tuple[str, ...] = ()  # empty: those that the generator knows
    birads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by pathology; empty: not said
    labels: Mapping[str, str] = field(default_factory=dict)  # of a task's own conditions, for every image
    shard: int = 256
    batch: int = 32
    filtered: bool = True
    in_healthy: bool = False  # lesions grow in healthy images, which are generated first
    sampling: Sampling = field(default_factory=Sampling)


class Counts(NamedTuple):
    made: int
    released: int

    @property
    def dropped(self) -> int:
        return self.made - self.released


def generate(
    makes: Generator,
    out: Path,
    settings: Settings,
    gate: release.Filter | None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Counts:
    """Make what is missing, then join the shards' lists to one manifest."""
    if settings.filtered and gate is None:
        raise Misconfigured(
            "No release filter beside this generator: build one with `busgen-cds privacy --filter-only`,"
            " or give --unfiltered for a measurement."
        )
    out.mkdir(parents=True, exist_ok=True)
    _same_question(out / "question.json", settings, makes)
    sizes = [min(settings.shard, settings.count - i) for i in range(0, settings.count, settings.shard)]
    with processes.team() as team:
        for number in range(team.rank, len(sizes), team.world):
            folder = out / f"shard-{number:05d}"
            if not folder.exists():
                _make_shard(makes, folder, number, sizes[number], settings, gate)
            tell(sum(sizes[: number + 1]), settings.count)
    return join(out, len(sizes)) if team.leads else Counts(0, 0)


def _same_question(path: Path, settings: Settings, makes: Generator) -> None:
    """A folder holds the answer to one question; more of the same may be added."""
    asked = json.dumps({k: v for k, v in _plain(settings).items() if k != "count"}, sort_keys=True, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != asked:
        raise Misconfigured(f"{path.parent} holds images asked for otherwise (see {path.name}): choose another folder.")
    path.write_text(asked, encoding="utf-8")


def _plain(settings: Settings) -> dict[str, Any]:
    described = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    described["sampling"] = vars(settings.sampling)
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in described.items()}


def wish(makes: Generator, settings: Settings, index: int) -> Wish:
    """What image `index` shall be."""
    rng = np.random.default_rng((settings.seed, index, 2))
    names = sorted(settings.mix)
    odds = np.array([settings.mix[name] for name in names], float)
    pathology: Any = names[int(rng.choice(len(names), p=odds / odds.sum()))]
    devices = settings.devices or makes.card.vocabulary.names.get("device", ())
    device = devices[int(rng.integers(len(devices)))] if devices else None
    grades = settings.birads.get(pathology, ())
    birads = grades[int(rng.integers(len(grades)))] if grades else None
    return makes.wish(index, settings.seed, pathology, birads, device, labels=settings.labels)


def _make_shard(
    makes: Generator, folder: Path, number: int, size: int, settings: Settings, gate: release.Filter | None
) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    (partial / "masks").mkdir()
    judge = embed.latent(makes.coder)
    rows: list[dict[str, str]] = []
    made, index = 0, number * STRIDE
    while len(rows) < size:
        count = min(settings.batch, size - len(rows))
        samples = _asked(makes, settings, range(index, index + count))
        index, made = index + count, made + count
        kept = samples
        if gate is not None and settings.filtered:
            passed = gate.passes(judge(embed.squares([s.image for s in samples], makes.card.size)))
            kept = [one for one, yes in zip(samples, passed, strict=True) if yes]
        rows += [_write(partial, one, folder.name, settings) for one in kept]
        if made >= MOST_TRIES * size and len(rows) < size:
            raise Misconfigured(
                f"The release filter refused {made - len(rows)} of {made} images: this generator copies."
            )
    _write_rows(partial / "labels.csv", rows)
    (partial / "counts.json").write_text(json.dumps({"made": made, "released": len(rows)}), encoding="utf-8")
    partial.rename(folder)


def _asked(makes: Generator, settings: Settings, indices: range) -> list[Sample]:
    wishes = [wish(makes, settings, i) for i in indices]
    if not settings.in_healthy:
        return makes.grant(wishes, settings.seed, settings.sampling)
    breasts = [
        makes.wish(i, settings.seed + 1, "normal", device=w.device) for i, w in zip(indices, wishes, strict=True)
    ]
    healthy = makes.grant(breasts, settings.seed + 1, settings.sampling)
    grown = [
        makes.wish(w.index, settings.seed, w.pathology, w.birads, w.device, healthy=h.image, labels=settings.labels)
        for w, h in zip(wishes, healthy, strict=True)
    ]
    return makes.grant(grown, settings.seed, settings.sampling)


def _write(folder: Path, one: Sample, shard: str, settings: Settings) -> dict[str, str]:
    name = f"{one.index:012d}.png"
    Image.fromarray(one.image).save(folder / "images" / name)
    if one.mask.any():
        Image.fromarray(one.mask).save(folder / "masks" / name)
    row = dict.fromkeys(COLUMNS, "")
    row.update(
        image=f"{shard}/images/{name}",
        mask=f"{shard}/masks/{name}" if one.mask.any() else "",
        source=SOURCE,
        patient=f"{SOURCE}-{settings.seed}-{one.index}",
        pathology=one.pathology,
        birads=one.birads or "",
        device=one.device or "",
        split="train",
        note="no patient is shown",
    )
    row.update({name: value for name, value in settings.labels.items() if name in COLUMNS})
    return row


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)


def join(out: Path, shards: int) -> Counts:
    """One manifest over all shards, and what was dropped on the way."""
    rows: list[dict[str, str]] = []
    made = 0
    for number in range(shards):
        folder = out / f"shard-{number:05d}"
        with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
        made += int(json.loads((folder / "counts.json").read_text(encoding="utf-8"))["made"])
    _write_rows(out / MANIFEST, rows)
    counts = Counts(made, len(rows))
    summary = {**counts._asdict(), "dropped": counts.dropped}
    (out / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return counts


def read_images(folder: Path, size: int, most: int | None = None) -> tuple[embed.Squares, list[dict[str, str]]]:
    """Generated images as the squares that an embedding takes, with their rows."""
    with (folder / MANIFEST).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:most]
    images = []
    for row in rows:
        with Image.open(folder / row["image"]) as image:
            images.append(np.asarray(image.convert("L")))
    return embed.squares(images, size), rows
