"""A scanner changes, and the network's own embeddings tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from busgen_cds.drift import Limits
from busgen_cds.flows.watch import Watch
from busgen_cds.store import database
from busgen_cds.store.drift import Drift
from busgen_cds.study import Scanner, Study
from busgen_cds.vision import assess, engine
from busgen_cds.vision.engine import Engine, Reading
from tests.vision import readers

ACME, BOLT = Scanner("Acme", "E10", "ROOM1"), Scanner("Bolt", "S9", "ROOM2")


class Ward:
    """Two scanners whose gain varies from study to study, read by a real engine."""

    def __init__(self, folder: Path, reader: Engine) -> None:
        self.now, self.random, self.numbers = datetime(2026, 3, 4, tzinfo=UTC), np.random.default_rng(3), count()
        self.drift = Drift(
            database.open(f"sqlite:///{folder / 'site.sqlite'}"), Limits(studies=20), 60, lambda: self.now
        )
        self.reader = reader
        self.watch = Watch(self.drift, lambda: reader.bundle.digest)

    def study(self, scanner: Scanner, brightness: float) -> Study:
        tissue = int(np.clip(self.random.normal(35 + brightness, 4), 5, 90))
        grey = int(self.random.integers(120, 220))
        made = readers.study(readers.frame(readers.lesion(grey), tissue=tissue), readers.frame(tissue=tissue))
        return replace(made, scanner=scanner, received=((f"1.2.{next(self.numbers)}", "ab"),))

    def reads(self, studies: int, scanner: Scanner, *, brighter: float = 0.0, revision: int = 1) -> None:
        for _ in range(studies):
            study, heard = self.study(scanner, brighter), list[Reading]()
            result = assess.assess(study, self.reader, prevalence=0.05, revision=revision, heard=heard.append)
            self.watch.saw(result, [self.reader.gate.whitened(reading.embedding) for reading in heard])
            self.watch.count(study, result)

    def week(self, **bolt: float) -> set[str]:
        """One more week of both; the devices whose images alarm."""
        self.now += timedelta(weeks=1)
        self.reads(25, ACME)
        self.reads(25, BOLT, **bolt)  # type: ignore[arg-type]
        self.watch.look()
        week = self.drift.weeks(self.reader.bundle.digest, last=0)[0].week
        return {a.device for a in self.drift.alarms(self.reader.bundle.digest) if a.week == week}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    opened = engine.open(readers.bundle(tmp_path_factory.mktemp("bundle")), "cpu", threads=1)
    yield opened
    opened.close()


def test_a_simulated_scanner_change(tmp_path: Path, reader: Engine) -> None:
    """One scanner's gain is turned up: the alarm names it; ordinary weeks and the other scanner stay quiet."""
    ward = Ward(tmp_path, reader)
    ward.reads(30, ACME)
    ward.reads(30, BOLT)
    assert ward.drift.filled(reader.bundle.digest) == 60
    assert [ward.week() for _ in range(3)] == [set(), set(), set()]
    alarmed = ward.week(brighter=14)
    assert "Bolt S9" in alarmed and "Acme E10" not in alarmed


def test_a_study_counts_once(tmp_path: Path, reader: Engine) -> None:
    """A later revision of a study is not counted again, and a study whose images were not heard is not counted."""
    ward = Ward(tmp_path, reader)
    ward.reads(2, ACME)
    ward.reads(3, ACME, revision=2)
    study = ward.study(ACME, 0)
    ward.watch.count(study, assess.assess(study, reader, prevalence=0.05))
    assert ward.drift.filled(reader.bundle.digest) == 2


def test_counting_that_fails_stops_no_study(tmp_path: Path, reader: Engine) -> None:
    """When the counts cannot be kept, the study goes on."""
    ward = Ward(tmp_path, reader)
    ward.drift._database = None  # type: ignore[assignment]
    ward.reads(1, ACME)
