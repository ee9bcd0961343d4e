"""Manifests → batches, through `pixels.prepare`.

Rules:
- A patient (or group of near-duplicates) belongs to one split; a training arm never meets a test split, and this is
  checked, not trusted.
- What is wrong with a manifest is said with its row and file, before any training starts.
- Images are prepared once and kept as bytes beside the runs, under a name that changes with whatever made them.
- A batch is a pure function of (seed, step): a run that was killed goes on with the batches it would have had.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from busgen_cds import pixels
from busgen_cds.errors import Misconfigured

PATHOLOGIES = ("normal", "benign", "malignant")
TAUGHT = frozenset({"train", "val"})
HELD_OUT = frozenset({"test", "device-adapt", "device-test", "site-adapt", "site-test", "excluded"})
MANIFEST = "manifest.csv"
COLUMNS = ("image", "mask", "source", "patient", "pathology", "split")
UNKNOWN = -1
GENERATED = "synthetic"  # the source of images that a generator made


@dataclass(frozen=True)
class Row:
    """One image of a manifest."""

    image: str
    mask: str
    source: str
    patient: str
    pathology: str
    split: str
    labels: dict[str, str]  # every column, as written
    line: int  # of the manifest file

    @property
    def malignant(self) -> bool:
        return self.pathology == "malignant"

    @property
    def lesion(self) -> bool:
        return self.pathology != "normal"

    @property
    def outlined(self) -> bool:
        """The lesion's outline is known: drawn, or nothing to draw."""
        return bool(self.mask) or not self.lesion


@dataclass(frozen=True)
class Images:
    """Prepared images of some rows; every array has one entry per row."""

    rows: tuple[Row, ...]
    image: NDArray[np.uint8]  # (N, S, S)
    mask: NDArray[np.uint8]  # (N, S, S): 0..255
    placed: NDArray[np.int64]  # (N, 2): height and width of the source image

    def __len__(self) -> int:
        return len(self.rows)

    def pick(self, keep: Sequence[bool] | NDArray[np.bool_]) -> Images:
        index = np.flatnonzero(np.asarray(keep))
        return Images(tuple(self.rows[i] for i in index), self.image[index], self.mask[index], self.placed[index])

    def of(self, source: str | None = None, *splits: str) -> Images:
        return self.pick([source in (None, row.source) and (not splits or row.split in splits) for row in self.rows])

    @property
    def malignant(self) -> NDArray[np.int64]:
        return np.array([row.malignant for row in self.rows], np.int64)

    @property
    def lesion(self) -> NDArray[np.int64]:
        return np.array([row.lesion for row in self.rows], np.int64)

    @property
    def patients(self) -> NDArray[np.str_]:
        return np.array([row.patient for row in self.rows])

    @property
    def masked(self) -> NDArray[np.int64]:
        """1 where the lesion's outline is known: drawn, or nothing to draw."""
        return np.array([row.outlined for row in self.rows], np.int64)


def default_root() -> Path:
    root = os.environ.get("BUSGEN_DATA")
    if not root:
        raise Misconfigured("No data folder: set BUSGEN_DATA, or name the folder with --data.")
    return Path(root)


