"""Cases in, a bundle on the shelf: one durable workflow for a night.

    enough new cases? → adapter → images → privacy → members → candidate → verdict → shelf

Rules:
- A night is worth it from so many new cases on; fewer are enough while a drift alarm asks for adaptation.
- Which cases teach is written down when the run begins; whatever is confirmed later waits for the next one.
- One night at a time: whoever takes up a run that another process is at waits for its stage, and goes on from there.
- A stage that was killed is begun again; what it makes is the same, so that the candidate's digest is, too.
- A candidate that the judge refuses is kept as refused, with its reasons; one that it accepts goes onto the shelf,
  signed by the night job's key. Nothing here can make it live.
- The cases' pixels lie in the run's folder only while it runs; afterwards the folder is removed, and what a run that
  never came back has left is removed by the next one.
- What a stage needs of the laboratory is handed in: nothing here knows how a network learns.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dbos import DBOS, DBOSConfig, SetWorkflowID
from dbos import error as dbos_error

from busgen_cds import signing
from busgen_cds.bundle import Candidate
from busgen_cds.errors import Misconfigured
from busgen_cds.flows import confirm_case, desk
from busgen_cds.flows.services import failed
from busgen_cds.store.casebook import Casebook, Listed
from busgen_cds.store.shelf import Shelf

log = logging.getLogger("busgen_cds.flows")

ADAPT_SITE = "adapt_site"
EXECUTOR = "night"
SHAPE = "night-1"  # of this workflow: a new one when its steps change
PLAN = "plan.json"
NIGHTLY = "adapt the site"
STAGES = ("plan", "adapter", "images", "privacy", "members", "candidate", "verdict", "shelf")


class Judged(Protocol):
    @property
    def reasons(self) -> tuple[str, ...]: ...
    @property
    def tables(self) -> tuple[Mapping[str, Any], ...]: ...


@dataclass(frozen=True)
class Recipes:
    """The laboratory's part; each takes the run's folder and leaves there what the next one reads."""

    adapter: Callable[[Path], object]
    images: Callable[[Path], object]
    privacy: Callable[[Path], object]
    members: Callable[[Path], object]
    candidate: Callable[[Path, str, str, str], Candidate]  # with name, version and date
    verdict: Callable[[Path], Judged]


@dataclass(frozen=True)
class Stations:
    cases: confirm_case.Stations
    shelf: Shelf
    signer: signing.Signer
    folder: Path  # of the runs
    write_cases: Callable[[Casebook, Sequence[Listed], Path], Path]
    recipes: Recipes
    least_new: int  # cases that teach, since the last run
    name: str
    least_new_asked: int = 0  # the same, while something asks for adaptation
    asked: Callable[[], str] = lambda: ""  # what asks for it, in words; empty: nothing
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    @property
    def book(self) -> Casebook:
        return self.cases.book


_in_use: list[Stations] = []


def use(stations: Stations | None) -> None:
    _in_use[:] = [stations] if stations else []


def _now() -> Stations:
    if not _in_use:
        raise Misconfigured("No night runs in this process.")
    return _in_use[0]


# ---- The workflow


@DBOS.workflow(name=ADAPT_SITE, max_recovery_attempts=20)
def adapt_site(run: str, anyway: bool) -> str:
    """What became of it: `shelved DIGEST`, `refused DIGEST`, `failed RUN`, or why nothing was begun."""
    with _alone():
        return _through_the_night(run, anyway)


@contextmanager
def _alone() -> Iterator[None]:
    """The engine gives a run that was not ended to every process that starts, also while its own is alive."""
    folder = os.open(_now().folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("Another process adapts here already: waiting for what it is at.")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _through_the_night(run: str, anyway: bool) -> str:
    word = _plan(run, anyway)
    if word != "planned":
        return word
    for stage in (_adapter, _images, _privacy, _members, _candidate, _verdict):
        if stage(run) != "done":
            return _give_up(run)
    if _shelf(run) != "done":
        return _give_up(run)
    return _clear_away(run)


@DBOS.step(name="plan")
def _plan(run: str, anyway: bool) -> str:
    """Freeze what teaches and what judges; the folder is there when the plan is."""
    stations, folder = _now(), _now().folder / run
    if (folder / PLAN).exists():
        return "planned"
    confirm_case.gather(stations.cases)
    every, new, asked = stations.book.listing(), stations.book.new(), stations.asked()
    teach = [each for each in every if each.part == "teach"]
    needed = min(stations.least_new, stations.least_new_asked) if asked else stations.least_new
    if not teach or (len(new) < needed and not anyway):
        return f"not enough cases: {len(new)} new ones, {needed} are asked for{f' ({asked})' if asked else ''}"
    of = signing.digest(signing.canonical(sorted(each.sha256 for each in every)))
    plan = {"on": stations.clock().date().isoformat(), "of": of, "cases": len(teach), "new": len(new), "asked": asked}
    partial = folder.with_name(f"{run}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        stations.write_cases(stations.book, every, partial / "cases")
        (partial / PLAN).write_text(json.dumps(plan), encoding="utf-8")
        if not stations.book.begin(run, teach, again=anyway):
            return "another night is under way, or has just ended"
        _clear_others(stations.folder, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return "planned"


def _clear_others(runs: Path, but: Path) -> None:
    """The pixels of runs that nobody took up again: this one is the only one under way."""
    for each in runs.iterdir():
        if each != but:
            shutil.rmtree(each, ignore_errors=True)


def _stage(name: str, work: Callable[[Stations, Path], object]) -> Callable[[str], str]:
    @DBOS.step(name=name)
    def step(run: str) -> str:
        try:
            work(_now(), _now().folder / run)
        except Exception as error:  # noqa: BLE001 - said by its type; its message may not reach the engine's tables
            reason = f"{name}: {failed(error).reason}"
            log.error("Adapting, %s", reason)
            _now().book.end(run, "failed", reason=reason)
            return "failed"
        return "done"

    return step


def _planned(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / PLAN).read_text(encoding="utf-8")))


def _make(stations: Stations, folder: Path) -> Candidate:
    plan = _planned(folder)
    return stations.recipes.candidate(folder, stations.name, f"site-{plan['on']}-{plan['of'][:6]}", plan["on"])


_adapter = _stage("adapter", lambda stations, folder: stations.recipes.adapter(folder))
_images = _stage("images", lambda stations, folder: stations.recipes.images(folder))
_privacy = _stage("privacy", lambda stations, folder: stations.recipes.privacy(folder))
_members = _stage("members", lambda stations, folder: stations.recipes.members(folder))
_candidate = _stage("candidate", _make)
_verdict = _stage("verdict", lambda stations, folder: stations.recipes.verdict(folder))


def _shelve(stations: Stations, folder: Path) -> None:
    """The candidate is put there, or kept as refused; doing it again changes nothing. What was refused stays so."""
    made, judged, plan = _make(stations, folder), stations.recipes.verdict(folder), _planned(folder)
    rows = [["cases", str(plan["cases"])], ["new", str(plan["new"])]]
    night = {"title": "The night", "rows": [*rows, *([["asked for by", plan["asked"]]] if plan["asked"] else [])]}
    report = {"tables": [*judged.tables, night]}
    if judged.reasons:
        kept = stations.shelf.refuse(made, reasons=judged.reasons, report=report)
    else:
        kept = stations.shelf.put(made, report=report, signer=stations.signer)
    refused = judged.reasons or kept.state == "refused"
    outcome, reasons = ("refused", kept.reasons or judged.reasons) if refused else ("shelved", ())
    stations.book.end(folder.name, outcome, digest=made.digest, reason="; ".join(reasons))


_shelf = _stage("shelf", _shelve)


@DBOS.step(name="clear away")
def _clear_away(run: str) -> str:
    """The run's pixels go; what became of it stands in the casebook."""
    shutil.rmtree(_now().folder / run, ignore_errors=True)
    ended = next(each for each in _now().book.adaptations() if each.ref == run)
    return f"{ended.outcome} {ended.digest}"


