"""How far each result has got: one delivery for each destination, and what became of each of its objects there.

Rules:
- A delivery moves on only from where it was seen, so that of two who hold it one goes on.
- What a destination said of an object is kept with its act; that it committed to keep one counts whenever it says so.
- Objects are sent again byte for byte: nothing here renders.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from busgen_cds.errors import Misconfigured
from busgen_cds.result import Kind
from busgen_cds.store import audit
from busgen_cds.store.database import Base, Database
from busgen_cds.store.inbox import StudyTable
from busgen_cds.store.result_tables import (
    CommitmentTable,
    DeliveredTable,
    DeliveryState,
    DeliveryTable,
    ObjectState,
    RenderedTable,
    ResultTable,
)

_tables = Base.metadata.tables
_results, _rendered = _tables[ResultTable.__tablename__], _tables[RenderedTable.__tablename__]
_deliveries, _delivered = _tables[DeliveryTable.__tablename__], _tables[DeliveredTable.__tablename__]
_commitments, _studies = _tables[CommitmentTable.__tablename__], _tables[StudyTable.__tablename__]


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


class Deliveries:
    def __init__(self, database: Database, clock: Callable[[], datetime], opener: Callable[[str], bytes]) -> None:
        """`opener` gives the bytes of a rendered object by its reference."""
        self._database, self._clock, self._open = database, clock, opener

    # -- with a result, in its transaction ---------------------------------------------------------------------------

    def address(
        self, session: Session, result_ref: str, study_ref: str, to: Addressee, kinds: Mapping[str, Kind], now: datetime
    ) -> None:
        """Keep what a destination is to get of a result: of its objects (by reference), those of the kinds it takes."""
        wanted = [ref for ref, kind in kinds.items() if kind in to.kinds]
        if not wanted:
            return
        ref = secrets.token_hex(16)
        session.execute(
            sa.insert(_deliveries).values(
                ref=ref,
                result_ref=result_ref,
                study_ref=study_ref,
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

    def withdraw_unsent(self, session: Session, result_ref: str) -> None:
        unsent = (_deliveries.c.result_ref == result_ref) & _deliveries.c.state.in_(("waiting", "parked"))
        session.execute(sa.update(_deliveries).where(unsent).values(state="withdrawn", reason="superseded"))

    # -- asking and moving -------------------------------------------------------------------------------------------

    def get(self, ref: str) -> Delivery | None:
        with self._database.reading() as session:
            row = session.execute(sa.select(_deliveries).where(_deliveries.c.ref == ref)).first()
        return Delivery(**row._mapping) if row else None

    def of(self, result_ref: str) -> tuple[Delivery, ...]:
        return self._where(_deliveries.c.result_ref == result_ref)

    def under_way(self, *, due_before: datetime | None = None) -> tuple[Delivery, ...]:
        """What is still on its way."""
        on_its_way = _deliveries.c.state.in_(("waiting", "asked"))
        return self._where(on_its_way if due_before is None else on_its_way & (_deliveries.c.next_try_at < due_before))

    def parked(self) -> tuple[Delivery, ...]:
        """What will not go on without a person."""
        return self._where(_deliveries.c.state == "parked")

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
            return tuple(Stored(*row, self._open) for row in session.execute(query.order_by(_rendered.c.number)))

    def only_takes_back(self, delivery_ref: str) -> bool:
        """Is it a rejection note, and nothing else?"""
        return {each.kind for each in self.delivered(delivery_ref)} == {"ko"}

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
        as_seen &= (_deliveries.c.state == delivery.state) & (_deliveries.c.state != "withdrawn")
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
        found = self._where(_deliveries.c.ref.in_(asked))
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
        return self.get(delivery.ref)

    def resend(self, result_ref: str, *, who: str, destination: str | None = None) -> tuple[Delivery, ...]:
        """Send all objects of a result again, byte for byte; also those that were refused or confirmed."""
        if not self._is_current(result_ref):
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
        return self._where(_deliveries.c.ref.in_(refs))

    # -- inside ------------------------------------------------------------------------------------------------------

    def _is_current(self, result_ref: str) -> bool:
        with self._database.reading() as session:
            return bool(session.execute(sa.select(_results.c.current).where(_results.c.ref == result_ref)).scalar())

    def _where(self, *conditions: sa.ColumnElement[bool]) -> tuple[Delivery, ...]:
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


def _changed(session: Session, change: sa.Update) -> bool:
    return cast("sa.CursorResult[Any]", session.execute(change)).rowcount > 0