def read_manifest(root: Path) -> list[Row]:
    """All rows of `manifest.csv`, checked."""
    path = root / MANIFEST
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (table.fieldnames or ())]
            if missing:
                raise Misconfigured(f"{path} has no column {', '.join(missing)}.")
            rows = [_row(record, line) for line, record in enumerate(table, start=2)]
    except OSError as error:
        raise Misconfigured(f"{path} cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise Misconfigured(f"{path} is not a table in UTF-8 ({error}): save it as CSV UTF-8.") from error
    _check(rows, root, path)
    return rows


def read_generated(folder: Path) -> list[Row]:
    """The images that a generator made, named where they lie; all of them are for training."""
    rows = [row for row in read_manifest(folder) if row.source == GENERATED]
    if not rows:
        raise Misconfigured(f"{folder} holds no generated images (source {GENERATED!r} of its manifest).")
    return [
        dataclasses.replace(
            row,
            image=str((folder / row.image).resolve()),
            mask=str((folder / row.mask).resolve()) if row.mask else "",
            split="train",
        )
        for row in rows
    ]


def write_table(path: Path, records: Sequence[Mapping[str, str]], columns: Sequence[str] = ()) -> None:
    """Records as a table, whole or not at all: these columns first, then whatever else a record has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        names = dict.fromkeys([*columns, *(name for record in records for name in record)])
        table = csv.DictWriter(file, list(names), restval="")
        table.writeheader()
        table.writerows(records)
    partial.replace(path)


def _row(record: dict[str, str], line: int) -> Row:
    image, mask, source, patient, pathology, split = (record[name] or "" for name in COLUMNS)
    return Row(image, mask, source, patient, pathology, split, labels=dict(record), line=line)


def _check(rows: list[Row], root: Path, path: Path) -> None:
    splits: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.pathology not in PATHOLOGIES:
            raise Misconfigured(
                f"{path}, line {row.line} ({row.image}): unknown pathology {row.pathology!r};"
                f" known are {', '.join(PATHOLOGIES)}."
            )
        if row.split not in TAUGHT | HELD_OUT:
            raise Misconfigured(
                f"{path}, line {row.line} ({row.image}): unknown split {row.split!r};"
                f" known are {', '.join(sorted(TAUGHT | HELD_OUT))}."
            )
        if not row.image:
            raise Misconfigured(f"{path}, line {row.line}: no image is named.")
        for name in filter(None, (row.image, row.mask)):
            if not (root / name).is_file():
                raise Misconfigured(f"{path}, line {row.line}: the file {name} is missing.")
        if row.split == "excluded":
            continue
        other = splits.setdefault((row.source, row.patient), row)
        if other.split != row.split:
            raise Misconfigured(
                f"{path}: patient {row.patient} is in two splits, {other.split} (line {other.line})"
                f" and {row.split} (line {row.line})."
            )


def check_arm(rows: Iterable[Row], all_rows: Iterable[Row], folds: bool = False) -> None:
    """No patient of a held-out split may be seen by an arm, and an arm needs both answers."""
    rows = list(rows)
    if not folds:
        sealed = {(row.source, row.patient) for row in all_rows if row.split in HELD_OUT - {"excluded"}}
        for row in rows:
            if row.split in HELD_OUT or (row.source, row.patient) in sealed:
                raise Misconfigured(
                    f"Line {row.line} ({row.image}): patient {row.patient} is held out ({row.split}) and may not train."
                )
    if len({row.malignant for row in rows}) < 2:
        only = "malignant" if rows and rows[0].malignant else "not malignant"
        raise Misconfigured(f"Training needs malignant and other images; the {len(rows)} rows chosen are all {only}.")


def check_val(rows: Sequence[Row]) -> None:
    """What a reader is calibrated on needs both answers, and a lesion that is drawn."""
    if len({row.malignant for row in rows}) < 2:
        raise Misconfigured(
            f"Calibration needs malignant and other images in `val`: its {len(rows)} rows are all alike."
        )
    if not any(row.lesion and row.mask for row in rows):
        raise Misconfigured("Calibration needs a lesion with its outline in `val`: no row there names a mask.")


def digest(rows: Iterable[Row]) -> str:
    """Changes with all that a judgement takes from rows: which images, of whom, with which answer, in which order."""
    key = hashlib.sha256()
    for row in rows:
        key.update(json.dumps([row.image, row.mask, row.source, row.patient, row.pathology, row.split]).encode())
    return key.hexdigest()


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """In a fixed order that knows nothing of source or class: any stretch of it is a fair sample."""
    return sorted(rows, key=lambda row: hashlib.sha256(row.image.encode()).digest())


def sample(rows: list[Row], most: int) -> list[Row]:
    """The rows as they are, or a fair sample where they are more than `most`."""
    return rows if len(rows) <= most else shuffled(rows)[:most]


def fold_of(patient: str, count: int) -> int:
    """Which of `count` folds a patient belongs to; the same on every machine."""
    return int(hashlib.sha256(patient.encode()).hexdigest()[:8], 16) % count


def load(root: Path, rows: Sequence[Row], cache: Path | None = None, size: int = pixels.SIZE) -> Images:
    """Prepare the rows' images, or take them from the cache that the same rows made before."""
    kept = cache / f"prepared-{_key(root, rows, size)}.npz" if cache else None
    if kept is not None and kept.exists():
        with np.load(kept) as arrays:
            return Images(tuple(rows), arrays["image"], arrays["mask"], arrays["placed"])
    image = np.zeros((len(rows), size, size), np.uint8)
    mask = np.zeros_like(image)
    placed = np.zeros((len(rows), 2), np.int64)
    for i, row in enumerate(rows):
        grey = _grey(root / row.image, row)
        prepared, placement = pixels.prepare(grey, size)
        image[i] = np.rint(prepared[0] * 255)
        placed[i] = grey.shape
        if row.mask:
            outline = _grey(root / row.mask, row)
            if outline.shape != grey.shape:
                raise Misconfigured(
                    f"Line {row.line}: {row.mask} is {_sides(outline)} and its image {row.image} {_sides(grey)}:"
                    " an outline is drawn at the size of its image."
                )
            if row.lesion and not outline.any():
                raise Misconfigured(
                    f"Line {row.line}: {row.mask} is all black, and would teach that {row.image} shows no lesion: draw"
                    " the lesion, or leave the mask's column empty."
                )
            mask[i] = prepare_mask(outline, placement)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, image=image, mask=mask, placed=placed)
        partial.replace(kept)
    return Images(tuple(rows), image, mask, placed)


