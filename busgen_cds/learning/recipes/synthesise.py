"""Make any number of images with masks and labels, shard by shard; what is too near to a training image is dropped.
So is an image in which the lesion that was asked for did not come: its label would say what it does not show.

Rules:
- A shard is a folder, complete or absent; a run that was stopped goes on with the shards that are missing, and every
  image is what it would have been. A run that is to hold more than before makes its last shard anew, to its full size.
- A folder holds one generator's answer to one question; one that cannot be answered is refused before it is begun.
- Pathology follows the mix that was asked for, and device is drawn evenly whatever the pathology: what a scanner is
  must not tell what a lesion is.
- The manifest is one that `train` reads; its source is "synthetic" and nobody is its patient.

Under `torchrun` every process makes its share of the shards.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from busgen_cds import signing
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import checkpoint, data, embed, processes, release
from busgen_cds.learning.generator import Generator, Sample, Sampling, Wish
from busgen_cds.learning.recipes.autoencode import describe

SUMMARY = "generated.json"
QUESTION = "question.json"
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
    empty: int = 0  # asked for with a lesion, made without

    @property
    def dropped(self) -> int:
        """Too near to a training image."""
        return self.made - self.released - self.empty


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
            "No release filter beside this generator or its adapter: build one with `busgen-cds privacy --filter-only`,"
            " then make the adapter anew with `busgen-cds fewshot`; or give --unfiltered for a measurement."
        )
    _answerable(makes, settings)
    sizes = [min(settings.shard, settings.count - i) for i in range(0, settings.count, settings.shard)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        _same_question(out / QUESTION, settings, makes)
        with processes.team() as team:
            for number in range(team.rank, len(sizes), team.world):
                folder = out / f"shard-{number:05d}"
                if not _full(folder, sizes[number]):
                    _make_shard(makes, folder, number, sizes[number], settings, gate)
                tell(sum(sizes[: number + 1]), settings.count)
        return join(out, sizes) if team.leads else Counts(0, 0)
    except OSError as error:
        raise Misconfigured(
            f"{out} cannot be written ({error.strerror}): make room or choose another folder, and call again;"
            " shards that are complete are kept."
        ) from error


def _answerable(makes: Generator, settings: Settings) -> None:
    """Every class and device of the question is asked for once."""
    if min(settings.count, settings.shard) < 1 or settings.seed < 0:
        raise Misconfigured("Count and shard are numbers from 1 on, a seed from 0 on.")
    shares = list(settings.mix.values())
    if not all(0 <= share < math.inf for share in shares) or not sum(shares):
        raise Misconfigured("The mix gives each pathology a share from 0 on, and one of them more than 0.")
    if settings.in_healthy and settings.mix.get("normal"):
        raise Misconfigured("Lesions are grown in healthy images: leave normal out of the mix.")
    for pathology in settings.mix:
        for device in settings.devices or (None,):
            makes.wish(0, settings.seed, pathology, device=device, labels=settings.labels)  # type: ignore[arg-type]


def _same_question(path: Path, settings: Settings, makes: Generator) -> None:
    """A folder holds one generator's answer to one question; more of the same may be added."""
    asked = {k: v for k, v in describe(settings).items() if k != "count"} | {"generator": makes.digest}
    text = json.dumps(asked, sort_keys=True, indent=1)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if before != {name: value for name, value in json.loads(text).items() if name in before}:
        raise Misconfigured(
            f"{path.parent} holds images asked for otherwise, or of another generator (see {path.name}): choose another"
            " folder."
        )
    checkpoint.write_text(path, text)


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


def _full(folder: Path, size: int) -> bool:
    return folder.exists() and _counted(folder).released >= size


def _counted(folder: Path) -> Counts:
    return Counts(**json.loads((folder / "counts.json").read_text(encoding="utf-8")))


