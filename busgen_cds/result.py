"""What we say about a study: Assessed, or Declined with a reason; and which Bundle said it.

Rules:
- Declining is an answer. Every consumer handles both; forgetting one does not type-check.
- A Result names the bundle's digest, the provider it ran on, the prevalence it was stated for and its revision.
- Contours are in 0-based pixels of the full source frame; frames count from 1; unknown is None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from busgen_cds.birads import Category
from busgen_cds.study import NotAnalysed, Region, Side, Source

Orientation = Literal["parallel", "not parallel"]


@dataclass(frozen=True)
class BundleName:
    name: str
    version: str
    digest: str


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Evidence for the score over a frame's region, in logits per cell; never normalised per image."""

    evidence: NDArray[np.float32] = field(repr=False)  # (grid rows, grid columns) over the region
    region: Region


@dataclass(frozen=True)
class Finding:
    source: Source
    probability: float  # of malignancy, calibrated, at the stated prevalence
    birads: Category
    uncertainty: float  # half-width of the 95 % interval of the probability
    contour: tuple[tuple[float, float], ...]
    laterality: Side | None = None
    long_axis_mm: float | None = None
    short_axis_mm: float | None = None
    area_mm2: float | None = None
    orientation: Orientation | None = None
    frames_seen: int = 1  # how many frames of the cine show it
    heat: HeatMap | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Answer:
    """What both kinds of Result carry."""

    study_uid: str
    evidence_digest: str
    bundle: BundleName
    provider: str  # the ONNX Runtime execution provider that really ran
    revision: int
    images_read: int
    not_analysed: tuple[NotAnalysed, ...]
    seconds: float


@dataclass(frozen=True)
class Assessed(Answer):
    probability: float
    birads: Category | None  # None: no lesion found
    prevalence: float
    calibrated_at: float
    findings: tuple[Finding, ...] = ()  # most suspicious first
    key_image: Source | None = None  # where to look when nothing was found
    key_heat: HeatMap | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Declined(Answer):
    reason: str


Result = Assessed | Declined


Kind = Literal["sr", "sc", "seg", "pr", "ko"]


@dataclass(frozen=True)
class Rendered:
    """One object that says a Result, as bytes that never change again."""

    kind: Kind
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    data: bytes = field(repr=False)  # a whole DICOM Part 10 file
