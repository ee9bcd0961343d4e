"""The worklist: one row for each study, in the order in which readers should look.

Rules:
- It holds nothing of its own. Every row is made from studies, results, deliveries, jobs and words, and the whole
  table can be thrown away and made again (`rebuild`).
- It follows the record of acts: whatever changes a study writes an act that names it, so the studies named since the
  last entry seen are the ones to look at again (`catch_up`).
- Unread before read, then by the site's rule of triage, then who has waited longest. With another rule, every row
  finds its new place before the list is shown.
- Searching finds whole identifiers only, through their keyed hashes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, Session, mapped_column

from busgen_cds.store.audit import ActRow
from busgen_cds.store.cases import WordTable
from busgen_cds.store.database import Base, Database, UtcTime, table_of
from busgen_cds.store.inbox import InstanceTable, StudyTable
from busgen_cds.store.jobs import JobTable
from busgen_cds.store.result_tables import DeliveredTable, DeliveryTable, ResultTable
from busgen_cds.store.vault import Vault
from busgen_cds.triage import Rule

# How far a study has got, in this order.
Stage = Literal["received", "answered", "delivered", "confirmed"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Stuck = Literal["", "held", "reading", "delivery"]
View = Literal["unread", "stuck", "read", "all"]
VIEWS: tuple[View, ...] = get_args(View)
AT_ONCE = 500


class WorklistTable(Base):
    __tablename__ = "worklist"
    __table_args__ = (
        sa.Index("ix_worklist_triage", "read", "place", "received_at"),
        sa.Index("ix_worklist_said", "said", "read", "place", "received_at"),
        sa.Index("ix_worklist_word", "read", "word_at"),
        sa.Index("ix_worklist_answered", "answered_at"),
        sa.Index("ix_worklist_stuck", "stuck", "read"),
        sa.Index("ix_worklist_received", "last_received_at"),
    )

    study_ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    received_at: Mapped[datetime] = mapped_column(UtcTime)
    last_received_at: Mapped[datetime] = mapped_column(UtcTime)
    instances: Mapped[int]
    stage: Mapped[str] = mapped_column(sa.String(12))
    stuck: Mapped[str] = mapped_column(sa.String(12))
    stuck_since: Mapped[datetime | None] = mapped_column(UtcTime)
    reason: Mapped[str] = mapped_column(sa.Text)  # why it is stuck, was declined, or is not for us
    result_ref: Mapped[str | None] = mapped_column(sa.String(32))
    revision: Mapped[int]
    outcome: Mapped[str] = mapped_column(sa.String(16))
    birads: Mapped[str | None] = mapped_column(sa.String(2))
    probability: Mapped[float | None]
    said: Mapped[str] = mapped_column(sa.String(16))  # what the filter asks for: a category, "none", "declined", …
    place: Mapped[float]  # in the order of triage: the smaller, the sooner
    answered_at: Mapped[datetime | None] = mapped_column(UtcTime)
    delivered_at: Mapped[datetime | None] = mapped_column(UtcTime)
    alarm: Mapped[str] = mapped_column(sa.Text)
    read: Mapped[bool]
    word: Mapped[str] = mapped_column(sa.String(8))
    word_by: Mapped[str] = mapped_column(sa.String(64))
    word_at: Mapped[datetime | None] = mapped_column(UtcTime)


class FollowedTable(Base):
    """Up to which entry of the record the worklist was brought, and how long it is: counting it anew takes too long."""

    __tablename__ = "worklist_followed"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    unread: Mapped[int] = mapped_column(default=0)
    stuck: Mapped[int] = mapped_column(default=0)
    read: Mapped[int] = mapped_column(default=0)
    rule: Mapped[str] = mapped_column(sa.String(32), default="")  # the places are by this one


_rows, _followed, _acts = table_of(WorklistTable), table_of(FollowedTable), table_of(ActRow)
_studies, _instances, _results = table_of(StudyTable), table_of(InstanceTable), table_of(ResultTable)
_deliveries, _delivered = table_of(DeliveryTable), table_of(DeliveredTable)
_jobs, _words = table_of(JobTable), table_of(WordTable)


@dataclass(frozen=True)
class Row:
    study_ref: str
    received_at: datetime
    last_received_at: datetime
    instances: int
    stage: Stage
    stuck: Stuck
    stuck_since: datetime | None
    reason: str
    result_ref: str | None
    revision: int
    outcome: str
    birads: str | None
    probability: float | None
    said: str
    place: float
    answered_at: datetime | None
    delivered_at: datetime | None
    alarm: str
    read: bool
    word: str
    word_by: str
    word_at: datetime | None


@dataclass(frozen=True)
class Counts:
    unread: int
    stuck: int
    read: int

    @property
    def all(self) -> int:
        return self.unread + self.read


class Worklist:
    def __init__(self, database: Database, vault: Vault, rule: Rule | None = None) -> None:
        self._database, self._vault, self._rule = database, vault, rule or Rule()

    # -- asking ----------------------------------------------------------------------------------------------------

    def rows(
        self, view: View = "unread", *, said: str = "", search: str = "", limit: int = 50, offset: int = 0
    ) -> list[Row]:
        query = sa.select(_rows).where(*self._conditions(view, said, search))
        if view == "read":
            query = query.order_by(_rows.c.word_at.desc())
        elif view == "stuck":
            query = query.order_by(_rows.c.stuck_since)
        else:
            query = query.order_by(_rows.c.read, _rows.c.place, _rows.c.received_at)
        with self._database.reading() as session:
            return [Row(**row._mapping) for row in session.execute(query.limit(limit).offset(offset))]

    def row(self, study_ref: str) -> Row | None:
        with self._database.reading() as session:
            row = session.execute(sa.select(_rows).where(_rows.c.study_ref == study_ref)).first()
        return Row(**row._mapping) if row else None

    def next_unread(self, after: Row | None = None) -> str | None:
        """The study to look at next, by triage; other than the one just looked at."""
        query = sa.select(_rows.c.study_ref).where(~_rows.c.read, _rows.c.result_ref.is_not(None))
        if after:
            query = query.where(_rows.c.study_ref != after.study_ref)
        with self._database.reading() as session:
            query = query.order_by(_rows.c.place, _rows.c.received_at).limit(1)
            ref: str | None = session.execute(query).scalar()
        return ref

    def answered(self, limit: int) -> list[str]:
        """The current results in the order of the list, unread before read."""
        query = sa.select(_rows.c.result_ref).where(_rows.c.result_ref.is_not(None))
        query = query.order_by(_rows.c.read, _rows.c.place, _rows.c.received_at)
        with self._database.reading() as session:
            return list(session.execute(query.limit(limit)).scalars())

    def counts(self) -> Counts:
        query = sa.select(_followed.c.unread, _followed.c.stuck, _followed.c.read)
        with self._database.reading() as session:
            row = session.execute(query).first()
        return Counts(*row) if row else Counts(0, 0, 0)

    def patients(self, study_refs: Sequence[str]) -> dict[str, str]:
        """The patient ids of the studies on one page."""
        query = sa.select(_studies.c.ref, _studies.c.patient).where(_studies.c.ref.in_(study_refs))
        with self._database.reading() as session:
            return {row.ref: self._vault.open_text(row.patient) for row in session.execute(query)}

    def two_patients(self, study_refs: Sequence[str]) -> set[str]:
        """Which of these hold the images of two patients: they go on only as the study of one."""
        query = sa.select(_studies.c.ref).where(_studies.c.ref.in_(study_refs), _studies.c.two_patients)
        with self._database.reading() as session:
            return set(session.execute(query).scalars())

    def studies_of(self, identifier: str) -> sa.CompoundSelect[Any]:
        """The studies that an identifier names: patient id, Study Instance UID, accession number or our reference."""
        blinds = self._vault.blinds(identifier)
        named = sa.select(_studies.c.ref).where(
            _studies.c.patient_blind.in_(blinds) | _studies.c.uid_blind.in_(blinds) | (_studies.c.ref == identifier)
        )
        return named.union(sa.select(_results.c.study_ref).where(_results.c.accession_blind.in_(blinds)))

    def answer_times(self, since: datetime) -> list[tuple[datetime, float, float | None]]:
        """For each answered study: when, seconds from its last image to the answer, seconds to the destination."""
        query = sa.select(_rows.c.answered_at, _rows.c.last_received_at, _rows.c.delivered_at)
        query = query.where(_rows.c.answered_at >= since).order_by(_rows.c.answered_at)
        with self._database.reading() as session:
            rows = session.execute(query).all()
        return [(at, _seconds(last, at) or 0.0, _seconds(last, sent)) for at, last, sent in rows]

    def by_hour(self, since: datetime, until: datetime) -> list[tuple[datetime, int, int]]:
        """(hour, studies, instances) by when a study's last image came; hours without any are there too."""
        query = sa.select(_rows.c.last_received_at, _rows.c.instances).where(_rows.c.last_received_at >= since)
        with self._database.reading() as session:
            rows = session.execute(query).all()
        hour = since.replace(minute=0, second=0, microsecond=0)
        found: dict[datetime, list[int]] = {}
        while hour <= until:
            found[hour] = []
            hour += timedelta(hours=1)
        for at, instances in rows:
            found.setdefault(at.replace(minute=0, second=0, microsecond=0), []).append(instances)
        return [(hour, len(each), sum(each)) for hour, each in sorted(found.items())]

    # -- following -------------------------------------------------------------------------------------------------

    def catch_up(self) -> int:
        """Look again at the studies that acts named since the last time, and at the stuck ones; how many changed."""
        with self._database.reading() as session:
            last = session.execute(sa.select(sa.func.max(_acts.c.number))).scalar() or 0
            seen, rule = session.execute(sa.select(_followed.c.number, _followed.c.rule)).first() or (0, "")
        if rule != self._rule.key:
            self._place_anew()
        if last <= seen:
            return 0
        with self._database.transaction() as session:
            seen = _followed_row(session).number
            named = _acts.c.study_ref.is_not(None) & (_acts.c.number > seen) & (_acts.c.number <= last)
            refs = set(session.execute(sa.select(_acts.c.study_ref).where(named).distinct()).scalars())
            refs |= set(
                session.execute(sa.select(_rows.c.study_ref).where(_rows.c.stuck > "").limit(AT_ONCE)).scalars()
            )
            session.execute(sa.update(_followed).values(number=max(seen, last)))
            return self._renew(session, refs)

    def refresh(self, study_ref: str) -> None:
        with self._database.transaction() as session:
            self._renew(session, [study_ref])

    def rebuild(self) -> int:
        with self._database.transaction() as session:
            session.execute(sa.delete(_rows))
            _followed_row(session)
            session.execute(sa.update(_followed).values(unread=0, stuck=0, read=0, rule=self._rule.key))
            return self._renew(session, session.execute(sa.select(_studies.c.ref)).scalars().all())

    def _place_anew(self) -> None:
        """The site has another rule: the same rows, in its order."""
        asked = sa.select(*(_rows.c[name] for name in ("study_ref", "outcome", "birads", "probability", "stuck")))
        found = sa.update(_rows).where(_rows.c.study_ref == sa.bindparam("ref")).values(place=sa.bindparam("to"))
        with self._database.transaction() as session:
            _followed_row(session)
            places = [
                {"ref": row.study_ref, "to": _place(row, row.stuck, self._rule)} for row in session.execute(asked)
            ]
            if places:
                session.connection().execute(found, places)
            session.execute(sa.update(_followed).values(rule=self._rule.key))

    def _renew(self, session: Session, study_refs: Iterable[str]) -> int:
        _followed_row(session)
        refs, changed = sorted(study_refs), 0
        for start in range(0, len(refs), AT_ONCE):
            part = refs[start : start + AT_ONCE]
            query = sa.select(_rows).where(_rows.c.study_ref.in_(part))
            before = {row.study_ref: Row(**row._mapping) for row in session.execute(query)}
            now = {row.study_ref: row for row in _made(session, part, self._rule)}
            different = [ref for ref in now if before.get(ref) != now[ref]]
            gone = [ref for ref in before if ref not in now]
            _replace(
                session, [before[ref] for ref in (*different, *gone) if ref in before], [now[r] for r in different]
            )
            changed += len(different) + len(gone)
        return changed

    def _conditions(self, view: View, said: str, search: str) -> list[sa.ColumnElement[bool]]:
        conditions: list[sa.ColumnElement[bool]] = []
        if search.strip():
            conditions.append(_rows.c.study_ref.in_(self.studies_of(search.strip())))
        if view == "stuck":
            conditions.append(_rows.c.stuck > "")
        elif view != "all":
            conditions.append(_rows.c.read == (view == "read"))
        if said:
            conditions.append(_rows.c.said == said)
        return conditions


