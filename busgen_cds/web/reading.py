"""The reading page: a study's frames, what was said about them, and the reader's word on each finding.

Rules:
- The page shows one revision; a word about another one is refused and says so.
- Opening a study is an act, and so is a picture of one that does not lie open.
- A picture is given only to who may read studies, and kept in no cache.
- An evidence map comes with its caption: evidence for the score, not the extent of a lesion (clinical safety 5).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import APIRouter, Form, HTTPException, Request
from starlette.responses import Response

from busgen_cds import case
from busgen_cds.result import Assessed, Declined, Finding, HeatMap
from busgen_cds.store.cases import READER_CATEGORIES, REASONS, WHOLE_STUDY, Contour, Reason, Said, Unfit, Word
from busgen_cds.store.people import Person
from busgen_cds.store.results import Entry, Shown
from busgen_cds.store.worklist import STAGES, Row
from busgen_cds.study import Patient
from busgen_cds.web import auth, render
from busgen_cds.web.front import Front
from busgen_cds.web.site import Site, Slide

router = APIRouter()


@dataclass(frozen=True)
class Open:
    """A study as it lies open: its row, the revision shown, and what was said about it."""

    row: Row
    shown: Shown | None
    history: tuple[Entry, ...]
    words: dict[int, Said]

    @property
    def findings(self) -> tuple[Finding, ...]:
        answer = self.shown.answer if self.shown else None
        return answer.findings if isinstance(answer, Assessed) else ()

    @property
    def current(self) -> bool:
        return self.shown is None or self.shown.entry.current


def open_study(front: Front, study_ref: str, revision: int | None = None) -> Open:
    row = front.caught_up().row(study_ref)
    if row is None:
        raise HTTPException(404, "There is no such study here; it may have been deleted by the site's rules.")
    history = tuple(front.results.history(study_ref))
    wanted = revision or row.revision
    entry = next((entry for entry in history if entry.revision == wanted), None)
    if revision and entry is None:
        raise HTTPException(404, f"This study has no revision {revision}.")
    shown = front.results.show(entry.ref) if entry else None
    words = front.cases.last_words(study_ref, wanted)
    return Open(row, shown, history, words)


@router.get("/studies/{study_ref}")
def show(
    request: Request, study_ref: str, revision: int | None = None, person: Person = auth.page("studies.read")
) -> Response:
    front = auth.front_of(request)
    opened = open_study(front, study_ref, revision)
    front.looked(person, study_ref, opened.shown.entry.revision if opened.shown else 0)
    return render.page(request, "reading.html", _values(front, opened, person))


@router.get("/studies/{study_ref}/stuck")
def stuck(
    request: Request, study_ref: str, revision: int, instances: int, person: Person = auth.page("studies.read")
) -> Response:
    """What holds a study up now, and whether it moved since a page was opened that showed so much of it. A page that
    showed no answer is loaded anew; one that did is told, because somebody may be drawing on it."""
    front = auth.front_of(request)
    row = front.caught_up().row(study_ref)
    if row is None or (revision == 0 and (row.revision > 0 or row.instances != instances)):
        return Response(status_code=204, headers={"HX-Refresh": "true"})
    values = {"row": row, "whose": _whose(front, study_ref), "seen": revision, "instances": instances}
    return render.page(request, "reading_stuck.html", values)


@router.get("/studies/{study_ref}/frames/{sop_instance_uid}/{frame_number}")
def frame(
    request: Request,
    study_ref: str,
    sop_instance_uid: str,
    frame_number: int,
    person: Person = auth.page("studies.read"),
) -> Response:
    return picture(auth.front_of(request), person, study_ref, sop_instance_uid, frame_number)


@router.get("/studies/{study_ref}/evidence/{revision}/{finding}")
def evidence(
    request: Request, study_ref: str, revision: int, finding: int, person: Person = auth.page("studies.read")
) -> Response:
    front = auth.front_of(request)
    entry = next((each for each in front.results.history(study_ref) if each.revision == revision), None)
    shown = front.results.show(entry.ref) if entry else None
    heat = _heat(shown.answer if shown else None, finding)
    if heat is None:
        raise HTTPException(404, "There is no evidence map for this.")
    front.pictured(person, study_ref)
    return Response(front.site.evidence(heat), media_type="image/png")


@router.post("/studies/{study_ref}/words")
def say(
    request: Request,
    study_ref: str,
    revision: Annotated[int, Form()],
    finding: Annotated[int, Form()],
    word: Annotated[str, Form(max_length=8)],
    birads: Annotated[str, Form(max_length=2)] = "",
    contour: Annotated[str, Form(max_length=100_000)] = "",
    reason: Annotated[str, Form(max_length=32)] = "",
    note: Annotated[str, Form(max_length=2000)] = "",
    person: Person = auth.page("studies.confirm"),
) -> Response:
    front = auth.front_of(request)
    opened = keep_word(front, person, study_ref, revision, finding, word, birads, contour_of(contour), reason, note)
    return render.page(request, "reading_panel.html", _values(front, opened, person))


def keep_word(
    front: Front,
    person: Person,
    study_ref: str,
    revision: int,
    finding: int,
    word: str,
    birads: str,
    contour: Contour,
    reason: str,
    note: str,
) -> Open:
    opened = open_study(front, study_ref)
    if opened.shown is None or opened.row.revision != revision:
        raise HTTPException(409, "A newer revision came while you were reading: load the page again.")
    if word not in ("agree", "edit", "reject"):
        raise Unfit("A word is agree, edit or reject.")
    _check_contour(opened, finding, contour)
    said = Word(
        study_ref,
        revision,
        finding,
        cast("case.Word", word),
        person.name,
        birads or None,
        contour,
        cast("Reason", reason) if reason else None,
        note.strip(),
    )
    front.site.confirm(said, len(opened.findings))
    return open_study(front, study_ref)


def contour_of(text: str) -> Contour:
    if not text:
        return ()
    try:
        return tuple((round(float(x), 2), round(float(y), 2)) for x, y in json.loads(text))
    except (ValueError, TypeError, OverflowError, RecursionError) as broken:
        raise Unfit("A contour is a list of points [x, y].") from broken


def _check_contour(opened: Open, finding: int, contour: Contour) -> None:
    if not contour or not 1 <= finding <= len(opened.findings):
        return
    source = opened.findings[finding - 1].source
    if not all(-0.5 <= x <= source.columns - 0.5 and -0.5 <= y <= source.rows - 0.5 for x, y in contour):
        raise Unfit("A point of the contour lies outside the frame.")


def picture(front: Front, person: Person, study_ref: str, sop_instance_uid: str, frame_number: int) -> Response:
    try:
        shown = front.site.picture(study_ref, sop_instance_uid, frame_number)
    except KeyError:
        raise HTTPException(404, "This study has no such frame.") from None
    front.pictured(person, study_ref)
    return Response(shown, media_type="image/png")


def _heat(answer: Any, finding: int) -> HeatMap | None:
    if not isinstance(answer, Assessed) or not 0 <= finding <= len(answer.findings):
        return None
    return answer.findings[finding - 1].heat if finding else answer.key_heat


def _values(front: Front, opened: Open, person: Person) -> dict[str, Any]:
    answer = opened.shown.answer if opened.shown else None
    ref = opened.row.study_ref
    patient = front.worklist.patients([ref]).get(ref, "")
    slides = front.site.slides(ref)
    return {
        "open": opened,
        "slides": slides,
        "row": opened.row,
        "answer": answer,
        "assessed": answer if isinstance(answer, Assessed) else None,
        "declined": answer if isinstance(answer, Declined) else None,
        "left_out": _left_out(answer),
        "patient": patient,
        "seen": opened.shown.entry.revision if opened.shown else 0,
        "instances": opened.row.instances,
        "whose": _whose(front, ref),
        "next": front.worklist.next_unread(after=opened.row),
        "stages": STAGES,
        "reasons": REASONS,
        "categories": READER_CATEGORIES,
        "may_say": person.may("studies.confirm") and opened.current and opened.shown is not None,
        "viewer": _viewer(front.site, opened),
        "data": _data(opened, slides),
    }


def _whose(front: Front, study_ref: str) -> dict[Patient, int]:
    return front.patients_in(study_ref) if front.worklist.two_patients([study_ref]) else {}


def _left_out(answer: Any) -> list[tuple[str, int]]:
    counted: dict[str, int] = {}
    for each in answer.not_analysed if answer else ():
        counted[each.reason] = counted.get(each.reason, 0) + 1
    return sorted(counted.items())


def _viewer(site: Site, opened: Open) -> str:
    if not site.viewer or opened.shown is None:
        return ""
    report = next((each for each in opened.shown.objects if each.kind == "sr"), None)
    series = report.series_instance_uid if report else ""
    return site.viewer.format(study_uid=opened.shown.study_uid, series_uid=series)


def _data(opened: Open, slides: Sequence[Slide]) -> dict[str, Any]:
    """What the page's script draws."""
    answer = opened.shown.answer if opened.shown else None
    key = answer.key_image if isinstance(answer, Assessed) else None
    return {
        "study": opened.row.study_ref,
        "revision": opened.shown.entry.revision if opened.shown else 0,
        "slides": [_slide(slide) for slide in slides],
        "findings": [_finding(n, each, opened.words.get(n)) for n, each in enumerate(opened.findings, 1)],
        "key": {"uid": key.sop_instance_uid, "frame": key.frame_number} if key else None,
        "keyHeat": _region(_heat(answer, WHOLE_STUDY)),
    }


def _slide(slide: Slide) -> dict[str, Any]:
    source = slide.source
    return {
        "uid": source.sop_instance_uid,
        "frames": source.frame_count,
        "rows": source.rows,
        "columns": source.columns,
        "spacing": list(slide.spacing) if slide.spacing else None,
        "seconds": slide.seconds_per_frame,
    }


def _finding(number: int, finding: Finding, said: Said | None) -> dict[str, Any]:
    edited = said.word.contour if said and said.word.word == "edit" else ()
    return {
        "number": number,
        "uid": finding.source.sop_instance_uid,
        "frame": finding.source.frame_number,
        "contour": finding.contour,
        "edited": edited,
        "rejected": bool(said and said.word.word == "reject"),
        "birads": (said.word.birads if said and said.word.birads else finding.birads),
        "heat": _region(finding.heat),
    }


def _region(heat: HeatMap | None) -> list[int] | None:
    return list(heat.region) if heat else None
