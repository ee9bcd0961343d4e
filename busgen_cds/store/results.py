"""What was said about each study, the objects that say it, and how far each object has got.

Rules:
- A result, its objects, its deliveries and its act are kept in one transaction, or not at all.
- The same evidence read by the same bundle is kept once; a study has exactly one current result.
- Objects are kept as bytes and never change, so that one UID never has two contents.
- A newer result supersedes loudly: it names all that reached a destination, what was not yet sent is withdrawn,
  and an act sounds the alarm when it ranks lower in triage.
- Documents and objects are sealed under the study's key: destroying that key shreds them.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, cast

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Mapped, Session, mapped_column

from busgen_cds import signing
from busgen_cds.birads import Category
from busgen_cds.errors import Misconfigured, Shredded, Transient, Untrusted
from busgen_cds.result import Assessed, BundleName, Declined, Finding, HeatMap, Kind, Rendered, Result, triage
from busgen_cds.store import audit
from busgen_cds.store.database import Base, Blind, Database, Sealed, UtcTime
from busgen_cds.store.inbox import InstanceTable, StudyTable
from busgen_cds.store.vault import Vault
from busgen_cds.study import NotAnalysed, NotForUs, Region, Source

Outcome = Literal["assessed", "declined", "not-for-us"]
NOT_FOR_US = 0  # its place in triage: nobody waits for it
# A delivery: one result, one destination.
DeliveryState = Literal["waiting", "asked", "done", "parked", "withdrawn"]
# An object at a destination. `sent`: the PACS said success; `confirmed`: it also committed to keep it.
ObjectState = Literal["waiting", "sent", "confirmed", "refused"]


_ALARMING = sa.text("current AND alarm <> ''")


class ResultTable(Base):
    __tablename__ = "result"
    __table_args__ = (
        sa.UniqueConstraint("study_ref", "revision"),
        sa.Index("ix_result_current", "current", "made_at"),
        sa.Index("ix_result_triage", "current", "triage", "made_at"),
        sa.Index("ix_result_alarm", "made_at", sqlite_where=_ALARMING, postgresql_where=_ALARMING),
        sa.Index(
            "uq_result_current",
            "study_ref",
            unique=True,
            sqlite_where=sa.text("current"),
            postgresql_where=sa.text("current"),
        ),
    )

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    study_ref: Mapped[str] = mapped_column(sa.ForeignKey("study.ref"))
    revision: Mapped[int]
    evidence_digest: Mapped[str] = mapped_column(sa.String(64))
    bundle_digest: Mapped[str] = mapped_column(sa.String(64))
    instances: Mapped[int]  # how many it was read from
    outcome: Mapped[str] = mapped_column(sa.String(16))
    reason: Mapped[str] = mapped_column(sa.Text)
    birads: Mapped[str | None] = mapped_column(sa.String(2))
    probability: Mapped[float | None]
    triage: Mapped[int]
    images_read: Mapped[int]
    made_at: Mapped[datetime] = mapped_column(UtcTime)
    current: Mapped[bool]
    supersedes: Mapped[str | None] = mapped_column(sa.String(32))
    alarm: Mapped[str] = mapped_column(sa.Text)
    accession_blind: Mapped[str] = mapped_column(Blind(of="accession"), index=True)
    accession: Mapped[bytes | None] = mapped_column(Sealed)
    document: Mapped[bytes] = mapped_column(sa.LargeBinary)  # under the study's key


class RenderedTable(Base):
    __tablename__ = "rendered"

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    result_ref: Mapped[str] = mapped_column(sa.ForeignKey("result.ref"), index=True)
    number: Mapped[int]  # in the order rendered
    kind: Mapped[str] = mapped_column(sa.String(4))
    sop_class_uid: Mapped[str] = mapped_column(sa.String(64))
    sop_instance_uid: Mapped[str] = mapped_column(sa.String(64), unique=True)  # made by us; names nobody
    series_instance_uid: Mapped[str] = mapped_column(sa.String(64))
    transfer_syntax_uid: Mapped[str] = mapped_column(sa.String(64))
    sha256: Mapped[str] = mapped_column(sa.String(64))
    data: Mapped[bytes] = mapped_column(sa.LargeBinary)  # under the study's key


class DeliveryTable(Base):
    __tablename__ = "delivery"
    __table_args__ = (
        sa.UniqueConstraint("result_ref", "destination"),
        sa.Index("ix_delivery_state", "state", "destination", "next_try_at"),
    )

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    result_ref: Mapped[str] = mapped_column(sa.ForeignKey("result.ref"))
    study_ref: Mapped[str] = mapped_column(sa.String(32), index=True)
    destination: Mapped[str] = mapped_column(sa.String(64))
    state: Mapped[str] = mapped_column(sa.String(16))
    since: Mapped[datetime] = mapped_column(UtcTime)
    tries: Mapped[int]
    next_try_at: Mapped[datetime] = mapped_column(UtcTime)
    reason: Mapped[str] = mapped_column(sa.Text)
    transaction_uid: Mapped[str] = mapped_column(sa.String(64), index=True)


class CommitmentTable(Base):
    """Every request for storage commitment: a PACS may answer an early one after a later one was made."""

    __tablename__ = "commitment"

    transaction_uid: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    delivery_ref: Mapped[str] = mapped_column(sa.ForeignKey("delivery.ref"), index=True)


class DeliveredTable(Base):
    __tablename__ = "delivered"
    __table_args__ = (sa.Index("ix_delivered_state", "state", "delivery_ref"),)

    delivery_ref: Mapped[str] = mapped_column(sa.ForeignKey("delivery.ref"), primary_key=True)
    rendered_ref: Mapped[str] = mapped_column(sa.ForeignKey("rendered.ref"), primary_key=True)
    state: Mapped[str] = mapped_column(sa.String(16))
    reason: Mapped[str] = mapped_column(sa.Text)
    at: Mapped[datetime] = mapped_column(UtcTime)


_tables = Base.metadata.tables
_results, _rendered = _tables["result"], _tables["rendered"]
_deliveries, _delivered = _tables["delivery"], _tables["delivered"]
_commitments = _tables["commitment"]
_studies, _instances = _tables[StudyTable.__tablename__], _tables[InstanceTable.__tablename__]


@dataclass(frozen=True)
class Entry:
    """A result as lists show it: nothing in it names a patient."""

    ref: str
    study_ref: str
    revision: int
    evidence_digest: str
    bundle_digest: str
    instances: int
    outcome: Outcome
    reason: str
    birads: Category | None
    probability: float | None
    triage: int
    images_read: int
    made_at: datetime
    current: bool
    supersedes: str | None
    alarm: str


@dataclass(frozen=True)
class Addressee:
    """Who gets which kinds of objects of a result."""

    destination: str
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Delivery:
    ref: str
    result_ref: str
    study_ref: str
    destination: str
    state: DeliveryState
    since: datetime
    tries: int
    next_try_at: datetime
    reason: str
    transaction_uid: str = field(repr=False)


@dataclass(frozen=True)
class Delivered:
    """One object at one destination."""

    rendered_ref: str
    kind: Kind
    destination: str
    sop_class_uid: str
    sop_instance_uid: str
    state: ObjectState
    reason: str
    at: datetime


@dataclass(frozen=True)
class Stored:
    """An object at rest: how it is addressed, and its bytes when they are asked for."""

    ref: str
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    opener: Callable[[str], bytes] = field(repr=False, compare=False)

    @property
    def data(self) -> bytes:
        return self.opener(self.ref)


@dataclass(frozen=True)
class Shown:
    """A result with everything that is known of it."""

    entry: Entry
    study_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    answer: Result | NotForUs
    objects: tuple[Rendered, ...]
    deliveries: tuple[Delivery, ...]
    delivered: tuple[Delivered, ...]


@dataclass(frozen=True)
class Previous:
    """What a new revision replaces."""

    revision: int
    outcome: Outcome
    objects: tuple[Rendered, ...]


class Results:
    def __init__(self, database: Database, vault: Vault, clock: Callable[[], datetime] = lambda: datetime.now(UTC)):
        self._database, self._vault, self._clock = database, vault, clock

    # -- keeping -----------------------------------------------------------------------------------------------------

    def keep(
        self,
        study_ref: str,
        answer: Result | NotForUs,
        rendered: Sequence[Rendered],
        *,
        evidence_digest: str,
        instances: int,
        revision: int,
        bundle_digest: str,
        addressees: Iterable[Addressee] = (),
        accession_number: str = "",
        recalled: str = "",
        session_also: Callable[[Session], None] | None = None,
    ) -> Entry:
        """Keep a result with all that belongs to it. Repeated, or late and with less evidence, it changes nothing."""
        now = self._clock()
        digests = [signing.digest(each.data) for each in rendered]
        with self._database.transaction() as session:
            known = _current(session, study_ref)
            if known and (known.evidence_digest == evidence_digest or known.instances > instances):
                return known
            if revision != _last_revision(session, study_ref) + 1:
                raise Transient("Another revision of this study was kept while this one was read: read it again.")
            seal = self._study_vault(session, study_ref)
            entry = _entry_of(
                answer,
                study_ref,
                now,
                known,
                instances=instances,
                revision=revision,
                evidence_digest=evidence_digest,
                bundle_digest=bundle_digest,
            )
            if recalled:
                entry = dataclasses.replace(entry, alarm=recalled)
            if known:
                self._supersede(session, known)
            row = dataclasses.asdict(entry)
            row["accession_blind"] = self._vault.blind(accession_number) if accession_number else ""
            row["accession"] = self._vault.seal_text(accession_number) if accession_number else None
            row["document"] = seal.seal(signing.canonical(to_document(answer)), entry.ref.encode())
            session.execute(sa.insert(_results).values(row))
            refs = self._keep_objects(session, entry, rendered, digests, seal)
            for each in addressees:
                self._address(session, entry, each, {r: o.kind for r, o in zip(refs, rendered, strict=True)}, now)
            audit.record(session, *_acts_of(entry, refs, digests, recalled), at=now)
            if session_also:
                session_also(session)
        return entry

    def _supersede(self, session: Session, old: Entry) -> None:
        session.execute(sa.update(_results).where(_results.c.ref == old.ref).values(current=False))
        unsent = (_deliveries.c.result_ref == old.ref) & _deliveries.c.state.in_(("waiting", "parked"))
        session.execute(sa.update(_deliveries).where(unsent).values(state="withdrawn", reason="superseded"))

    def _keep_objects(
        self, session: Session, entry: Entry, objects: Sequence[Rendered], digests: Sequence[str], seal: Vault
    ) -> list[str]:
        refs = [secrets.token_hex(16) for _ in objects]
        for number, (ref, each, digest) in enumerate(zip(refs, objects, digests, strict=True)):
            session.execute(
                sa.insert(_rendered).values(
                    ref=ref,
                    result_ref=entry.ref,
                    number=number,
                    kind=each.kind,
                    sop_class_uid=each.sop_class_uid,
                    sop_instance_uid=each.sop_instance_uid,
                    series_instance_uid=each.series_instance_uid,
                    transfer_syntax_uid=each.transfer_syntax_uid,
                    sha256=digest,
                    data=seal.seal(each.data, ref.encode()),
                )
            )
        return refs

    def _address(self, session: Session, entry: Entry, to: Addressee, kinds: Mapping[str, Kind], now: datetime) -> None:
        wanted = [ref for ref, kind in kinds.items() if kind in to.kinds]
        if not wanted:
            return
        ref = secrets.token_hex(16)
        session.execute(
            sa.insert(_deliveries).values(
                ref=ref,
                result_ref=entry.ref,
                study_ref=entry.study_ref,
                destination=to.destination,
                state="waiting",
                since=now,
                tries=0,
                next_try_at=now,
                reason="",
                transaction_uid="",
            )
        )
        rows = [
            {"delivery_ref": ref, "rendered_ref": each, "state": "waiting", "reason": "", "at": now} for each in wanted
        ]
        session.execute(sa.insert(_delivered), rows)

    # -- asking ------------------------------------------------------------------------------------------------------

    def current(self, study_ref: str) -> Entry | None:
        with self._database.reading() as session:
            return _current(session, study_ref)

    def next_revision(self, study_ref: str) -> int:
        with self._database.reading() as session:
            return _last_revision(session, study_ref) + 1

    def previous(self, study_ref: str) -> Previous | None:
        """What a revision made now would replace: of all that was rendered, what some destination has."""
        entry = self.current(study_ref)
        if entry is None:
            return None
        sent_again = (_delivered.c.state == "waiting") & (_delivered.c.reason != "")
        arrived = _delivered.c.state.in_(("sent", "confirmed")) | sent_again
        mine = sa.select(_results.c.ref).where(_results.c.study_ref == study_ref)
        query = sa.select(_rendered).where(
            _rendered.c.result_ref.in_(mine),
            _rendered.c.ref.in_(sa.select(_delivered.c.rendered_ref).where(arrived)),
        )
        in_order = query.join(_results, _results.c.ref == _rendered.c.result_ref)
        objects = self._open_objects(in_order.order_by(_results.c.revision, _rendered.c.number))
        return Previous(entry.revision, entry.outcome, objects)

    def listing(
        self,
        *,
        limit: int = 100,
        before: datetime | None = None,
        order: Literal["newest", "triage"] = "newest",
        outcome: Outcome | None = None,
        superseded: bool = False,
    ) -> list[Entry]:
        """Results, newest or most pressing first; `before` pages on in order of time."""
        query = sa.select(*_ENTRY).limit(limit)
        if not superseded:
            query = query.where(_results.c.current == sa.true())
        if before:
            query = query.where(_results.c.made_at < before)
        if outcome:
            query = query.where(_results.c.outcome == outcome)
        newest = _results.c.made_at.desc()
        by = (_results.c.triage.desc(), newest) if order == "triage" else (newest,)
        with self._database.reading() as session:
            return [_entry(row) for row in session.execute(query.order_by(*by))]

    def alarms(self, *, limit: int = 100) -> list[Entry]:
        """Current results that rank lower than the ones they replaced, or that recall them."""
        query = sa.select(*_ENTRY).where(_ALARMING).order_by(_results.c.made_at.desc()).limit(limit)
        with self._database.reading() as session:
            return [_entry(row) for row in session.execute(query)]

    def search(self, text: str, *, limit: int = 100) -> list[Entry]:
        """By patient id, accession number, Study Instance UID, or a reference of ours: whole, never in part."""
        text = text.strip()
        blinds = self._vault.blinds(text)
        studies = sa.select(_studies.c.ref).where(
            _studies.c.uid_blind.in_(blinds) | _studies.c.patient_blind.in_(blinds)
        )
        matching = (
            sa.select(*_ENTRY).where(_results.c.study_ref.in_(studies)),
            sa.select(*_ENTRY).where(_results.c.accession_blind.in_(blinds)),
            sa.select(*_ENTRY).where((_results.c.ref == text) | (_results.c.study_ref == text)),
        )
        with self._database.reading() as session:
            found = {row.ref: _entry(row) for query in matching for row in session.execute(query.limit(limit))}
        return sorted(found.values(), key=lambda entry: entry.made_at, reverse=True)[:limit]

    def show(self, result_ref: str) -> Shown | None:
        with self._database.reading() as session:
            row = session.execute(sa.select(_results).where(_results.c.ref == result_ref)).first()
            if row is None:
                return None
            study = session.execute(sa.select(_studies).where(_studies.c.ref == row.study_ref)).one()
            document = self._study_vault(session, row.study_ref).open(row.document, row.ref.encode())
        deliveries = self.deliveries(result_ref)
        return Shown(
            _entry(row),
            self._vault.open_text(study.uid),
            self._vault.open_text(study.patient),
            from_document(json.loads(document)),
            self.objects(result_ref),
            deliveries,
            tuple(each for delivery in deliveries for each in self.delivered(delivery.ref)),
        )

    def objects(self, result_ref: str) -> tuple[Rendered, ...]:
        """The objects of a result, as the bytes that were rendered."""
        query = sa.select(_rendered).where(_rendered.c.result_ref == result_ref).order_by(_rendered.c.number)
        return self._open_objects(query)

    def history(self, study_ref: str) -> list[Entry]:
        query = sa.select(*_ENTRY).where(_results.c.study_ref == study_ref).order_by(_results.c.revision)
        with self._database.reading() as session:
            return [_entry(row) for row in session.execute(query)]

    def identity(self, study_ref: str) -> tuple[str, str]:
        """Study Instance UID and patient id as received."""
        with self._database.reading() as session:
            row = session.execute(sa.select(_studies).where(_studies.c.ref == study_ref)).one()
        if row.key is None:
            raise Shredded("This study was shredded: nobody knows its names any more.")
        return self._vault.open_text(row.uid), self._vault.open_text(row.patient)

    def ours(self, sop_instance_uids: Iterable[str]) -> set[str]:
        """Which of these are objects that we made: a PACS may send them back."""
        uids = list(sop_instance_uids)
        with self._database.reading() as session:
            query = sa.select(_rendered.c.sop_instance_uid)
            return {
                uid
                for start in range(0, len(uids), 500)
                for uid in session.execute(
                    query.where(_rendered.c.sop_instance_uid.in_(uids[start : start + 500]))
                ).scalars()
            }

    def covers(self, result_ref: str, instances: int) -> None:
        """The result stands although more was received: what came was nothing new."""
        grown = (_results.c.ref == result_ref) & (_results.c.instances < instances)
        with self._database.transaction() as session:
            session.execute(sa.update(_results).where(grown).values(instances=instances))

    def unread(self, *, settled_before: datetime, received_after: datetime | None = None) -> list[str]:
        """Studies with instances that their current result does not cover. Held ones wait for a person, not for us;
        but an answer to what turned out to be two patients is to be recalled."""
        mine = (_instances.c.study_ref == _studies.c.ref) & ~_instances.c.conflict
        received = sa.select(sa.func.count()).where(mine).scalar_subquery()
        last = sa.select(sa.func.max(_instances.c.received_at)).where(mine).scalar_subquery()
        # evidence only grows, so the newest result covers the most; asked like this, each study costs two look-ups
        covered = sa.select(sa.func.max(_results.c.instances)).where(_results.c.study_ref == _studies.c.ref)
        answered = sa.select(_results.c.ref).where(_results.c.study_ref == _studies.c.ref).exists()
        query = sa.select(_studies.c.ref).where(
            _studies.c.held.is_(None) | (_studies.c.two_patients & answered),
            _studies.c.key.is_not(None),
            received > sa.func.coalesce(covered.scalar_subquery(), 0),
            last < settled_before,
        )
        if received_after:
            lately = sa.select(_instances.c.study_ref).where(_instances.c.received_at >= received_after)
            query = query.where(_studies.c.ref.in_(lately))
        with self._database.reading() as session:
            return list(session.execute(query).scalars())

    # -- delivering --------------------------------------------------------------------------------------------------

    def delivery(self, ref: str) -> Delivery | None:
        with self._database.reading() as session:
            row = session.execute(sa.select(_deliveries).where(_deliveries.c.ref == ref)).first()
        return Delivery(**row._mapping) if row else None

    def deliveries(self, result_ref: str) -> tuple[Delivery, ...]:
        return self._deliveries_where(_deliveries.c.result_ref == result_ref)

    def undelivered(self, *, due_before: datetime | None = None) -> tuple[Delivery, ...]:
        """What is still on its way."""
        on_its_way = _deliveries.c.state.in_(("waiting", "asked"))
        return self._deliveries_where(
            on_its_way if due_before is None else on_its_way & (_deliveries.c.next_try_at < due_before)
        )

    def parked(self) -> tuple[Delivery, ...]:
        """What will not go on without a person."""
        return self._deliveries_where(_deliveries.c.state == "parked")

    def delivered(self, delivery_ref: str) -> tuple[Delivered, ...]:
        return self._delivered_where(_delivered.c.delivery_ref == delivery_ref)

    def refused(self) -> tuple[tuple[Delivery, Delivered], ...]:
        """Objects of current results that a destination will not take."""
        query = (
            sa.select(_deliveries)
            .join(_delivered, _delivered.c.delivery_ref == _deliveries.c.ref)
            .join(_results, _results.c.ref == _deliveries.c.result_ref)
            .where(_delivered.c.state == "refused", _results.c.current == sa.true())
            .distinct()
        )
        with self._database.reading() as session:
            deliveries = [Delivery(**row._mapping) for row in session.execute(query)]
        return tuple((d, each) for d in deliveries for each in self.delivered(d.ref) if each.state == "refused")

    def to_send(self, delivery_ref: str) -> tuple[Stored, ...]:
        """What this destination has not been told yet, the report first; each is opened when its turn comes."""
        waiting = sa.select(_delivered.c.rendered_ref).where(
            _delivered.c.delivery_ref == delivery_ref, _delivered.c.state == "waiting"
        )
        columns = (_rendered.c.ref, _rendered.c.sop_class_uid, _rendered.c.sop_instance_uid)
        query = sa.select(*columns, _rendered.c.transfer_syntax_uid).where(_rendered.c.ref.in_(waiting))
        with self._database.reading() as session:
            return tuple(Stored(*row, self._open_one) for row in session.execute(query.order_by(_rendered.c.number)))

    def _open_one(self, rendered_ref: str) -> bytes:
        return self._open_objects(sa.select(_rendered).where(_rendered.c.ref == rendered_ref))[0].data

    def only_takes_back(self, delivery_ref: str) -> bool:
        """Is it a rejection note, and nothing else?"""
        return {each.kind for each in self.delivered(delivery_ref)} == {"ko"}

    def is_current(self, result_ref: str) -> bool:
        with self._database.reading() as session:
            return bool(session.execute(sa.select(_results.c.current).where(_results.c.ref == result_ref)).scalar())

    def said(self, delivery: Delivery, sop_instance_uid: str, state: ObjectState, reason: str = "") -> None:
        """What a destination said of one object, with its act."""
        rendered = sa.select(_rendered.c.ref).where(_rendered.c.sop_instance_uid == sop_instance_uid)
        mine = (_delivered.c.delivery_ref == delivery.ref) & _delivered.c.rendered_ref.in_(rendered)
        now = self._clock()
        with self._database.transaction() as session:
            done = sa.update(_delivered).where(mine, _delivered.c.state != state)
            if _changed(session, done.values(state=state, reason=reason, at=now)):
                row = session.execute(
                    sa.select(_rendered.c.ref, _rendered.c.kind).where(_rendered.c.sop_instance_uid == sop_instance_uid)
                ).one()
                detail = {"kind": row.kind, "object": row.ref, "to": delivery.destination, "reason": reason}
                act = audit.Act(f"object {state}", "delivery", reason, delivery.study_ref, detail)
                audit.record(session, act, at=now)

    def move(
        self,
        delivery: Delivery,
        state: DeliveryState,
        *,
        reason: str = "",
        next_try_at: datetime | None = None,
        transaction_uid: str | None = None,
    ) -> bool:
        """Take a delivery on from where it was seen; False when somebody else did so before."""
        values: dict[str, Any] = {"state": state, "reason": reason}
        if next_try_at is not None:
            values |= {"next_try_at": next_try_at, "tries": delivery.tries + 1}
        if transaction_uid is not None:
            values["transaction_uid"] = transaction_uid
        as_seen = (_deliveries.c.ref == delivery.ref) & (_deliveries.c.tries == delivery.tries)
        as_seen &= _deliveries.c.state.not_in(("withdrawn",))
        with self._database.transaction() as session:
            moved = _changed(session, sa.update(_deliveries).where(as_seen).values(values))
            if moved and transaction_uid:
                asked = {"transaction_uid": transaction_uid, "delivery_ref": delivery.ref}
                session.execute(sa.insert(_commitments).values(asked))
            if moved and state == "parked":
                detail = {"to": delivery.destination}
                act = audit.Act("delivery parked", "delivery", reason, delivery.study_ref, detail)
                audit.record(session, act, at=self._clock())
        return moved

    def hasten(self, destination: str) -> list[Delivery]:
        """A destination answers again: everything that waits for it may go now."""
        now = self._clock()
        waits = (_deliveries.c.destination == destination) & (_deliveries.c.state == "waiting")
        waits &= _deliveries.c.next_try_at > now
        with self._database.reading() as session:
            rows = session.execute(sa.select(_deliveries).where(waits)).all()
        if rows:
            with self._database.transaction() as session:
                session.execute(sa.update(_deliveries).where(waits).values(next_try_at=now))
        return [Delivery(**row._mapping) for row in rows]

    def by_transaction(self, transaction_uid: str) -> Delivery | None:
        """The delivery for which a PACS was once asked to commit, by this request or by one before the last."""
        asked = sa.select(_commitments.c.delivery_ref).where(_commitments.c.transaction_uid == transaction_uid)
        found = self._deliveries_where(_deliveries.c.ref.in_(asked))
        return found[0] if found else None

    def heard(
        self, transaction_uid: str, kept: Iterable[str], failed: Iterable[tuple[str, str]], *, again_at: datetime
    ) -> Delivery | None:
        """A PACS's word on a request for storage commitment: what it does not keep is to be sent again.

        That it keeps something counts whenever it says so; that it does not, only in answer to the last request."""
        delivery = self.by_transaction(transaction_uid)
        if delivery is None:
            return None
        for uid in kept:
            self.said(delivery, uid, "confirmed")
        newest = delivery.state == "asked" and delivery.transaction_uid == transaction_uid
        for uid, reason in failed if newest else ():
            self.said(delivery, uid, "waiting", f"not committed: {reason}")
        states = {each.state for each in self.delivered(delivery.ref)}
        if delivery.state in ("done", "withdrawn"):
            return delivery
        if "waiting" in states:
            if not newest:
                return delivery
            reason = f"{delivery.destination} does not keep what it stored: it is sent again."
            self.move(delivery, "waiting", reason=reason, next_try_at=again_at)
        elif "sent" not in states:
            self.move(delivery, "done")
        return self.delivery(delivery.ref)

    def resend(self, result_ref: str, *, who: str, destination: str | None = None) -> tuple[Delivery, ...]:
        """Send all objects of a result again, byte for byte; also those that were refused or confirmed."""
        if not self.is_current(result_ref):
            raise Misconfigured("A newer revision replaced this result: send the current one again.")
        mine = _deliveries.c.result_ref == result_ref
        if destination is not None:
            mine &= _deliveries.c.destination == destination
        sent = ("sent", "confirmed", "refused")
        return self._reopen(mine, who, "delivery asked for again", objects=sent, reason="asked for again")

    def retry(self, study_ref: str, *, who: str) -> tuple[Delivery, ...]:
        """Take up the study's parked deliveries again, with what was refused."""
        refused = sa.select(_delivered.c.delivery_ref).where(_delivered.c.state == "refused")
        mine = (_deliveries.c.study_ref == study_ref) & (_deliveries.c.state != "withdrawn")
        mine &= (_deliveries.c.state == "parked") | _deliveries.c.ref.in_(refused)
        mine &= _deliveries.c.result_ref.in_(sa.select(_results.c.ref).where(_results.c.current == sa.true()))
        return self._reopen(mine, who, "delivery taken up again", objects=("refused",))

    def _reopen(
        self, which: sa.ColumnElement[bool], who: str, act: str, *, objects: tuple[str, ...], reason: str = ""
    ) -> tuple[Delivery, ...]:
        now = self._clock()
        again = {"state": "waiting", "reason": "", "next_try_at": now, "since": now}
        readable = _deliveries.c.study_ref.in_(sa.select(_studies.c.ref).where(_studies.c.key.is_not(None)))
        with self._database.transaction() as session:
            rows = session.execute(sa.select(_deliveries).where(which, readable)).all()
            refs = [row.ref for row in rows]
            session.execute(
                sa.update(_deliveries).where(_deliveries.c.ref.in_(refs)).values(**again, tries=_deliveries.c.tries + 1)
            )
            session.execute(
                sa.update(_delivered)
                .where(_delivered.c.delivery_ref.in_(refs), _delivered.c.state.in_(objects))
                .values(state="waiting", reason=reason, at=now)
            )
            acts = [audit.Act(act, who, "", row.study_ref, {"to": row.destination}) for row in rows]
            audit.record(session, *acts, at=now)
        return self._deliveries_where(_deliveries.c.ref.in_(refs))

    # -- inside ------------------------------------------------------------------------------------------------------

    def _study_vault(self, session: Session, study_ref: str) -> Vault:
        key = session.execute(sa.select(_studies.c.key).where(_studies.c.ref == study_ref)).scalar_one()
        if key is None:
            raise Shredded("This study was shredded: its results cannot be read any more.")
        return Vault(self._vault.unwrap(key))

    def _open_objects(self, query: sa.Select[Any]) -> tuple[Rendered, ...]:
        with self._database.reading() as session:
            rows = session.execute(query).all()
            if not rows:
                return ()
            study_ref = session.execute(
                sa.select(_results.c.study_ref).where(_results.c.ref == rows[0].result_ref)
            ).scalar_one()
            vault = self._study_vault(session, study_ref)
        return tuple(_open(row, vault) for row in rows)

    def _deliveries_where(self, *conditions: sa.ColumnElement[bool]) -> tuple[Delivery, ...]:
        query = sa.select(_deliveries).where(*conditions).order_by(_deliveries.c.since, _deliveries.c.destination)
        with self._database.reading() as session:
            return tuple(Delivery(**row._mapping) for row in session.execute(query))

    def _delivered_where(self, *conditions: sa.ColumnElement[bool]) -> tuple[Delivered, ...]:
        query = (
            sa.select(
                _delivered.c.rendered_ref,
                _rendered.c.kind,
                _deliveries.c.destination,
                _rendered.c.sop_class_uid,
                _rendered.c.sop_instance_uid,
                _delivered.c.state,
                _delivered.c.reason,
                _delivered.c.at,
            )
            .join(_rendered, _rendered.c.ref == _delivered.c.rendered_ref)
            .join(_deliveries, _deliveries.c.ref == _delivered.c.delivery_ref)
            .where(*conditions)
            .order_by(_rendered.c.number)
        )
        with self._database.reading() as session:
            return tuple(Delivered(**row._mapping) for row in session.execute(query))


