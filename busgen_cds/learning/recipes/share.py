"""A package of generated images that another site can use, and can check.

Rules:
- Only generated images enter; every one passed the release filter, and the privacy report says what that is worth:
  a report on the generator that made these very images, and on no other.
- The package says everything about itself: labels, Croissant metadata, a data card, the report, checksums.
- It is signed last: a folder without its signature is no package. `verify` follows the same rules as a bundle.
- Whoever writes DICOM is handed in; nothing here knows it.

Metadata: Croissant 1.0 (MLCommons, http://mlcommons.org/croissant/1.0).
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from busgen_cds import signing
from busgen_cds.errors import Misconfigured, Untrusted
from busgen_cds.learning import data
from busgen_cds.learning.recipes import synthesise

KIND = "application/vnd.busgen-cds.share+json"
ENVELOPE = "package.dsse.json"
METADATA, CARD, REPORT, LABELS = "croissant.json", "card.md", "privacy.json", "labels.csv"
LICENCE = "https://creativecommons.org/licenses/by/4.0/"


@dataclass(frozen=True)
class Made:
    """One generated image, for whoever writes DICOM."""

    number: int
    image: NDArray[np.uint8]
    pathology: str
    device: str


Writer = Callable[[Made], bytes]


@dataclass(frozen=True)
class Terms:
    name: str
    version: str
    creator: str
    date: str  # ISO
    licence: str = LICENCE


def package(
    generated: Path,
    report: Path,
    out: Path,
    terms: Terms,
    signer: signing.Signer,
    dicom: Writer | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Copy, describe, and sign."""
    if out.exists() and any(out.iterdir()):
        raise Misconfigured(f"{out} is not empty: a package is made once, in a folder of its own.")
    rows = _rows(generated)
    if not synthesise.is_filtered(generated):
        raise Misconfigured(f"{generated} was made without the release filter, for a measurement: it is not shared.")
    told = report_on(generated, report)
    counts = json.loads(_read(generated / synthesise.SUMMARY, "the count of dropped images"))
    out.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        _copy(generated, out, row, i, dicom)
        tell(i + 1, len(rows))
    data.write_table(out / LABELS, rows)
    shutil.copyfile(report, out / REPORT)
    (out / CARD).write_text(card(rows, told, counts, terms), encoding="utf-8")
    sums = _digests(out)
    (out / METADATA).write_text(json.dumps(croissant(terms, sums, list(rows[0])), indent=1), encoding="utf-8")
    contents = {"name": terms.name, "version": terms.version, "date": terms.date, "files": _digests(out)}
    (out / ENVELOPE).write_bytes(signing.seal(signing.canonical(contents), KIND, signer))
    return out


def verify(folder: Path, verifier: signing.Verifier) -> dict[str, Any]:
    """The package's contents, if a trusted key vouches for every file and no other is there."""
    try:
        envelope = (folder / ENVELOPE).read_bytes()
    except OSError as missing:
        raise Untrusted(f"{folder} is not signed: {ENVELOPE} cannot be read ({missing.strerror}).") from missing
    contents: dict[str, Any] = json.loads(verifier.open(envelope, KIND))
    found = _digests(folder)
    wrong = [name for name in sorted({*found, *contents["files"]}) if found.get(name) != contents["files"].get(name)]
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Untrusted(
            f"{folder} is not the package that was signed: {wrong[0]}{others} changed, added or taken away."
        )
    return contents


def _rows(generated: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(_read(generated / data.MANIFEST, "the list of generated images"))))
    strange = [row["image"] for row in rows if row["source"] != synthesise.SOURCE]
    if strange or not rows:
        raise Misconfigured(f"Only generated images are shared; {generated} holds {strange[:1] or 'none'}.")
    return rows


def report_on(generated: Path, report: Path) -> dict[str, Any]:
    """The privacy report on the generator that made these images."""
    try:
        told: Any = json.loads(_read(report, "the privacy report"))
    except ValueError:
        told = None
    if not isinstance(told, dict) or not {"of", "members", "findings", "holds"} <= set(told):
        raise Misconfigured(f"{report} is no privacy report: `busgen-cds privacy` writes one, privacy.json.")
    audited, maker = told.get("generator"), synthesise.maker(generated)
    if not audited:
        raise Misconfigured(
            f"{report} does not name the weights that it audited, for it is from an older version: run"
            " `busgen-cds privacy` on these images again."
        )
    if not maker:
        raise Misconfigured(
            f"{generated} does not name the generator that made it: make the images anew with `busgen-cds generate`."
        )
    if audited != maker:
        raise Misconfigured(
            f"{report} is on {told['of']} with the weights {audited[:16]}; {generated} was made by the weights"
            f" {maker[:16]}. Run `busgen-cds privacy` on these images with the generator, and the adapter, that made"
            " them."
        )
    if told.get("manner") != synthesise.manner(generated):
        raise Misconfigured(
            f"{report} is on images that were asked for in another way (steps, guidance or healthy images): what it"
            f" found need not hold for those in {generated}. Run `busgen-cds privacy` on them."
        )
    return told


