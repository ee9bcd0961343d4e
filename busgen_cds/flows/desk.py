"""Where work is asked for: any process of the site may ask; a worker does it.

Rules:
- Asking twice for the same thing is asking once: workflows are named by what they are about and by the attempt.
- What is said here is a hint that something is to do. What is to do stands in our own database, so that whatever a
  crash swallows is asked for again by the next sweep.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DebouncerClient, Serializer

from busgen_cds.dicom.commitment import Commitment
from busgen_cds.flows.services import Waits
from busgen_cds.store.deliveries import Delivery
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.jobs import Job, Jobs
from busgen_cds.store.results import Results
from busgen_cds.study import Patient

APPLICATION = "busgen-cds"
SHAPE = "1"  # of the workflows: a new one when their steps change, so that none is recovered into other steps
COMPLETE, READ, DELIVER = "complete", "read", "deliver"
# The workflows' names, as they stand in DBOS's database.
COMPLETE_STUDY, READ_STUDY, DELIVER_RESULT = "complete_study", "read_study", "deliver_result"
WAKES_EARLY = 1.2  # DBOS looks once a second for delayed workflows; the rest of a silence is waited for exactly

STATED = "stated"  # in place of the evidence's digest, which the word changes as it is written

ACTIVE = ("PENDING", "ENQUEUED", "DELAYED")
_GAVE_UP = "MAX_RECOVERY_ATTEMPTS_EXCEEDED"


class Words(Serializer):
    """References and short words as JSON: nothing in the engine's database is ever run when it is read."""

    def serialize(self, data: Any) -> str:
        if isinstance(data, BaseException):
            return json.dumps({"raised": type(data).__name__})  # its message may quote a name
        return json.dumps(data)

    def deserialize(self, serialized_data: str) -> Any:
        data = json.loads(serialized_data)
        if isinstance(data, dict) and set(data) == {"raised"}:
            return RuntimeError(data["raised"])
        return data

    def name(self) -> str:
        return "busgen_cds_words"


def prepare(url: str) -> None:
    """Create or migrate the workflow engine's own database."""
    address = sa.make_url(url)
    if address.get_backend_name() == "sqlite" and address.database:
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(address.database, timeout=30)
        try:
            connection.execute("PRAGMA journal_mode=WAL")  # readers and a writer at once; it stays with the file
        finally:
            connection.close()
    DBOS.migrate(url)


