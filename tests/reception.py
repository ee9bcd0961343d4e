"""A listener with a real store behind it, for tests and the bench: `python -m tests.reception FOLDER PORT [PROCESSES]`.

The folder holds the database, the inbox, and `bell.jsonl`: a line for everything that was told to the outside.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from busgen_cds.dicom.association import CommitmentReport, CommitmentRequest, Desk, Noted, Rules
from busgen_cds.dicom.listener import Listener, ListenerConfig
from busgen_cds.store import audit, database
from busgen_cds.store.database import Database
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.vault import Vault

SITE_KEY = bytes(range(32))


def open_store(folder: Path, **options: int) -> tuple[Database, Inbox]:
    folder.mkdir(parents=True, exist_ok=True)
    opened = database.open(f"sqlite:///{folder / 'site.db'}")
    return opened, Inbox(folder / "inbox", opened, Vault(SITE_KEY), **options)


def desk(folder: Path, least_free_bytes: int = 0, later: Callable[[CommitmentReport], bool] | None = None) -> Desk:
    opened, inbox = open_store(folder, least_free_bytes=least_free_bytes)
    bell, lock = folder / "bell.jsonl", threading.Lock()

    def ring(**line: object) -> None:
        with lock, bell.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def note(noted: Noted) -> None:
        ring(kind=noted.kind, who=noted.who, what=noted.what)
        with opened.transaction() as session:
            audit.record(session, audit.Act(noted.kind, noted.who, noted.what, detail={"address": noted.address}))

    def commitment(request: CommitmentRequest) -> CommitmentReport:
        verdicts = inbox.answer_for(request.instances)
        return CommitmentReport(request, *verdicts)

    return Desk(
        receive=inbox.receive,
        arrived=lambda ref: ring(arrived=ref),
        association_closed=lambda refs: ring(closed=sorted(refs)),
        commitment=commitment,
        report_later=later or (lambda _report: False),
        noted=note,
    )


@contextmanager
def listening(
    folder: Path,
    config: ListenerConfig | None = None,
    *,
    least_free_bytes: int = 0,
    later: Callable[[CommitmentReport], bool] | None = None,
) -> Iterator[Listener]:
    """A listener in this process's threads, unless the configuration says otherwise."""
    config = config or ListenerConfig(host="127.0.0.1", port=0, processes=0)
    listener = Listener(config, functools.partial(desk, folder, least_free_bytes, later))
    listener.start()
    try:
        yield listener
    finally:
        listener.stop(seconds=1)


def keep_books(folder: Path) -> None:
    open_store(folder)[1].keep_books()


def bell(folder: Path) -> list[dict[str, object]]:
    path = folder / "bell.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(folder: str, port: str, processes: str = "2") -> None:
    opened, inbox = open_store(Path(folder))
    inbox.sweep()
    opened.close()
    config = ListenerConfig(Rules(), "127.0.0.1", int(port), processes=int(processes))
    listener = Listener(config, functools.partial(desk, Path(folder)), functools.partial(keep_books, Path(folder)))
    listener.start()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    listener.stop(seconds=2)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(*sys.argv[1:])
