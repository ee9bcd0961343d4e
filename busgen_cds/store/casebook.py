"""The site's cases, sealed; the pathology that came for its studies; and what was learnt from them, when.

Rules:
- A case is kept once for a finding; when what is known of it changes, it is replaced, and that is an act.
- Its patient belongs to the test set or to those who teach, for ever: a keyed hash decides, under a key that is made
  once and never changed, not even when the site key is.
- A case outlives its study: it names nobody, and its pixels stay sealed under the site's key.
- Pathology is matched by accession number and patient id together, both as keyed hashes.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from busgen_cds import truth
from busgen_cds.case import Case, Pathology
from busgen_cds.pathology import Report
from busgen_cds.result import BundleName
from busgen_cds.store import audit
from busgen_cds.store.database import Base, Blind, Database, Sealed, UtcTime, table_of
from busgen_cds.store.inbox import StudyTable
from busgen_cds.store.result_tables import ResultTable
from busgen_cds.store.vault import Vault

Part = Literal["teach", "test"]
GIVEN_UP = timedelta(days=2)  # a run that has not ended by then stands in nobody's way
TEST_SHARE = 0.3  # of patients, for ever: another share would move patients from one side to the other


class SecretTable(Base):
    __tablename__ = "site_secret"

    name: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    value: Mapped[bytes] = mapped_column(Sealed)


class CaseTable(Base):
    __tablename__ = "site_case"
    __table_args__ = (sa.UniqueConstraint("study_ref", "finding"), sa.Index("ix_site_case_made_at", "made_at"))

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    study_ref: Mapped[str] = mapped_column(sa.String(32))
    revision: Mapped[int]
    finding: Mapped[int]
    patient: Mapped[str] = mapped_column(sa.String(16))  # keyed hash
    part: Mapped[str] = mapped_column(sa.String(8))
    pathology: Mapped[str] = mapped_column(sa.String(16))
    birads: Mapped[str | None] = mapped_column(sa.String(2))
    origin: Mapped[str] = mapped_column(sa.String(16))
    word: Mapped[str | None] = mapped_column(sa.String(8))
    confirmed_on: Mapped[str] = mapped_column(sa.String(10))
    device: Mapped[str] = mapped_column(sa.String(64))
    bundle_name: Mapped[str] = mapped_column(sa.String(64))
    bundle_version: Mapped[str] = mapped_column(sa.String(64))
    bundle_digest: Mapped[str] = mapped_column(sa.String(64))
    sha256: Mapped[str] = mapped_column(sa.String(64))  # of everything in the case
    grounds: Mapped[str] = mapped_column(sa.String(64), server_default="")  # digest of what was known then
    pixels: Mapped[bytes] = mapped_column(Sealed)
    made_at: Mapped[datetime] = mapped_column(UtcTime)


class PathologyTable(Base):
    __tablename__ = "pathology"

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    accession_blind: Mapped[str] = mapped_column(Blind(of="accession"), index=True)
    accession: Mapped[bytes] = mapped_column(Sealed)
    patient_blind: Mapped[str] = mapped_column(Blind(of="patient"))
    patient: Mapped[bytes] = mapped_column(Sealed)
    pathology: Mapped[str] = mapped_column(sa.String(16))
    reported_on: Mapped[str] = mapped_column(sa.String(10))
    withdrawn: Mapped[bool]
    received_at: Mapped[datetime] = mapped_column(UtcTime)


class AdaptationTable(Base):
    __tablename__ = "adaptation"

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    began_at: Mapped[datetime] = mapped_column(UtcTime)
    cases: Mapped[int]
    newest_case: Mapped[datetime] = mapped_column(UtcTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcTime)
    outcome: Mapped[str] = mapped_column(sa.String(16))  # "", shelved, refused, failed
    digest: Mapped[str] = mapped_column(sa.String(64))
    reason: Mapped[str] = mapped_column(sa.Text)


_secrets, _cases = table_of(SecretTable), table_of(CaseTable)
_pathology, _adaptations = table_of(PathologyTable), table_of(AdaptationTable)
_studies, _results = table_of(StudyTable), table_of(ResultTable)


@dataclass(frozen=True)
class Listed:
    """A case without its pixels."""

    ref: str
    study_ref: str
    finding: int
    patient: str
    part: Part
    pathology: Pathology
    birads: str | None
    origin: str
    word: str | None
    confirmed_on: str
    device: str
    sha256: str
    made_at: datetime


@dataclass(frozen=True)
class Matched:
    """Pathology that names a study's accession number; `patient`: and its patient."""

    ref: str
    pathology: Pathology
    reported_on: str
    same_patient: bool


