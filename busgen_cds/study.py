"""What came in: a Study of Frames, or the reason why it is not for us.

Rules:
- A Study is made once, by intake, from what a scanner sent; nothing here is guessed or repaired later.
- Names and pixels never appear in a repr, because reprs end up in logs.
- What was left out stands in `not_analysed` with its reason; nothing is dropped in silence.
- Whose a study is follows from all its images at once, by one rule for everybody who asks: `contradiction`, `whose`.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Side = Literal["L", "R"]
TWO_PATIENTS = "Two {} under one Study Instance UID: find out whose images these are, then release or delete."


class Region(NamedTuple):
    """A part of a frame in its pixels, right and bottom excluded."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


class Spacing(NamedTuple):
    """Millimetres from one pixel to the next."""

    row: float
    column: float


@dataclass(frozen=True)
class Source:
    """One frame of one instance, as DICOM addresses it. Frames count from 1."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    rows: int
    columns: int
    frame_number: int = 1
    frame_count: int = 1
    colour: bool = False  # stored with a colour photometric interpretation, even where it shows grey


@dataclass(frozen=True, eq=False)
class Frame:
    """One B-mode picture: the full grey frame, and where in it the tissue is."""

    source: Source
    grey: NDArray[np.uint8] = field(repr=False)  # (rows, columns) of the full source frame
    region: Region
    spacing: Spacing | None = None
    laterality: Side | None = None  # only ever as stated by the source
    step: float = 1.0  # frames of its clip from one that was looked at to the next

    @property
    def tissue(self) -> NDArray[np.uint8]:
        left, top, right, bottom = self.region
        return self.grey[top:bottom, left:right]


@dataclass(frozen=True)
class NotAnalysed:
    source: Source
    reason: str


@dataclass(frozen=True)
class Patient:
    """Who it is, as the source says; carried to the report and shown nowhere else."""

    id: str = field(default="", repr=False)
    name: str = field(default="", repr=False)
    birth_date: str = field(default="", repr=False)
    sex: str = field(default="", repr=False)
    issuer: str = field(default="", repr=False)


def contradiction(patients: Iterable[Patient]) -> str:
    """Why these are surely not one person; empty when nothing says so. What is missing contradicts nothing."""
    known = tuple(dict.fromkeys(patients))
    ids, issuers, births = ({value for value in values if value} for values in _identifiers(known))
    if len(ids) > 1:
        return TWO_PATIENTS.format("patient ids")
    if len(issuers) > 1:
        return TWO_PATIENTS.format("issuers of a patient id")
    if len(births) > 1:
        return TWO_PATIENTS.format("birth dates")
    names = sorted({name for patient in known if (name := _letters(patient.name))})  # a shorter one before its longer
    return TWO_PATIENTS.format("names") if any(not b.startswith(a) for a, b in pairwise(names)) else ""


def whose(patients: Sequence[Patient]) -> Patient:
    """The one person that these are, each of the words as the first says it who carries the id; the others after."""
    known = sorted(patients, key=lambda patient: not patient.id)
    said = {each.name: [getattr(patient, each.name) for patient in known] for each in fields(Patient)}
    return Patient(**{name: next(filter(None, words), "") for name, words in said.items()})


def _identifiers(patients: Sequence[Patient]) -> tuple[list[str], list[str], list[str]]:
    return (
        [patient.id.strip() for patient in patients],
        [patient.issuer.strip() for patient in patients],
        [patient.birth_date.strip() for patient in patients],
    )


def _letters(name: str) -> str:
    """The first of the ways in which a name is written, without case, accents, blanks and separators."""
    plain = unicodedata.normalize("NFKD", name.partition("=")[0])
    return "".join(letter for letter in plain.casefold() if letter.isalnum())


@dataclass(frozen=True)
class Header:
    """The study's own words, needed on every object that answers it."""

    study_date: str = ""
    study_time: str = ""
    accession_number: str = field(default="", repr=False)
    study_id: str = field(default="", repr=False)
    description: str = field(default="", repr=False)
    referring_physician: str = field(default="", repr=False)


@dataclass(frozen=True)
class Scanner:
    manufacturer: str = ""
    model: str = ""
    station: str = ""


def evidence_digest(received: Iterable[tuple[str, str]]) -> str:
    """Of SOP Instance UIDs with the SHA-256 of what was received under them; their order does not matter."""
    lines = "\n".join(f"{uid} {sha}" for uid, sha in sorted(received))
    return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class Study:
    uid: str
    patient: Patient
    header: Header
    scanner: Scanner
    frames: tuple[Frame, ...]
    not_analysed: tuple[NotAnalysed, ...] = ()
    received: tuple[tuple[str, str], ...] = ()  # (SOP Instance UID, SHA-256 as received) of every instance
    ref: str = ""  # the site's own opaque reference, where it keeps the study

    @property
    def evidence_digest(self) -> str:
        """Names exactly what was received: the same bytes always give the same results."""
        return evidence_digest(self.received)

    @property
    def images(self) -> tuple[Source, ...]:
        """Every frame that was looked at or left out, in the order received."""
        return (*(frame.source for frame in self.frames), *(left.source for left in self.not_analysed))


@dataclass(frozen=True)
class NotForUs:
    """Nothing here is breast B-mode ultrasound that we can read; the answer is the reason."""

    study_uid: str
    reason: str
    not_analysed: tuple[NotAnalysed, ...] = ()
    received: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Held:
    """Nobody can say whose images these are: a person decides, and until then nothing is said of them."""

    study_uid: str
    reason: str
    received: tuple[tuple[str, str], ...] = ()
