"""Known Studies and Results to be put into objects: the sources exist as DICOM files, the answers are made up."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from datetime import datetime
from typing import Any

import numpy as np
from pydicom import dcmread

from busgen_cds.birads import Category
from busgen_cds.result import Assessed, BundleName, Declined, Finding, HeatMap, Result
from busgen_cds.study import Frame, Header, NotAnalysed, Patient, Region, Scanner, Source, Spacing, Study
from tests import images

AT = datetime(2026, 1, 2, 10, 20, 30)
BUNDLE = BundleName("busgen-reader", "1.2.0", hashlib.sha256(b"a bundle").hexdigest())
REGION = Region(*images.REGION)
SPACING = Spacing(images.MM_PER_PIXEL, images.MM_PER_PIXEL)


def study_of(files: list[bytes], *, spacing: Spacing | None = SPACING, left_out: tuple[str, ...] = ()) -> Study:
    """What intake would make of tests.images' files; the last len(left_out) instances were not analysed."""
    read = [dcmread(io.BytesIO(data)) for data in files]
    first = read[0]
    kept, dropped = read[: len(read) - len(left_out)], read[len(read) - len(left_out) :]
    return Study(
        uid=first.StudyInstanceUID,
        patient=Patient(first.PatientID, str(first.PatientName), first.PatientBirthDate, first.PatientSex),
        header=Header(first.StudyDate, first.StudyTime, first.AccessionNumber, first.StudyID, first.StudyDescription),
        scanner=Scanner(first.Manufacturer, first.ManufacturerModelName, first.StationName),
        frames=tuple(frame for ds in kept for frame in _frames(ds, spacing)),
        not_analysed=tuple(NotAnalysed(_source(ds, 1), why) for ds, why in zip(dropped, left_out, strict=True)),
        received=tuple(
            (str(ds.SOPInstanceUID), hashlib.sha256(data).hexdigest()) for ds, data in zip(read, files, strict=True)
        ),
    )


def breast(n: int = 1, *, spacing: Spacing | None = SPACING, left_out: tuple[str, ...] = (), **image: Any) -> Study:
    return study_of(images.breast_study(n, **image), spacing=spacing, left_out=left_out)


def finding(frame: Frame, birads: Category = "4B", **what: Any) -> Finding:
    """An ellipse in the middle of the tissue."""
    left, top, right, bottom = frame.region
    cx, cy, rx, ry = (left + right) / 2, (top + bottom) / 2, 90.0, 60.0
    turns = [2 * math.pi * i / 40 for i in range(40)]
    known = frame.spacing is not None
    described: dict[str, Any] = {
        "source": frame.source,
        "probability": 0.375,
        "birads": birads,
        "uncertainty": 0.072,
        "contour": tuple((cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in turns),
        "laterality": frame.laterality,
        "long_axis_mm": 14.4 if known else None,
        "short_axis_mm": 9.6 if known else None,
        "area_mm2": 108.57 if known else None,
        "orientation": "parallel",
        "heat": heat(frame.region),
    }
    return Finding(**(described | what))


def heat(region: Region, height: float = 0.012) -> HeatMap:
    """Evidence for malignancy in the middle, a little against it at the edges."""
    y, x = np.mgrid[0:50, 0:56]
    bump = np.exp(-(((x - 28) / 9) ** 2 + ((y - 25) / 7) ** 2))
    return HeatMap((height * bump - 0.0005).astype(np.float32), region)


def assessed(study: Study, *findings: Finding, **what: Any) -> Assessed:
    worst = findings[0] if findings else None
    described: dict[str, Any] = {
        "probability": worst.probability if worst else 0.004,
        "birads": worst.birads if worst else None,
        "prevalence": 0.006,
        "calibrated_at": 0.32,
        "findings": findings,
        "key_image": None if findings else study.frames[0].source,
        "key_heat": None if findings else heat(study.frames[0].region, 0.0004),
    }
    return Assessed(**_answer(study), **(described | what))


def declined(study: Study, reason: str = "the images are unlike anything the reader was trained on") -> Declined:
    return Declined(**_answer(study), reason=reason)


def revised(result: Result, revision: int = 2) -> Any:
    return dataclasses.replace(result, revision=revision)


def _answer(study: Study) -> dict[str, Any]:
    return {
        "study_uid": study.uid,
        "evidence_digest": study.evidence_digest,
        "bundle": BUNDLE,
        "provider": "CPUExecutionProvider",
        "revision": 1,
        "images_read": len(study.frames),
        "not_analysed": study.not_analysed,
        "seconds": 0.5,
    }


def _frames(ds: Any, spacing: Spacing | None) -> list[Frame]:
    pixels = ds.pixel_array
    several = pixels if int(ds.get("NumberOfFrames", 1)) > 1 else pixels[None]
    side = ds.get("Laterality") or None
    return [
        Frame(_source(ds, number), _grey(picture), REGION, spacing, side) for number, picture in enumerate(several, 1)
    ]


def _grey(picture: Any) -> Any:
    return picture if picture.ndim == 2 else picture.mean(-1).astype(np.uint8)


def _source(ds: Any, number: int) -> Source:
    return Source(
        str(ds.SOPClassUID),
        str(ds.SOPInstanceUID),
        str(ds.SeriesInstanceUID),
        rows=ds.Rows,
        columns=ds.Columns,
        frame_number=number,
        frame_count=int(ds.get("NumberOfFrames", 1)),
        colour=ds.PhotometricInterpretation != "MONOCHROME2",
    )
