"""The locked release set: generated images with masks and labels, signed once, that every site's judge can read.

Rules:
- It holds generated images only, each of which passed its generator's release filter, and lesions only with their
  outline. Its card says how they were made, what the privacy audit of that generator found, or that there was none, and
  how well a reader tells them apart.
- It is a parcel, signed by a key that is used once: what a site unpacks is what was released, to the byte.
- A set is small: it travels with the package.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from busgen_cds import parcel, signing
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import calibrate, data, export, figures
from busgen_cds.learning.conditions import Vocabulary
from busgen_cds.learning.figures import Interval
from busgen_cds.learning.recipes import adapt_site, synthesise

NAME = "busgen-release-set"
FILE = NAME + parcel.SUFFIX
CARD = "card.md"
MOST_BYTES = 5_000_000


@dataclass(frozen=True)
class Terms:
    version: str
    created: str  # ISO date
    generator: str  # digest of its weights


@dataclass(frozen=True)
class Known:
    """How well a reader tells the set's images apart, and those of them that judge."""

    reader: str
    every: Interval
    judging: Interval


def make(
    generated: Path,
    out: Path,
    terms: Terms,
    signer: signing.Signer,
    reader: tuple[str, export.Run] | None = None,
    privacy: Mapping[str, Any] | None = None,
) -> parcel.Contents:
    """Pack the images of a folder that `generate` made, with their card; the old set is replaced whole.

    `reader`: a name, and a reader that says how well it tells them apart; `privacy`: the report on the generator.
    """
    counts = json.loads((generated / synthesise.SUMMARY).read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as made:
        folder = Path(made) / "set"
        _copy([row for row in data.read_generated(generated) if row.mask or not row.lesion], folder)
        known = measured(folder, *reader) if reader else None
        text = card(data.read_manifest(folder), counts, terms, known, privacy)
        (folder / CARD).write_text(text, encoding="utf-8")
        packed = Path(made) / FILE
        said = parcel.pack(
            folder, packed, what="synthetic set", name=NAME, version=terms.version, sender="the product",
            created=terms.created, signer=signer,
        )  # fmt: skip
        if packed.stat().st_size > MOST_BYTES:
            raise Misconfigured(
                f"The set takes {packed.stat().st_size / 1e6:.1f} MB; {MOST_BYTES / 1e6:.0f} MB may travel: make fewer."
            )
        digest = signing.digest(packed.read_bytes())
        (out / CARD).write_text(f"{text}\nSHA-256 of `{FILE}`: `{digest}`\n", encoding="utf-8")
        packed.replace(out / FILE)
    return said


def typical(vocabulary: Vocabulary, count: int, seed: int) -> synthesise.Settings:
    """Images that look like their label: plainly benign and plainly malignant categories."""
    plain = {"benign": ("2", "3"), "malignant": ("5",)}
    known = set(vocabulary.names.get("birads", ()))
    grades = {name: kept for name, asked in plain.items() if (kept := tuple(g for g in asked if g in known))}
    return synthesise.Settings(count=count, seed=seed, birads=grades, shard=90)


def _copy(rows: Sequence[data.Row], folder: Path) -> None:
    folder.mkdir()
    records = []
    for number, row in enumerate(rows):
        record = row.labels | {"image": f"{number:04d}.png", "mask": f"{number:04d}-mask.png" if row.mask else ""}
        for name in filter(None, ("image", row.mask and "mask")):
            shutil.copyfile(getattr(row, name), folder / record[name])
        records.append({name: record.get(name, "") for name in synthesise.COLUMNS})
    data.write_table(folder / data.MANIFEST, records)


def measured(folder: Path, name: str, run: export.Run) -> Known:
    """AUC of a reader on a set's folder."""
    images = data.load(folder, data.read_manifest(folder))
    score = calibrate.read(run, images.image).malignancy
    mine = [adapt_site.judges(row) for row in images.rows]
    return Known(
        name,
        figures.auc_interval(score, images.malignant, images.patients),
        figures.auc_interval(score[mine], images.malignant[mine], images.patients[mine]),
    )


def card(
    rows: Sequence[data.Row],
    counts: Mapping[str, int],
    terms: Terms,
    known: Known | None,
    privacy: Mapping[str, Any] | None,
) -> str:
    """What this is, what it is for, and what it is not."""
    judging = [row for row in rows if adapt_site.judges(row)]
    devices = sorted({row.labels.get("device", "") for row in rows} - {""})
    audit = (
        "not carried out for this generator"
        if privacy is None
        else f"{'holds' if privacy['holds'] else 'does NOT hold'} all its bars"
    )
    read = (
        ["**How well they are told apart.** Not measured.", ""]
        if known is None
        else [
            f"**How well they are told apart.** {known.reader}: AUC {known.every} on all, {known.judging} on those that"
            " judge. Labels are what the generator was asked for.",
            "",
        ]
    )
    return "\n".join(
        [
            f"# {NAME} {terms.version}",
            "",
            f"{len(rows)} generated breast ultrasound images ({sum(r.malignant for r in rows)} asked for as malignant)"
            f" with lesion masks and labels, {terms.created}. No patient is shown. The judge of a site's nights reads"
            f" {len(judging)} of them where no real test set is at hand; the others are for replay, where a site asks"
            " for it, so that its reader does not forget.",
            "",
            f"**How they were made.** By the generator `{terms.generator[:16]}` (SHA-256 of its weights), which learnt"
            f" from public images; devices asked for: {', '.join(devices) or 'none'}.",
            "",
            f"**Release filter.** {counts['made']} were made, {counts['dropped']} dropped as too near to a training"
            f" image and {counts.get('empty', 0)} because no lesion came.",
            "",
            f"**Privacy.** The audit was {audit}." if privacy is None else f"**Privacy.** The audit {audit}.",
            "",
            *read,
            "**For** noticing that an adapted reader forgot what it knew. **Not for** judging a reader: judge on"
            " patients. An image may not show what its label says.",
            "",
        ]
    )