def _followed_row(session: Session) -> sa.Row[Any]:
    """Taken first: one at a time follows. SQLite's writers are alone in any case."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": 0x776F726B})
    row = session.execute(sa.select(_followed)).first()
    if row is None:
        session.execute(sa.insert(_followed).values(id=1, number=0, unread=0, stuck=0, read=0, rule=""))
        row = session.execute(sa.select(_followed)).one()
    return row


def _replace(session: Session, old: Sequence[Row], new: Sequence[Row]) -> None:
    """Rows and counts change together."""
    if old:
        session.execute(sa.delete(_rows).where(_rows.c.study_ref.in_([row.study_ref for row in old])))
    if new:
        session.execute(sa.insert(_rows), [dataclasses.asdict(row) for row in new])
    if old or new:
        more = {
            "unread": sum(not row.read for row in new) - sum(not row.read for row in old),
            "read": sum(row.read for row in new) - sum(row.read for row in old),
            "stuck": sum(row.stuck != "" for row in new) - sum(row.stuck != "" for row in old),
        }
        session.execute(sa.update(_followed).values({name: _followed.c[name] + by for name, by in more.items()}))


def _made(session: Session, refs: Sequence[str], rule: Rule) -> list[Row]:
    studies = session.execute(sa.select(_studies).where(_studies.c.ref.in_(refs), _studies.c.key.is_not(None))).all()
    counted = sa.select(_instances.c.study_ref, sa.func.count().label("n"), sa.func.max(_instances.c.received_at))
    counted = counted.where(_instances.c.study_ref.in_(refs), ~_instances.c.conflict).group_by(_instances.c.study_ref)
    arrived: dict[str, tuple[int, datetime]] = {ref: (n, last) for ref, n, last in session.execute(counted)}
    current = sa.select(*(c for c in _results.c if c.name != "document"))
    current = current.where(_results.c.study_ref.in_(refs), _results.c.current == sa.true())
    results = {row.study_ref: row for row in session.execute(current)}
    jobs = {row.study_ref: row for row in session.execute(sa.select(_jobs).where(_jobs.c.study_ref.in_(refs)))}
    deliveries = _by_study(session, _delivery_query(refs))
    words = _by_study(
        session, sa.select(_words).where(_words.c.study_ref.in_(refs)).order_by(_words.c.at, _words.c.ref)
    )
    return [
        _row(
            study,
            arrived.get(study.ref, (0, study.first_received_at)),
            results.get(study.ref),
            jobs.get(study.ref),
            deliveries.get(study.ref, []),
            words.get(study.ref, []),
            rule,
        )
        for study in studies
    ]


def _delivery_query(refs: Sequence[str]) -> sa.Select[Any]:
    """Each object of the current result at each destination."""
    return (
        sa.select(
            _deliveries.c.study_ref,
            _deliveries.c.destination,
            _deliveries.c.state.label("delivery"),
            _deliveries.c.reason,
            _deliveries.c.since,
            _delivered.c.state,
            _delivered.c.reason.label("refusal"),
            _delivered.c.at,
        )
        .join(_results, (_results.c.ref == _deliveries.c.result_ref) & (_results.c.current == sa.true()))
        .join(_delivered, _delivered.c.delivery_ref == _deliveries.c.ref)
        .where(_deliveries.c.study_ref.in_(refs), _deliveries.c.state != "withdrawn")
    )


def _by_study(session: Session, query: sa.Select[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in session.execute(query):
        found.setdefault(row.study_ref, []).append(row)
    return found


def _row(
    study: Any,
    arrived: tuple[int, datetime],
    result: Any,
    job: Any,
    objects: list[Any],
    words: list[Any],
    rule: Rule,
) -> Row:
    stuck, since, why = _stuck(study, job, objects)
    stage, delivered_at = _stage(result, objects)
    mine = [word for word in words if result and word.revision == result.revision]
    done = next((word for word in reversed(mine) if word.completes), None)
    not_for_us = result is not None and result.outcome == "not-for-us"
    return Row(
        study_ref=study.ref,
        received_at=study.first_received_at,
        last_received_at=arrived[1],
        instances=arrived[0],
        stage=stage,
        stuck=stuck,
        stuck_since=since,
        reason=why or (result.reason if result else ""),
        result_ref=result.ref if result else None,
        revision=result.revision if result else 0,
        outcome=result.outcome if result else "",
        birads=result.birads if result else None,
        probability=result.probability if result else None,
        said=_said(result),
        place=_place(result, stuck, rule),
        answered_at=result.made_at if result else None,
        delivered_at=delivered_at,
        alarm=result.alarm if result else "",
        read=done is not None or not_for_us,
        word=_word(mine) if done else "",
        word_by=done.who if done else "",
        word_at=done.at if done else (result.made_at if not_for_us else None),
    )


def _place(result: Any, stuck: str, rule: Rule) -> float:
    if result is None:
        return rule.place("", stuck=bool(stuck))
    return rule.place(result.outcome, result.birads, result.probability, stuck=bool(stuck))


def _stuck(study: Any, job: Any, objects: list[Any]) -> tuple[Stuck, datetime | None, str]:
    if study.held:
        return "held", study.first_received_at, study.held
    if job is not None and job.state == "parked":
        return "reading", job.since, job.reason
    for each in objects:
        if each.delivery == "parked":
            return "delivery", each.since, f"{each.destination}: {each.reason}"
        if each.state == "refused":
            return "delivery", each.at, f"{each.destination} refused: {each.refusal}"
    return "", None, ""


def _stage(result: Any, objects: list[Any]) -> tuple[Stage, datetime | None]:
    if result is None:
        return "received", None
    states = {each.state for each in objects}
    if not states or not states <= {"sent", "confirmed"}:
        return "answered", None
    return ("confirmed" if states == {"confirmed"} else "delivered"), max(each.at for each in objects)


def _said(result: Any) -> str:
    if result is None:
        return ""
    if result.outcome != "assessed":
        return str(result.outcome)
    return str(result.birads or "none")


def _word(words: list[Any]) -> str:
    """Of the last word on each finding, the one that disagrees most."""
    last = {word.finding: word.word for word in words}.values()
    return next(word for word in ("reject", "edit", "agree") if word in last)


def _seconds(start: datetime, end: datetime | None) -> float | None:
    return None if end is None else max(0.0, (end - start).total_seconds())