@DBOS.step(name="give up")
def _give_up(run: str) -> str:
    """Its reason is kept; the cases stay new, and the next night tries again."""
    shutil.rmtree(_now().folder / run, ignore_errors=True)
    return f"failed {run}"


# ---- Running it


def launch(stations: Stations, workflows_url: str) -> None:
    """The engine in this process; what was begun here and not ended goes on at once."""
    stations.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    use(stations)
    desk.prepare(workflows_url)
    logging.getLogger("dbos").setLevel(logging.WARNING)
    config: DBOSConfig = {
        "name": desk.APPLICATION,
        "system_database_url": workflows_url,
        "executor_id": EXECUTOR,
        "application_version": SHAPE,
        "log_level": "WARNING",
        "enable_otlp": False,
        "run_migrations": False,
        "serializer": Words(),
    }
    DBOS(config=config)
    DBOS.launch()


def run(*, anyway: bool = False) -> str:
    """Take up the run that was not ended, or begin one; returns what became of it."""
    unended = [
        each.workflow_id
        for each in DBOS.list_workflows(name=ADAPT_SITE, status=["PENDING", "ENQUEUED"], load_input=False)
    ]
    if unended:
        return str(DBOS.retrieve_workflow(unended[0]).get_result())
    ref = secrets.token_hex(16)
    with SetWorkflowID(f"adapt-{ref}"):
        return adapt_site(ref, anyway)


def every(cron: str) -> None:
    """At these times of a cron line, or, where it is empty, never; a night that was missed is left out."""
    if DBOS.get_schedule(NIGHTLY) is not None:
        DBOS.delete_schedule(NIGHTLY)
    if not cron:
        return
    zone = clinic_zone()
    try:
        DBOS.create_schedule(schedule_name=NIGHTLY, workflow_fn=night, schedule=cron, cron_timezone=zone)
    except dbos_error.DBOSException as wrong:
        raise Misconfigured(f"adaptation.cron is no time to adapt at: {wrong}. Write it as 0 1 * * *.") from wrong
    log.info("Adapting at the times %s, %s.", cron, zone or "UTC: this machine does not say its time zone")


def clinic_zone() -> str | None:
    """The name of this machine's time zone: a night is the clinic's night. None: it says none."""
    _, found, linked = os.path.realpath("/etc/localtime").partition("/zoneinfo/")
    name = os.environ.get("TZ", "").removeprefix(":") or (linked if found else "")
    try:
        return ZoneInfo(name).key if name else None
    except (ZoneInfoNotFoundError, ValueError):
        return None


@DBOS.workflow(name="night", max_recovery_attempts=20)
def night(scheduled: datetime, context: Any) -> None:
    log.info("Adapting: %s.", adapt_site(_named(secrets.token_hex(16)), False))


@DBOS.step(name="name")
def _named(ref: str) -> str:
    """Named once, also when the night is taken up again."""
    return ref


class Words(desk.Words):
    """As the worker's, and the time at which a night was due."""

    def serialize(self, data: Any) -> str:
        return super().serialize(data) if isinstance(data, BaseException) else json.dumps(data, default=str)


def end(wait: int = 0) -> None:
    """What is under way after so many seconds is taken up again by the next launch."""
    DBOS.destroy(workflow_completion_timeout_sec=wait)
    use(None)


def be_modest(niceness: int) -> None:
    """Whoever reads studies comes first."""
    os.nice(max(0, niceness - os.nice(0)))
