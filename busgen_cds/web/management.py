"""Operations, the record of acts and the people: what a site's own staff looks after."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, cast

import sqlalchemy as sa
from fastapi import APIRouter, Form, HTTPException, Query, Request
from markupsafe import Markup
from starlette.responses import RedirectResponse, Response, StreamingResponse

from busgen_cds.errors import Misconfigured, Transient, Untrusted
from busgen_cds.store import audit, refusals
from busgen_cds.store.audit import Act
from busgen_cds.store.database import table_of
from busgen_cds.store.inbox import QuarantineTable
from busgen_cds.store.people import RIGHTS, ROLES, Person, Role
from busgen_cds.web import auth, render
from busgen_cds.web.front import Front

ALIVE = timedelta(seconds=60)
BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0)  # seconds, of the latency histogram
MOST_QUARANTINED = 200
MOST_WAITING = 200
ACTS = 100
Text = Annotated[str, Form(max_length=256)]

_quarantine = table_of(QuarantineTable)
router = APIRouter()


# -- operations


@router.get("/operations")
def operations(request: Request, person: Person = auth.page("operations.read")) -> Response:
    values = {**operation(auth.front_of(request)), "refs": person.may("studies.read")}
    part = request.headers.get("hx-request")
    return render.page(request, "operations_state.html" if part else "operations.html", values)


@router.post("/operations/nodes/{name}/echo")
def echo(request: Request, name: str, person: Person = auth.page("operations.act")) -> Response:
    good, said = ask_node(auth.front_of(request), person, name)
    kind = "good" if good else "bad"
    at = render.local(auth.front_of(request).site.clock(), "%H:%M:%S")
    words = Markup('<span class="{}">{}</span> <span class="soft">{}</span>').format(kind, said, at)
    return Response(str(words), media_type="text/html")


@router.post("/operations/engine/resume")
def resume(request: Request, person: Person = auth.page("operations.act")) -> Response:
    auth.front_of(request).site.resume(person.name)
    return RedirectResponse("/operations", 303)


def ask_node(front: Front, person: Person, name: str) -> tuple[bool, str]:
    if name not in {node.name for node in front.site.nodes}:
        raise HTTPException(404, f"No node is called {name}.")
    try:
        said = f"answers in {front.site.echo(name) * 1000:.0f} ms"
        good = True
    except (Transient, Misconfigured, Untrusted, OSError) as failed:
        said, good = str(failed), False
    front.note(Act("node asked", person.name, name, None, {"answer": said[:500]}))
    return good, said


def operation(front: Front) -> dict[str, Any]:
    """How the site is doing."""
    now = front.site.clock()
    disk = shutil.disk_usage(front.site.folder)
    worklist = front.caught_up()
    times = worklist.answer_times(now - timedelta(days=1))
    waiting = front.jobs.all("waiting")
    stuck = worklist.rows("stuck", limit=MOST_WAITING)
    return {
        "nodes": front.site.nodes,
        "disk": disk,
        "counts": worklist.counts(),
        "waiting": waiting,
        "oldest": max(((now - job.since).total_seconds() for job in waiting), default=0.0),
        "stuck": stuck,
        "shared": worklist.two_patients([row.study_ref for row in stuck if row.stuck == "held"]),
        "deliveries": _by_destination(front),
        "alive": front.jobs.alive(within=ALIVE),
        "silent": front.jobs.silent(since=ALIVE),
        "stopped": front.jobs.engine_stopped(),
        "hours": worklist.by_hour(now - timedelta(hours=23), now),
        "answers": histogram([answer for _, answer, _ in times]),
        "answer_figures": figures([answer for _, answer, _ in times]),
        "sent": histogram([sent for _, _, sent in times if sent is not None]),
        "sent_figures": figures([sent for _, _, sent in times if sent is not None]),
        "quarantine": quarantined(front),
        "refused": [each.sentence() for each in refusals.lately(front.site.database, now)],
        "alarms": front.results.alarms(limit=20),
    }


def _by_destination(front: Front) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for each in (*front.results.deliveries.under_way(), *front.results.deliveries.parked()):
        line = found.setdefault(each.destination, {"name": each.destination, "waiting": 0, "parked": 0, "reason": ""})
        line["parked" if each.state == "parked" else "waiting"] += 1
        line["reason"] = each.reason or line["reason"]
    return sorted(found.values(), key=lambda line: str(line["name"]))


def histogram(seconds: Sequence[float]) -> list[dict[str, Any]]:
    counts = [0] * (len(BOUNDS) + 1)
    for value in seconds:
        counts[sum(value > bound for bound in BOUNDS)] += 1
    most = max(counts) or 1
    names = [f"≤ {render.span(bound)}" if bound >= 60 else f"≤ {bound:g} s" for bound in BOUNDS]
    return [
        {"name": name, "count": count, "share": count / most}
        for name, count in zip([*names, f"> {render.span(BOUNDS[-1])}"], counts, strict=True)
    ]


def figures(seconds: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(seconds)

    def at(share: float) -> float | None:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None

    return {"count": len(ordered), "median": at(0.5), "p95": at(0.95), "most": at(1.0)}


def quarantined(front: Front) -> list[Any]:
    columns = ("ref", "received_at", "calling_ae", "address", "sop_class_uid", "size", "reason")
    query = sa.select(*(_quarantine.c[name] for name in columns)).order_by(_quarantine.c.received_at.desc())
    with front.site.database.reading() as session:
        return list(session.execute(query.limit(MOST_QUARANTINED)))


# -- the record of acts


@router.get("/audit")
def record(
    request: Request,
    who: Annotated[str, Query(max_length=128)] = "",
    kind: Annotated[str, Query(max_length=64)] = "",
    patient: Annotated[str, Query(max_length=128)] = "",
    since: str = "",
    until: str = "",
    before: Annotated[int, Query(ge=0, le=1 << 62)] = 0,
    person: Person = auth.page("audit.read"),
) -> Response:
    front = auth.front_of(request)
    found = acts(front, wanted(front, who, kind, patient, since, until, before), ACTS + 1)
    values = {
        "acts": found[:ACTS],
        "more": found[ACTS - 1]["number"] if len(found) > ACTS else None,
        "who": who,
        "kind": kind,
        "patient": patient,
        "since": since,
        "until": until,
        "total": front.last_act(),
    }
    part = request.headers.get("hx-request")
    return render.page(request, "audit_rows.html" if part else "audit.html", values)


@router.post("/audit/verify")
def verify(request: Request, person: Person = auth.page("audit.read")) -> Response:
    front = auth.front_of(request)
    verdict = check_record(front, person)
    return render.page(request, "audit_verdict.html", {"verdict": verdict})


@router.get("/audit/export")
def export(
    request: Request,
    who: str = "",
    kind: str = "",
    patient: str = "",
    since: str = "",
    until: str = "",
    person: Person = auth.page("audit.read"),
) -> Response:
    front = auth.front_of(request)
    return exported(front, person, wanted(front, who, kind, patient, since, until))


def check_record(front: Front, person: Person) -> audit.Verdict:
    verdict = audit.verify(front.site.database, front.site.checkpoints())
    detail = {"entries": verdict.entries, "first_bad": verdict.first_bad, "checkpoints": verdict.checkpoints}
    front.note(Act("record verified", person.name, verdict.reason, None, detail))
    return verdict


def wanted(front: Front, who: str, kind: str, patient: str, since: str, until: str, before: int = 0) -> audit.Wanted:
    return audit.Wanted(
        who=who.strip(),
        kind=kind.strip(),
        study_refs=front.worklist.studies_of(patient.strip()) if patient.strip() else None,
        since=_day(since) if since else None,
        until=_day(until, whole=True) if until else None,
        before=before or None,
    )


def _day(text: str, *, whole: bool = False) -> datetime:
    try:
        return audit.day(text, whole=whole)
    except (ValueError, OverflowError) as broken:
        raise HTTPException(422, f"{text[:40]!r} is not a date: write 2026-01-31.") from broken


def acts(front: Front, which: audit.Wanted, limit: int) -> list[dict[str, Any]]:
    """The newest first."""
    found = audit.entries(front.site.database, which, limit=limit, newest_first=True)
    return [each.row() for each in found]


def exported(front: Front, person: Person, which: audit.Wanted) -> StreamingResponse:
    """Acts as they are hashed, oldest first, one JSON object a line. That they were read out is an act."""
    front.note(Act("record exported", person.name, ""))
    name = f'attachment; filename="acts-{front.site.clock():%Y%m%d-%H%M%S}.ndjson"'
    lines = (each.line() for each in audit.entries(front.site.database, which))
    return StreamingResponse(lines, media_type="application/x-ndjson", headers={"Content-Disposition": name})


# -- people


@router.get("/people")
def people(request: Request, person: Person = auth.page("people.manage")) -> Response:
    return _people(request)


@router.post("/people")
def add(
    request: Request,
    name: Text,
    password: Text,
    roles: Annotated[list[str], Form()] = [],  # noqa: B006 - FastAPI copies it
    person: Person = auth.page("people.manage"),
) -> Response:
    auth.front_of(request).people.add(name, password, _roles(roles), person.name)
    return RedirectResponse("/people", 303)


@router.post("/people/{name}")
def change(
    request: Request,
    name: str,
    what: Text,
    roles: Annotated[list[str], Form()] = [],  # noqa: B006
    person: Person = auth.page("people.manage"),
) -> Response:
    accounts = auth.front_of(request).people
    verbs: dict[str, Any] = {
        "roles": lambda: accounts.set_roles(name, _roles(roles), person.name),
        "disable": lambda: accounts.set_disabled(name, True, person.name),
        "enable": lambda: accounts.set_disabled(name, False, person.name),
        "unlock": lambda: accounts.unlock(name, person.name),
        "second factor off": lambda: accounts.stop_second_factor(name, person.name),
    }
    if what not in verbs:
        raise HTTPException(422, "That cannot be done to an account.")
    verbs[what]()
    return RedirectResponse("/people", 303)


def _roles(given: Sequence[str]) -> list[Role]:
    return [cast("Role", role) for role in given]


def _people(request: Request) -> Response:
    values = {"accounts": auth.front_of(request).people.accounts(), "roles": ROLES, "rights": RIGHTS}
    return render.page(request, "people.html", values)
