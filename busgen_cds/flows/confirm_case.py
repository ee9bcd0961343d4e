"""A Result, and what readers, final reports and pathology say of it, become Cases; doubts and conflicts are shown.

Rules:
- A case holds nothing but the de-identified tissue, the lesion's outline if a reader agreed with it or drew it, what it
  truly is, who said so, when, and which bundle had said what.
- Doing it again changes nothing, and opens no image of a case that stands on the same grounds. When what is known
  changes, the case is replaced; what is in doubt again is none, nor is what a newer revision no longer shows. A study
  that was let go keeps its cases as they are.
- A case has a patient: without an id nobody can say whether those who teach and those who test are the same person.
- Nothing is guessed: `truth` decides, and every finding without a case has its reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from busgen_cds import truth
from busgen_cds.case import Case, Pathology
from busgen_cds.dicom import deidentify, intake, radiologist
from busgen_cds.dicom.deidentify import Pseudonyms
from busgen_cds.errors import Shredded
from busgen_cds.result import Assessed, BundleName, Finding
from busgen_cds.store.casebook import Casebook
from busgen_cds.store.cases import WHOLE_STUDY, Cases, Contour, Said
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.results import Results
from busgen_cds.study import Frame, Region, Source, Study
from busgen_cds.truth import Conflict, Known, Open, Opinion

WHO = "case maker"
SHAPE = 1  # of a case: one more when the same words come to make another one


@dataclass(frozen=True)
class Stations:
    inbox: Inbox
    results: Results
    words: Cases
    book: Casebook


@dataclass(frozen=True)
class Outcome:
    """What became of a finding; number 0: the study as a whole."""

    study_ref: str
    finding: int
    found: Known | Open | Conflict
    changed: bool = False  # a case was kept, replaced or dropped just now


@dataclass(frozen=True)
class _Said:
    """Everything that is known of one study."""

    study_ref: str
    revision: int
    answer: Assessed
    words: dict[int, Said]
    pathology: tuple[Pathology, ...]
    final: str | None
    proven_on: str  # ISO date of what was reported, where anything was

    @property
    def standing(self) -> int:
        rejected = sum(said.word.word == "reject" for number, said in self.words.items() if number != WHOLE_STUDY)
        return len(self.answer.findings) - rejected

    def opinion(self, number: int) -> Opinion | None:
        said = self.words.get(number)
        if said is None:
            return None
        own = self.answer.findings[number - 1].birads if number else self.answer.birads
        return Opinion(said.word.word, said.word.birads or own, said.word.reason or "")


def gather(stations: Stations, study_refs: Iterable[str] | None = None) -> list[Outcome]:
    """Make or put right the cases of these studies; of all that anything was said of, without them."""
    chosen = study_refs if study_refs is not None else sorted(_spoken_of(stations))
    return [outcome for study_ref in chosen for outcome in of_study(stations, study_ref)]


def _spoken_of(stations: Stations) -> set[str]:
    """Studies of which a reader, a final report or pathology said anything."""
    said = stations.words.studies() | stations.book.proven()
    return said | {ref for ref in stations.inbox.studies_with(radiologist.SR) - said if _reported(stations, ref)}


def _reported(stations: Stations, study_ref: str) -> bool:
    try:
        return _final(stations, study_ref)[1] is not None
    except Shredded:
        return False


def of_study(stations: Stations, study_ref: str) -> list[Outcome]:
    try:
        return _of_study(stations, study_ref)
    except Shredded:
        return []


def _of_study(stations: Stations, study_ref: str) -> list[Outcome]:
    entry = stations.results.current(study_ref)
    shown = stations.results.show(entry.ref) if entry else None
    if entry is None or shown is None:
        return []
    if not isinstance(shown.answer, Assessed):
        return _outdated(stations, study_ref, stations.book.grounds(study_ref))
    said, doubts = _known(stations, study_ref, entry.revision, shown.answer)
    numbers = range(1, len(said.answer.findings) + 1) if said.answer.findings else [WHOLE_STUDY]
    decided = {number: _decided(said, number) for number in numbers}
    made, grounds = stations.book.grounds(study_ref), {n: _grounds(said, n, found) for n, found in decided.items()}
    anew = [n for n in numbers if made.get(n) != grounds[n]]
    frames = _frames(stations, study_ref) if any(isinstance(decided[n], Known) for n in anew) else {}
    kept = [
        _kept(stations, said, n, found, grounds[n], frames) if n in anew else Outcome(study_ref, n, found)
        for n, found in decided.items()
    ]
    return doubts + _outdated(stations, study_ref, made.keys() - set(numbers)) + kept


def _grounds(said: _Said, number: int, found: Known | Open | Conflict) -> str:
    """Changes with whatever may change a case: a revision, its images and a reader's word are never rewritten."""
    word = said.words[number].ref if number in said.words else ""
    return hashlib.sha256(repr((SHAPE, said.revision, number, word, found, said.proven_on)).encode()).hexdigest()


def _outdated(stations: Stations, study_ref: str, gone: Iterable[int]) -> list[Outcome]:
    """The cases of findings that the study's newest answer does not have."""
    found = Open("a newer revision of the study's result does not show it")
    return [
        Outcome(study_ref, number, found, stations.book.drop(study_ref, number, reason=found.reason, who=WHO))
        for number in sorted(gone)
    ]