_ENTRY = tuple(_results.c[each.name] for each in dataclasses.fields(Entry))


def _entry(row: sa.Row[Any]) -> Entry:
    return Entry(**{each.name: getattr(row, each.name) for each in dataclasses.fields(Entry)})


def _changed(session: Session, change: sa.Update) -> bool:
    return cast("sa.CursorResult[Any]", session.execute(change)).rowcount > 0


def _current(session: Session, study_ref: str) -> Entry | None:
    """The newest revision is the current one."""
    newest = sa.select(*_ENTRY).where(_results.c.study_ref == study_ref).order_by(_results.c.revision.desc()).limit(1)
    row = session.execute(newest).first()
    return _entry(row) if row else None


def _last_revision(session: Session, study_ref: str) -> int:
    query = sa.select(sa.func.max(_results.c.revision)).where(_results.c.study_ref == study_ref)
    return session.execute(query).scalar() or 0


def _open(row: sa.Row[Any], vault: Vault) -> Rendered:
    data = vault.open(row.data, row.ref.encode())
    if signing.digest(data) != row.sha256:
        raise Untrusted("A kept object is not the one that was rendered.")
    return Rendered(
        row.kind, row.sop_class_uid, row.sop_instance_uid, row.series_instance_uid, row.transfer_syntax_uid, data
    )


