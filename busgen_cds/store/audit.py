"""The record of acts: who did what, in the transaction in which it happened.

Rules:
- Every act is a row whose hash covers the row before it, so that an altered, removed, inserted or moved row shows.
- A hash chain shows edits in the middle, not a cut tail: only a signed checkpoint, exported to a place that this
  machine cannot rewrite, shows that. `verify` takes the checkpoints and names the first bad entry.
- An act names a study by its opaque reference. No name, no identifier and no pixel stands in `what` or `detail`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, Session, mapped_column

from busgen_cds import signing
from busgen_cds.store.database import Base, Database, UtcTime, table_of

GENESIS = "0" * 64


@dataclass(frozen=True)
class Act:
    kind: str  # "study received", "result made", "delivered", "log-in", …
    who: str  # an account, an AE title or a part of this program
    what: str = ""
    study_ref: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


class ActRow(Base):
    __tablename__ = "act"

    number: Mapped[int] = mapped_column(sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcTime)
    kind: Mapped[str] = mapped_column(sa.String(64))
    who: Mapped[str] = mapped_column(sa.String(128))
    what: Mapped[str] = mapped_column(sa.Text)
    study_ref: Mapped[str | None] = mapped_column(sa.String(32), index=True)
    detail: Mapped[str] = mapped_column(sa.Text)
    hash: Mapped[str] = mapped_column(sa.String(64))


_acts = table_of(ActRow)
_LAST = sa.select(_acts.c.number, _acts.c.hash).order_by(_acts.c.number.desc()).limit(1)
_INSERT = sa.insert(_acts)


def record(session: Session | sa.Connection, *acts: Act, at: datetime | None = None) -> None:
    """Add acts to the chain, in the caller's transaction."""
    if not acts:
        return
    connection = session.connection() if isinstance(session, Session) else session
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": 0x61637473})
    last = connection.execute(_LAST).first()
    number, before = (last.number, last.hash) if last else (0, GENESIS)
    moment = at or datetime.now(UTC)
    rows = []
    for act in acts:
        number += 1
        row = _row(number, moment, act)
        row["hash"] = before = _hash(before, row)
        rows.append(row)
    connection.execute(_INSERT, rows)


def _row(number: int, at: datetime, act: Act) -> dict[str, Any]:
    return {
        "number": number,
        "at": at,
        "kind": act.kind,
        "who": act.who,
        "what": act.what,
        "study_ref": act.study_ref,
        "detail": signing.canonical(dict(act.detail)).decode(),
    }


def _hash(before: str, row: Mapping[str, Any]) -> str:
    covered = [before, row["number"], row["at"].astimezone(UTC).isoformat(timespec="microseconds")]
    covered += [row[name] for name in ("kind", "who", "what", "study_ref", "detail")]
    return hashlib.sha256(signing.canonical(covered)).hexdigest()


def acts_of(session: Session, study_ref: str, kind: str) -> list[Act]:
    query = sa.select(_acts).where(_acts.c.study_ref == study_ref, _acts.c.kind == kind).order_by(_acts.c.number)
    rows = session.execute(query)
    return [Act(row.kind, row.who, row.what, row.study_ref, json.loads(row.detail)) for row in rows]


@dataclass(frozen=True)
class Entry:
    """An act as it stands in the record."""

    number: int
    at: datetime
    act: Act
    hash: str

    def row(self) -> dict[str, Any]:
        """As it is hashed, field by field."""
        return {**_row(self.number, self.at, self.act), "hash": self.hash}

    def line(self) -> bytes:
        """As it is hashed, on one line of JSON."""
        return signing.canonical({**self.row(), "at": self.at.isoformat(timespec="microseconds")}) + b"\n"


@dataclass(frozen=True)
class Wanted:
    """Which acts are asked for; what is not said does not matter."""

    who: str = ""
    kind: str = ""  # how it begins
    study_refs: sa.Select[Any] | sa.CompoundSelect[Any] | None = None
    since: datetime | None = None
    until: datetime | None = None
    after: int = 0
    before: int | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        said: list[sa.ColumnElement[bool]] = [_acts.c.number > self.after]
        if self.who:
            typed = _acts.c.who.startswith(f"{self.who} (", autoescape=True)  # and from which account
            typed |= _acts.c.who.contains(f" ({self.who}, ", autoescape=True)
            said.append((_acts.c.who == self.who) | typed)
        if self.kind:
            said.append(_acts.c.kind.startswith(self.kind, autoescape=True))
        if self.study_refs is not None:
            said.append(_acts.c.study_ref.in_(self.study_refs))
        if self.since:
            said.append(_acts.c.at >= self.since)
        if self.until:
            said.append(_acts.c.at < self.until)
        if self.before is not None:
            said.append(_acts.c.number < self.before)
        return said


