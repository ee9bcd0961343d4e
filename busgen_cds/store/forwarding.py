"""The record of acts, sent on to others: how far each has got.

Rules:
- The record itself is the spool: what was not taken yet is still in it, whatever happens to us or to the other side.
- A destination is moved on only when it has taken what was sent; after a break some acts are sent again, none is lost.
- Acts go in the order of the record, each with its number, so that the other side knows what it has already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from busgen_cds.store import audit
from busgen_cds.store.database import Base, Database, UtcTime, table_of

AT_ONCE = 200


class ForwardedTable(Base):
    __tablename__ = "act_forwarded"

    destination: Mapped[str] = mapped_column(sa.String(256), primary_key=True)
    number: Mapped[int] = mapped_column(sa.BigInteger)  # the last act that it took
    at: Mapped[datetime] = mapped_column(UtcTime)


_forwarded = table_of(ForwardedTable)


@dataclass(frozen=True)
class Progress:
    destination: str
    number: int
    behind: int  # acts that it has not taken yet; below zero: it has taken more than the record holds now
    at: datetime | None


def forward(
    database: Database, destination: str, send: Callable[[Sequence[audit.Entry]], None], now: Callable[[], datetime]
) -> int:
    """Send on what is new, some at a time; `send` raises when it was not taken. How many were."""
    count = 0
    while batch := _next(database, destination):
        send(batch)
        _move_on(database, destination, batch[-1].number, now())
        count += len(batch)
    return count


def progress(database: Database, destination: str) -> Progress:
    with database.reading() as session:
        row = session.execute(sa.select(_forwarded).where(_forwarded.c.destination == destination)).first()
    number = row.number if row else 0
    return Progress(destination, number, audit.length(database) - number, row.at if row else None)


def _next(database: Database, destination: str) -> list[audit.Entry]:
    with database.reading() as session:
        query = sa.select(_forwarded.c.number).where(_forwarded.c.destination == destination)
        number = session.execute(query).scalar() or 0
    found: Iterable[audit.Entry] = audit.entries(database, audit.Wanted(after=number), limit=AT_ONCE)
    return list(found)


def _move_on(database: Database, destination: str, number: int, at: datetime) -> None:
    mine = _forwarded.c.destination == destination
    with database.transaction() as session:
        known = session.execute(sa.select(_forwarded.c.number).where(mine)).first()
        if known is None:
            session.execute(sa.insert(_forwarded).values(destination=destination, number=number, at=at))
        elif known.number < number:
            session.execute(sa.update(_forwarded).where(mine).values(number=number, at=at))