def _entry_of(
    answer: Result | NotForUs,
    study_ref: str,
    now: datetime,
    replaced: Entry | None,
    *,
    evidence_digest: str,
    instances: int,
    revision: int,
    bundle_digest: str,
) -> Entry:
    rank = NOT_FOR_US if isinstance(answer, NotForUs) else triage(answer)
    stated = answer if isinstance(answer, Assessed) else None
    return Entry(
        ref=secrets.token_hex(16),
        study_ref=study_ref,
        revision=revision,
        evidence_digest=evidence_digest,
        bundle_digest=bundle_digest,
        instances=instances,
        outcome=_outcome(answer),
        reason="" if isinstance(answer, Assessed) else answer.reason,
        birads=stated.birads if stated else None,
        probability=stated.probability if stated else None,
        triage=rank,
        images_read=0 if isinstance(answer, NotForUs) else answer.images_read,
        made_at=now,
        current=True,
        supersedes=replaced.ref if replaced else None,
        alarm=_alarm(replaced, rank, _said(answer)),
    )


def _outcome(answer: Result | NotForUs) -> Outcome:
    if isinstance(answer, Assessed):
        return "assessed"
    return "declined" if isinstance(answer, Declined) else "not-for-us"


def _said(answer: Result | NotForUs) -> str:
    if isinstance(answer, Assessed):
        return f"category {answer.birads}" if answer.birads else "no lesion found"
    return "not analysed"