def _known(stations: Stations, study_ref: str, revision: int, answer: Assessed) -> tuple[_Said, list[Outcome]]:
    reports = stations.book.pathology_of(study_ref)
    strangers = sum(not each.same_patient for each in reports)
    doubts = []
    if strangers:
        reason = f"{strangers} pathology reports name this accession number and another patient: whose are they?"
        doubts = [Outcome(study_ref, WHOLE_STUDY, Conflict(reason))]
    mine = [each for each in reports if each.same_patient]
    words = stations.words.last_words(study_ref, revision)
    received, final = _final(stations, study_ref)
    proven, on = tuple(each.pathology for each in mine), max((each.reported_on for each in mine), default=received)
    return _Said(study_ref, revision, answer, words, proven, final, on), doubts


def _final(stations: Stations, study_ref: str) -> tuple[str, str | None]:
    """When the last verified report of the study was received, and its category."""
    categories = []
    for instance in stations.inbox.instances(study_ref):
        if instance.sop_class_uid in radiologist.SR:
            read = radiologist.read(stations.inbox.open(instance))
            if isinstance(read, radiologist.Final):
                categories.append((instance.received_at, read.birads))
    if not categories:
        return "", None
    at, category = max(categories)
    return at.date().isoformat(), category


def _decided(said: _Said, number: int) -> Known | Open | Conflict:
    opinion = said.opinion(number)
    if number == WHOLE_STUDY:
        return truth.of_study(opinion, said.pathology)
    found = truth.of_finding(opinion, said.final, said.pathology, standing=said.standing)
    if isinstance(found, Known) and found.pathology == "normal" and _shares_its_frame(said, number):
        return Open("rejected, and the frame shows another finding that stands")
    return found


def _shares_its_frame(said: _Said, number: int) -> bool:
    mine = _frame_of(said.answer.findings[number - 1].source)
    others = [f for n, f in enumerate(said.answer.findings, start=1) if n != number and not _rejected(said, n)]
    return any(_frame_of(other.source) == mine for other in others)


def _rejected(said: _Said, number: int) -> bool:
    return number in said.words and said.words[number].word.word == "reject"


FrameName = tuple[str, int]


def _frame_of(source: Source) -> FrameName:
    return source.sop_instance_uid, source.frame_number


def _frames(stations: Stations, study_ref: str) -> dict[FrameName, tuple[Frame, Study]]:
    instances = stations.inbox.instances(study_ref)
    stated = stations.inbox.stated(study_ref)
    files = ((stations.inbox.open(instance), instance.sha256) for instance in instances)
    study = intake.study(files, stated.patient if stated else None)
    if not isinstance(study, Study):
        return {}
    return {_frame_of(frame.source): (frame, study) for frame in study.frames}


def _kept(
    stations: Stations,
    said: _Said,
    number: int,
    found: Known | Open | Conflict,
    grounds: str,
    shown: dict[FrameName, tuple[Frame, Study]],
) -> Outcome:
    made = _made(stations, said, number, found, shown)
    if not isinstance(made, Case):
        dropped = stations.book.drop(said.study_ref, number, reason=made.reason, who=WHO)
        return Outcome(said.study_ref, number, made, dropped)
    who = said.words[number].word.who if number in said.words else WHO
    changed = stations.book.keep(
        made, study_ref=said.study_ref, revision=said.revision, finding=number, who=who, grounds=grounds
    )
    return Outcome(said.study_ref, number, found, changed)


def _made(
    stations: Stations,
    said: _Said,
    number: int,
    found: Known | Open | Conflict,
    shown: dict[FrameName, tuple[Frame, Study]],
) -> Case | Open | Conflict:
    if not isinstance(found, Known):
        return found
    finding = said.answer.findings[number - 1] if number else None
    source = finding.source if finding else said.answer.key_image
    frame, study = shown.get(_frame_of(source), (None, None)) if source else (None, None)
    if frame is None or study is None:
        return Open("its frame is not at hand any more")
    if not study.patient.id.strip():
        return Open("its images state no patient id: nobody can say who it is")
    return _case(stations, said, number, found, finding, frame, study)


def _case(
    stations: Stations, said: _Said, number: int, found: Known, finding: Finding | None, frame: Frame, study: Study
) -> Case:
    pseudonyms = Pseudonyms(stations.book.pseudonym_key())
    hidden = deidentify.frame(frame, pseudonyms)
    word = said.words.get(number)
    opinion = said.opinion(number)
    bundle = said.answer.bundle
    return Case(
        patient_hash=pseudonyms.patient(study.patient.id),  # one scanner may name the id's issuer, and another not
        tissue=hidden.tissue,
        mask=_mask(word, finding, found, hidden.region),
        pathology=found.pathology,
        birads=opinion.birads if opinion and found.pathology != "normal" else None,
        origin=found.origin,
        word=word.word.word if word else None,
        confirmed_on=word.at.date().isoformat() if word else said.proven_on,
        said_by=BundleName(bundle.name, bundle.version, bundle.digest),
        device=deidentify.device(study.scanner),
    )


def _mask(word: Said | None, finding: Finding | None, found: Known, region: Region) -> NDArray[np.bool_] | None:
    """The outline that a reader agreed with or drew; nobody's outline is none."""
    if word is None or finding is None or found.pathology == "normal":
        return None
    return rasterised(word.word.contour or finding.contour, region)


def rasterised(contour: Contour | Sequence[tuple[float, float]], region: Region) -> NDArray[np.bool_]:
    """A closed line in pixels of the frame as a mask of the region."""
    picture = Image.new("1", (region.width, region.height))
    ImageDraw.Draw(picture).polygon([(x - region.left, y - region.top) for x, y in contour], fill=1, outline=1)
    return np.asarray(picture, np.bool_)
