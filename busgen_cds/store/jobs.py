"""Jobs that wait or are stuck, who is at work, and whether the engine may be used.

Rules:
- A study has one job of reading at most, for the evidence it had when the job was made; each attempt has a number.
- A stuck job is parked with its reason. Nothing is lost by that: `retry` gives it another attempt.
- Every worker says that it is alive; a living one takes over from one that has stopped saying so.
- An engine that met something Untrusted is stopped until a person resumes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, Session, mapped_column

from busgen_cds.store import audit
from busgen_cds.store.database import Base, Database, UtcTime

State = Literal["waiting", "parked"]


class JobTable(Base):
    __tablename__ = "job"

    study_ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    evidence_digest: Mapped[str] = mapped_column(sa.String(64))
    attempt: Mapped[int]
    state: Mapped[str] = mapped_column(sa.String(16), index=True)
    reason: Mapped[str] = mapped_column(sa.Text)
    since: Mapped[datetime] = mapped_column(UtcTime)


class ExecutorTable(Base):
    __tablename__ = "executor"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    beat_at: Mapped[datetime] = mapped_column(UtcTime)


class StopTable(Base):
    __tablename__ = "engine_stop"

    at: Mapped[datetime] = mapped_column(UtcTime, primary_key=True)
    reason: Mapped[str] = mapped_column(sa.Text)
    resumed_at: Mapped[datetime | None] = mapped_column(UtcTime)


_jobs, _executors, _stops = (Base.metadata.tables[name] for name in ("job", "executor", "engine_stop"))


@dataclass(frozen=True)
class Job:
    study_ref: str
    evidence_digest: str
    attempt: int
    state: State
    reason: str
    since: datetime


class Jobs:
    def __init__(self, database: Database, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database, self._clock = database, clock

    # -- reading -----------------------------------------------------------------------------------------------------

    def begin(self, study_ref: str, evidence_digest: str) -> Job:
        """The job of reading this evidence: the one there is, or a new one. Newer evidence replaces an older job."""
        with self._database.transaction() as session:
            job = _job(session, study_ref)
            if job and job.evidence_digest == evidence_digest:
                return job
            session.execute(sa.delete(_jobs).where(_jobs.c.study_ref == study_ref))
            new = Job(study_ref, evidence_digest, 1, "waiting", "", self._clock())
            session.execute(sa.insert(_jobs).values(**vars(new)))
        return new

    def another_attempt(self, job: Job) -> Job:
        """One more, whoever asks; of two that ask for the same one, both get it."""
        as_seen = (_jobs.c.study_ref == job.study_ref) & (_jobs.c.attempt == job.attempt)
        as_seen &= _jobs.c.evidence_digest == job.evidence_digest
        again = {"attempt": job.attempt + 1, "state": "waiting", "reason": "", "since": self._clock()}
        with self._database.transaction() as session:
            session.execute(sa.update(_jobs).where(as_seen).values(**again))
            return _job(session, job.study_ref) or job

    def park(self, study_ref: str, evidence_digest: str, reason: str) -> None:
        """It will not go on by itself. A job for newer evidence is another one, and goes on."""
        with self._database.transaction() as session:
            mine = (_jobs.c.study_ref == study_ref) & (_jobs.c.state == "waiting")
            mine &= _jobs.c.evidence_digest == evidence_digest
            parked = sa.update(_jobs).where(mine).values(state="parked", reason=reason, since=self._clock())
            if _changed(session, parked):
                audit.record(session, audit.Act("study parked", "reading", reason, study_ref), at=self._clock())

    def retry(self, study_ref: str, *, who: str) -> Job | None:
        """Another attempt at a parked study; None when it is not parked."""
        job = self.of(study_ref)
        if job is None or job.state != "parked":
            return None
        with self._database.transaction() as session:
            audit.record(session, audit.Act("study taken up again", who, "", study_ref), at=self._clock())
        return self.another_attempt(job)

    def done(self, session: Session, study_ref: str, *evidence_digests: str) -> None:
        """In the transaction that keeps the result: the evidence asked for, and the evidence that was there by then."""
        mine = (_jobs.c.study_ref == study_ref) & _jobs.c.evidence_digest.in_(evidence_digests)
        session.execute(sa.delete(_jobs).where(mine))

    def drop(self, study_ref: str, *evidence_digests: str) -> None:
        with self._database.transaction() as session:
            self.done(session, study_ref, *evidence_digests)

    def of(self, study_ref: str) -> Job | None:
        with self._database.reading() as session:
            return _job(session, study_ref)

    def all(self, state: State | None = None) -> list[Job]:
        query = sa.select(_jobs).order_by(_jobs.c.since)
        if state:
            query = query.where(_jobs.c.state == state)
        with self._database.reading() as session:
            return [Job(**row._mapping) for row in session.execute(query)]

    # -- who is at work ----------------------------------------------------------------------------------------------

    def beat(self, executor: str) -> None:
        with self._database.transaction() as session:
            now = self._clock()  # after the lock was waited for, or a busy database makes a living one look dead
            mine = sa.update(_executors).where(_executors.c.id == executor)
            if not _changed(session, mine.values(beat_at=now)):
                session.execute(sa.insert(_executors).values(id=executor, beat_at=now))

    def leave(self, executor: str) -> None:
        """It ends as it should: nobody needs to take over."""
        with self._database.transaction() as session:
            session.execute(sa.delete(_executors).where(_executors.c.id == executor))

    def alive(self, *, within: timedelta) -> list[str]:
        recent = _executors.c.beat_at >= self._clock() - within
        with self._database.reading() as session:
            return list(session.execute(sa.select(_executors.c.id).where(recent).order_by(_executors.c.id)).scalars())

    def silent(self, *, since: timedelta, but: str = "") -> list[str]:
        """Others than me that stopped saying that they are alive. They stay in the list until they speak or leave."""
        late = (_executors.c.beat_at < self._clock() - since) & (_executors.c.id != but)
        with self._database.reading() as session:
            return list(session.execute(sa.select(_executors.c.id).where(late)).scalars())

    def taken_over(self, silent: str, by: str) -> None:
        """Its work went to a living one. Should it speak again, it is listed again."""
        with self._database.transaction() as session:
            session.execute(sa.delete(_executors).where(_executors.c.id == silent))
            audit.record(session, audit.Act("worker taken over", by, "", detail={"of": silent}), at=self._clock())

    # -- the engine --------------------------------------------------------------------------------------------------

    def stop_engine(self, reason: str) -> None:
        if self.engine_stopped() is not None:
            return
        with self._database.transaction() as session:
            session.execute(sa.insert(_stops).values(at=self._clock(), reason=reason, resumed_at=None))
            audit.record(session, audit.Act("engine stopped", "reading", reason), at=self._clock())

    def engine_stopped(self) -> str | None:
        """Why no study is read at present, if so."""
        with self._database.reading() as session:
            return session.execute(sa.select(_stops.c.reason).where(_stops.c.resumed_at.is_(None))).scalar()

    def resumed_since(self, moment: datetime) -> bool:
        """Was it put to use again after having been stopped?"""
        with self._database.reading() as session:
            return session.execute(sa.select(_stops.c.at).where(_stops.c.resumed_at >= moment)).first() is not None

    def resume_engine(self, *, who: str) -> bool:
        with self._database.transaction() as session:
            resumed = _changed(
                session, sa.update(_stops).where(_stops.c.resumed_at.is_(None)).values(resumed_at=self._clock())
            )
            if resumed:
                audit.record(session, audit.Act("engine resumed", who), at=self._clock())
        return resumed


def _job(session: Session, study_ref: str) -> Job | None:
    row = session.execute(sa.select(_jobs).where(_jobs.c.study_ref == study_ref)).first()
    return Job(**row._mapping) if row else None


def _changed(session: Session, change: sa.Update) -> bool:
    return cast("sa.CursorResult[Any]", session.execute(change)).rowcount > 0
