"""Letting go of studies: by a person's word, or by the site's rules of how long each kind is kept.

Rules:
- A study is let go as a whole: its key, its images, its results and objects, what readers noted, what was reported
  of it, what names it. What stays are the opaque reference, the figures of its result, the record of acts, and the
  cases that were made of it: they name nobody, and are let go as cases.
- A study with anything undelivered, under way, stuck or held is never let go by a rule; a person may insist.
- How long counts from the last thing that happened to the study: its last image, result or word.
- Nothing is let go unless the site says for how long its kind is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, get_args

import sqlalchemy as sa

from busgen_cds.errors import Misconfigured
from busgen_cds.store.casebook import PathologyTable
from busgen_cds.store.cases import WordTable
from busgen_cds.store.database import Database, table_of
from busgen_cds.store.inbox import Inbox, InstanceTable, QuarantineTable, StudyTable
from busgen_cds.store.jobs import JobTable
from busgen_cds.store.result_tables import DeliveryTable, RenderedTable, ResultTable
from busgen_cds.store.vault import Vault

Kind = Literal["assessed", "declined", "not-for-us", "unread", "quarantine"]
KINDS: tuple[Kind, ...] = get_args(Kind)
AT_ONCE = 200

_studies, _instances, _quarantine = table_of(StudyTable), table_of(InstanceTable), table_of(QuarantineTable)
_results, _rendered, _deliveries = table_of(ResultTable), table_of(RenderedTable), table_of(DeliveryTable)
_words, _jobs, _pathology = table_of(WordTable), table_of(JobTable), table_of(PathologyTable)


@dataclass(frozen=True)
class Applied:
    """What the rules let go."""

    studies: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()


@dataclass(frozen=True)
class Letting:
    """Who can let go: it needs the inbox for the files, the vault for an empty note."""

    inbox: Inbox
    database: Database
    vault: Vault

    def shred(self, study_ref: str, who: str, *, insist: bool = False) -> list[str]:
        """Let a study go, and prove it: what still speaks against that, if anything does."""
        if not insist and (reasons := why_not_yet(self.database, study_ref)):
            raise Misconfigured(f"This study is not let go yet: {'; '.join(reasons)}. Insist, or let it be done first.")
        self._shred(study_ref, who)
        return self.why_not_shredded(study_ref)

    def apply(self, keep: Mapping[Kind, timedelta], now: datetime, who: str = "retention") -> Applied:
        """Let go what is older than its kind is kept; once more changes nothing."""
        refs: list[str] = []
        for kind, age in keep.items():
            if kind != "quarantine":
                refs += self._shred_due(kind, now - age, who)
        aside = self._old_quarantined(now - keep["quarantine"]) if "quarantine" in keep else []
        for ref in aside:
            self.inbox.discard_quarantined(ref, who)
        if refs or aside:
            self.database.scrub()
        return Applied(tuple(refs), tuple(aside))

    def why_not_shredded(self, study_ref: str) -> list[str]:
        """The proof: what of a shredded study could still be read; nothing, when all is well."""
        against = self.inbox.why_not_shredded(study_ref)
        mine = _results.c.study_ref == study_ref
        with self.database.reading() as session:
            documents = session.execute(
                sa.select(sa.func.max(sa.func.length(_results.c.document))).where(mine)
            ).scalar()
            objects = session.execute(_objects_of(study_ref, sa.func.max(sa.func.length(_rendered.c.data)))).scalar()
            named = session.execute(sa.select(_results.c.ref).where(mine, _results.c.accession_blind != "")).first()
            notes = session.execute(sa.select(_words.c.note).where(_words.c.study_ref == study_ref)).scalars().all()
        said = [
            ("its results are in the database", bool(documents)),
            ("its objects are in the database", bool(objects)),
            ("its accession number is in the database", named is not None),
            ("what a reader noted is in the database", any(self.vault.open_text(note) for note in notes)),
        ]
        return against + [what for what, is_so in said if is_so]

    def _shred_due(self, kind: Kind, before: datetime, who: str) -> list[str]:
        still, chosen = _is_due(kind, before), due(self.database, kind, before)
        return [ref for ref in chosen if self._shred(ref, who, scrub=False, if_still=still)]

    def _shred(
        self, study_ref: str, who: str, *, scrub: bool = True, if_still: sa.ColumnElement[bool] | None = None
    ) -> bool:
        also = functools.partial(self._let_go, study_ref)
        return self.inbox.shred(study_ref, who, also=also, scrub=scrub, if_still=if_still)

    def _let_go(self, study_ref: str, connection: sa.Connection) -> None:
        mine = _results.c.study_ref == study_ref
        numbers = sa.select(_results.c.accession_blind).where(mine, _results.c.accession_blind != "")
        connection.execute(sa.delete(_pathology).where(_pathology.c.accession_blind.in_(numbers)))
        connection.execute(sa.update(_results).where(mine).values(document=b"", accession=None, accession_blind=""))
        refs = sa.select(_results.c.ref).where(mine)
        connection.execute(sa.update(_rendered).where(_rendered.c.result_ref.in_(refs)).values(data=b""))
        ended = {"state": "withdrawn", "reason": "the study was shredded"}
        connection.execute(sa.update(_deliveries).where(_undelivered(study_ref)).values(**ended))
        connection.execute(sa.delete(_jobs).where(_jobs.c.study_ref == study_ref))
        nothing = self.vault.seal_text("")
        connection.execute(sa.update(_words).where(_words.c.study_ref == study_ref).values(note=nothing, contour=""))

    def _old_quarantined(self, before: datetime) -> list[str]:
        query = sa.select(_quarantine.c.ref).where(_quarantine.c.received_at < before).limit(AT_ONCE)
        with self.database.reading() as session:
            return list(session.execute(query).scalars())


def why_not_yet(database: Database, study_ref: str) -> list[str]:
    """What is still to be done with a study, for a person."""
    with database.reading() as session:
        study = session.execute(sa.select(_studies).where(_studies.c.ref == study_ref)).first()
        if study is None:
            raise Misconfigured(f"There is no study {study_ref!r}: its reference stands in the worklist.")
        if study.key is None:
            return ["it was shredded before"]
        job = session.execute(sa.select(_jobs.c.state).where(_jobs.c.study_ref == study_ref)).scalar()
        left = session.execute(sa.select(_deliveries.c.destination).where(_undelivered(study_ref))).scalars().all()
    said = [f"its result has not reached {', '.join(sorted(set(left)))}"] if left else []
    said += ["it is held for a person"] if study.held else []
    return said + (["it is stuck" if job == "parked" else "it is being read"] if job else [])


def due(database: Database, kind: Kind, before: datetime) -> list[str]:
    """Studies of a kind to which nothing has happened since, and nothing is left to do; the oldest first."""
    query = sa.select(_studies.c.ref).where(_is_due(kind, before))
    with database.reading() as session:
        return list(session.execute(query.order_by(_studies.c.first_received_at).limit(AT_ONCE)).scalars())


def _is_due(kind: Kind, before: datetime) -> sa.ColumnElement[bool]:
    last = sa.select(sa.func.max(_instances.c.received_at)).where(_instances.c.study_ref == _studies.c.ref)
    current = (_results.c.study_ref == _studies.c.ref) & (_results.c.current == sa.true())
    answered = sa.select(_results.c.ref).where(current)
    young = answered.where(_results.c.made_at >= before)
    return sa.and_(
        _studies.c.key.is_not(None),
        _studies.c.held.is_(None),
        sa.func.coalesce(last.scalar_subquery(), _studies.c.first_received_at) < before,
        ~young.exists(),
        ~sa.select(_words.c.ref).where(_words.c.study_ref == _studies.c.ref, _words.c.at >= before).exists(),
        ~sa.select(_jobs.c.study_ref).where(_jobs.c.study_ref == _studies.c.ref).exists(),
        ~sa.select(_deliveries.c.ref).where(_undelivered(_studies.c.ref)).exists(),
        ~answered.exists() if kind == "unread" else answered.where(_results.c.outcome == kind).exists(),
    )


def _undelivered(study_ref: str | sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    return (_deliveries.c.study_ref == study_ref) & _deliveries.c.state.in_(("waiting", "asked", "parked"))


def _objects_of(study_ref: str, what: sa.ColumnElement[int]) -> sa.Select[Any]:
    joined = _rendered.join(_results, _results.c.ref == _rendered.c.result_ref)
    return sa.select(what).select_from(joined).where(_results.c.study_ref == study_ref)


def overview(database: Database, keep: Mapping[Kind, timedelta], now: datetime) -> Iterator[tuple[Kind, str, int]]:
    """For each kind: how long it is kept, and how many studies a run now would let go."""
    for kind in KINDS:
        if kind not in keep:
            yield kind, "for ever", 0
            continue
        before = now - keep[kind]
        count = _count_quarantined(database, before) if kind == "quarantine" else len(due(database, kind, before))
        yield kind, f"{keep[kind].days} days", count


def _count_quarantined(database: Database, before: datetime) -> int:
    query = sa.select(sa.func.count()).select_from(_quarantine).where(_quarantine.c.received_at < before)
    with database.reading() as session:
        return int(session.execute(query).scalar_one())