@dataclass(frozen=True)
class Adaptation:
    ref: str
    began_at: datetime
    cases: int
    newest_case: datetime
    ended_at: datetime | None
    outcome: str
    digest: str
    reason: str


class Casebook:
    def __init__(
        self, database: Database, vault: Vault, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._database, self._vault, self._clock = database, vault, clock

    # -- who is who --------------------------------------------------------------------------------------------------

    def pseudonym_key(self) -> bytes:
        """The key of the cases' hashes: made once, the same ever after."""
        with self._database.transaction() as session:
            kept = session.execute(sa.select(_secrets.c.value).where(_secrets.c.name == "pseudonyms")).scalar()
            if kept is not None:
                return self._vault.open(kept)
            fresh = secrets.token_bytes(32)
            session.execute(sa.insert(_secrets).values(name="pseudonyms", value=self._vault.seal(fresh)))
            return fresh

    def part_of(self, patient: str) -> Part:
        digest = hmac.digest(self.pseudonym_key(), f"part\n{patient}".encode(), hashlib.sha256)
        return "test" if int.from_bytes(digest[:8]) < TEST_SHARE * 2**64 else "teach"

    # -- cases -------------------------------------------------------------------------------------------------------

    def keep(self, one: Case, *, study_ref: str, revision: int, finding: int, who: str, grounds: str) -> bool:
        """Keep or replace a finding's case; False: it is kept already, as it is."""
        pixels = _to_bytes(one)
        said, part = one.said_by or BundleName("", "", ""), self.part_of(one.patient_hash)
        values: dict[str, Any] = {
            "revision": revision, "patient": one.patient_hash, "part": part,
            "pathology": one.pathology, "birads": one.birads, "origin": one.origin, "word": one.word,
            "confirmed_on": one.confirmed_on, "device": one.device, "bundle_name": said.name,
            "bundle_version": said.version, "bundle_digest": said.digest,
        }  # fmt: skip
        digest = hashlib.sha256(repr(sorted(values.items())).encode() + pixels).hexdigest()
        now = self._clock()
        with self._database.transaction() as session:
            mine = (_cases.c.study_ref == study_ref) & (_cases.c.finding == finding)
            before = session.execute(sa.select(_cases.c.ref, _cases.c.sha256).where(mine)).first()
            if before is not None and before.sha256 == digest:
                session.execute(sa.update(_cases).where(mine).values(grounds=grounds))
                return False
            values |= {"grounds": grounds, "sha256": digest, "pixels": self._vault.seal(pixels), "made_at": now}
            ref = before.ref if before else secrets.token_hex(16)
            if before is None:
                values |= {"ref": ref, "study_ref": study_ref, "finding": finding}
                session.execute(sa.insert(_cases).values(values))
            else:
                session.execute(sa.update(_cases).where(mine).values(values))
            says = truth.in_words(one.pathology, one.origin)
            detail = {"case": ref, "finding": finding, "says": says, "origin": one.origin, "part": part}
            kind = f"case {'replaced' if before else 'made'} from {truth.source(one.origin)}"
            audit.record(session, audit.Act(kind, who, says, study_ref, detail), at=now)
        return True

    def drop(self, study_ref: str, finding: int, *, reason: str, who: str) -> bool:
        """What is in doubt again is no case."""
        with self._database.transaction() as session:
            mine = (_cases.c.study_ref == study_ref) & (_cases.c.finding == finding)
            gone = session.execute(sa.delete(_cases).where(mine).returning(_cases.c.ref)).scalar()
            if gone:
                audit.record(session, audit.Act("case dropped", who, reason, study_ref, {"case": gone}))
        return gone is not None

    def grounds(self, study_ref: str) -> dict[int, str]:
        """Those of a study that have a case, and the digest of what it was made of."""
        query = sa.select(_cases.c.finding, _cases.c.grounds).where(_cases.c.study_ref == study_ref)
        with self._database.reading() as session:
            return {row.finding: row.grounds for row in session.execute(query)}

    def listing(self, part: Part | None = None, *, made_after: datetime | None = None) -> list[Listed]:
        query = sa.select(*(c for c in _cases.c if c.name in Listed.__dataclass_fields__))
        query = query.order_by(_cases.c.made_at, _cases.c.ref)
        if part is not None:
            query = query.where(_cases.c.part == part)
        if made_after is not None:
            query = query.where(_cases.c.made_at > made_after)
        with self._database.reading() as session:
            return [Listed(**row._asdict()) for row in session.execute(query)]

    def open(self, ref: str) -> Case:
        with self._database.reading() as session:
            row = session.execute(sa.select(_cases).where(_cases.c.ref == ref)).one()
        tissue, mask = _from_bytes(self._vault.open(row.pixels))
        said = BundleName(row.bundle_name, row.bundle_version, row.bundle_digest) if row.bundle_digest else None
        return Case(
            row.patient,
            tissue,
            mask,
            row.pathology,
            row.birads,
            row.origin,
            row.word,
            row.confirmed_on,
            said,
            row.device,
        )

    # -- pathology ---------------------------------------------------------------------------------------------------

    def receive(self, report: Report, *, who: str) -> bool:
        """Keep a report; False: it is known already."""
        accession, patient = self._vault.blind(report.accession_number), self._vault.blind(report.patient_id)
        now = self._clock()
        with self._database.transaction() as session:
            same = sa.select(_pathology.c.ref).where(
                _pathology.c.accession_blind.in_(self._vault.blinds(report.accession_number)),
                _pathology.c.patient_blind.in_(self._vault.blinds(report.patient_id)),
                _pathology.c.pathology == report.pathology,
                _pathology.c.reported_on == report.reported_on,
            )
            if session.execute(same).first():
                return False
            ref = secrets.token_hex(16)
            session.execute(
                sa.insert(_pathology).values(
                    ref=ref,
                    accession_blind=accession,
                    accession=self._vault.seal_text(report.accession_number),
                    patient_blind=patient,
                    patient=self._vault.seal_text(report.patient_id),
                    pathology=report.pathology,
                    reported_on=report.reported_on,
                    withdrawn=False,
                    received_at=now,
                )
            )
            audit.record(
                session, audit.Act("pathology received", who, report.pathology, detail={"report": ref}), at=now
            )
        return True

    def withdraw(self, ref: str, *, who: str) -> bool:
        """A person says that a report does not hold; it is named by how its reference begins."""
        with self._database.transaction() as session:
            begins = _pathology.c.ref.startswith(ref, autoescape=True) & ~_pathology.c.withdrawn
            found = session.execute(sa.select(_pathology.c.ref).where(begins)).scalars().all()
            if len(found) != 1 or not ref:
                return False
            session.execute(sa.update(_pathology).where(_pathology.c.ref == found[0]).values(withdrawn=True))
            audit.record(session, audit.Act("pathology withdrawn", who, detail={"report": found[0]}))
        return True

    def pathology_of(self, study_ref: str) -> list[Matched]:
        """What names this study's accession number, with or without its patient."""
        same = _pathology.c.patient_blind == _studies.c.patient_blind
        query = (
            sa.select(_pathology.c.ref, _pathology.c.pathology, _pathology.c.reported_on, same.label("same_patient"))
            .select_from(_results)
            .join(_studies, _studies.c.ref == _results.c.study_ref)
            .join(_pathology, _pathology.c.accession_blind == _results.c.accession_blind)
            .where(_results.c.study_ref == study_ref, _results.c.current, _results.c.accession_blind != "")
            .where(~_pathology.c.withdrawn)
            .order_by(_pathology.c.reported_on, _pathology.c.ref)
        )
        with self._database.reading() as session:
            return [Matched(r.ref, r.pathology, r.reported_on, bool(r.same_patient)) for r in session.execute(query)]

    def proven(self) -> set[str]:
        """Studies for which pathology came."""
        query = sa.select(_results.c.study_ref).join(
            _pathology, _pathology.c.accession_blind == _results.c.accession_blind
        )
        with self._database.reading() as session:
            return set(session.execute(query.where(_results.c.current, _results.c.accession_blind != "")).scalars())

    def waiting(self) -> int:
        """How many reports name an accession number of no study that was answered here."""
        answered = sa.select(_results.c.accession_blind).where(_results.c.current)
        query = sa.select(sa.func.count()).select_from(_pathology).where(~_pathology.c.withdrawn)
        with self._database.reading() as session:
            return session.execute(query.where(_pathology.c.accession_blind.not_in(answered))).scalar_one()

    # -- what was learnt ---------------------------------------------------------------------------------------------

    def begin(self, ref: str, cases: Collection[Listed], *, again: bool = False) -> bool:
        """Once for a run, however often it is taken up; False: another is under way, or has learnt from all of it."""
        now, newest = self._clock(), max(each.made_at for each in cases)
        with self._database.transaction() as session:
            open_ = (_adaptations.c.outcome == "") & (_adaptations.c.began_at > now - GIVEN_UP)
            under_way = set(session.execute(sa.select(_adaptations.c.ref).where(open_)).scalars())
            if under_way:
                return ref in under_way
            learnt = _adaptations.c.outcome.in_(("shelved", "refused")) & (_adaptations.c.newest_case >= newest)
            if not again and session.execute(sa.select(_adaptations.c.ref).where(learnt)).first():
                return False
            values = {"ref": ref, "began_at": now, "cases": len(cases), "newest_case": newest}
            session.execute(sa.insert(_adaptations).values(values | {"outcome": "", "digest": "", "reason": ""}))
            audit.record(session, audit.Act("adaptation began", "night", detail={"run": ref, "cases": len(cases)}))
        return True

    def end(self, ref: str, outcome: str, *, digest: str = "", reason: str = "") -> None:
        values = {"ended_at": self._clock(), "outcome": outcome, "digest": digest, "reason": reason}
        with self._database.transaction() as own:
            mine = (_adaptations.c.ref == ref) & (_adaptations.c.outcome == "")
            changed = own.execute(sa.update(_adaptations).where(mine).values(values).returning(_adaptations.c.ref))
            if changed.scalar() is not None:
                detail = {"run": ref, "digest": digest, "outcome": outcome}
                audit.record(own, audit.Act("adaptation ended", "night", reason, detail=detail))

    def learnt(self) -> Adaptation | None:
        """The last run that came to an end with the cases it learnt from."""
        return next((each for each in self.adaptations() if each.outcome in ("shelved", "refused")), None)

    def new(self) -> list[Listed]:
        """The cases that teach, and that no run has learnt from yet."""
        last = self.learnt()
        return self.listing("teach", made_after=last.newest_case if last else None)

    def adaptations(self) -> list[Adaptation]:
        """The newest first."""
        with self._database.reading() as session:
            rows = session.execute(sa.select(_adaptations).order_by(_adaptations.c.began_at.desc()))
            return [Adaptation(**row._asdict()) for row in rows]


def _to_bytes(one: Case) -> bytes:
    buffer = io.BytesIO()
    mask = np.zeros((0, 0), np.bool_) if one.mask is None else one.mask
    np.savez_compressed(buffer, tissue=one.tissue, mask=mask)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> tuple[Any, Any]:
    with np.load(io.BytesIO(data)) as arrays:
        return arrays["tissue"], cast(Any, arrays["mask"] if arrays["mask"].size else None)
