"""What an operator asks of a site, as plain documents: for the command line and the pages alike.

No document names a patient; a study is named by its opaque reference.
"""

from __future__ import annotations

from typing import Any

from busgen_cds import summary
from busgen_cds.app import Site
from busgen_cds.errors import Misconfigured
from busgen_cds.store.results import Delivered, Delivery
from busgen_cds.study import NotForUs


def queue(site: Site) -> list[dict[str, Any]]:
    """Everything that is not done: held, waiting, stuck, refused, set aside."""
    held = [_row("study", s.ref, "held", s.last_received_at, s.held) for s in site.inbox.studies() if s.held]
    jobs = [_row("study", job.study_ref, job.state, job.since, job.reason) for job in site.jobs.all()]
    waiting = [_delivery(each) for each in (*site.results.undelivered(), *site.results.parked())]
    refused = [_refused(delivery, each) for delivery, each in site.results.refused()]
    corrupt = [_row("quarantine", q.ref, q.calling_ae, q.received_at, q.reason) for q in site.inbox.quarantined()]
    aside = [
        _row("instance", c.ref, "set aside", c.received_at, "other content under a SOP Instance UID that was known")
        for c in site.inbox.conflicts()
    ]
    stopped = site.jobs.engine_stopped()
    engine = [_row("engine", "", "stopped", "", stopped)] if stopped else []
    return [*engine, *held, *jobs, *waiting, *refused, *corrupt, *aside]


def document(site: Site, result_ref: str) -> dict[str, Any]:
    """One result with its objects and their deliveries."""
    shown = site.results.show(result_ref)
    if shown is None:
        raise Misconfigured(f"There is no result {result_ref!r}: see `busgen-cds results list`.")
    uids = [each.sop_instance_uid for each in shown.objects]
    answer = shown.answer
    said = summary.of_not_for_us(answer, 0.0) if isinstance(answer, NotForUs) else summary.of_result(answer, uids)
    return {
        "result": shown.entry.ref,
        "study": shown.entry.study_ref,
        "made": shown.entry.made_at.isoformat(),
        "current": shown.entry.current,
        "alarm": shown.entry.alarm,
        **said,
        "deliveries": [
            {"destination": d.destination, "state": d.state, "tries": d.tries, "reason": d.reason}
            for d in shown.deliveries
        ],
        "delivered": [
            {"kind": d.kind, "destination": d.destination, "state": d.state, "reason": d.reason}
            for d in shown.delivered
        ],
    }


def retry(site: Site, study_ref: str, who: str) -> str:
    """Take up a study's stuck work again: its reading, or its deliveries."""
    if site.jobs.engine_stopped() is not None:
        site.jobs.resume_engine(who=who)
    job = site.jobs.retry(study_ref, who=who)
    if job is not None:
        site.desk.read(study_ref, job.evidence_digest)
        return "Its reading was put to work again."
    deliveries = site.results.retry(study_ref, who=who)
    for each in deliveries:
        site.desk.deliver(each)
    return f"{len(deliveries)} deliveries put to work again."


def release(site: Site, study_ref: str, who: str) -> str:
    """Let a held study go on."""
    site.inbox.release(study_ref, who)
    site.desk.arrived(study_ref)
    return "The study goes on."


def _row(kind: str, ref: str, state: str, since: object, reason: str | None) -> dict[str, Any]:
    when = since.astimezone().strftime("%Y-%m-%d %H:%M:%S") if hasattr(since, "astimezone") else str(since)
    return {"kind": kind, "ref": ref, "state": state, "since": when, "reason": reason or ""}


def _delivery(each: Delivery) -> dict[str, Any]:
    return _row(f"delivery to {each.destination}", each.study_ref, each.state, each.since, each.reason)


def _refused(delivery: Delivery, each: Delivered) -> dict[str, Any]:
    return _row(f"{each.kind} at {each.destination}", delivery.study_ref, "refused", each.at, each.reason)
