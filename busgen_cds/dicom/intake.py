"""The instances of one study → a Study of B-mode frames, or the reason why it is not for us, or why it is held.

Rules:
- Every instance is answered for: its frames are read, or it stands in `not_analysed` with its reason.
- One damaged instance never stops the others.
- The answer depends on what was received, not on the order in which it came.
- Our own objects that come back are neither read nor counted, or each answer would ask for another.
- Two patients under one study: nothing is read, and the study is held.
- Whose it is, is said by all instances together; an instance without an id never says it for the others.

Only a study too large to be held at once makes the order matter: give its instances in the same order each time.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from busgen_cds.dicom import colour, decode, region, relevance
from busgen_cds.dicom.decode import Frames, Opened, Unreadable
from busgen_cds.dicom.relevance import text
from busgen_cds.study import (
    Frame,
    Header,
    Held,
    NotAnalysed,
    NotForUs,
    Patient,
    Region,
    Scanner,
    Side,
    Source,
    Spacing,
    Study,
    contradiction,
    whose,
)

MAX_SAMPLED = 96  # frames of one clip, spread evenly
MAX_HELD = 384 << 20  # bytes of grey frames in one study
ANOTHER = "left out: it does not carry the patient id that a person stated for this study"
NONE_OF_THEIRS = "No image under this study carries the patient id that was stated: state another, or delete the study."
NOBODYS = Source("", "", "", 0, 0)  # so that no report refers to another patient's image
COLOURED = "colour over the tissue: Doppler or elastography, not B-mode"

Said = Frame | NotAnalysed
Tissue = tuple[Region, Spacing | None]


class _Owner(NamedTuple):
    patient: Patient
    header: Header
    scanner: Scanner


def study(instances: Iterable[tuple[bytes, str]], stated: Patient | None = None) -> Study | NotForUs | Held:
    """Whole files of one study, each with the SHA-256 of what was received; `stated`: whose it is by a person's word,
    after which only images that carry the same id are read."""
    desk = _Desk(stated)
    for data, sha256 in instances:
        desk.take(data, sha256)
    return desk.answer()


@dataclass
class _Desk:
    """What has been read so far."""

    stated: Patient | None
    said: list[tuple[tuple[int, int, str, int], Said]] = field(default_factory=list, repr=False)
    received: dict[str, str] = field(default_factory=dict)  # SHA-256 → SOP Instance UID
    owners: dict[str, _Owner] = field(default_factory=dict, repr=False)  # by SOP Instance UID
    uids: set[str] = field(default_factory=set)
    held: int = 0

    def take(self, data: bytes, sha256: str) -> None:
        if sha256 in self.received:
            return
        source, order = Source("", "", "", 0, 0), (0, 0)
        try:
            opened = decode.open_file(data)
            if relevance.is_ours(opened.header):
                return
            source, order = _source(opened.header), _order(opened.header)
            said = self._read(opened, source)
        except Unreadable as reason:
            said = [NotAnalysed(source, str(reason))]
        except Exception as broken:  # noqa: BLE001 - a damaged data set may raise anything, and stops no other
            said = [NotAnalysed(source, f"damaged: it cannot be read ({type(broken).__name__})")]
        self.received[sha256] = source.sop_instance_uid
        self.said += [((*order, one.source.sop_instance_uid or sha256, one.source.frame_number), one) for one in said]

    def _read(self, opened: Opened, source: Source) -> list[Said]:
        if not source.sop_instance_uid or not text(opened.header, "StudyInstanceUID"):
            return [NotAnalysed(source, "it does not say its SOP Instance UID and Study Instance UID")]
        if source.sop_instance_uid in self.owners:
            return [NotAnalysed(source, "the same SOP Instance UID as another image, with other content")]
        self.uids.add(text(opened.header, "StudyInstanceUID"))
        owner = _owner(opened.header)
        if self.stated is not None and not _same(owner.patient, self.stated):
            return [NotAnalysed(NOBODYS, ANOTHER)]
        self.owners[source.sop_instance_uid] = owner
        if contradiction(owner.patient for owner in self.owners.values()):
            return []
        said = list(_pictures(opened, source, MAX_HELD - self.held))
        self.held += sum(
            frame.grey.nbytes for frame in {id(one.grey): one for one in said if isinstance(one, Frame)}.values()
        )
        return said

    def answer(self) -> Study | NotForUs | Held:
        if len(self.uids) > 1:
            raise ValueError("instances of several studies were given as one")
        uid = next(iter(self.uids), "")
        said = [one for _, one in sorted(self.said, key=lambda pair: pair[0])]
        received = tuple(sorted((sop, sha256) for sha256, sop in self.received.items()))
        held = contradiction(owner.patient for owner in self.owners.values())
        if self.stated is not None and not self.owners:
            held = NONE_OF_THEIRS
        if held:
            return Held(uid, held, received)
        frames = tuple(one for one in said if isinstance(one, Frame))
        left = tuple(one for one in said if isinstance(one, NotAnalysed))
        if not frames:
            return NotForUs(uid, _summary(left), left, received)
        order = [one.source.sop_instance_uid for one in frames] + [one.source.sop_instance_uid for one in left]
        owners = [self.owners[name] for name in dict.fromkeys(order) if name in self.owners]
        _, header, scanner = self.owners[frames[0].source.sop_instance_uid]
        return Study(uid, whose([owner.patient for owner in owners]), header, scanner, frames, left, received)


def _pictures(opened: Opened, source: Source, room: int) -> Iterator[Said]:
    """Every frame of an instance: read, or left out with the reason."""
    refused = relevance.refusal(opened.header)
    if refused:
        yield NotAnalysed(source, refused)
        return
    shape = decode.shape(opened)
    source = dataclasses.replace(
        source, rows=shape.rows, columns=shape.columns, frame_count=shape.frames, colour=shape.colour
    )
    stated = region.stated(opened.header, shape.rows, shape.columns)
    refused = _not_b_mode(stated)
    if refused:
        yield NotAnalysed(source, refused)
        return
    frames = Frames(opened, shape)
    sampled = _sample(frames.available, room // (shape.rows * shape.columns))
    step = (frames.available - 1) / (len(sampled) - 1) if len(sampled) > 1 else 1.0
    clip = _Clip(frames, region.readable(stated), relevance.laterality(opened.header), step)
    for number in range(1, shape.frames + 1):
        here = dataclasses.replace(source, frame_number=number)
        if number - 1 in sampled:
            yield from clip.read(here)
        elif number > clip.frames.available:
            yield NotAnalysed(here, "the pixel data end before this frame is whole")
        else:
            yield NotAnalysed(here, f"not sampled: {len(sampled)} of {shape.frames} frames of this clip are read")


def _not_b_mode(stated: region.Stated) -> str | None:
    if stated.heart_trace:
        return "not a breast: it carries an ECG"
    if stated.curve:
        return f"{stated.curve}: not B-mode"
    if stated.flow and not region.readable(stated):
        return "colour Doppler: not B-mode"
    return None


def _sample(available: int, room: int) -> set[int]:
    """Indices spread evenly from the first frame to the last; a clip takes at most half of the room that is left."""
    count = min(available, MAX_SAMPLED, room if available == 1 else room // 2)
    return {int(i) for i in np.rint(np.linspace(0, available - 1, count))} if count > 0 else set()


@dataclass
class _Clip:
    """The frames of one instance; where the tissue is holds for all of them."""

    frames: Frames
    stated: tuple[Tissue, ...]
    laterality: Side | None
    step: float
    tissue: tuple[Tissue, ...] = ()

    def read(self, source: Source) -> Iterator[Said]:
        try:
            picture = self.frames.decode(source.frame_number - 1)
        except Unreadable as reason:
            yield NotAnalysed(source, str(reason))
            return
        except Exception as broken:  # noqa: BLE001 - a codec may raise anything on damaged data
            yield NotAnalysed(source, f"damaged: the frame cannot be decoded ({type(broken).__name__})")
            return
        strong = colour.coloured(picture)
        self.tissue = self.tissue or self._find(picture.grey)
        clear = [pair for pair in self.tissue if not colour.covers(strong, pair[0])]
        shown = [pair for pair in clear if not region.is_sector(picture.grey, pair[0])]
        if not shown:
            yield NotAnalysed(source, _why_nothing(self.tissue, clear))
        grey = colour.without_marks(picture.grey, strong, [box for box, _ in shown])
        for box, spacing in shown:
            yield Frame(source, grey, box, spacing, self.laterality, self.step)

    def _find(self, grey: NDArray[np.uint8]) -> tuple[Tissue, ...]:
        spacing = region.spacing_of_frame(self.frames.opened.header)
        if not self.stated:
            return tuple((box, spacing) for box in region.found(grey))
        trimmed = [(region.trimmed(grey, box), own) for box, own in self.stated]
        return tuple((box, own or spacing) for box, own in trimmed if box is not None)


def _why_nothing(tissue: Sequence[Tissue], clear: Sequence[Tissue]) -> str:
    if not tissue:
        return "no tissue is seen in it"
    return "not a breast: the sector of a curved or phased probe" if clear else COLOURED


def _same(patient: Patient, stated: Patient) -> bool:
    return bool(patient.id) and not contradiction([patient, stated])


def _summary(left: Sequence[NotAnalysed]) -> str:
    if not left:
        return "no image was received"
    counts = Counter(one.reason for one in left).most_common(3)
    return "; ".join(f"{reason} ({count})" if len(left) > 1 else reason for reason, count in counts)


def _source(header: Dataset) -> Source:
    return Source(text(header, "SOPClassUID"), text(header, "SOPInstanceUID"), text(header, "SeriesInstanceUID"), 0, 0)


def _order(header: Dataset) -> tuple[int, int]:
    def number(name: str) -> int:
        digits = text(header, name)
        return int(digits) if digits.isdigit() and len(digits) < 12 else 0

    return number("SeriesNumber"), number("InstanceNumber")


def _owner(header: Dataset) -> _Owner:
    """Whose study this is and what took it, in the header's own words."""
    patient = Patient(
        id=text(header, "PatientID"),
        name=text(header, "PatientName"),
        birth_date=text(header, "PatientBirthDate"),
        sex=text(header, "PatientSex"),
        issuer=text(header, "IssuerOfPatientID"),
    )
    said = Header(
        study_date=text(header, "StudyDate"),
        study_time=text(header, "StudyTime"),
        accession_number=text(header, "AccessionNumber"),
        study_id=text(header, "StudyID"),
        description=text(header, "StudyDescription"),
        referring_physician=text(header, "ReferringPhysicianName"),
    )
    scanner = Scanner(text(header, "Manufacturer"), text(header, "ManufacturerModelName"), text(header, "StationName"))
    return _Owner(patient, said, scanner)
