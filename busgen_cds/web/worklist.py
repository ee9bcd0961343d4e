"""The worklist page: who is to be looked at first, how far each study is, and what is stuck.

The table is a part of its own: the page loads it at first, at each filter, and whenever something changed.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from starlette.responses import Response

from busgen_cds.birads import CATEGORIES
from busgen_cds.store.people import Person
from busgen_cds.store.worklist import STAGES, VIEWS, Row, View
from busgen_cds.web import auth, render
from busgen_cds.web.front import Front

PAGE = 50
MOST_STUCK = 5
SAID = (*reversed(CATEGORIES), "declined", "none", "not-for-us")
Identifier = Annotated[str, Form(max_length=64)]
_SAID_NAMES = {"declined": "Not analysed", "none": "No lesion found", "not-for-us": "Not for us"}

router = APIRouter()


@router.get("/worklist")
def show(
    request: Request,
    view: View = "unread",
    said: str = "",
    search: Annotated[str, Query(max_length=128)] = "",
    offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
    person: Person = auth.page("studies.read"),
) -> Response:
    values = _values(auth.front_of(request), view, said if said in SAID else "", search.strip(), offset)
    part = bool(request.headers.get("hx-request"))
    return render.page(request, "worklist_rows.html" if part else "worklist.html", {**values, "part": part})


@router.post("/studies/{study_ref}/retry")
def retry(
    request: Request,
    study_ref: str,
    patient: Identifier = "",
    issuer: Identifier = "",
    person: Person = auth.page("studies.retry"),
) -> Response:
    """`patient` and `issuer`: of a study of two patients, the one whose it is."""
    front = auth.front_of(request)
    row = front.caught_up().row(study_ref)
    taken = front.take_up(row, person, patient, issuer) if row else []
    said = f"Taken up again: {', '.join(taken)}." if taken else "It is not stuck any more."
    return Response(said, headers={"HX-Trigger": "changed"}, media_type="text/plain")


def _values(front: Front, view: View, said: str, search: str, offset: int) -> dict[str, Any]:
    worklist = front.caught_up()
    rows = worklist.rows(view, said=said, search=search, limit=PAGE + 1, offset=offset)
    stuck = worklist.rows("stuck", limit=MOST_STUCK) if view == "unread" and not (said or search or offset) else []
    shown = rows[:PAGE]
    return {
        "rows": shown,
        "stuck": stuck,
        "shared": worklist.two_patients([row.study_ref for row in (*shown, *stuck) if row.stuck == "held"]),
        "patients": worklist.patients([row.study_ref for row in (*shown, *stuck)]),
        "counts": worklist.counts(),
        "view": view,
        "views": VIEWS,
        "said": said,
        "all_said": [(each, _SAID_NAMES.get(each, each)) for each in SAID],
        "search": search,
        "offset": offset,
        "next_offset": offset + PAGE if len(rows) > PAGE else None,
        "previous_offset": max(0, offset - PAGE) if offset else None,
        "stages": STAGES,
        "stuck_words": STUCK_WORDS,
        "waited": _waited,
        "order": front.site.triage.words,
    }


STUCK_WORDS = {"held": "Held", "reading": "Not read", "delivery": "Not delivered"}


def _waited(row: Row, now: Any) -> float:
    """Seconds since the last image came, until somebody read it."""
    return max(0.0, ((row.word_at or now) - row.last_received_at).total_seconds())
