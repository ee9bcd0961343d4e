"""What a running site does for itself, now and then: rules of retention, checkpoints of the record, sending it on.

Rules:
- Each task may fail without stopping the others or the site; it says so in the log and is tried again.
- With several workers each task runs in one of them at a time: who has the task's lock does it.
- Done once more, each task changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from sqlalchemy.exc import NoResultFound

from busgen_cds.app import Site
from busgen_cds.dicom import audit_message, syslog
from busgen_cds.dicom.audit_message import Event, Origin
from busgen_cds.errors import Misconfigured, Shredded, Transient
from busgen_cds.settings import Settings, Syslog
from busgen_cds.store import checkpoints, forwarding
from busgen_cds.store.audit import Entry
from busgen_cds.store.retention import Applied, Kind, Letting

log = logging.getLogger("busgen_cds.operations.housekeeping")

HOUR = 3600.0


def kept_for(chosen: Settings) -> dict[Kind, timedelta]:
    """The kinds that are let go after a time."""
    said = chosen.retention
    days: dict[Kind, int] = {
        "assessed": said.assessed_days,
        "declined": said.declined_days,
        "not-for-us": said.not_for_us_days,
        "unread": said.unread_days,
        "quarantine": said.quarantine_days,
    }
    return {kind: timedelta(days=number) for kind, number in days.items() if number}


def let_go(site: Site, now: datetime | None = None) -> Applied:
    letting = Letting(site.inbox, site.database, site.vault)
    done = letting.apply(kept_for(site.settings), now or datetime.now(UTC))
    if done.studies or done.quarantined:
        log.info("Retention: %d studies and %d set-aside objects let go.", len(done.studies), len(done.quarantined))
    return done


def write_checkpoint(site: Site, now: datetime | None = None) -> None:
    """When the last one is old enough."""
    said, folder, moment = site.settings.record, site.settings.checkpoints, now or datetime.now(UTC)
    if folder is None:
        return
    last = checkpoints.newest(folder)
    if last is None or moment - last >= timedelta(hours=said.checkpoint_hours):
        key = checkpoints.signer(site.settings.path(said.key))
        log.info("Checkpoint: %s", checkpoints.export(site.database, folder, key, moment).name)


def send_record(site: Site) -> int:
    """New acts, as audit messages, to the hospital's audit repository; how many it took."""
    said = site.settings.record.syslog
    if said is None:
        return 0
    to = _server(site.settings, said)
    origin = Origin(site.settings.site.name, socket.gethostname(), site.settings.listener.ae_title)

    def send(entries: Sequence[Entry]) -> None:
        events = [_event(site, each, said.identifiers) for each in entries]
        frames = [
            syslog.frame(audit_message.message(each, origin), at=each.at, host=origin.host, process=os.getpid())
            for each in events
        ]
        syslog.send(frames, to)

    return forwarding.forward(site.database, f"{to.host}:{to.port}", send, lambda: datetime.now(UTC))


def _event(site: Site, entry: Entry, identified: bool) -> Event:
    act, uid, patient = entry.act, "", ""
    if identified and act.study_ref:
        with contextlib.suppress(Shredded, NoResultFound):  # a shredded study has no names any more
            uid, patient = site.results.identity(act.study_ref)
    return Event(
        entry.number, entry.at, act.kind, act.who, act.what, entry.hash, act.study_ref or "", uid, patient, act.detail
    )


def _server(chosen: Settings, said: Syslog) -> syslog.Server:
    certificate, key = (str(chosen.path(path)) if path else "" for path in (said.certificate, said.key))
    return syslog.Server(said.host, said.port, str(chosen.path(said.authority)), certificate, key, said.check_host)


Task = Callable[[Site], object]
TASKS: dict[str, tuple[Task, float]] = {
    "retention": (let_go, HOUR),
    "checkpoint": (write_checkpoint, HOUR / 4),
    "record forwarding": (send_record, 5.0),
}


@contextmanager
def kept(site: Site) -> Iterator[None]:
    """The tasks run beside whatever is done here."""
    ending = threading.Event()
    threads = [
        threading.Thread(target=_repeat, args=(site, name, task, every, ending), name=name, daemon=True)
        for name, (task, every) in TASKS.items()
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join(10)


def _repeat(site: Site, name: str, task: Task, every: float, ending: threading.Event) -> None:
    said = ""
    while True:
        try:
            with _alone(site, name) as mine:
                if mine:
                    task(site)
            said = ""
        except (Misconfigured, Transient, OSError) as failed:
            if str(failed) != said:  # once, not every few seconds
                log.warning("The %s failed, and is tried again: %s", name, failed)
            said = str(failed)
        except Exception as failed:  # noqa: BLE001 - it is done again soon; nothing of it may reach the log but its type
            log.warning("The %s failed, and is tried again: %s", name, type(failed).__name__)
        if ending.wait(every):
            return


@contextmanager
def _alone(site: Site, name: str) -> Iterator[bool]:
    folder = site.settings.path(site.settings.storage.folder)
    with (folder / f"{name.replace(' ', '-')}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