def day(text: str, *, whole: bool = False) -> datetime:
    """When a day begins on this machine's clock, or, as a whole, when it has ended: one with a change of clocks has 23
    or 25 hours. A time of day is taken as it stands. ValueError, OverflowError: it is no day."""
    later = timedelta(days=1 if whole and len(text) <= len("2026-01-31") else 0)
    return (datetime.fromisoformat(text) + later).astimezone(UTC)


def entries(
    database: Database, wanted: Wanted, *, limit: int | None = None, newest_first: bool = False
) -> Iterator[Entry]:
    order = _acts.c.number.desc() if newest_first else _acts.c.number
    query = sa.select(_acts).where(*wanted.conditions()).order_by(order).limit(limit).execution_options(yield_per=500)
    with database.reading() as session:
        for row in session.execute(query):
            act = Act(row.kind, row.who, row.what, row.study_ref, json.loads(row.detail))
            yield Entry(row.number, row.at, act, row.hash)


def length(database: Database) -> int:
    with database.reading() as session:
        last = session.execute(_LAST).first()
    return int(last.number) if last else 0


CHECKPOINT_KIND = "application/vnd.busgen-cds.audit-checkpoint+json"


@dataclass(frozen=True)
class Checkpoint:
    """How long the record was at a moment, and what its last hash was."""

    number: int
    hash: str
    at: str


def checkpoint(database: Database, signer: signing.Signer, at: datetime) -> bytes:
    """A signed statement of how far the record goes now: keep it where this machine cannot rewrite it."""
    with database.reading() as session:
        last = session.execute(_LAST).first()
    number, hash_ = (last.number, last.hash) if last else (0, GENESIS)
    document = {"number": number, "hash": hash_, "at": at.astimezone(UTC).isoformat()}
    return signing.seal(signing.canonical(document), CHECKPOINT_KIND, signer)


def read_checkpoint(envelope: bytes, verifier: signing.Verifier) -> Checkpoint:
    return Checkpoint(**json.loads(verifier.open(envelope, CHECKPOINT_KIND)))


@dataclass(frozen=True)
class Verdict:
    entries: int
    first_bad: int | None = None
    reason: str = ""
    checkpoints: int = 0  # against which it was held; against none, a cut tail does not show

    @property
    def sound(self) -> bool:
        return self.first_bad is None

    def __str__(self) -> str:
        if not self.sound:
            return f"The record does not hold. {self.reason}"
        count = self.checkpoints
        against = f"{count} checkpoint{'s' * (count > 1)}" if count else "no checkpoint: a cut tail would not show"
        return f"The record holds: {self.entries} entries, against {against}."


def verify(database: Database, checkpoints: Sequence[Checkpoint] = ()) -> Verdict:
    """Walk the whole chain; name the first entry that does not follow from the one before, or is not as signed."""
    return replace(_walked(database, checkpoints), checkpoints=len(checkpoints))


def _walked(database: Database, checkpoints: Sequence[Checkpoint]) -> Verdict:
    expected: dict[int, set[str]] = {}  # two at one number that differ: one of them tells another story
    for point in checkpoints:
        if point.number:
            expected.setdefault(point.number, set()).add(point.hash)
    before, number = GENESIS, 0
    with database.reading() as session:
        for row in session.execute(sa.select(_acts).order_by(_acts.c.number).execution_options(yield_per=1000)):
            number += 1
            if row.number != number:
                return Verdict(number, number, f"Entry {number} is missing: the next one is {row.number}.")
            before_now = _hash(before, row._asdict())
            if before_now != row.hash:
                return Verdict(number, number, f"Entry {number} does not follow from the one before it.")
            if expected.pop(number, {row.hash}) != {row.hash}:
                return Verdict(number, number, f"Entry {number} is not the one that a signed checkpoint names.")
            before = row.hash
    if expected:
        return Verdict(number, number + 1, f"A signed checkpoint names entry {max(expected)}; the record ends before.")
    return Verdict(number)
