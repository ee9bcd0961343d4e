"""What readers said about findings: agree, edit or reject, each with who and when.

Rules:
- Words are only ever added. Changing one's mind adds a word; the last one about a finding counts.
- The same word said twice in a row by the same person is kept once.
- A word is about one revision of a study's result; a newer revision has to be looked at again.
- A reader's own note is sealed: people write names into notes.
- Each word is an act in the transaction that keeps it.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, Session, mapped_column

from busgen_cds import case
from busgen_cds.store import audit
from busgen_cds.store.database import Base, Database, Sealed, UtcTime, table_of
from busgen_cds.store.vault import Vault

Reason = Literal["no lesion here", "normal structure", "artefact", "image not usable", "other"]
REASONS: tuple[Reason, ...] = get_args(Reason)
READER_CATEGORIES = ("2", "3", "4A", "4B", "4C", "5")  # a person may also say "benign", which the software never does
WHOLE_STUDY = 0
MOST_POINTS = 2000
MOST_NOTE = 2000

Contour = tuple[tuple[float, float], ...]


class WordTable(Base):
    __tablename__ = "word"
    __table_args__ = (sa.Index("ix_word_study", "study_ref", "revision", "at"),)

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    study_ref: Mapped[str] = mapped_column(sa.ForeignKey("study.ref"))
    revision: Mapped[int]
    finding: Mapped[int]  # counts from 1; 0: the study as a whole
    word: Mapped[str] = mapped_column(sa.String(8))
    birads: Mapped[str | None] = mapped_column(sa.String(2))
    contour: Mapped[str] = mapped_column(sa.Text)  # JSON; empty: as it was
    reason: Mapped[str] = mapped_column(sa.String(32))
    note: Mapped[bytes] = mapped_column(Sealed)
    who: Mapped[str] = mapped_column(sa.String(64))
    at: Mapped[datetime] = mapped_column(UtcTime)
    completes: Mapped[bool]  # with this word, every finding of the revision has one


_words = table_of(WordTable)


class Unfit(Exception):
    """This word cannot be kept; the message says what is missing."""


@dataclass(frozen=True)
class Word:
    study_ref: str
    revision: int
    finding: int
    word: case.Word
    who: str
    birads: str | None = None
    contour: Contour = ()
    reason: Reason | None = None
    note: str = field(default="", repr=False)

    def check(self) -> None:
        if self.word == "edit" and not (self.birads or self.contour):
            raise Unfit("An edit needs another contour or another category.")
        if self.word == "reject" and self.reason not in REASONS:
            raise Unfit("Say why the finding is rejected.")
        if self.word == "agree" and (self.birads or self.contour or self.reason):
            raise Unfit("Whoever agrees changes nothing: say edit instead.")
        if self.birads is not None and self.birads not in READER_CATEGORIES:
            raise Unfit(f"The category is one of {', '.join(READER_CATEGORIES)}.")
        if self.contour and not 3 <= len(self.contour) <= MOST_POINTS:
            raise Unfit(f"A contour has 3 to {MOST_POINTS} points.")
        if not all(math.isfinite(part) for point in self.contour for part in point):
            raise Unfit("A point of the contour is no place in an image.")
        if len(self.note) > MOST_NOTE:
            raise Unfit(f"A note has {MOST_NOTE} characters at most.")


@dataclass(frozen=True)
class Said:
    """A word as it was kept."""

    ref: str
    word: Word
    at: datetime


class Cases:
    def __init__(
        self, database: Database, vault: Vault, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._database, self._vault, self._clock = database, vault, clock

    def say(self, word: Word, *, findings: int) -> bool:
        """Keep a word about a result that has so many findings; False: it was said already."""
        word.check()
        if not (word.finding == WHOLE_STUDY if findings == 0 else 1 <= word.finding <= findings):
            raise Unfit(f"This result has {findings} findings; there is none with number {word.finding}.")
        now = self._clock()
        with self._database.transaction() as session:
            before = self._last_words(session, word.study_ref, word.revision)
            if _same(before.get(word.finding), word):
                return False
            completes = {*before, word.finding} >= set(range(1, findings + 1))
            ref = secrets.token_hex(16)
            session.execute(
                sa.insert(_words).values(
                    ref=ref,
                    study_ref=word.study_ref,
                    revision=word.revision,
                    finding=word.finding,
                    word=word.word,
                    birads=word.birads,
                    contour=json.dumps(word.contour) if word.contour else "",
                    reason=word.reason or "",
                    note=self._vault.seal_text(word.note),
                    who=word.who,
                    at=now,
                    completes=completes,
                )
            )
            audit.record(session, _act(word, ref), at=now)
        return True

    def words(self, study_ref: str, revision: int | None = None) -> tuple[Said, ...]:
        """In the order said."""
        query = sa.select(_words).where(_words.c.study_ref == study_ref).order_by(_words.c.at, _words.c.ref)
        if revision is not None:
            query = query.where(_words.c.revision == revision)
        with self._database.reading() as session:
            return tuple(Said(row.ref, self._word(row), row.at) for row in session.execute(query))

    def studies(self) -> set[str]:
        """Those of which anything was said."""
        with self._database.reading() as session:
            return set(session.execute(sa.select(_words.c.study_ref).distinct()).scalars())

    def last_words(self, study_ref: str, revision: int) -> dict[int, Said]:
        """By finding: what counts."""
        return {said.word.finding: said for said in self.words(study_ref, revision)}

    def _last_words(self, session: Session, study_ref: str, revision: int) -> dict[int, Word]:
        mine = (_words.c.study_ref == study_ref) & (_words.c.revision == revision)
        rows = session.execute(sa.select(_words).where(mine).order_by(_words.c.at, _words.c.ref))
        return {row.finding: self._word(row) for row in rows}

    def _word(self, row: Any) -> Word:
        contour = tuple((float(x), float(y)) for x, y in json.loads(row.contour or "[]"))
        note = self._vault.open_text(row.note)
        return Word(
            row.study_ref,
            row.revision,
            row.finding,
            row.word,
            row.who,
            row.birads,
            contour,
            row.reason or None,
            note,
        )


def _same(before: Word | None, word: Word) -> bool:
    return before == word


_KIND: dict[case.Word, str] = {"agree": "finding agreed", "edit": "finding edited", "reject": "finding rejected"}


def _act(word: Word, ref: str) -> audit.Act:
    detail = {
        "word": ref,
        "revision": word.revision,
        "finding": word.finding,
        "birads": word.birads,
        "contour changed": bool(word.contour),
        "reason": word.reason,
    }
    return audit.Act(_KIND[word.word], word.who, word.reason or "", word.study_ref, detail)
