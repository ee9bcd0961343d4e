"""Bundles become live while studies come in."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydicom.dataset import Dataset

from busgen_cds.result import Result
from busgen_cds.store.shelf import Shelf
from busgen_cds.study import Study
from busgen_cds.vision import assess, engine
from busgen_cds.vision.live import Live
from tests import hospital
from tests.hospital import Hospital, a_lesion
from tests.store.test_shelf import NIGHT, PROMOTER, RELEASE, REPORT, VERIFIER, a_candidate

STUDIES = 20
WAITS = replace(hospital.QUICK, follow=0.05)


class LiveReader:
    """The real road from the shelf to a Result; each study takes long enough to be under way at a switch."""

    def __init__(self, shelf: Shelf) -> None:
        self.live = Live(shelf.standing, lambda: engine.open(shelf.live(), "cpu", threads=1))
        self.reads: list[tuple[str, str]] = []  # the study, and the bundle that was live when it began

    def __call__(self, study: Study, revision: int) -> Result:
        with self.live.for_a_study() as reader:
            self.reads.append((study.uid, reader.bundle.digest))
            time.sleep(0.15)
            return assess.assess(study, reader, prevalence=0.05, revision=revision)

    def follow(self) -> bool:
        return self.live.follow()


class Ward:
    """A hospital that reads with what its shelf says is live, and a candidate in shadow."""

    def __init__(self, it: Hospital, folder: Path) -> None:
        home = folder / "product"
        a_candidate("shipped").seal(home, RELEASE)
        self.shelf = Shelf(folder / "shelf", it.site.database, VERIFIER, home=lambda: home)
        self.shipped = self.shelf.live().digest
        self.candidate = self.shelf.put(a_candidate("2"), report=REPORT, signer=NIGHT).digest
        self.shelf.to_shadow(self.candidate, person="phil")
        it.reader = LiveReader(self.shelf)

    def as_another_process(self) -> Shelf:
        return Shelf(self.shelf.folder, self.shelf._database, VERIFIER, home=self.shelf._home)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Hospital, Ward]]:
    wards: list[Ward] = []
    with hospital.opened(tmp_path / "site", waits=WAITS, prepare=lambda it: wards.append(Ward(it, tmp_path))) as it:
        yield it, wards[0]
        it.reader.live.close()


def test_promote_and_roll_back_under_load(opened: tuple[Hospital, Ward]) -> None:
    """Promote and roll back under load of 20 studies: none is lost, and each result names the bundle that made it."""
    it, ward = opened
    files = [a_lesion(1, seed=number) for number in range(STUDIES)]
    waves = [threading.Thread(target=lambda part=part: [it.scanner.sends(each) for each in part]) for part in
             (files[:7], files[7:14], files[14:])]  # fmt: skip
    waves[0].start()
    it.waits_until(lambda: len(it.reader.reads) >= 3)
    ward.as_another_process().promote(ward.candidate, person="phil", signer=PROMOTER)
    it.waits_until(lambda: it.reader.live.engine.bundle.digest == ward.candidate)
    waves[1].start()
    it.waits_until(lambda: len(began_with(it, ward.candidate)) >= 3)
    ward.as_another_process().roll_back(person="ada", signer=PROMOTER)
    it.waits_until(lambda: it.reader.live.engine.bundle.digest == ward.shipped)
    waves[2].start()
    for wave in waves:
        wave.join()
    it.settles()

    studies = [hospital.study_uid(each) for each in files]
    began = dict(it.reader.reads)
    assert sorted(uid for uid, _ in it.reader.reads) == sorted(studies)  # each read once
    for uid in studies:
        shown = it.result(uid)
        assert shown.entry.bundle_digest == shown.answer.bundle.digest == began[uid]  # type: ignore[union-attr]
        assert shown.entry.revision == 1
        (report,) = it.reports(uid)
        assert began[uid] in said(report)
    order = [digest for _, digest in it.reader.reads]
    switches = [n for n in range(1, STUDIES) if order[n] != order[n - 1]]
    assert len(switches) == 2 and order[0] == order[-1] == ward.shipped and order[switches[0]] == ward.candidate
    assert it.acts("bundle promoted") == it.acts("bundle rolled back to") == 1


def began_with(it: Hospital, digest: str) -> list[str]:
    return [study for study, bundle in it.reader.reads if bundle == digest]


def said(report: Dataset) -> str:
    return " ".join(str(element.value) for element in report.iterall())


def test_an_untrusted_word_stops_the_engine(opened: tuple[Hospital, Ward]) -> None:
    """A live statement that does not hold stops the engine with the reason; a person's new word repairs it."""
    it, ward = opened
    ward.as_another_process().promote(ward.candidate, person="phil", signer=PROMOTER)
    it.waits_until(lambda: it.reader.live.engine.bundle.digest == ward.candidate)
    with it.site.database.transaction() as session:
        replay = "INSERT INTO live_statement SELECT 7, digest, envelope, at FROM live_statement WHERE number = 1"
        session.execute(sa.text(replay))
    assert "put in its place" in it.waits_until(it.site.jobs.engine_stopped)
    unread = it.scanner.sends(a_lesion(1))
    time.sleep(1)
    assert it.reader.reads == []
    assert ward.as_another_process().roll_back(person="ada", signer=PROMOTER).number == 8
    it.desk.resume(who="ada")
    it.settles()
    assert it.result(unread).entry.bundle_digest == ward.shipped