def _alarm(replaced: Entry | None, rank: int, said: str) -> str:
    """Safety rule 7: a fall is never quiet, whatever it falls to."""
    if replaced is None or rank >= replaced.triage:
        return ""
    before = "not analysed" if replaced.reason else "no lesion found"
    if replaced.birads:
        before = f"category {replaced.birads}"
    return f"Revision {replaced.revision} said {before}; the one that replaces it says {said}."


def _acts_of(entry: Entry, refs: Sequence[str], digests: Sequence[str], recalled: str) -> list[audit.Act]:
    detail = {
        "result": entry.ref,
        "revision": entry.revision,
        "outcome": entry.outcome,
        "bundle": entry.bundle_digest,
        "evidence": entry.evidence_digest,
        "supersedes": entry.supersedes,
        "objects": dict(zip(refs, digests, strict=True)),
    }
    acts = [audit.Act("result made", "reading", entry.reason, entry.study_ref, detail)]
    if entry.alarm:
        kind = "results recalled" if recalled else "category fell"
        acts.append(audit.Act(kind, "reading", entry.alarm, entry.study_ref, {"result": entry.ref}))
    return acts


# -- Result ⇄ document. Evidence is kept as it was, to the bit: the pages lay it over the frame.


def to_document(answer: Result | NotForUs) -> dict[str, Any]:
    bare: Any = answer
    if isinstance(answer, Assessed):
        findings = tuple(dataclasses.replace(finding, heat=None) for finding in answer.findings)
        bare = dataclasses.replace(answer, findings=findings, key_heat=None)
    document = {"outcome": _outcome(answer), **dataclasses.asdict(bare)}
    if isinstance(answer, Assessed):
        document["key_heat"] = _heat_to_document(answer.key_heat)
        for values, finding in zip(document["findings"], answer.findings, strict=True):
            values["heat"] = _heat_to_document(finding.heat)
    return document


