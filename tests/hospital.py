"""A simulated hospital: a scanner, a PACS, a reader and a clock, around the real listener, store and flows.

    with hospital.opened(tmp_path) as it:
        it.pacs.goes_down()
        study = it.scanner.sends(a_lesion(images=3))
        it.pacs.comes_up()
        it.settles()
        assert it.reader.reads == [study]

Only the reader is simulated (`Reader` says what the test tells it to say, unless a real one is handed in). All bytes
travel over real sockets, into a real database, through the real workflows.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dbos._workflow_commands
import pydicom
import sqlalchemy as sa
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.presentation import build_context

from busgen_cds.arrival import Arrival, Peek
from busgen_cds.dicom import intake, objects, reactor
from busgen_cds.dicom.association import CommitmentReport, CommitmentRequest, Desk, Rules
from busgen_cds.dicom.listener import Listener, ListenerConfig
from busgen_cds.flows import desk as desks
from busgen_cds.flows.services import Destination, Services, Waits
from busgen_cds.flows.worker import Worker
from busgen_cds.result import Assessed, BundleName, Declined, Finding, Rendered, Result
from busgen_cds.store import database
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.jobs import Jobs
from busgen_cds.store.results import Previous, Results, Shown
from busgen_cds.store.vault import Vault
from busgen_cds.study import Study
from tests import images
from tests.pacs import Pacs

SITE_KEY = bytes(range(32))
BUNDLE = BundleName("hospital-reader", "1", "b" * 64)
QUICK = Waits(
    silence=2.0, after_close=0.1, count=3.0, count_again=0.2, commitment=2.0, commitment_again=0.5, first_retry=0.2,
    longest_retry=1.0, heartbeat=0.3, silent=1.5, sweep=1.0, poll=0.02, reading_tries=3,
)  # fmt: skip

PROBABILITY = {"3": 0.01, "4A": 0.05, "4B": 0.3, "4C": 0.8, "5": 0.97}


class Clock:
    """Real time, and as many days more as the test lets pass."""

    def __init__(self) -> None:
        self._ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self._ahead

    def passes(self, **how_long: float) -> None:
        self._ahead += timedelta(**how_long)


class Reader:
    """Says of each study what it was told to say; counts how often it was asked."""

    def __init__(self) -> None:
        self.says: str | None = "4C"
        self.declines = ""
        self.fails: list[Exception] = []  # one for each coming attempt
        self.seconds = 0.0
        self.gate = threading.Event()  # cleared: a reading that has begun waits here
        self.gate.set()
        self.reads: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, study: Study, revision: int) -> Result:
        with self._lock:
            self.reads.append(study.uid)
            failure = self.fails.pop(0) if self.fails else None
        self.gate.wait(60)
        time.sleep(self.seconds)
        if failure is not None:
            raise failure
        common: Any = {
            "study_uid": study.uid, "evidence_digest": study.evidence_digest, "bundle": BUNDLE, "provider": "none",
            "revision": revision, "images_read": len(study.frames), "not_analysed": study.not_analysed, "seconds": 0.1,
        }  # fmt: skip
        if self.declines:
            return Declined(**common, reason=self.declines)
        return self._assessed(study, common)

    def _assessed(self, study: Study, common: dict[str, Any]) -> Assessed:
        birads: Any = self.says
        probability = PROBABILITY[birads] if birads else 0.005
        frame = study.frames[0]
        left, top, *_ = frame.region
        contour = tuple((left + x, top + y) for x, y in ((40.0, 40.0), (80.0, 40.0), (80.0, 70.0), (40.0, 70.0)))
        finding = Finding(frame.source, probability, birads, 0.05, contour, None, 3.2, 2.4, 7.7, "parallel")
        return Assessed(
            **common, probability=probability, birads=birads, prevalence=0.05, calibrated_at=0.3,
            findings=(finding,) if birads else (), key_image=frame.source,
        )  # fmt: skip


class Scanner:
    """A modality: it sends images by C-STORE and remembers which were acknowledged."""

    def __init__(self, port: int, ae_title: str = "US_ROOM_1") -> None:
        self.port, self.ae_title = port, ae_title
        self.acknowledged: list[str] = []
        self.acknowledged_at: dict[str, float] = {}  # Study Instance UID → when its last image was

    def sends(self, files: Sequence[bytes]) -> str:
        """All on one association; the Study Instance UID of the last."""
        study = ""
        with self.association(files) as association:
            for number, data in enumerate(files):
                study = self.sends_one(association, data, number)
        return study

    @contextmanager
    def association(self, files: Sequence[bytes]) -> Iterator[Any]:
        entity = AE(ae_title=self.ae_title)
        wanted = {(str(ds.SOPClassUID), str(ds.file_meta.TransferSyntaxUID)) for ds in map(opened_file, files)}
        association = entity.associate(
            "127.0.0.1", self.port, contexts=[build_context(*pair) for pair in sorted(wanted)],
            ae_title="BUSGEN", evt_handlers=[(evt.EVT_CONN_OPEN, _no_delay), (evt.EVT_CONN_OPEN, reactor.stands_still)],
        )  # fmt: skip
        if not association.is_established:
            raise ConnectionError("the listener does not accept an association")
        try:
            yield association
        finally:
            if association.is_established:
                association.release()

    def sends_one(self, association: Any, data: bytes, number: int = 0) -> str:
        dataset = pydicom.dcmread(io.BytesIO(data))
        answer = association.send_c_store(dataset, msg_id=number % 65535 + 1)
        if not answer or answer.Status != 0:
            raise ConnectionError(f"not acknowledged: {answer.get('Status') if answer else 'no answer'}")
        study = str(dataset.StudyInstanceUID)
        self.acknowledged.append(str(dataset.SOPInstanceUID))
        self.acknowledged_at[study] = time.monotonic()
        return study


@dataclass
class Site:
    """What survives a power cut, and what every process of the hospital opens for itself."""

    folder: Path
    database_url: str = ""
    workflows_url: str = ""
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.workflows_url = self.workflows_url or f"sqlite:///{self.folder / 'workflows.sqlite'}"
        self.vault = Vault(SITE_KEY)
        self.database = database.open(self.database_url or f"sqlite:///{self.folder / 'site.sqlite'}")
        self.inbox = Inbox(self.folder / "inbox", self.database, self.vault, self.clock)
        self.results = Results(self.database, self.vault, self.clock)
        self.jobs = Jobs(self.database, self.clock)

    def close(self) -> None:
        self.database.close()


def services(
    site: Site,
    *,
    reader: Callable[[Study, int], Result],
    destinations: Sequence[Destination],
    waits: Waits = QUICK,
    query_node: Any = None,
    follow: Callable[[], bool] = lambda: False,
    watch: Any = None,
) -> Services:
    def render(study: Study, result: Result, replaced: Previous | None) -> tuple[Rendered, ...]:
        return objects.render(
            study, result, profile=objects.Profile((*objects.EVERYWHERE.kinds, "ko")),
            rendered_at=datetime.now().astimezone(), replaces=replaced.objects if replaced else (),
        )  # fmt: skip

    return Services(
        inbox=site.inbox, results=site.results, jobs=site.jobs, intake=intake.study, assess=reader, render=render,
        destinations=tuple(destinations), query_node=query_node, waits=waits, clock=site.clock, follow=follow,
        watch=watch,
    )  # fmt: skip


class Hospital:
    def __init__(self, folder: Path, *, waits: Waits = QUICK, **site: Any) -> None:
        self.clock = Clock()
        self.site = Site(folder, clock=self.clock, **site)
        self.waits = waits
        self.pacs = Pacs()
        self.reader: Any = Reader()
        self.destinations = [Destination(self.pacs.node)]
        self.query_node: Any = None
        self.companion: Any = None
        self.worker: Worker | None = None
        self.listener: Listener | None = None
        self.scanner: Scanner = Scanner(0)

    # -- verbs

    def opens(self) -> None:
        self.pacs.comes_up()
        self.worker_starts()
        assert self.worker is not None
        self.listener = Listener(
            ListenerConfig(rules=Rules(), host="127.0.0.1", port=0, processes=0),
            lambda: Desk(
                receive=self.site.inbox.receive,
                arrived=lambda study_ref: self.desk.arrived(study_ref),
                association_closed=lambda study_refs: self.desk.association_closed(study_refs),
                commitment=_commits_nothing,
                committed=lambda word, who: self.desk.committed(word, lambda _name: who.ae_title == self.pacs.ae_title),
            ),
        )
        self.listener.start()
        self.scanner = Scanner(self.listener.port)

    def closes(self) -> None:
        if self.listener is not None:
            self.listener.stop(2)
        if self.worker is not None:
            self.worker.stop()
        self.pacs.goes_down()
        self.site.close()

    def worker_starts(self, name: str = "worker-1") -> Worker:
        dbos._workflow_commands._BACKGROUND_JOBS_INTERVAL_SEC = 0.05  # its second of granularity, for quicker tests
        self.worker = Worker(
            services(
                self.site, reader=self.reader, destinations=self.destinations, waits=self.waits,
                query_node=self.query_node, follow=getattr(self.reader, "follow", lambda: False),
                watch=getattr(self.reader, "watch", None),
            ),
            workflows_url=self.site.workflows_url, name=name, companion=self.companion,
        )  # fmt: skip
        self.worker.start()
        return self.worker

    def worker_restarts(self) -> None:
        assert self.worker is not None
        self.worker.stop()
        self.worker_starts()

    def statuses(self) -> dict[str, str]:
        """Of the engine's workflows, by name."""
        return {each.workflow_id: each.status for each in self.desk.client.list_workflows(load_input=False)}

    def idle(self) -> bool:
        """Has every workflow come to its end?"""
        return not set(desks.ACTIVE) & set(self.statuses().values())

    def settles(self, seconds: float = 60) -> None:
        """Until every study is read, parked or held, and every delivery done, parked or withdrawn."""
        try:
            self.waits_until(lambda: not self.unsettled(), seconds)
        except AssertionError:
            raise AssertionError(f"still waiting: {self.unsettled()}; workflows: {self.statuses()}") from None

    def waits_until(self, true: Callable[[], Any], seconds: float = 60, otherwise: str = "it did not happen") -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if answer := true():
                return answer
            time.sleep(0.03)
        raise AssertionError(f"{otherwise} (waited {seconds:g} s)")

    def stays_unread(self, study_uid: str, *, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert study_uid not in self.reader.reads, "it was read too early"
            time.sleep(0.05)

    def scanner_without_a_bell_sends(self, files: Sequence[bytes]) -> str:
        """Received and acknowledged, and then the power fails before anybody was told."""
        keep(self.site, files)
        return study_uid(files)

    @property
    def desk(self) -> Any:
        assert self.worker is not None
        return self.worker.desk

    # -- what is the case

    def unsettled(self) -> list[str]:
        results, jobs = self.site.results, self.site.jobs
        parked = {job.study_ref for job in jobs.all("parked")}
        unread = [ref for ref in results.unread(settled_before=self.clock() + timedelta(days=1)) if ref not in parked]
        waiting = [f"reading {job.study_ref}" for job in jobs.all("waiting")]
        waiting += [f"to {each.destination}" for each in results.deliveries.under_way()]
        return [f"unread {ref}" for ref in unread] + waiting

    def ref(self, study_uid: str) -> str:
        found = self.site.inbox.find_study(study_uid)
        assert found, "the hospital does not know this study"
        return found

    def result(self, study_uid: str) -> Shown:
        """The current result of a study."""
        entry = self.site.results.current(self.ref(study_uid))
        assert entry, "this study has no result"
        shown = self.site.results.show(entry.ref)
        assert shown
        return shown

    def reports(self, study_uid: str, at: Pacs | None = None) -> list[Dataset]:
        """The reports of a study that a PACS holds, the newest revision last."""
        return sorted((at or self.pacs).of(study_uid, modality="SR"), key=lambda report: int(report.SeriesNumber))

    def parked(self, study_uid: str) -> str:
        """Why this study does not go on."""
        ref = self.ref(study_uid)
        job = self.site.jobs.of(ref)
        reasons = [job.reason] if job and job.state == "parked" else []
        reasons += [each.reason for each in self.site.results.deliveries.parked() if each.study_ref == ref]
        return " ".join(reasons)

    def acts(self, kind: str) -> int:

        with self.site.database.reading() as session:
            return int(
                session.execute(sa.text("SELECT count(*) FROM act WHERE kind = :kind"), {"kind": kind}).scalar_one()
            )


@contextmanager
def opened(folder: Path, *, prepare: Callable[[Hospital], None] | None = None, **how: Any) -> Iterator[Hospital]:
    it = Hospital(folder, **how)
    if prepare:
        prepare(it)
    it.opens()
    try:
        yield it
    finally:
        it.closes()


def a_lesion(n: int = 2, **image: Any) -> list[bytes]:
    """A breast study of n images that show a lesion."""
    return images.breast_study(n, **image)


def opened_file(data: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)


def keep(site: Site, files: Sequence[bytes]) -> None:
    """Into the inbox without a network, and without telling anybody."""
    for data in files:
        header = opened_file(data)
        sop_class, instance = str(header.SOPClassUID), str(header.SOPInstanceUID)
        study, series = str(header.StudyInstanceUID), str(header.SeriesInstanceUID)
        arrival = Arrival("US_ROOM_1", "127.0.0.1", sop_class, instance, str(header.file_meta.TransferSyntaxUID))
        site.inbox.keep(arrival, Peek(study, series, sop_class, instance, str(header.PatientID)), [data])


def study_uid(files: Sequence[bytes]) -> str:
    return str(opened_file(files[0]).StudyInstanceUID)


def words(report: Dataset) -> str:
    """All that a report says in text."""
    return " ".join(str(element.value) for element in report.iterall() if element.keyword == "TextValue")


def relabelled(data: bytes, **header: str) -> bytes:
    """The same picture under other words of its header."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    for keyword, value in header.items():
        setattr(dataset, keyword, value)
    return images.part10(dataset)


def with_pixels_cut(data: bytes) -> bytes:
    """An image whose pixel data are shorter than its header promises; the file itself holds together."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.PixelData = dataset.PixelData[: len(dataset.PixelData) // 4 * 2]
    return images.part10(dataset)


def quicker(**waits: float) -> Waits:
    return replace(QUICK, **waits)


def _commits_nothing(request: CommitmentRequest) -> CommitmentReport:
    return CommitmentReport(request, (), tuple((*pair, 0x0112) for pair in request.instances))


def _no_delay(event: evt.Event) -> None:
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