class Desk:
    def __init__(self, url: str, results: Results, jobs: Jobs, waits: Waits) -> None:
        self._url, self.results, self.jobs, self.waits = url, results, jobs, waits
        self.deliveries = results.deliveries
        self._client: DBOSClient | None = None
        self._opening = threading.Lock()

    @property
    def client(self) -> DBOSClient:
        with self._opening:
            if self._client is None:
                self._client = DBOSClient(
                    system_database_url=self._url, application_name=APPLICATION, serializer=Words()
                )
            return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.destroy()
            self._client = None

    # -- reading -----------------------------------------------------------------------------------------------------

    def arrived(self, study_ref: str, quiet_seconds: float | None = None) -> None:
        """Something of this study came: it is looked at when it has been quiet for so long."""
        quiet = self.waits.silence if quiet_seconds is None else quiet_seconds
        options: Any = {"workflow_name": COMPLETE_STUDY, "queue_name": COMPLETE, "app_version": SHAPE}
        debouncer = DebouncerClient(self.client, options)
        debouncer.debounce(study_ref, max(0.0, quiet - WAKES_EARLY), study_ref, quiet)

    def association_closed(self, study_refs: Iterable[str]) -> None:
        """Whoever sent these has hung up: less silence is needed."""
        for study_ref in study_refs:
            self.arrived(study_ref, min(self.waits.after_close, self.waits.silence))

    def read(self, study_ref: str, evidence_digest: str) -> str:
        """Have this evidence read, unless that is under way, parked, or not to be."""
        if self.jobs.engine_stopped() is not None:
            return "engine stopped"
        job = self.jobs.begin(study_ref, evidence_digest)
        known = self.results.current(study_ref)
        if known and known.evidence_digest == evidence_digest:  # kept between the asking and the beginning
            self.jobs.drop(study_ref, evidence_digest)
            return "read already"
        while job.state != "parked":
            name = _name_of_reading(job)
            status = self._status(name)
            if status is None:
                self._ask(READ_STUDY, READ, name, study_ref, evidence_digest, job.attempt)
                return "asked"
            if status in ACTIVE:
                return "under way"
            if status == _GAVE_UP:
                self.jobs.park(
                    study_ref,
                    evidence_digest,
                    "Reading it ended the worker again and again: look at its log, then retry.",
                )
                return "parked"
            job = self.jobs.another_attempt(job)
        return "parked"

    def under_way(self, jobs: Iterable[Job]) -> set[str]:
        """Which of these studies are being read, or are in the queue for it."""
        names = {_name_of_reading(job): job.study_ref for job in jobs}
        active: set[str] = set()
        for chunk in _chunks(sorted(names)):
            found = self.client.list_workflows(
                workflow_ids=chunk, status=list(ACTIVE), load_input=False, load_output=False
            )
            active |= {names[each.workflow_id] for each in found}
        return active

    def has_work(self, worker: str) -> bool:
        """Has it taken up workflows that are not at their end?"""
        mine = self.client.list_workflows(
            executor_id=worker, status="PENDING", limit=1, load_input=False, load_output=False
        )
        return bool(mine)

    def forget(self, ended_before: datetime) -> int:
        """Drop workflows that ended long ago from the engine's database: what they did stands in ours."""
        ended = self.client.list_workflows(
            completed_before=ended_before.isoformat(), limit=1000, load_input=False, load_output=False
        )
        self.client.delete_workflows([each.workflow_id for each in ended])
        return len(ended)

    def read_later(self, study_ref: str, evidence_digest: str, after_seconds: float) -> None:
        """Another attempt at the same evidence, after a transient failure; newer evidence has a job of its own."""
        job = self.jobs.of(study_ref)
        if job is None or job.evidence_digest != evidence_digest:
            return
        again = self.jobs.another_attempt(job)
        name = _name_of_reading(again)
        self._ask(READ_STUDY, READ, name, study_ref, evidence_digest, again.attempt, delay_seconds=after_seconds)

    # -- delivering --------------------------------------------------------------------------------------------------

    def deliver(self, delivery: Delivery, *, after_seconds: float = 0.0) -> str:
        name = _name(delivery)
        status = self._status(name)
        if status is None:
            self._ask(DELIVER_RESULT, DELIVER, name, delivery.ref, delivery.tries, delay_seconds=after_seconds)
            return "asked"
        if status in ACTIVE:
            return "under way"
        if status == _GAVE_UP:
            self.deliveries.move(
                delivery, "parked", reason="Delivering it ended the worker again and again: then retry."
            )
            return "parked"
        if self.deliveries.move(delivery, delivery.state, reason=delivery.reason, next_try_at=delivery.next_try_at):
            moved = self.deliveries.get(delivery.ref)
            return self.deliver(moved, after_seconds=after_seconds) if moved else "gone"
        return "overtaken"

    def hasten(self, deliveries: Iterable[Delivery]) -> None:
        for each in deliveries:
            self.client.set_workflow_delay(_name(each), delay_seconds=0)

    def committed(self, word: Commitment, is_from: Callable[[str], bool]) -> bool:
        """A PACS's word on what it got from us, heard on an association of its own; `is_from` says whether that was
        opened by the node of a name. False: it was not by the one that was asked, and nothing is believed."""
        asked = self.deliveries.by_transaction(word.transaction_uid)
        if asked is None:
            return True
        if not is_from(asked.destination):
            return False
        wait = self.waits.retry(asked.tries)
        again_at = datetime.now(UTC) + timedelta(seconds=wait)
        delivery = self.deliveries.heard(word.transaction_uid, word.kept, word.failed, again_at=again_at)
        if delivery is not None and delivery.state == "waiting":
            self.deliver(delivery, after_seconds=wait)
        return True

    # -- an operator's verbs -----------------------------------------------------------------------------------------

    def retry(self, study_ref: str, *, who: str) -> list[str]:
        """Take up again what is stuck for this study; says what was."""
        taken = []
        job = self.jobs.retry(study_ref, who=who)
        if job is not None:
            self.read(study_ref, job.evidence_digest)
            taken.append("reading")
        elif study_ref in self.results.unread(settled_before=datetime.now(UTC)) and self.jobs.of(study_ref) is None:
            self.arrived(study_ref, 0.0)
            taken.append("reading")
        for delivery in self.deliveries.retry(study_ref, who=who):
            self.deliver(delivery)
            taken.append(f"delivery to {delivery.destination}")
        return taken

    def release(self, inbox: Inbox, study_ref: str, *, who: str, patient: Patient | None = None) -> None:
        """Let a held study go on: it is read if it was not, and what waits for it is sent. With the images of two
        patients under it, as the study of the one who is stated."""
        if patient is not None:  # a word adds no image by which a sweep would see that there is something to read
            self.jobs.begin(study_ref, STATED)
        inbox.release(study_ref, who, patient)
        for delivery in self.deliveries.retry(study_ref, who=who):
            self.deliver(delivery)
        self.arrived(study_ref, 0.0)

    def resume(self, *, who: str) -> bool:
        """Use the engine again, after what stopped it was put right; the next sweep puts to work what was left."""
        return self.jobs.resume_engine(who=who)

    def resend(self, result_ref: str, *, who: str, destination: str | None = None) -> list[str]:
        """Send a result's objects again, byte for byte."""
        deliveries = self.deliveries.resend(result_ref, who=who, destination=destination)
        for delivery in deliveries:
            self.deliver(delivery)
        return [delivery.destination for delivery in deliveries]

    # -- inside ------------------------------------------------------------------------------------------------------

    def _status(self, name: str) -> str | None:
        found = self.client.list_workflows(workflow_ids=[name], load_input=False, load_output=False)
        return found[0].status if found else None

    def _ask(self, workflow: str, queue: str, name: str, *arguments: Any, delay_seconds: float = 0.0) -> None:
        options: Any = {
            "workflow_name": workflow, "queue_name": queue, "workflow_id": name, "app_version": SHAPE,
        }  # fmt: skip
        if delay_seconds > 0:
            options["delay_seconds"] = delay_seconds
        self.client.enqueue(options, *arguments)


def _name_of_reading(job: Job) -> str:
    return f"read-{job.study_ref}-{job.evidence_digest[:16]}-{job.attempt}"


def _chunks(names: list[str], size: int = 500) -> Iterable[list[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))


def _name(delivery: Delivery) -> str:
    return f"deliver-{delivery.ref}-{delivery.tries}"