def from_document(document: Mapping[str, Any]) -> Result | NotForUs:
    values = dict(document)
    outcome = values.pop("outcome")
    left_out = tuple(NotAnalysed(Source(**each["source"]), each["reason"]) for each in values["not_analysed"])
    values["not_analysed"] = left_out
    if outcome == "not-for-us":
        return NotForUs(**{**values, "received": tuple(map(tuple, values["received"]))})
    values["bundle"] = BundleName(**values["bundle"])
    if outcome == "declined":
        return Declined(**values)
    values["findings"] = tuple(_finding(each) for each in values["findings"])
    values["key_image"] = Source(**values["key_image"]) if values["key_image"] else None
    values["key_heat"] = _heat(values["key_heat"])
    return Assessed(**values)


def _finding(values: Mapping[str, Any]) -> Finding:
    contour = tuple((float(x), float(y)) for x, y in values["contour"])
    source, heat = Source(**values["source"]), _heat(values["heat"])
    return Finding(**{**values, "source": source, "contour": contour, "heat": heat})


def _heat_to_document(heat: HeatMap | None) -> dict[str, Any] | None:
    if heat is None:
        return None
    evidence = np.ascontiguousarray(heat.evidence, "<f4")
    return {"region": heat.region, "shape": evidence.shape, "evidence": base64.b64encode(evidence.tobytes()).decode()}


def _heat(values: Mapping[str, Any] | None) -> HeatMap | None:
    if values is None:
        return None
    evidence = np.frombuffer(base64.b64decode(values["evidence"]), "<f4").reshape(values["shape"])
    return HeatMap(evidence.astype(np.float32), Region(*values["region"]))
