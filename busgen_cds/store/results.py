"""What was said about each study, and the objects that say it; how far they got is told by its `deliveries`.

Rules:
- A result, its objects, its deliveries and its act are kept in one transaction, or not at all.
- The same evidence read by the same bundle is kept once; a study has exactly one current result.
- Objects are kept as bytes and never change, so that one UID never has two contents.
- A newer result supersedes loudly: it names all that reached a destination, what was not yet sent is withdrawn,
  and an act sounds the alarm when the category fell.
- Documents and objects are sealed under the study's key: destroying that key shreds them.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from busgen_cds import signing
from busgen_cds.birads import Category
from busgen_cds.errors import Shredded, Transient, Untrusted
from busgen_cds.result import Assessed, Rendered, Result
from busgen_cds.store import audit
from busgen_cds.store.database import Base, Database
from busgen_cds.store.deliveries import Addressee, Delivered, Deliveries, Delivery
from busgen_cds.store.inbox import InstanceTable, StudyTable
from busgen_cds.store.result_document import from_document, outcome_of, to_document
from busgen_cds.store.result_tables import ALARMING, DeliveredTable, Outcome, RenderedTable, ResultTable
from busgen_cds.store.vault import Vault
from busgen_cds.study import NotForUs
from busgen_cds.triage import fell

_tables = Base.metadata.tables
_results, _rendered = _tables[ResultTable.__tablename__], _tables[RenderedTable.__tablename__]
_delivered = _tables[DeliveredTable.__tablename__]
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
    images_read: int
    made_at: datetime
    current: bool
    supersedes: str | None
    alarm: str


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
        self.deliveries = Deliveries(database, clock, self._open_one)

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
            kinds = {ref: each.kind for ref, each in zip(refs, rendered, strict=True)}
            for each in addressees:
                self.deliveries.address(session, entry.ref, study_ref, each, kinds, now)
            audit.record(session, *_acts_of(entry, refs, digests, recalled), at=now)
            if session_also:
                session_also(session)
        return entry

    def _supersede(self, session: Session, old: Entry) -> None:
        session.execute(sa.update(_results).where(_results.c.ref == old.ref).values(current=False))
        self.deliveries.withdraw_unsent(session, old.ref)

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
        outcome: Outcome | None = None,
        superseded: bool = False,
    ) -> list[Entry]:
        """Results, newest first; `before` pages on."""
        query = sa.select(*_ENTRY).limit(limit)
        if not superseded:
            query = query.where(_results.c.current == sa.true())
        if before:
            query = query.where(_results.c.made_at < before)
        if outcome:
            query = query.where(_results.c.outcome == outcome)
        with self._database.reading() as session:
            return [_entry(row) for row in session.execute(query.order_by(_results.c.made_at.desc()))]

    def named(self, refs: Sequence[str]) -> list[Entry]:
        """These results, in this order."""
        with self._database.reading() as session:
            found = {
                row.ref: _entry(row)
                for start in range(0, len(refs), 500)
                for row in session.execute(sa.select(*_ENTRY).where(_results.c.ref.in_(refs[start : start + 500])))
            }
        return [found[ref] for ref in refs if ref in found]

    def alarms(self, *, limit: int = 100) -> list[Entry]:
        """Current results that rank lower than the ones they replaced, or that recall them."""
        query = sa.select(*_ENTRY).where(ALARMING).order_by(_results.c.made_at.desc()).limit(limit)
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
        deliveries = self.deliveries.of(result_ref)
        return Shown(
            _entry(row),
            self._vault.open_text(study.uid),
            self._vault.open_text(study.patient),
            from_document(json.loads(document)),
            self.objects(result_ref),
            deliveries,
            tuple(each for delivery in deliveries for each in self.deliveries.delivered(delivery.ref)),
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

    def unread(self, *, settled_before: datetime, received_after: datetime | None = None) -> dict[str, datetime]:
        """Studies with instances that their current result does not cover, and when their last one came. Held ones
        wait for a person, not for us; but an answer to what turned out to be two patients is to be recalled."""
        mine = (_instances.c.study_ref == _studies.c.ref) & ~_instances.c.conflict
        received = sa.select(sa.func.count()).where(mine).scalar_subquery()
        last = sa.select(sa.func.max(_instances.c.received_at)).where(mine).scalar_subquery()
        # evidence only grows, so the newest result covers the most; asked like this, each study costs two look-ups
        covered = sa.select(sa.func.max(_results.c.instances)).where(_results.c.study_ref == _studies.c.ref)
        answered = sa.select(_results.c.ref).where(_results.c.study_ref == _studies.c.ref).exists()
        query = sa.select(_studies.c.ref, last.label("last")).where(
            _studies.c.held.is_(None) | (_studies.c.two_patients & answered),
            _studies.c.key.is_not(None),
            received > sa.func.coalesce(covered.scalar_subquery(), 0),
            last < settled_before,
        )
        if received_after:
            lately = sa.select(_instances.c.study_ref).where(_instances.c.received_at >= received_after)
            query = query.where(_studies.c.ref.in_(lately))
        with self._database.reading() as session:
            return {row.ref: row.last for row in session.execute(query)}

    def is_current(self, result_ref: str) -> bool:
        with self._database.reading() as session:
            return bool(session.execute(sa.select(_results.c.current).where(_results.c.ref == result_ref)).scalar())

    # -- inside ------------------------------------------------------------------------------------------------------

    def _study_vault(self, session: Session, study_ref: str) -> Vault:
        key = session.execute(sa.select(_studies.c.key).where(_studies.c.ref == study_ref)).scalar_one()
        if key is None:
            raise Shredded("This study was shredded: its results cannot be read any more.")
        return Vault(self._vault.unwrap(key))

    def _open_one(self, rendered_ref: str) -> bytes:
        return self._open_objects(sa.select(_rendered).where(_rendered.c.ref == rendered_ref))[0].data

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


_ENTRY = tuple(_results.c[each.name] for each in dataclasses.fields(Entry))


def _entry(row: sa.Row[Any]) -> Entry:
    return Entry(**{each.name: getattr(row, each.name) for each in dataclasses.fields(Entry)})


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
    outcome = outcome_of(answer)
    stated = answer if isinstance(answer, Assessed) else None
    birads = stated.birads if stated else None
    return Entry(
        ref=secrets.token_hex(16),
        study_ref=study_ref,
        revision=revision,
        evidence_digest=evidence_digest,
        bundle_digest=bundle_digest,
        instances=instances,
        outcome=outcome,
        reason="" if isinstance(answer, Assessed) else answer.reason,
        birads=birads,
        probability=stated.probability if stated else None,
        images_read=0 if isinstance(answer, NotForUs) else answer.images_read,
        made_at=now,
        current=True,
        supersedes=replaced.ref if replaced else None,
        alarm=_alarm(replaced, outcome, birads),
    )


def _alarm(replaced: Entry | None, outcome: Outcome, birads: Category | None) -> str:
    """Safety rule 7: a fall is never quiet, whatever it falls to."""
    if replaced is None or not fell((replaced.outcome, replaced.birads), (outcome, birads)):
        return ""
    before, now = _said(replaced.outcome, replaced.birads), _said(outcome, birads)
    return f"Revision {replaced.revision} said {before}; the one that replaces it says {now}."


def _said(outcome: Outcome, birads: Category | None) -> str:
    if outcome != "assessed":
        return "not analysed"
    return f"category {birads}" if birads else "no lesion found"


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
