"""What came in, week by week and device by device, as sums that hold no image and no name; and the alarms they raised.

Rules:
- The reference is the first studies that a bundle reads at this site (`drift.reference_studies`): what the person who
  promoted it looked at. It is kept for each device and for all together; a device that the reference does not know
  well enough is compared with all.
- A study counts once, at its first revision, in the week (from Monday, UTC) in which it was read.
- An alarm is raised once for a figure, a week and a device, and is an act in the transaction that raises it.
- Where it may, an alarm asks for adaptation; it is answered by whatever was learnt after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Mapped, Session, mapped_column

from busgen_cds import drift
from busgen_cds.drift import Figure, Limits, Sums
from busgen_cds.store import audit
from busgen_cds.store.database import Base, Database, UtcTime, table_of

REFERENCE = "reference"  # in place of a week
ALL = ""  # in place of a device
MOST_DEVICE = 64  # characters


class WeekTable(Base):
    __tablename__ = "drift_week"

    digest: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    week: Mapped[str] = mapped_column(sa.String(10), primary_key=True)
    device: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    studies: Mapped[int]
    declined: Mapped[int]
    scores: Mapped[str] = mapped_column(sa.Text)  # JSON list
    categories: Mapped[str] = mapped_column(sa.Text)  # JSON list
    features: Mapped[bytes] = mapped_column(sa.LargeBinary)  # float64
    squares: Mapped[float]


class AlarmTable(Base):
    __tablename__ = "drift_alarm"

    digest: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    week: Mapped[str] = mapped_column(sa.String(10), primary_key=True)
    device: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    figure: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    value: Mapped[float]
    highest: Mapped[float]
    at: Mapped[datetime] = mapped_column(UtcTime)


_weeks, _alarms = table_of(WeekTable), table_of(AlarmTable)


@dataclass(frozen=True)
class Week:
    """One device (or all) in one week, and how it differs from the reference."""

    week: str
    device: str
    sums: Sums = field(repr=False)
    figures: tuple[Figure, ...]

    @property
    def alarming(self) -> bool:
        return any(figure.alarming for figure in self.figures)


@dataclass(frozen=True)
class Alarm:
    digest: str
    week: str
    device: str
    figure: str
    value: float
    highest: float
    at: datetime


class Drift:
    def __init__(
        self,
        database: Database,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        reference_studies: int = 200,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        *,
        asks: bool = True,
    ) -> None:
        self._database, self.limits, self.reference_studies, self._clock = database, limits, reference_studies, clock
        self.asks = asks

    def add(self, digest: str, device: str, study: Sums) -> None:
        """Count one study that this bundle read."""
        device = (device.strip() or "unknown")[:MOST_DEVICE]
        with self._database.transaction() as session:
            _alone(session)
            counted = sa.select(sa.func.coalesce(sa.func.sum(_weeks.c.studies), 0))
            counted = counted.where(_weeks.c.digest == digest, _weeks.c.week == REFERENCE)
            filling = session.execute(counted).scalar_one() < self.reference_studies
            week = REFERENCE if filling else monday(self._clock())
            mine = (_weeks.c.digest == digest) & (_weeks.c.week == week) & (_weeks.c.device == device)
            row = session.execute(sa.select(_weeks).where(mine)).first()
            if row is None:
                key = {"digest": digest, "week": week, "device": device}
                session.execute(sa.insert(_weeks).values(**key, **_values(study)))
            else:
                session.execute(sa.update(_weeks).where(mine).values(**_values(_sums(row) + study)))

    def filled(self, digest: str) -> int:
        """How many studies the reference has."""
        return self._reference(digest)[ALL].studies

    def weeks(self, digest: str, *, last: int = 12) -> list[Week]:
        """The last weeks, newest first: all devices together, then each."""
        reference = self._reference(digest)
        if reference[ALL].studies < self.reference_studies:
            return []
        since = monday(self._clock() - timedelta(weeks=last))
        query = sa.select(_weeks).where(_weeks.c.digest == digest, _weeks.c.week != REFERENCE, _weeks.c.week >= since)
        found: dict[tuple[str, str], Sums] = {}
        with self._database.reading() as session:
            for row in session.execute(query):
                for device in (ALL, row.device):
                    found[row.week, device] = found.get((row.week, device), Sums()) + _sums(row)
        return [
            Week(week, device, sums, drift.figures(self._against(reference, device), sums, self.limits))
            for (week, device), sums in sorted(found.items(), key=lambda item: (-_day(item[0][0]), item[0][1]))
        ]

    def raise_alarms(self, digest: str) -> list[Alarm]:
        """Alarms that were not raised before, each with its act."""
        now = self._clock()
        alarming = [(w, f) for w in self.weeks(digest, last=2) for f in w.figures if f.alarming]
        raised = []
        for week, figure in alarming:
            alarm = Alarm(digest, week.week, week.device, figure.name, figure.value, figure.limit, now)
            with self._database.transaction() as session:
                _alone(session)
                if not _known(session, alarm):
                    session.execute(sa.insert(_alarms).values(**vars(alarm)))
                    audit.record(session, _act(alarm, self.asks), at=now)
                    raised.append(alarm)
        return raised

    def alarms(self, digest: str, *, limit: int = 100) -> list[Alarm]:
        query = sa.select(_alarms).where(_alarms.c.digest == digest)
        query = query.order_by(_alarms.c.week.desc(), _alarms.c.device, _alarms.c.figure).limit(limit)
        with self._database.reading() as session:
            return [Alarm(**row._mapping) for row in session.execute(query)]

    def asked(self, digest: str, learnt: datetime | None) -> Alarm | None:
        """The newest alarm that asks for adaptation: none was begun after it."""
        raised = [each for each in self.alarms(digest) if learnt is None or each.at > learnt] if self.asks else []
        return max(raised, key=lambda each: each.at, default=None)

    def _reference(self, digest: str) -> dict[str, Sums]:
        query = sa.select(_weeks).where(_weeks.c.digest == digest, _weeks.c.week == REFERENCE)
        with self._database.reading() as session:
            found = {row.device: _sums(row) for row in session.execute(query)}
        return {**found, ALL: sum(found.values(), Sums())}

    def _against(self, reference: dict[str, Sums], device: str) -> Sums:
        own = reference.get(device, Sums())
        return own if own.studies >= self.limits.studies else reference[ALL]


def monday(moment: datetime) -> str:
    day = moment.astimezone(UTC).date()
    return (day - timedelta(days=day.weekday())).isoformat()


def _day(week: str) -> int:
    return datetime.fromisoformat(week).toordinal()


def _alone(session: Session) -> None:
    """One counts at a time; on SQLite a writing transaction is alone anyway."""
    if session.connection().dialect.name == "postgresql":
        session.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": 0x64726966})


def _values(sums: Sums) -> dict[str, Any]:
    return {
        "studies": sums.studies,
        "declined": sums.declined,
        "scores": json.dumps(sums.scores),
        "categories": json.dumps(sums.categories),
        "features": sums.features.astype("<f8").tobytes(),
        "squares": sums.squares,
    }


def _sums(row: Any) -> Sums:
    return Sums(
        row.studies,
        row.declined,
        tuple(json.loads(row.scores)),
        tuple(json.loads(row.categories)),
        np.frombuffer(row.features, "<f8").astype(np.float64),
        row.squares,
    )


def _known(session: Session, alarm: Alarm) -> bool:
    mine = sa.and_(*(_alarms.c[name] == getattr(alarm, name) for name in ("digest", "week", "device", "figure")))
    return session.execute(sa.select(_alarms.c.at).where(mine)).first() is not None


def _act(alarm: Alarm, asks: bool) -> audit.Act:
    where = alarm.device or "all devices"
    what = f"{alarm.figure} of {where} in the week of {alarm.week}: {alarm.value:.3f}, limit {alarm.highest:.3f}"
    detail = {"digest": alarm.digest, "figure": alarm.figure} | ({"asks for": "adaptation"} if asks else {})
    return audit.Act("drift alarm", "watch", what, detail=detail)
