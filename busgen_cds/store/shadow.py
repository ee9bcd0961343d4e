"""What a bundle in shadow says of the studies that the live one read: kept apart, compared, never sent.

Rules:
- A reading in shadow names the result it stands beside; one bundle reads beside one result once.
- Nothing here reaches a PACS, a worklist or a reader: no object is made of it.
- A study is named by its opaque reference. What failed in shadow is kept with its reason; it is a finding too.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, get_args

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from busgen_cds.birads import CATEGORIES
from busgen_cds.result import Assessed, Result
from busgen_cds.store.database import Base, Database, UtcTime, table_of
from busgen_cds.store.result_tables import ResultTable

# What was said of a study, in one word; the order is that of suspicion, and a declined study ranks above category 3.
Word = Literal["none", "3", "declined", "4A", "4B", "4C", "5", "failed"]
WORDS: tuple[Word, ...] = get_args(Word)
_RANK = {word: rank for rank, word in enumerate(WORDS)}
assert set(CATEGORIES) <= set(WORDS)


class ShadowTable(Base):
    __tablename__ = "shadow_reading"

    digest: Mapped[str] = mapped_column(sa.String(64), primary_key=True)  # of the bundle in shadow
    result_ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    study_ref: Mapped[str] = mapped_column(sa.String(32))
    live_digest: Mapped[str] = mapped_column(sa.String(64))
    live_word: Mapped[str] = mapped_column(sa.String(8))
    live_probability: Mapped[float | None]
    word: Mapped[str] = mapped_column(sa.String(8))
    probability: Mapped[float | None]
    reason: Mapped[str] = mapped_column(sa.Text)  # why it declined or failed
    seconds: Mapped[float]
    live_seconds: Mapped[float]
    at: Mapped[datetime] = mapped_column(UtcTime, index=True)


_shadow, _results = table_of(ShadowTable), table_of(ResultTable)


@dataclass(frozen=True)
class Beside:
    """One study as the live bundle and the one in shadow read it."""

    digest: str
    result_ref: str
    study_ref: str
    live_digest: str
    live_word: Word
    live_probability: float | None
    word: Word
    probability: float | None
    reason: str
    seconds: float
    live_seconds: float
    at: datetime

    @property
    def change(self) -> int:
        """How many steps more suspicious the one in shadow is; negative: less."""
        return _RANK[self.word] - _RANK[self.live_word] if "failed" not in (self.word, self.live_word) else 0


@dataclass(frozen=True)
class Comparison:
    """What a person looks at before promoting."""

    studies: int
    same: int
    up: int
    down: int
    failed: int
    agreement: float | None  # share of studies with the same word
    difference: float | None  # mean absolute difference of the probability, where both say one
    seconds: float | None  # median in shadow
    live_seconds: float | None
    changes: Mapping[tuple[Word, Word], int] = field(repr=False)  # (live, shadow) → studies
    largest: tuple[Beside, ...] = field(default=(), repr=False)

    @property
    def read(self) -> int:
        """Studies that it could read: none of them, and it is not promoted."""
        return self.studies - self.failed


def word_of(result: Result) -> Word:
    if not isinstance(result, Assessed):
        return "declined"
    return result.birads or "none"


class Shadow:
    def __init__(self, database: Database, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database, self._clock = database, clock

    def due(self, digest: str, *, since: datetime, limit: int = 1) -> list[tuple[str, str]]:
        """(result, study) that were read since it is in shadow, and not yet by it; the newest first."""
        done = sa.select(_shadow.c.result_ref).where(_shadow.c.digest == digest)
        query = (
            sa.select(_results.c.ref, _results.c.study_ref)
            .where(
                _results.c.current == sa.true(),
                _results.c.outcome.in_(("assessed", "declined")),
                _results.c.made_at >= since,
                _results.c.document != b"",  # a shredded study has nothing to be read any more
                _results.c.ref.not_in(done),
            )
            .order_by(_results.c.made_at.desc())
            .limit(limit)
        )
        with self._database.reading() as session:
            return [(row.ref, row.study_ref) for row in session.execute(query)]

    def keep(
        self, digest: str, result_ref: str, study_ref: str, live: Result, said: Result | str, seconds: float
    ) -> bool:
        """What it said beside this result, or why it failed; False: it is kept already."""
        values = {
            "digest": digest,
            "result_ref": result_ref,
            "study_ref": study_ref,
            "live_digest": live.bundle.digest,
            "live_word": word_of(live),
            "live_probability": live.probability if isinstance(live, Assessed) else None,
            "word": "failed" if isinstance(said, str) else word_of(said),
            "probability": said.probability if isinstance(said, Assessed) else None,
            "reason": said if isinstance(said, str) else getattr(said, "reason", ""),
            "seconds": seconds if isinstance(said, str) else said.seconds,
            "live_seconds": live.seconds,
            "at": self._clock(),
        }
        mine = (_shadow.c.digest == digest) & (_shadow.c.result_ref == result_ref)
        with self._database.transaction() as session:
            if session.execute(sa.select(_shadow.c.digest).where(mine)).first():
                return False
            session.execute(sa.insert(_shadow).values(**values))
        return True

    def beside(self, digest: str, *, limit: int = 100_000) -> list[Beside]:
        query = sa.select(_shadow).where(_shadow.c.digest == digest).order_by(_shadow.c.at.desc()).limit(limit)
        with self._database.reading() as session:
            return [Beside(**row._mapping) for row in session.execute(query)]

    def comparison(self, digest: str) -> Comparison:
        return compare(self.beside(digest))


def compare(rows: Sequence[Beside], *, largest: int = 10) -> Comparison:
    failed = sum("failed" in (row.word, row.live_word) for row in rows)
    same = sum(row.word == row.live_word for row in rows) - sum(row.word == row.live_word == "failed" for row in rows)
    apart = [
        abs(row.probability - row.live_probability)
        for row in rows
        if row.probability is not None and row.live_probability is not None
    ]
    changed = sorted((row for row in rows if row.change), key=lambda row: -abs(row.change))
    return Comparison(
        studies=len(rows),
        same=same,
        up=sum(row.change > 0 for row in rows),
        down=sum(row.change < 0 for row in rows),
        failed=failed,
        agreement=same / len(rows) if rows else None,
        difference=statistics.fmean(apart) if apart else None,
        seconds=statistics.median(row.seconds for row in rows) if rows else None,
        live_seconds=statistics.median(row.live_seconds for row in rows) if rows else None,
        changes=Counter((row.live_word, row.word) for row in rows),
        largest=tuple(changed[:largest]),
    )
