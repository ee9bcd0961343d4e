"""What the flows need of the stations, and how long they wait: handed in once, by the application or by a test.

Rules:
- Flows name stations only by what is in `Services`; nothing here reads settings.
- A workflow's arguments and answers are opaque references and short words: no UID, name, path or pixel is among them.
- What happens after a failure is said by its type, in `failed`, in one place for all flows.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from sqlalchemy.exc import OperationalError

from busgen_cds.dicom.outbox import Node
from busgen_cds.errors import Misconfigured, Shredded, Transient, Untrusted
from busgen_cds.flows.watch import Watch
from busgen_cds.result import Kind, Rendered, Result
from busgen_cds.store.deliveries import Addressee, Deliveries
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.jobs import Jobs
from busgen_cds.store.results import Previous, Results
from busgen_cds.study import Held, NotForUs, Patient, Study

log = logging.getLogger("busgen_cds.flows")


@dataclass(frozen=True)
class Destination:
    """Where results go, and the site's profile for it."""

    node: Node
    kinds: tuple[Kind, ...] = ("sr", "sc", "seg", "pr")
    commitment: bool = False
    rejection_notes: bool = False
    deliver_declined: bool = True

    @property
    def addressee(self) -> Addressee:
        return Addressee(self.node.name, (*self.kinds, "ko") if self.rejection_notes else self.kinds)


@dataclass(frozen=True)
class Waits:
    """All waits, in seconds."""

    silence: float = 5.0  # after the last image, when its association is still open
    after_close: float = 2.0  # after the last image, when its association was closed: other associations may follow
    count: float = 60.0  # for images that the PACS counts and we lack
    count_again: float = 3.0
    commitment: float = 2.0  # for a PACS's word on the association of the request
    commitment_again: float = 600.0  # until it is asked again
    first_retry: float = 5.0
    longest_retry: float = 900.0
    give_up: float = 14 * 86400.0
    reading_tries: int = 8  # at a transient failure of reading; then it is parked
    heartbeat: float = 3.0
    silent: float = 20.0  # a worker that has not spoken for so long is dead
    sweep: float = 30.0
    follow: float = 1.0  # how often it is looked which bundle is live
    drift: float = 60.0  # how often it is looked whether what comes in drifts
    shadow: float = 2.0  # how often it is looked what is left to read in shadow
    poll: float = 0.1  # how often queues are looked at: what the quickest study waits for

    def retry(self, tries: int) -> float:
        """A delay that doubles."""
        return float(min(self.longest_retry, self.first_retry * 2 ** min(tries, 30)))


@dataclass(frozen=True)
class Services:
    inbox: Inbox
    results: Results
    jobs: Jobs
    # (Part 10 file, SHA-256) of each instance, and whose study it is where a person stated that
    intake: Callable[[Iterable[tuple[bytes, str]], Patient | None], Study | NotForUs | Held]
    assess: Callable[[Study, int], Result]  # with the revision that it will be
    render: Callable[[Study, Result, Previous | None], tuple[Rendered, ...]]  # and what it replaces
    follow: Callable[[], bool] = lambda: False  # use the bundle that is live now; True: that is another one
    watch: Watch | None = None  # whether what comes in drifts
    destinations: tuple[Destination, ...] = ()
    query_node: Node | None = None
    waits: Waits = field(default_factory=Waits)
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    @property
    def deliveries(self) -> Deliveries:
        return self.results.deliveries

    def destination(self, name: str) -> Destination:
        for each in self.destinations:
            if each.node.name == name:
                return each
        raise Misconfigured(f"No destination is named {name!r} any more: add it again, or withdraw its deliveries.")


_in_use: list[Services] = []


def use(services: Services | None) -> None:
    """DBOS calls workflows by name, in this process: what they work with is set before the worker starts."""
    _in_use[:] = [services] if services else []


def in_use() -> Services:
    if not _in_use:
        raise Misconfigured("No worker runs in this process.")
    return _in_use[0]


class Failure(NamedTuple):
    """What follows from an exception: try again later, park, park and stop the engine, or let the work go."""

    then: Literal["again", "park", "stop", "drop"]
    reason: str


def failed(error: Exception) -> Failure:
    if isinstance(error, Transient):
        return Failure("again", str(error))
    if isinstance(error, OperationalError):  # the database is locked, full or gone for a while
        return Failure("again", "The database did not answer.")
    if isinstance(error, Misconfigured):
        return Failure("park", str(error))
    if isinstance(error, Untrusted):
        return Failure("stop", str(error))
    if isinstance(error, Shredded):
        return Failure("drop", str(error))
    return Failure("park", f"A fault of ours, please report it: {type(error).__name__} {_place(error)}.")


def _place(error: Exception) -> str:
    """Where it was raised. The message of an unforeseen exception may hold a name, so it goes nowhere."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "busgen_cds" in frame.filename] or frames
    if not ours:
        return "at an unknown place"
    return f"at {ours[-1].filename.rpartition('busgen_cds/')[2]}:{ours[-1].lineno}"
