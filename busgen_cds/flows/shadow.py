"""A bundle in shadow reads what the live one has read, in quiet moments.

Rules:
- It begins only when no study waits for the live engine, and its threads have the lowest priority on the machine.
- What it says goes to `store.shadow` and nowhere else. Its failures stop nobody.
- Which studies are left stands in the database: nothing is asked for, nothing is lost by a restart, and of two
  workers that read the same one the first is kept.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from busgen_cds.errors import Misconfigured, Transient, Untrusted
from busgen_cds.flows.services import Services, failed, log
from busgen_cds.result import Result
from busgen_cds.store.shadow import Shadow
from busgen_cds.store.shelf import Shelf, Shelved
from busgen_cds.study import NotForUs, Study

LOWEST = 19  # of the priorities of a POSIX system


def step_back() -> None:
    """This thread, and those it starts, run when nobody else wants to; elsewhere than on Linux it asks for nothing."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)


class Reader(Protocol):
    """An engine of the bundle in shadow."""

    def read(self, study: Study) -> Result: ...
    def close(self) -> None: ...


class Companion:
    """Reads along. `open` gives a reader for a digest of the shelf, verified."""

    def __init__(
        self,
        shelf: Shelf,
        shadow: Shadow,
        open: Callable[[str], Reader],
        step_back: Callable[[], None] = step_back,
    ) -> None:
        self.shelf, self.shadow, self._open, self._step_back = shelf, shadow, open, step_back
        self._digest = ""
        self._reader: Reader | None = None

    def turn(self, services: Services, ended: Callable[[], bool] = lambda: False) -> int:
        """Read what is due, until a study waits for the live engine; how many were read."""
        self._step_back()
        read = 0
        while not ended() and not services.jobs.all("waiting"):
            entry = self._entry()
            reader = self._reader_of(entry)
            due = self.shadow.due(entry.digest, since=entry.since) if entry and reader else []
            if entry is None or reader is None or not due:
                break
            self._read(services, reader, entry.digest, *due[0])
            read += 1
        return read

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._digest, self._reader = "", None

    def _entry(self) -> Shelved | None:
        digest = self.shelf.in_shadow()
        return self.shelf.find(digest) if digest else None

    def _reader_of(self, entry: Shelved | None) -> Reader | None:
        digest = entry.digest if entry else ""
        if digest != self._digest:
            self.close()
            self._digest = digest  # what cannot be opened is not tried again until another is put into shadow
            try:
                self._reader = self._open(digest) if digest else None
            except (Untrusted, Misconfigured) as error:
                log.error("Bundle %s cannot read in shadow: %s", digest[:12], error)
        return self._reader

    def _read(self, services: Services, reader: Reader, digest: str, result_ref: str, study_ref: str) -> None:
        shown = services.results.show(result_ref)
        if shown is None or isinstance(shown.answer, NotForUs):
            return
        began = time.monotonic()
        try:
            instances = services.inbox.instances(study_ref)
            stated = services.inbox.stated(study_ref)
            files = ((services.inbox.open(each), each.sha256) for each in instances)
            study = services.intake(files, stated.patient if stated else None)
            said: Result | str = reader.read(study) if isinstance(study, Study) else study.reason
        except Transient:
            raise  # it is due again at the next turn
        except Exception as error:  # noqa: BLE001 - a candidate that fails on a study is what shadow is there to show
            said = failed(error).reason
        self.shadow.keep(digest, result_ref, study_ref, shown.answer, said, time.monotonic() - began)
