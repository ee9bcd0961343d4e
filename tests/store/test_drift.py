"""Weeks, devices and the alarms they raise."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from busgen_cds import drift
from busgen_cds.drift import Limits
from busgen_cds.store import audit, database
from busgen_cds.store.drift import ALL, Drift, monday
from tests import postgres

BUNDLE, OTHER = "a" * 64, "b" * 64
START = datetime(2026, 3, 4, 12, tzinfo=UTC)  # a Wednesday
EVEN = {"none": 0.3, "3": 0.3, "4A": 0.2, "4C": 0.2}


class Clinic:
    """Two scanners, week after week."""

    def __init__(self, url: str) -> None:
        self.now, self.random = START, np.random.default_rng(7)
        self.database = database.open(url)
        self.drift = Drift(self.database, Limits(), 120, lambda: self.now)

    def reads(self, studies: int, device: str = "Acme One", *, gain: float = 0.0, bundle: str = BUNDLE) -> None:
        for _ in range(studies):
            images = self.random.standard_normal((2, 8)) + gain
            category = str(self.random.choice(list(EVEN), p=list(EVEN.values())))
            vector = drift.features(images.astype(np.float32))
            self.drift.add(bundle, device, drift.one(category, float(self.random.beta(1, 3)), vector))

    def begins(self) -> None:
        """Its reference is full, and a new week begins."""
        for _ in range(60):
            self.reads(1, "Acme One")
            self.reads(1, "Bolt Two")
        self.now += timedelta(weeks=1)

    def acts(self) -> list[str]:
        with self.database.reading() as session:
            return list(session.execute(sa.text("SELECT what FROM act WHERE kind = 'drift alarm'")).scalars())


@pytest.fixture
def clinic(tmp_path: Path) -> Clinic:
    return Clinic(f"sqlite:///{tmp_path / 'site.sqlite'}")


def test_the_first_studies_are_the_reference(clinic: Clinic) -> None:
    """The first studies a bundle reads are what later weeks are compared with; until then nothing is said."""
    clinic.reads(119)
    clinic.reads(40, bundle=OTHER)
    assert clinic.drift.filled(BUNDLE) == 119 and clinic.drift.weeks(BUNDLE) == []
    clinic.reads(3)
    assert clinic.drift.filled(BUNDLE) == 120
    (all_, one) = clinic.drift.weeks(BUNDLE)
    assert (all_.device, one.device, all_.sums.studies, all_.week) == (ALL, "Acme One", 2, "2026-03-02")


def test_ordinary_weeks_are_quiet(clinic: Clinic) -> None:
    """Ten ordinary weeks of two scanners raise no alarm."""
    clinic.begins()
    for _ in range(10):
        clinic.reads(40, "Acme One")
        clinic.reads(40, "Bolt Two")
        assert clinic.drift.raise_alarms(BUNDLE) == []
        clinic.now += timedelta(weeks=1)
    assert clinic.acts() == []


def test_a_scanner_changes(clinic: Clinic) -> None:
    """When a scanner's images change, the alarm names the scanner, once, as an act; the other scanner stays quiet."""
    clinic.begins()
    clinic.reads(40, "Acme One", gain=1.2)
    clinic.reads(40, "Bolt Two")
    raised = clinic.drift.raise_alarms(BUNDLE)
    assert {(a.device, a.figure) for a in raised} >= {("Acme One", "images")}
    assert "Bolt Two" not in {a.device for a in raised}
    assert clinic.drift.raise_alarms(BUNDLE) == []  # once
    assert len(clinic.acts()) == len(raised) == len(clinic.drift.alarms(BUNDLE))
    assert any("images of Acme One in the week of 2026-03-09" in what for what in clinic.acts())
    assert audit.verify(clinic.database).sound


def test_an_alarm_asks_until_it_was_answered(clinic: Clinic) -> None:
    """An alarm asks for adaptation until something was learnt after it; a site may switch the asking off."""
    clinic.begins()
    clinic.reads(40, "Acme One", gain=1.2)
    assert clinic.drift.asked(BUNDLE, None) is None
    clinic.drift.raise_alarms(BUNDLE)
    for learnt in (None, clinic.now - timedelta(days=1)):
        alarm = clinic.drift.asked(BUNDLE, learnt)
        assert alarm is not None and alarm.week == "2026-03-09"
    assert clinic.drift.asked(BUNDLE, clinic.now + timedelta(hours=1)) is None
    assert clinic.drift.asked(OTHER, None) is None
    quiet = Drift(clinic.database, Limits(), 120, lambda: clinic.now, asks=False)
    assert quiet.alarms(BUNDLE) and quiet.asked(BUNDLE, None) is None
    with clinic.database.reading() as session:
        details = session.execute(sa.text("SELECT detail FROM act WHERE kind = 'drift alarm'")).scalars()
        assert all('"asks for": "adaptation"' in str(each).replace('":"', '": "') for each in details)


def test_a_new_scanner(clinic: Clinic) -> None:
    """A scanner that the reference does not know is compared with all that it knows."""
    clinic.begins()
    clinic.reads(40, "Crisp Three", gain=1.2)
    assert ("Crisp Three", "images") in {(a.device, a.figure) for a in clinic.drift.raise_alarms(BUNDLE)}


def test_a_new_bundle_begins_anew(clinic: Clinic) -> None:
    """Another bundle has another reference: promoting it raises no alarm about the one before."""
    clinic.begins()
    clinic.reads(40, gain=1.2, bundle=OTHER)
    assert clinic.drift.raise_alarms(OTHER) == [] and clinic.drift.weeks(OTHER) == []


def test_weeks_begin_on_monday() -> None:
    """A week begins on Monday, in UTC."""
    assert monday(datetime(2026, 3, 8, 23, 59, tzinfo=UTC)) == "2026-03-02"
    assert monday(datetime(2026, 3, 9, tzinfo=UTC)) == "2026-03-09"


def test_nothing_but_sums(clinic: Clinic) -> None:
    """What is kept of a week does not grow with its studies and holds none of them."""
    clinic.begins()
    clinic.reads(1)
    with clinic.database.reading() as session:
        size = sa.text("SELECT length(features), length(scores) FROM drift_week WHERE week = '2026-03-09'")
        before = session.execute(size).one()
    clinic.reads(30)
    with clinic.database.reading() as session:
        after = session.execute(size).one()
    assert before[0] == after[0] == 8 * drift.FEATURES and abs(before[1] - after[1]) < 20


def test_on_postgresql() -> None:
    """Weeks and alarms are kept on PostgreSQL as on SQLite."""
    with postgres.running("site") as addresses:
        clinic = Clinic(addresses["site"])
        clinic.begins()
        clinic.reads(35, "Acme One", gain=1.2)
        assert ("Acme One", "images") in {(a.device, a.figure) for a in clinic.drift.raise_alarms(BUNDLE)}
        clinic.database.close()
