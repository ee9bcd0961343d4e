"""What waits and what is stuck, with the reason and the verb that takes it on: the same list for command line and page.

Rules:
- Whatever was received and has not reached its end is in this list, and who was refused at the door lately.
- Stuck means that it will not go on by itself. Every stuck entry has a reason that an operator can act on.
- A study that was received and is not being read long after its last image is stuck, whatever the cause.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from busgen_cds.store.inbox import Inbox, Quarantined
from busgen_cds.store.jobs import Jobs
from busgen_cds.store.refusals import Refused
from busgen_cds.store.results import Results

What = Literal["engine", "study", "delivery", "object", "instance", "result", "association"]
Verb = Literal["", "retry", "release", "resume"]
UNREAD = timedelta(minutes=10)  # after its last image; the longest that an image is waited for is a minute


@dataclass(frozen=True)
class Item:
    what: What
    ref: str  # of the study; of the instance in quarantine; empty for the engine
    state: str
    reason: str
    since: datetime | None
    stuck: bool
    verb: Verb = ""
    destination: str = ""
    tries: int = 0
    next_try_at: datetime | None = None


def items(inbox: Inbox, results: Results, jobs: Jobs, *, now: datetime, refused: Iterable[Refused] = ()) -> list[Item]:
    """Stuck first (the engine before all), then what waits, each oldest first."""
    found = [
        *_engine(jobs),
        *_studies(inbox, results, jobs, now),
        *_deliveries(results),
        *_objects(results),
        *_instances(inbox),
        *_alarms(results),
        *(Item("association", "", "refused", each.sentence(), each.last_at, True) for each in refused),
    ]
    return sorted(found, key=lambda item: (not item.stuck, item.what != "engine", item.since or now))


def _engine(jobs: Jobs) -> list[Item]:
    reason = jobs.engine_stopped()
    return [Item("engine", "", "stopped", reason, None, True, "resume")] if reason is not None else []


def _studies(inbox: Inbox, results: Results, jobs: Jobs, now: datetime) -> list[Item]:
    held = dict(inbox.held_studies())
    rows = [Item("study", ref, "held", why, None, True, "release") for ref, why in held.items()]
    known = set(held)
    for job in jobs.all():
        stuck = job.state == "parked"
        if job.study_ref not in known:
            state = "parked" if stuck else "reading"
            rows.append(
                Item(
                    "study",
                    job.study_ref,
                    state,
                    job.reason,
                    job.since,
                    stuck,
                    "retry" if stuck else "",
                    "",
                    job.attempt,
                )
            )
            known.add(job.study_ref)
    unread = results.unread(settled_before=now)
    reason = "It was received and is not being read: look whether a worker runs and the engine goes, then retry."
    return rows + [
        Item("study", ref, "unread", reason, None, True, "retry")
        if last < now - UNREAD
        else Item("study", ref, "receiving", "", None, False)
        for ref, last in unread.items()
        if ref not in known
    ]


def _deliveries(results: Results) -> list[Item]:
    return [
        Item(
            "delivery",
            each.study_ref,
            "parked" if each.state == "parked" else "delivering",
            each.reason,
            each.since,
            each.state == "parked",
            "retry" if each.state == "parked" else "",
            each.destination,
            each.tries,
            None if each.state == "parked" else each.next_try_at,
        )
        for each in (*results.deliveries.parked(), *results.deliveries.under_way())
    ]


def _objects(results: Results) -> list[Item]:
    return [
        Item(
            "object",
            delivery.study_ref,
            "refused",
            f"{each.kind}: {each.reason}",
            each.at,
            True,
            "retry",
            each.destination,
        )
        for delivery, each in results.deliveries.refused()
    ]


def _whence(each: Quarantined) -> str:
    return f"from {each.calling_ae}" + (f", {each.times} times" if each.times > 1 else "")


def _instances(inbox: Inbox) -> list[Item]:
    rows = [
        Item("instance", each.ref, "quarantined", f"{each.reason} ({_whence(each)})", each.received_at, True)
        for each in inbox.quarantined()
    ]
    return rows + [
        Item(
            "instance",
            each.study_ref,
            "set aside",
            f"Other content under a known SOP Instance UID (from {each.calling_ae}).",
            each.received_at,
            True,
        )
        for each in inbox.conflicts()
    ]


def _alarms(results: Results) -> list[Item]:
    """A fallen category stays in sight while it is the current result."""
    return [Item("result", each.study_ref, "alarm", each.alarm, each.made_at, True) for each in results.alarms()]
