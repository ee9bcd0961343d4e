"""What machines ask: is it alive, may it be given work, and its figures for Prometheus.

Rules:
- /health answers as long as the process can; /ready only when every check holds, and it names those that do not.
- Neither says more than a name to who has no account. Figures need the right to read operations.
- Nothing here counts by patient, study or person.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta

import sqlalchemy as sa
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from busgen_cds.store.people import Person
from busgen_cds.store.shelf import STATES
from busgen_cds.web import auth
from busgen_cds.web.front import Front
from busgen_cds.web.management import ALIVE, BOUNDS

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter()


@router.get("/health")
def health() -> Response:
    return PlainTextResponse("alive\n")


@router.get("/ready")
def ready(request: Request) -> Response:
    failing = sorted(name for name, holds in readiness(auth.front_of(request)).items() if not holds)
    return JSONResponse({"ready": not failing, "failing": failing}, 503 if failing else 200)


def readiness(front: Front) -> dict[str, bool]:
    checks = {
        "database": lambda: front.last_act(),
        "bundle": lambda: _demand(front.bundle() is not None),
        "engine": lambda: _demand(front.jobs.engine_stopped() is None),
        "worker": lambda: _demand(bool(front.jobs.alive(within=ALIVE))),
        **front.site.checks,
    }
    return {name: _holds(check) for name, check in checks.items()}


@router.get("/metrics")
def metrics(request: Request, person: Person = auth.caller("operations.read")) -> Response:
    return PlainTextResponse("\n".join((*_lines(auth.front_of(request)), "")), media_type=PROMETHEUS)


def _lines(front: Front) -> Iterator[str]:
    now, worklist = front.site.clock(), front.caught_up()
    counts, disk = worklist.counts(), shutil.disk_usage(front.site.folder)
    bundle = front.bundle()
    yield from _gauge("busgen_up", "The pages answer.", [("", 1)])
    if bundle:
        labels = f'name="{bundle.name.name}",version="{bundle.name.version}",digest="{bundle.name.digest}"'
        yield from _gauge("busgen_bundle", "The live bundle.", [(f'{labels},provider="{bundle.provider}"', 1)])
    studies = [('state="unread"', counts.unread), ('state="read"', counts.read), ('state="stuck"', counts.stuck)]
    yield from _gauge("busgen_studies", "Studies by what a reader still has to do.", studies)
    jobs = [(f'state="{state}"', len(front.jobs.all(state))) for state in ("waiting", "parked")]
    yield from _gauge("busgen_jobs", "Jobs of reading.", jobs)
    deliveries = [
        ('state="waiting"', len(front.results.deliveries.under_way())),
        ('state="parked"', len(front.results.deliveries.parked())),
    ]
    yield from _gauge("busgen_deliveries", "Deliveries on their way, and those that wait for a person.", deliveries)
    workers = [
        ('state="alive"', len(front.jobs.alive(within=ALIVE))),
        ('state="silent"', len(front.jobs.silent(since=ALIVE))),
    ]
    yield from _gauge("busgen_workers", "Workers that say that they are alive, and those that stopped.", workers)
    yield from _gauge(
        "busgen_engine_stopped", "1: no study is read.", [("", int(front.jobs.engine_stopped() is not None))]
    )
    yield from _gauge("busgen_disk_free_bytes", "Free disk under the site's folder.", [("", disk.free)])
    yield from _gauge("busgen_disk_bytes", "Its size.", [("", disk.total)])
    yield from _gauge("busgen_quarantined", "Instances in quarantine.", [("", _quarantined(front))])
    yield from _models(front)
    yield from _gauge("busgen_acts", "Entries of the record.", [("", front.last_act())])
    times = worklist.answer_times(now - timedelta(days=1))
    yield from _histogram("busgen_answer_seconds", "Last image to answer, last day.", [t for _, t, _ in times])
    sent = [t for _, _, t in times if t is not None]
    yield from _histogram("busgen_delivery_seconds", "Last image to delivered report, last day.", sent)


def _models(front: Front) -> Iterator[str]:
    models, bundle = front.site.models, front.bundle()
    if models is None:
        return
    states = Counter(each.state for each in models.shelf.listing())
    values = [(f'state="{state}"', states[state]) for state in STATES]
    yield from _gauge("busgen_shelf", "Bundles on the shelf.", values)
    yield from _gauge(
        "busgen_live_statement", "Number of the word on what is live.", [("", models.shelf.standing().number)]
    )
    weeks = models.drift.weeks(bundle.name.digest, last=1) if bundle else []
    newest = {week.device: week for week in reversed(weeks)}
    drifts = [
        (f'device="{_label(device or "all")}",figure="{figure.name}"', figure.value)
        for device, week in sorted(newest.items())
        for figure in week.figures
    ]
    yield from _gauge("busgen_drift", "How the newest week differs from the reference.", drifts)
    alarming = sum(figure.alarming for week in newest.values() for figure in week.figures)
    yield from _gauge("busgen_drift_alarms", "Figures of the newest week that are alarming.", [("", alarming)])


def _label(text: str) -> str:
    """A scanner's own name for itself is foreign text."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


def _gauge(name: str, words: str, values: Iterable[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP {name} {words}"
    yield f"# TYPE {name} gauge"
    for labels, value in values:
        yield f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"


def _histogram(name: str, words: str, seconds: list[float]) -> Iterator[str]:
    yield f"# HELP {name} {words}"
    yield f"# TYPE {name} histogram"
    for bound in BOUNDS:
        yield f'{name}_bucket{{le="{bound:g}"}} {sum(value <= bound for value in seconds)}'
    yield f'{name}_bucket{{le="+Inf"}} {len(seconds)}'
    yield f"{name}_sum {sum(seconds):.3f}"
    yield f"{name}_count {len(seconds)}"


def _quarantined(front: Front) -> int:
    with front.site.database.reading() as session:
        return session.execute(sa.text("SELECT count(*) FROM quarantine")).scalar_one()  # type: ignore[no-any-return]


def _demand(holds: bool) -> None:
    if not holds:
        raise LookupError


def _holds(check: object) -> bool:
    try:
        check()  # type: ignore[operator]
    except Exception:  # noqa: BLE001 - whatever it is, it does not hold
        return False
    return True
