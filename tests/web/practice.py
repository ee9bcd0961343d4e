"""A practice for tests of the pages: a real database, vault and inbox with synthetic studies that were answered.

Only the answers are made up (`Says`), because what a page shows must not depend on what a network learnt.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from busgen_cds import geometry, web
from busgen_cds.arrival import Arrival, Peek
from busgen_cds.birads import CATEGORIES
from busgen_cds.dicom import outbox, screen
from busgen_cds.dicom.screen import Screen
from busgen_cds.flows import desk
from busgen_cds.flows.desk import Desk
from busgen_cds.flows.services import Waits
from busgen_cds.result import Assessed, BundleName, Declined, Finding, HeatMap, Rendered
from busgen_cds.store import database
from busgen_cds.store.cases import Cases
from busgen_cds.store.deliveries import Addressee
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.jobs import Jobs
from busgen_cds.store.people import People, Role
from busgen_cds.store.results import Entry, Results
from busgen_cds.store.vault import Vault
from busgen_cds.store.worklist import Row, Worklist
from busgen_cds.study import NotAnalysed, NotForUs, Region, Source
from busgen_cds.web import auth
from busgen_cds.web.front import Limit
from tests import images

SITE_KEY = bytes(range(32))
BUNDLE = BundleName("reader", "1.2", "9f2c4e7ab01d" + "5" * 52)
PASSWORD = "Correct horse 7 battery"
FIGURES = {
    "AUC": [0.921, 0.894, 0.945],
    "sensitivity at the rule-out score": [0.984, 0.961, 0.995],
    "calibration": {"ECE": 0.021, "Brier": 0.094},
    "images": 1265,
}
PROBABILITY = {"3": 0.012, "4A": 0.064, "4B": 0.31, "4C": 0.82, "5": 0.968}


@dataclass(frozen=True)
class Says:
    """What is said about a study."""

    birads: str | None = "4C"
    findings: int = 1
    frame: int = 1
    declines: str = ""
    not_for_us: str = ""
    left_out: int = 0
    sent: str = "confirmed"  # confirmed, sent, waiting, parked, refused; "": nobody gets it


@dataclass
class Practice:
    folder: Path
    ahead: timedelta = timedelta()
    pacs: outbox.Node | None = None
    resumed: list[str] = field(default_factory=list)
    database_url: str = ""

    def __post_init__(self) -> None:
        self.database = database.open(self.database_url or f"sqlite:///{self.folder / 'site.sqlite'}")
        self.vault = Vault(SITE_KEY)
        self.inbox = Inbox(self.folder / "inbox", self.database, self.vault, self.clock)
        self.results = Results(self.database, self.vault, self.clock)
        self.jobs = Jobs(self.database, self.clock)
        self.people = People(self.database, self.vault, self.clock)
        self.cases = Cases(self.database, self.vault, self.clock)
        self.screen = Screen(self.inbox.instances, self.inbox.open)
        self.bundle: BundleName | None = BUNDLE
        self._desk: Desk | None = None

    def clock(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def close(self) -> None:
        if self._desk:
            self._desk.close()
        self.database.close()

    @property
    def desk(self) -> Desk:
        """The real one: what it is asked for stands in a real workflow database."""
        if self._desk is None:
            url = f"sqlite:///{self.folder / 'workflows.sqlite'}"
            desk.prepare(url)
            self._desk = Desk(url, self.results, self.jobs, Waits())
        return self._desk

    def site(self, **changed: Any) -> web.Site:
        made = web.Site(
            name="St. Example, breast unit",
            database=self.database,
            vault=self.vault,
            folder=self.folder,
            bundle=self.live_bundle,
            slides=self.screen.slides,
            picture=self.screen.picture,
            evidence=screen.evidence,
            confirm=lambda word, findings: self.cases.say(word, findings=findings),
            retry=lambda study_ref, who: self.desk.retry(study_ref, who=who),
            release=self.inbox.release,
            resume=lambda who: self.jobs.resume_engine(who=who),
            echo=self.echo,
            nodes=(
                web.Node("PACS", "PACS@127.0.0.1:104", "report, capture, segmentation, state"),
                web.Node("RIS", "https://ris.example/dicom-web", "report"),
            ),
            receives=web.Receives("BUSGEN_CDS", 11112, ("US_ROOM_1", "PACS")),
            viewer="https://viewer.example/viewer?StudyInstanceUIDs={study_uid}&initialSeriesInstanceUID={series_uid}",
            clock=self.clock,
        )
        return replace(made, **changed)

    def echo(self, name: str) -> float:
        nowhere = outbox.Node(name="RIS", ae_title="RIS", host="127.0.0.1", port=1)
        return outbox.echo(self.pacs if name == "PACS" and self.pacs else nowhere)

    def live_bundle(self) -> web.LiveBundle | None:
        if self.bundle is None:
            return None
        facts = {"Calibrated at a prevalence of": "32 %", "Never “3” from a score of": "0.04"}
        card = "# Reader 1.2\n\nReads breast B-mode ultrasound.\n\nTrained on public images; not for clinical use."
        return web.LiveBundle(self.bundle, "CPUExecutionProvider", "2026-01-02", card, FIGURES, facts)

    # -- studies

    def receives(self, files: Sequence[bytes], minutes_ago: float = 0.0) -> str:
        before, self.ahead = self.ahead, self.ahead - timedelta(minutes=minutes_ago)
        try:
            return [self._keeps(data) for data in files][-1]
        finally:
            self.ahead = before

    def _keeps(self, data: bytes) -> str:
        ds = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
        syntax = str(ds.file_meta.TransferSyntaxUID)
        arrival = Arrival("US_ROOM_1", "127.0.0.1", str(ds.SOPClassUID), str(ds.SOPInstanceUID), syntax)
        header = Peek(
            str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID), str(ds.SOPClassUID), str(ds.SOPInstanceUID),
            str(ds.PatientID), "", "US",
        )  # fmt: skip
        return self.inbox.keep(arrival, header, [data]).study_ref

    def answers(self, study_ref: str, says: Says, *, render: bool = False) -> Entry:
        revision = self.results.next_revision(study_ref)
        answer, evidence = self._answer(study_ref, says, revision), f"{revision:064d}"
        rendered = _stand_in(study_ref, revision)
        entry = self.results.keep(
            study_ref,
            answer,
            rendered,
            evidence_digest=evidence,
            instances=len(self.inbox.instances(study_ref)) + revision,
            revision=revision,
            bundle_digest=BUNDLE.digest,
            addressees=[Addressee("PACS", ("sr", "sc"))] if says.sent and not says.not_for_us else (),
            accession_number=f"ACC-{study_ref[:6]}",
        )
        self._delivers(entry, rendered, says.sent)
        return entry

    def _delivers(self, entry: Entry, rendered: Sequence[Rendered], how: str) -> None:
        for delivery in self.results.deliveries.of(entry.ref):
            if how in ("sent", "confirmed", "refused"):
                for each in rendered:
                    refused = how == "refused" and each.kind == "sc"
                    state: Any = "refused" if refused else "sent" if how == "refused" else how
                    self.results.deliveries.said(
                        delivery, each.sop_instance_uid, state, "0xA700 out of resources" if refused else ""
                    )
                self.results.deliveries.move(delivery, "done")
            elif how == "parked":
                reason = "another patient stands under this study there: find out whose images these are."
                self.results.deliveries.move(delivery, "parked", reason=reason)

    def _answer(self, study_ref: str, says: Says, revision: int) -> Any:
        slides = self.screen.slides(study_ref)
        uid = self.inbox.study_uid(study_ref)
        gone = Source("1.2.840.10008.5.1.4.1.1.6.1", "2.25.1", "2.25.2", 600, 800)
        left = tuple(
            NotAnalysed(gone, "colour over the tissue: Doppler or elastography, not B-mode")
            for _ in range(says.left_out)
        )
        if says.not_for_us:
            return NotForUs(uid, says.not_for_us, left)
        common: dict[str, Any] = {
            "study_uid": uid, "evidence_digest": f"{revision:064d}", "bundle": BUNDLE,
            "provider": "CPUExecutionProvider", "revision": revision, "not_analysed": left, "seconds": 1.4,
            "images_read": sum(s.source.frame_count for s in slides),
        }  # fmt: skip
        if says.declines:
            return Declined(**common, reason=says.declines)
        findings = tuple(self._finding(study_ref, says, n) for n in range(says.findings if says.birads else 0))
        key = slides[0].source if slides else None
        probability = PROBABILITY[says.birads] if says.birads else 0.006
        return Assessed(
            **common, probability=probability, birads=says.birads, prevalence=0.05, calibrated_at=0.32,
            findings=findings, key_image=key, key_heat=None,
        )  # fmt: skip

    def _finding(self, study_ref: str, says: Says, number: int) -> Finding:
        slides = self.screen.slides(study_ref)
        slide = slides[min(number, len(slides) - 1)]
        frame = min(says.frame, slide.source.frame_count)
        birads: Any = CATEGORIES[max(0, CATEGORIES.index(says.birads) - number)]  # type: ignore[arg-type]
        png = self.screen.picture(study_ref, slide.source.sop_instance_uid, frame)
        contour, heat = drawn(np.asarray(Image.open(io.BytesIO(png)).convert("L")), number)
        mm = geometry.measure(contour, *(slide.spacing or (0.1, 0.1)))
        p = PROBABILITY[birads]
        return Finding(
            replace(slide.source, frame_number=frame), p, birads, min(0.09, p), contour[:-1], None,
            mm.long_axis, mm.short_axis, mm.area, "not parallel", 1, heat,
        )  # fmt: skip

    # -- asking

    def worklist_row(self, study_ref: str) -> Row:
        worklist = Worklist(self.database, self.vault)
        worklist.catch_up()
        row = worklist.row(study_ref)
        assert row is not None
        return row

    def patient(self, study_ref: str) -> str:
        return self.results.identity(study_ref)[1]

    def arrival(self) -> Arrival:
        return Arrival("US_ROOM_1", "127.0.0.1", "1.2.840.10008.5.1.4.1.1.6.1", "2.25.99", "1.2.840.10008.1.2.1")

    # -- people

    def person(self, name: str, *roles: Role) -> None:
        self.people.add(name, PASSWORD, roles, "test")

    def acts(self, kind: str = "") -> list[tuple[str, str]]:
        import sqlalchemy as sa

        query = "SELECT kind, who FROM act WHERE kind LIKE :kind ORDER BY number"
        with self.database.reading() as session:
            return [(row.kind, row.who) for row in session.execute(sa.text(query), {"kind": f"{kind}%"})]


def drawn(grey: NDArray[np.uint8], number: int) -> tuple[geometry.Outline, HeatMap]:
    """A contour around the darkest place of the tissue, and evidence that is strongest there."""
    left, top, right, bottom = images.REGION
    tissue = np.asarray(Image.fromarray(grey[top:bottom, left:right]).filter(ImageFilter.GaussianBlur(16)), np.float64)
    rows, columns = tissue.shape
    y, x = np.mgrid[0:rows, 0:columns]
    middle = np.exp(-(((x / columns - 0.5) / 0.26) ** 2) - ((y / rows - 0.42 - 0.1 * number) / 0.24) ** 2)
    dark = (255 - tissue) / 255 * middle
    line = geometry.simplify(geometry.outline(dark, float(np.quantile(dark, 0.9))), 1.2)
    contour = tuple((a + left, b + top) for a, b in line)
    cells = np.asarray(Image.fromarray(dark.astype(np.float32)).resize((14, 14), Image.Resampling.BOX))
    strength = (cells - np.quantile(cells, 0.8)) / (cells.max() - np.quantile(cells, 0.8))
    evidence = np.clip(strength, -0.04, 1) * 0.6 / (cells.size / 100)  # full scale is 0.6 logits per 1 % of the region
    return contour, HeatMap(evidence.astype(np.float32), Region(*images.REGION))


def _stand_in(study_ref: str, revision: int) -> tuple[Rendered, ...]:
    def one(kind: Any) -> Rendered:
        uid = images.uid(kind, study_ref, revision)
        return Rendered(
            kind, "1.2.840.10008.5.1.4.1.1.88.33", uid, images.uid("series", uid), "1.2.840.10008.1.2.1", b"-"
        )

    return one("sr"), one("sc")


@contextmanager
def served(
    site: web.Site, *, proxies: Sequence[str] = (), log_ins: int = 0, slowest: float = auth.SLOWEST_BODY
) -> Iterator[str]:
    """The pages on a free port of this machine."""
    app = web.create(site, slowest=slowest)
    if log_ins:
        app.state.front.log_ins = Limit(log_ins)
    server = web.Server(app, "127.0.0.1", 0, proxies)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        if time.monotonic() > until or not thread.is_alive():
            raise RuntimeError("the pages did not start")
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.bound}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


class Browser(httpx.Client):
    """What a browser does about cookies and forms, without drawing."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(base_url=address, timeout=30, **options)
        self.form_key = ""

    def logs_in(self, name: str, password: str = PASSWORD, code: str = "") -> httpx.Response:
        answer = self.post("/login", data={"name": name, "password": password, "code": code})
        if answer.status_code == 303:
            text = self.get("/account").text
            self.form_key = text.split('name="form_key" value="')[1].split('"')[0]
        return answer

    def does(self, path: str, data: Any = None, **options: Any) -> httpx.Response:
        return self.post(path, data={**(data or {}), "form_key": self.form_key}, **options)
