"""Images → latents in shards, once, so that the flow's training never waits for an image.

Rules:
- A shard is a WebDataset tar, complete or absent: written beside its place and renamed.
- Rows are spread over the shards by their file names' digest: every shard is a fair sample.
- Views of an image: as it is, mirrored, and close-ups that keep the lesion and the skin's side up.
- No patient, date or file name enters a shard.
- A folder holds the work of one autoencoder with one set of settings, of one list of images.

Under `torchrun` every process encodes its share of the shards; a run that was stopped goes on with what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray

from busgen_cds import pixels, signing
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import autoencoder, checkpoint, conditions, data, processes
from busgen_cds.learning.autoencoder import Autoencoder
from busgen_cds.learning.conditions import Box
from busgen_cds.learning.recipes.autoencode import describe, read_coder
from busgen_cds.pixels import Placement

INDEX = "index.json"
WORK = "work.json"
VIEWED = ("views", "normal_views", "closest", "seed")  # the settings that decide which views are made
LABELS = ("pathology", "birads", "device")


@dataclass(frozen=True)
class Settings:
    sources: tuple[str, ...] = ("busbra", "busi")
    size: int = 128
    views: int = 4  # of each lesion image
    normal_views: int = 12  # of each normal image: there are few
    shard: int = 1024  # images before their views
    closest: float = 0.8  # a close-up shows at least this part of each side
    seed: int = 0
    labels: tuple[str, ...] = LABELS


class View(NamedTuple):
    """One picture ready to be encoded."""

    image: NDArray[np.uint8]  # (S, S)
    mask: NDArray[np.uint8]
    placement: Placement


def encode(
    root: Path,
    coder: Path,
    out: Path,
    settings: Settings,
    splits: Sequence[str] = ("train", "val"),
    tell: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the shards of each split that are missing and, last, their index."""
    with processes.team() as team:
        network = read_coder(coder).to(team.device)
        rows = [row for row in data.read_manifest(root) if row.source in settings.sources]
        if team.world > 1:  # one for every process at least
            most = max(1, sum(row.split == "train" and row.outlined for row in rows) // team.world)
            settings = dataclasses.replace(settings, shard=min(settings.shard, most))
        parts = [(split, i, part) for split in splits for i, part in enumerate(spread(rows, split, settings.shard))]
        asked = {**describe(settings), "autoencoder": digest_of(coder), "rows": _rows_digest(parts, settings)}
        checkpoint.same_work(out / WORK, asked, "latents that were made")
        if team.leads and (bare := sum(row.split in splits and not row.outlined for row in rows)):
            say(f"{bare} images of lesions without an outline are left out: they would teach that no lesion is there")
        for done, (split, i, part) in enumerate(parts[team.rank :: team.world]):
            path = out / f"{split}-{i:06d}.tar"
            if path.exists():
                continue
            write(path, _samples(root, part, network, settings, split == "train"))
            tell(done + 1, len(parts) // team.world)
        if team.world > 1:
            torch.distributed.barrier()
        if team.leads:
            _write_index(out, parts, settings)
    return out / INDEX


def digest_of(coder: Path) -> str:
    """Names an autoencoder's file."""
    return signing.digest(coder.read_bytes())


def _rows_digest(parts: Sequence[tuple[str, int, Sequence[data.Row]]], settings: Settings) -> str:
    """Changes with all that shards take from a manifest: which images, in which order, their outlines and labels."""
    key = hashlib.sha256()
    for split, i, part in parts:
        for row in part:
            key.update(json.dumps([split, i, row.image, row.mask, *map(row.labels.get, settings.labels)]).encode())
    return key.hexdigest()


def read_work(folder: Path) -> dict[str, Any]:
    """How a folder's shards were made; nothing where they are older than this note."""
    path = folder / WORK
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def views_of(folder: Path) -> dict[str, Any]:
    """The settings that decided a folder's views."""
    return {name: value for name, value in read_work(folder).items() if name in VIEWED}


def check_coder(folder: Path, coder: Path) -> None:
    """Latents mean something to the autoencoder that made them, and to no other."""
    if read_work(folder).get("autoencoder") not in (None, digest_of(coder)):
        raise Misconfigured(
            f"The shards in {folder} were encoded by another autoencoder than {coder}: name theirs with --coder, or"
            " encode into another folder."
        )


def spread(rows: Sequence[data.Row], split: str, size: int) -> list[list[data.Row]]:
    """The rows of a split, shuffled and cut into shards; a lesion without an outline would be taught as none."""
    mine = data.shuffled(row for row in rows if row.split == split and row.outlined)
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def count_of(rows: Sequence[data.Row], settings: Settings, views: bool) -> int:
    return sum(1 if not views else settings.views if row.lesion else settings.normal_views for row in rows)


def views(
    root: Path, rows: Sequence[data.Row], settings: Settings, all_views: bool = True, cache: Path | None = None
) -> Iterator[tuple[data.Row, list[View]]]:
    """Each row's pictures as the flow learns from them; the whole image alone unless all are asked for."""
    whole = data.load(root, rows, cache, settings.size)
    double = data.load(root, rows, cache, 2 * settings.size) if all_views else whole
    for i, row in enumerate(rows):
        rng = np.random.default_rng((settings.seed, int.from_bytes(hashlib.sha256(row.image.encode()).digest()[:4])))
        count = count_of([row], settings, all_views)
        yield row, [view(whole, double, i, k, settings, rng) for k in range(count)]


def _samples(
    root: Path, rows: Sequence[data.Row], coder: Autoencoder, settings: Settings, all_views: bool
) -> Iterator[dict[str, Any]]:
    number = 0
    for row, made in views(root, rows, settings, all_views):
        for one, latent in zip(made, _latents(coder, made), strict=True):
            yield sample(f"{number:07d}", latent, one, {name: row.labels.get(name) or None for name in settings.labels})
            number += 1


def encoded(
    coder: Autoencoder, rows: Sequence[data.Row], shown: Sequence[Sequence[View]], labels: Iterable[str]
) -> list[Encoded]:
    """Each row in its views, as the flow's training sees them, without a shard between."""
    made, names = [], tuple(labels)
    for row, seen in zip(rows, shown, strict=True):
        told = {name: row.labels.get(name) or None for name in names}
        for one, latent in zip(seen, _latents(coder, seen), strict=True):
            box, place = conditions.box_of(one.mask, one.placement), one.placement
            outline = conditions.outline_planes(one.mask).half().numpy()
            made.append(Encoded(latent, outline, told, box, place.height, place.width))
    return made


@torch.inference_mode()
def _latents(coder: Autoencoder, shown: Sequence[View]) -> NDArray[np.float16]:
    image = autoencoder.signed(np.stack([one.image for one in shown]), next(coder.parameters()).device)
    latents: NDArray[np.float16] = coder.encode(image).cpu().half().numpy()
    return latents


def view(
    whole: data.Images, double: data.Images, i: int, number: int, settings: Settings, rng: np.random.Generator
) -> View:
    """View 0 is the image, view 1 its mirror image; every other is a close-up, mirrored by a coin."""
    height, width = (int(n) for n in whole.placed[i])
    if number < 2:
        one = View(whole.image[i], whole.mask[i], Placement(height, width, settings.size))
        return _mirrored(one) if number else one
    one = _close_up(double, i, settings, rng)
    return _mirrored(one) if rng.random() < 0.5 else one


def _mirrored(one: View) -> View:
    # the letter-box is centred up to a pixel: mirror the region, not the square
    place = one.placement
    columns = slice(place.left, place.left + place.columns)
    image, mask = one.image.copy(), one.mask.copy()
    image[:, columns], mask[:, columns] = image[:, columns][:, ::-1], mask[:, columns][:, ::-1]
    return View(image, mask, place)


def _close_up(double: data.Images, i: int, settings: Settings, rng: np.random.Generator) -> View:
    big = Placement(int(double.placed[i][0]), int(double.placed[i][1]), 2 * settings.size)
    region = (slice(0, big.rows), slice(big.left, big.left + big.columns))
    image, mask = double.image[i][region], double.mask[i][region]
    top, bottom, left, right = _frame(mask, settings.closest, rng)
    place = Placement(bottom - top, right - left, settings.size)
    square, outline = np.zeros((2, settings.size, settings.size), np.uint8)
    inner = (slice(0, place.rows), slice(place.left, place.left + place.columns))
    for target, source in ((square, image), (outline, mask)):
        small = pixels.resize(source[top:bottom, left:right].astype(np.float32), place.rows, place.columns)
        target[inner] = np.rint(small).clip(0, 255)
    return View(square, outline, place)


def _frame(mask: NDArray[np.uint8], closest: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A window that keeps the lesion whole and cuts little of the skin."""
    rows, columns = mask.shape
    height, width = (int(n * rng.uniform(closest, 1)) for n in (rows, columns))
    top, left = int(rng.uniform(0, 0.3) * (rows - height)), int(rng.uniform(0, 1) * (columns - width))
    lesion = np.argwhere(mask > 127)
    if len(lesion):
        (first, west), (last, east) = lesion.min(0), lesion.max(0) + 1
        top, left = min(top, int(first)), min(left, int(west))
        height, width = max(height, int(last) - top), max(width, int(east) - left)
    return top, top + height, left, left + width


def sample(key: str, latent: NDArray[np.float16], one: View, labels: dict[str, str | None]) -> dict[str, Any]:
    box = conditions.box_of(one.mask, one.placement)
    notes = {
        "labels": labels,
        "box": list(box) if box else None,
        "height": one.placement.height,
        "width": one.placement.width,
    }
    outline = conditions.outline_planes(one.mask).half().numpy()
    return {
        "__key__": key,
        "latent.npy": _npy(latent),
        "outline.npy": _npy(outline),
        "json": json.dumps(notes).encode(),
    }


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write(path: Path, samples: Iterator[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    with webdataset.TarWriter(str(partial), encoder=False, mtime=0) as tar:
        for one in samples:
            tar.write(one)
    partial.replace(path)


def _write_index(out: Path, parts: Sequence[tuple[str, int, Sequence[data.Row]]], settings: Settings) -> None:
    """What a reader of the shards must know: how many samples each holds, the labels, boxes and shapes seen."""
    shards = [
        {"name": f"{split}-{i:06d}.tar", "split": split, "count": count_of(part, settings, split == "train")}
        for split, i, part in parts
    ]
    train = [row for split, _, part in parts if split == "train" for row in part]
    if not train:
        raise Misconfigured("No row of the split `train`: nothing to learn from.")
    labels = {
        name: list(data.PATHOLOGIES)
        if name == "pathology"
        else sorted({row.labels.get(name) or "" for row in train} - {""})
        for name in settings.labels
    }
    index = {"size": settings.size, "sources": list(settings.sources), "labels": labels, "shards": shards}
    checkpoint.write_text(out / INDEX, json.dumps(index, indent=1))


class Encoded(NamedTuple):
    """One sample of a shard."""

    latent: NDArray[np.float16]  # (L, h, w)
    outline: NDArray[np.float16]  # (OUTLINE, h, w)
    labels: dict[str, str | None]
    box: Box | None
    height: int
    width: int


def read(path: Path) -> list[Encoded]:
    """All samples of one shard."""
    found = []
    stream = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False, nodesplitter=lambda urls: urls)
    for one in stream:
        notes = json.loads(one["json"])
        latent, outline = (np.load(io.BytesIO(one[name])) for name in ("latent.npy", "outline.npy"))
        box = Box(*notes["box"]) if notes["box"] else None
        found.append(Encoded(latent, outline, notes["labels"], box, notes["height"], notes["width"]))
    return found


@dataclass(frozen=True)
class Index:
    folder: Path
    size: int
    sources: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]
    shards: tuple[tuple[str, str, int], ...]  # split, name, count

    def of(self, split: str) -> list[tuple[Path, int]]:
        return [(self.folder / name, count) for s, name, count in self.shards if s == split]


def read_index(folder: Path) -> Index:
    try:
        document = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except OSError as error:
        raise Misconfigured(f"No shards in {folder}: {INDEX} cannot be read ({error.strerror}).") from error
    shards = tuple((s["split"], s["name"], s["count"]) for s in document["shards"])
    labels = {name: tuple(words) for name, words in document["labels"].items()}
    return Index(folder, document["size"], tuple(document["sources"]), labels, shards)