def _make_shard(
    makes: Generator, folder: Path, number: int, size: int, settings: Settings, gate: release.Filter | None
) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    (partial / "masks").mkdir()
    rows: list[dict[str, str]] = []
    made, empty, index = 0, 0, number * STRIDE
    while len(rows) < size:
        count = min(settings.batch, size - len(rows))
        samples = _asked(makes, settings, range(index, index + count))
        index, made = index + count, made + count
        kept = [one for one in samples if one.pathology == "normal" or one.mask.any()]
        empty += len(samples) - len(kept)
        if gate is not None and settings.filtered and kept:
            passed = release.clear(gate, makes.coder, [s.image for s in kept], makes.card.size)
            kept = [one for one, yes in zip(kept, passed, strict=True) if yes]
        rows += [_write(partial, one, folder.name, settings) for one in kept]
        if made >= MOST_TRIES * size and len(rows) < size:
            raise Misconfigured(
                f"Of {made} images the release filter refused {made - len(rows) - empty}, as a generator that copies"
                f" makes them, and {empty} show no lesion."
            )
    data.write_table(partial / "labels.csv", rows, COLUMNS)
    counts = Counts(made, len(rows), empty)
    (partial / "counts.json").write_text(json.dumps(counts._asdict()), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
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
    row = dict.fromkeys([*COLUMNS, *settings.labels], "")
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
    row.update(settings.labels)
    return row


def join(out: Path, sizes: Sequence[int]) -> Counts:
    """One manifest over all shards, and what was dropped on the way."""
    rows: list[dict[str, str]] = []
    every = []
    for number, size in enumerate(sizes):
        folder = out / f"shard-{number:05d}"
        with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
            these = list(csv.DictReader(file))
        rows += these[:size]
        counted, spare = _counted(folder), len(these[size:])  # made for a greater count
        every.append(Counts(counted.made - spare, counted.released - spare, counted.empty))
    data.write_table(out / data.MANIFEST, rows, COLUMNS)
    counts = Counts(sum(c.made for c in every), len(rows), sum(c.empty for c in every))
    summary = {**counts._asdict(), "dropped": counts.dropped}
    (out / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return counts


def read_counts(folder: Path) -> Counts:
    """How many images were made for a folder, and how many of them it holds."""
    told = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return Counts(told["made"], told["released"], told.get("empty", 0))


def is_filtered(folder: Path) -> bool:
    """Whether a folder's images passed a release filter."""
    return bool(_question(folder).get("filtered"))


def maker(folder: Path) -> str:
    """The digest of the generator that made a folder's images; empty where the folder does not name it."""
    return str(_question(folder).get("generator", ""))


def digest(folder: Path) -> str:
    """Names a folder's images by its list of them and by how they were asked for."""
    files = (folder / name for name in (data.MANIFEST, QUESTION))
    return signing.digest(b"".join(path.read_bytes() for path in files if path.exists()))


def manner(folder: Path) -> dict[str, Any]:
    """How a folder's images were asked for, beyond what they show: what was found of others need not hold for them."""
    return {name: value for name, value in _question(folder).items() if name in ("in_healthy", "sampling")}


def check_maker(folder: Path, makes: Generator) -> None:
    """This generator, and no other, made a folder's images."""
    if not (folder / data.MANIFEST).is_file():
        raise Misconfigured(f"{folder} holds no generated images: `busgen-cds generate` makes some.")
    made_by, named = maker(folder), makes.digest
    if made_by != named:
        raise Misconfigured(
            f"The images in {folder} were made by the weights {made_by[:16] or 'of an unnamed generator'}, and"
            f" the generator named has {named[:16]}: name the generator, and the adapter, that made them."
        )


def _question(folder: Path) -> dict[str, Any]:
    path = folder / QUESTION
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def read_images(folder: Path, size: int, most: int | None = None) -> tuple[embed.Squares, list[dict[str, str]]]:
    """Generated images as the squares that an embedding takes, with their rows."""
    with (folder / data.MANIFEST).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:most]
    images = []
    for row in rows:
        with Image.open(folder / row["image"]) as image:
            images.append(np.asarray(image.convert("L")))
    return embed.squares(images, size), rows
