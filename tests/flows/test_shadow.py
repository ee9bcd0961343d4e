"""A bundle in shadow reads along: it delays nobody, and nobody is told."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from busgen_cds.bundle import Calibration
from busgen_cds.flows.shadow import Companion, Reader
from busgen_cds.result import Result
from busgen_cds.store.shadow import Shadow, compare
from busgen_cds.study import Study
from busgen_cds.vision import assess, engine
from tests import hospital
from tests.flows.test_live_bundle import WAITS, Ward
from tests.hospital import Hospital, a_lesion
from tests.store.test_shelf import NIGHT, REPORT, a_candidate
from tests.vision import readers

STRICTER = Calibration(**{**vars(readers.CALIBRATION), "offset": 6.0})


class Along:
    """An engine in shadow; what the test wants to go wrong goes wrong."""

    def __init__(self, ward: Ward, digest: str) -> None:
        self.engine = engine.open(ward.shelf.open(digest), "cpu", threads=1)
        self.reads: list[str] = []

    def read(self, study: Study) -> Result:
        self.reads.append(study.uid)
        if len(self.reads) == 2:
            raise ZeroDivisionError("Doe^Jane")
        return assess.assess(study, self.engine, prevalence=0.05)

    def close(self) -> None:
        self.engine.close()


class Scene:
    def __init__(self, it: Hospital, folder: Path) -> None:
        self.it, self.ward, self.opened = it, Ward(it, folder), 0
        self.before_opening: Callable[[], object] = lambda: None
        self.ward.shelf.end_shadow(self.ward.candidate, person="phil")
        stricter = a_candidate("stricter", calibration=STRICTER)
        self.digest = self.ward.shelf.put(stricter, report=REPORT, signer=NIGHT).digest
        self.ward.shelf.to_shadow(self.digest, person="phil")
        self.shadow = Shadow(it.site.database)
        self.companion = it.companion = Companion(self.ward.shelf, self.shadow, self.opens, lambda: None)

    def opens(self, digest: str) -> Reader:
        self.before_opening()
        self.opened += 1
        return Along(self.ward, digest)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made: list[Scene] = []
    waits = dataclasses.replace(WAITS, shadow=0.5)
    with hospital.opened(tmp_path / "site", waits=waits, prepare=lambda it: made.append(Scene(it, tmp_path))) as it:
        yield made[0]
        it.reader.live.close()


def test_it_reads_along(scene: Scene) -> None:
    """It reads what the live one read, once; what it says is compared, kept apart, and never sent."""
    it = scene.it
    studies = [it.scanner.sends(a_lesion(1, seed=number)) for number in range(4)]
    it.settles(200)
    it.waits_until(lambda: len(scene.shadow.beside(scene.digest)) == 4, 200)
    rows = scene.shadow.beside(scene.digest)
    time.sleep(0.5)  # and nothing more comes
    assert len(scene.shadow.beside(scene.digest)) == 4
    assert {row.study_ref for row in rows} == {it.ref(study) for study in studies}
    for study in studies:
        assert [r.bundle_digest for r in it.site.results.history(it.ref(study))] == [scene.ward.shipped]
        (report,) = it.reports(study)
        assert scene.digest not in str(report)
    failed = [row for row in rows if row.word == "failed"]
    assert len(failed) == 1 and "ZeroDivisionError" in failed[0].reason and "Doe" not in failed[0].reason
    found = scene.shadow.comparison(scene.digest)
    assert (found.studies, found.failed, found.same + found.up + found.down) == (4, 1, 3)
    assert found.seconds is not None and found.live_seconds is not None and scene.opened == 1


def test_it_waits_its_turn(tmp_path: Path) -> None:
    """While a study waits for the live engine, nothing is read in shadow; afterwards it is."""
    made: list[Scene] = []
    never = dataclasses.replace(WAITS, shadow=3600, sweep=3600)
    with hospital.opened(tmp_path / "site", waits=never, prepare=lambda it: made.append(Scene(it, tmp_path))) as it:
        it.scanner.sends(a_lesion(1))
        it.settles(200)
        assert it.worker is not None
        it.site.jobs.begin("f" * 32, "e" * 64)
        assert made[0].companion.turn(it.worker.stations) == 0
        it.site.jobs.drop("f" * 32, "e" * 64)
        assert made[0].companion.turn(it.worker.stations) == 1
        it.reader.live.close()


def test_what_cannot_be_opened(scene: Scene) -> None:
    """A bundle in shadow that does not verify is tried once, stops nobody, and the live one reads on."""
    it, shelf = scene.it, scene.ward.shelf
    shelf.end_shadow(scene.digest, person="phil")
    it.waits_until(lambda: scene.companion._digest == "", 200)
    network, scene.opened = shelf.folder / scene.digest / "reader.onnx", 0
    scene.before_opening = lambda: network.write_bytes(b"another")
    shelf.to_shadow(scene.digest, person="phil")
    study = it.scanner.sends(a_lesion(1))
    it.settles(200)
    it.waits_until(lambda: scene.opened, 200)
    time.sleep(0.4)
    assert scene.opened == 1 and it.site.jobs.engine_stopped() is None
    assert it.result(study).entry.bundle_digest == scene.ward.shipped
    assert scene.shadow.beside(scene.digest) == []


def test_the_comparison() -> None:
    """Agreement, changes of category by direction, failures and cost are counted."""
    from datetime import UTC, datetime

    from busgen_cds.store.shadow import Beside

    def row(live: str, said: str, seconds: float = 1.0, p: float | None = 0.2, q: float | None = 0.3) -> Beside:
        return Beside("d", "r", "s", "l", live, p, said, q, "", seconds, 0.5, datetime.now(UTC))  # type: ignore[arg-type]

    found = compare(
        [row("4A", "4A"), row("3", "5", 3.0), row("4C", "none", 2.0), row("declined", "failed", p=None, q=None)]
    )
    assert (found.studies, found.same, found.up, found.down, found.failed) == (4, 1, 1, 1, 1)
    assert found.agreement == 0.25 and found.difference == pytest.approx(0.1)
    assert found.seconds == 1.5 and found.live_seconds == 0.5
    assert found.changes["3", "5"] == 1 and [abs(each.change) for each in found.largest] == [5, 5]
    assert compare([]).agreement is None