def _copy(generated: Path, out: Path, row: dict[str, str], number: int, dicom: Writer | None) -> None:
    """Images are written anew: nothing travels but pixels."""
    name = f"{number:07d}"
    with Image.open(generated / row["image"]) as image:
        grey = np.asarray(image.convert("L"))
    _save(out / "images" / f"{name}.png", grey)
    row.update(image=f"images/{name}.png", patient=f"{synthesise.SOURCE}-{name}")
    if row["mask"]:
        with Image.open(generated / row["mask"]) as mask:
            _save(out / "masks" / f"{name}.png", np.asarray(mask.convert("L")) > 0)
        row["mask"] = f"masks/{name}.png"
    if dicom is not None:
        path = out / "dicom" / f"{name}.dcm"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(dicom(Made(number, grey, row["pathology"], row["device"])))


def _save(path: Path, pixels: NDArray[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / ENVELOPE)
    return {path.relative_to(folder).as_posix(): signing.digest(path.read_bytes()) for path in files}


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as missing:
        raise Misconfigured(f"{what} is needed and {path} cannot be read ({missing.strerror}).") from missing


def croissant(terms: Terms, sums: dict[str, str], columns: Sequence[str]) -> dict[str, Any]:
    """What a dataset search or a loader must know (Croissant 1.0)."""
    labels = [name for name in columns if name not in ("image", "mask")]
    fields = [_field(name, "labels", {"column": name}, "sc:Text") for name in labels]
    fields += [
        _field("image", "images", {"fileProperty": "content"}, "sc:ImageObject"),
        _field("image_file", "labels", {"column": "image"}, "sc:Text"),
        _field("mask_file", "labels", {"column": "mask"}, "sc:Text"),
    ]
    return {
        "@context": {
            "@language": "en",
            "@vocab": "https://schema.org/",
            "sc": "https://schema.org/",
            "cr": "http://mlcommons.org/croissant/",
            "dct": "http://purl.org/dc/terms/",
            "conformsTo": "dct:conformsTo",
            "recordSet": "cr:recordSet",
            "field": "cr:field",
            "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
            "source": "cr:source",
            "extract": "cr:extract",
            "column": "cr:column",
            "fileProperty": "cr:fileProperty",
            "fileObject": "cr:fileObject",
            "fileSet": "cr:fileSet",
            "includes": "cr:includes",
        },
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": terms.name,
        "version": terms.version,
        "datePublished": terms.date,
        "license": terms.licence,
        "creator": {"@type": "sc:Organization", "name": terms.creator},
        "description": "Generated breast ultrasound images with lesion masks and labels. No patient is shown.",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": "labels",
                "contentUrl": LABELS,
                "encodingFormat": "text/csv",
                "sha256": sums[LABELS],
            },
            {"@type": "cr:FileSet", "@id": "images", "encodingFormat": "image/png", "includes": "images/*.png"},
            {"@type": "cr:FileSet", "@id": "masks", "encodingFormat": "image/png", "includes": "masks/*.png"},
        ],
        "recordSet": [{"@type": "cr:RecordSet", "@id": "images-with-labels", "field": fields}],
    }


def _field(name: str, source: str, extract: dict[str, str], kind: str) -> dict[str, Any]:
    holder = "fileObject" if source == "labels" else "fileSet"
    return {
        "@type": "cr:Field",
        "@id": f"images-with-labels/{name}",
        "name": name,
        "dataType": kind,
        "source": {holder: {"@id": source}, "extract": extract},
    }


def card(rows: list[dict[str, str]], report: dict[str, Any], counts: dict[str, int], terms: Terms) -> str:
    """The data card: what this is, what it is for, and what it is not."""
    by_class = {
        name: sum(row["pathology"] == name for row in rows) for name in sorted({row["pathology"] for row in rows})
    }
    findings = [
        f"| {f['attack']} | {f['figure']} | {_figure(f['value'])} | {_figure(f['control'])} | {f['verdict']} |"
        for f in report["findings"]
    ]
    return "\n".join(
        [
            f"# {terms.name} {terms.version}",
            "",
            f"{len(rows)} generated breast ultrasound images with lesion masks and labels, {terms.date}."
            f" By {terms.creator}. Licence: {terms.licence}",
            "",
            f"**Contents.** {', '.join(f'{n} {name}' for name, n in by_class.items())}. `{LABELS}` names image, mask,"
            " pathology, BI-RADS and device of each; `dicom/`, where present, holds the same images as ultrasound"
            " objects that state they are synthetic.",
            "",
            f"**How they were made.** By the generator {report['of']}, which learnt from {report['members']} or more"
            " images of patients. Labels are what was asked for, not what a pathologist found: an image may not show"
            " what its label says.",
            "",
            f"**Release filter.** {counts['made']} images were made, {counts['dropped']} were dropped as too near to a"
            " training image.",
            "",
            f"**Privacy.** The report {'holds' if report['holds'] else 'does NOT hold'} all its bars. It measures risk"
            " by the attacks below; it proves nothing about attacks that were not made.",
            "",
            "| attack | figure | value | control | verdict |",
            "|---|---|---|---|---|",
            *findings,
            "",
            "**For** training and teaching. **Not for** diagnosis, and not for judging a reader: judge on patients.",
            "",
        ]
    )


def _figure(interval: dict[str, float | None]) -> str:
    if interval["value"] is None:
        return "not measured"
    value, low, high = (float(interval[name] or 0) for name in ("value", "low", "high"))
    return f"{value:.3f} ({low:.3f}–{high:.3f})"