def prepare_mask(mask: NDArray[np.uint8], placement: pixels.Placement) -> NDArray[np.uint8]:
    """A drawn outline, put where `pixels.prepare` puts its image."""
    small = pixels.resize((mask > 0).astype(np.float32) * 255, placement.rows, placement.columns)
    square = np.zeros((placement.size, placement.size), np.uint8)
    square[: placement.rows, placement.left : placement.left + placement.columns] = np.rint(small)
    return square


def _grey(path: Path, row: Row) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except OSError as error:
        raise Misconfigured(f"Line {row.line}: {path} cannot be decoded ({error}).") from error


def _sides(grey: NDArray[np.uint8]) -> str:
    return f"{grey.shape[1]} × {grey.shape[0]} pixels"


def _key(root: Path, rows: Sequence[Row], size: int) -> str:
    """Changes with the content of every file: two folders may hold other images under the same names."""
    key = hashlib.sha256(f"{pixels.VERSION} {size}".encode())
    for row in rows:
        for name in (row.image, row.mask):
            key.update(hashlib.sha256((root / name).read_bytes()).digest() if name else b"-")
    return key.hexdigest()[:16]


def balanced(images: Images) -> NDArray[np.float64]:
    """Chance of each image to be drawn: sources by the root of their size, and within a source classes alike.

    Without it the network would learn each source's share of cancers instead of what a cancer looks like.
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    sources: dict[str, int] = defaultdict(int)
    for i, row in enumerate(images.rows):
        groups[row.source, row.pathology].append(i)
        sources[row.source] += 1
    weight = np.zeros(len(images))
    for (source, _), members in groups.items():
        classes = sum(1 for name, _ in groups if name == source)
        # half-way between one share per class and the classes' own shares
        share = 0.5 / classes + 0.5 * len(members) / sources[source]
        weight[members] = np.sqrt(sources[source]) * share / len(members)
    return np.asarray(weight / weight.sum())


def with_share(weights: NDArray[np.float64], images: Images, source: str, share: float) -> NDArray[np.float64]:
    """The same chances, but for one source, which has this share of every draw."""
    mine = np.array([row.source == source for row in images.rows])
    if not 0 < share < 1 or not mine.any() or mine.all():
        raise Misconfigured(f"A share of {share:g} of {source} images needs some of them and some others.")
    scaled = np.where(mine, weights * share / weights[mine].sum(), weights * (1 - share) / weights[~mine].sum())
    return np.asarray(scaled)


def draw(weights: NDArray[np.float64], count: int, seed: int, step: int) -> NDArray[np.int64]:
    """The images of one step."""
    return np.random.default_rng((seed, step)).choice(len(weights), count, p=weights)
