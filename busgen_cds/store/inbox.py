"""What was received, exactly as it was received, until the site's rules let it go.

Rules:
- `keep` returns only when the file's bytes, its name and its row are on the disk, in this order:
  write → fsync → rename → fsync of the directory → commit. Whoever was told "kept" finds it after a power cut.
- The same bytes under the same SOP Instance UID are kept once, in quarantine too. Other bytes under a known UID are
  set aside.
- Nothing plain is written: files are sealed by `vault`, identifiers in the rows too.
- A study is named by an opaque random reference; only that leaves this module for workflows and logs.
- Two patients under one study UID: all is kept, and the study is held until a person states whose it is. The images
  of anybody else are then left out; a new one of theirs holds it again.
- A file without a row was never acknowledged; `sweep` removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from busgen_cds.arrival import Arrival, Kept, NoRoom, Outcome, Peek
from busgen_cds.errors import Misconfigured, Shredded, Transient
from busgen_cds.store import audit, clerk, vault
from busgen_cds.store.clerk import Entry
from busgen_cds.store.database import Base, Blind, Database, Sealed, UtcTime, WrappedKey, table_of
from busgen_cds.store.vault import SealedWriter, Vault
from busgen_cds.study import Patient, contradiction, whose

SAY_WHOSE = (
    "Images of two patients are under this study: say whose it is (on its page, or by "
    "`busgen-cds queue --release … --patient …`); "
    "the images of anybody else are left out."
)
PROCESSING_FAILURE, NO_SUCH_INSTANCE, CLASS_INSTANCE_CONFLICT = 0x0110, 0x0112, 0x0119
_LOOK_AT_DISK_EVERY = 64 * 1024 * 1024

Clock = Callable[[], datetime]


class StudyTable(Base):
    __tablename__ = "study"
    __table_args__ = (
        sa.Index(
            "ix_study_held",
            "first_received_at",
            sqlite_where=sa.text("held IS NOT NULL"),
            postgresql_where=sa.text("held IS NOT NULL"),
        ),
    )

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    uid_blind: Mapped[str] = mapped_column(Blind(of="uid"), unique=True)
    uid: Mapped[bytes] = mapped_column(Sealed)
    patient_blind: Mapped[str] = mapped_column(Blind(of="patient"), index=True)
    patient: Mapped[bytes] = mapped_column(Sealed)
    key: Mapped[bytes | None] = mapped_column(WrappedKey)  # gone when the study is shredded
    first_received_at: Mapped[datetime] = mapped_column(UtcTime)
    two_patients: Mapped[bool] = mapped_column(default=False)
    held: Mapped[str | None] = mapped_column(sa.Text)
    issuer: Mapped[bytes | None] = mapped_column(Sealed)  # of the patient's id
    stated: Mapped[str | None] = mapped_column(sa.String(32))  # random, anew each time a person states whose it is


class InstanceTable(Base):
    __tablename__ = "instance"
    __table_args__ = (
        sa.Index(
            "uq_instance_sop_uid_blind",
            "sop_uid_blind",
            unique=True,
            sqlite_where=sa.text("NOT conflict"),
            postgresql_where=sa.text("NOT conflict"),
        ),
        sa.Index("ix_instance_study_ref", "study_ref", "conflict", "received_at"),  # counted without looking at rows
        sa.Index("ix_instance_received_at", "received_at"),  # what came lately: the sweep asks every half minute
        sa.Index(
            "ix_instance_conflict",
            "received_at",
            sqlite_where=sa.text("conflict = 1"),
            postgresql_where=sa.text("conflict"),
        ),
    )

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    study_ref: Mapped[str] = mapped_column(sa.ForeignKey("study.ref"))
    sop_uid_blind: Mapped[str] = mapped_column(Blind(of="sop_uid"))
    sop_uid: Mapped[bytes] = mapped_column(Sealed)
    sop_class_uid: Mapped[str] = mapped_column(sa.String(64))
    transfer_syntax_uid: Mapped[str] = mapped_column(sa.String(64))
    sha256: Mapped[str] = mapped_column(sa.String(64))
    size: Mapped[int] = mapped_column(sa.BigInteger)
    received_at: Mapped[datetime] = mapped_column(UtcTime)
    calling_ae: Mapped[str] = mapped_column(sa.String(16))
    key: Mapped[bytes] = mapped_column(sa.LargeBinary)  # the data key, wrapped by the study's key
    conflict: Mapped[bool] = mapped_column(default=False)


class QuarantineTable(Base):
    __tablename__ = "quarantine"
    __table_args__ = (sa.Index("ix_quarantine_content", "sop_uid_blind", "sha256"),)

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    received_at: Mapped[datetime] = mapped_column(UtcTime, index=True)
    calling_ae: Mapped[str] = mapped_column(sa.String(16))
    address: Mapped[str] = mapped_column(sa.String(64))
    sop_uid_blind: Mapped[str] = mapped_column(Blind(of="sop_uid"), server_default="")
    sop_uid: Mapped[bytes] = mapped_column(Sealed)
    sop_class_uid: Mapped[str] = mapped_column(sa.String(64))
    transfer_syntax_uid: Mapped[str] = mapped_column(sa.String(64))
    sha256: Mapped[str] = mapped_column(sa.String(64), server_default="")
    size: Mapped[int] = mapped_column(sa.BigInteger)
    times: Mapped[int] = mapped_column(server_default="1")  # that it came
    reason: Mapped[str] = mapped_column(sa.Text)
    key: Mapped[bytes] = mapped_column(WrappedKey)  # the data key


_studies, _instances, _quarantine = table_of(StudyTable), table_of(InstanceTable), table_of(QuarantineTable)


_FIND_STUDY = sa.select(_studies).where(_studies.c.uid_blind == sa.bindparam("blind"))
_INSERT_STUDY = sa.insert(_studies)
_HOLD_STUDY = (
    sa.update(_studies)
    .where(_studies.c.ref == sa.bindparam("study"))
    .values(two_patients=True, held=sa.bindparam("held_now"))
)
_FIND_INSTANCES = sa.select(_instances.c.ref, _instances.c.study_ref, _instances.c.sha256, _instances.c.conflict).where(
    _instances.c.sop_uid_blind == sa.bindparam("blind")
)
_INSERT_INSTANCE = sa.insert(_instances)


@dataclass(frozen=True)
class Instance:
    ref: str
    study_ref: str
    sop_class_uid: str
    sop_instance_uid: str = field(repr=False)
    transfer_syntax_uid: str
    sha256: str  # of the whole Part 10 file as kept
    bytes: int
    received_at: datetime
    calling_ae: str


@dataclass(frozen=True)
class StudyRow:
    ref: str
    first_received_at: datetime
    last_received_at: datetime
    instances: int
    two_patients: bool
    held: str | None


@dataclass(frozen=True)
class Quarantined:
    ref: str
    received_at: datetime
    calling_ae: str
    address: str
    sop_class_uid: str
    sop_instance_uid: str = field(repr=False)
    transfer_syntax_uid: str
    bytes: int
    reason: str
    times: int = 1  # that it came


class Stated(NamedTuple):
    """A person's word on whose study it is, and what tells it from an earlier word."""

    word: str
    patient: Patient


class _Filed(NamedTuple):
    """A study, as an instance is filed under it."""

    ref: str
    key: bytes
    patient: Patient
    two_patients: bool
    held: str | None


class _Known(NamedTuple):
    ref: str
    study_ref: str
    sha256: str
    conflict: bool


@dataclass(eq=False)
class _Waiting:
    """An entry of this process, until the one that leads has committed it."""

    entry: Entry
    kept: Kept | None = None
    failed: BaseException | None = None


def _now() -> datetime:
    return datetime.now(UTC)


class Inbox:
    def __init__(
        self,
        folder: Path,
        database: Database,
        vault: Vault,
        clock: Clock = _now,
        *,
        least_free_bytes: int = 0,
    ) -> None:
        self._database, self._vault, self._clock = database, vault, clock
        self._least_free = least_free_bytes
        self._folder = folder
        self._incoming, self._kept = folder / "incoming", folder / "kept"
        self._quarantine = folder / "quarantine"
        for path in (self._incoming, self._kept, self._quarantine):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_path = folder / "commit.lock"
        self._on_disk: set[Path] = set()  # folders that this process has seen through to the disk
        self._waiting: list[_Waiting] = []
        self._line = clerk.Line(folder)
        self._leading, self._joining = threading.Lock(), threading.Lock()

    # -- receiving -------------------------------------------------------------------------------------------------

    def receive(self, arrival: Arrival) -> Receiving:
        """Begin to write an instance; raises NoRoom before anything is written."""
        self._look_at_disk()
        return Receiving(self, arrival)

    def keep(self, arrival: Arrival, header: Peek, chunks: Iterable[bytes]) -> Kept:
        receiving = self.receive(arrival)
        try:
            for chunk in chunks:
                receiving.write(chunk)
        except BaseException:
            receiving.abandon()
            raise
        return receiving.keep(header)

    def quarantine(self, arrival: Arrival, chunks: Iterable[bytes], reason: str) -> str:
        receiving = self.receive(arrival)
        try:
            for chunk in chunks:
                receiving.write(chunk)
        except BaseException:
            receiving.abandon()
            raise
        return receiving.quarantine(reason)

    # -- asking ----------------------------------------------------------------------------------------------------

    def studies(self) -> list[StudyRow]:
        counted = (
            sa.select(
                _instances.c.study_ref, sa.func.count().label("n"), sa.func.max(_instances.c.received_at).label("last")
            )
            .where(~_instances.c.conflict)
            .group_by(_instances.c.study_ref)
            .subquery()
        )
        query = (
            sa.select(_studies, counted.c.n, counted.c.last)
            .join(counted, counted.c.study_ref == _studies.c.ref)
            .where(_studies.c.key.is_not(None))
            .order_by(_studies.c.first_received_at)
        )
        with self._database.reading() as session:
            return [
                StudyRow(row.ref, row.first_received_at, row.last, row.n, row.two_patients, row.held)
                for row in session.execute(query)
            ]

    def instances(self, study_ref: str) -> tuple[Instance, ...]:
        """What the study consists of, in the order received; set-aside conflicts are not part of it."""
        return self._instances_where(_instances.c.study_ref == study_ref, ~_instances.c.conflict)

    def studies_with(self, sop_class_uids: Collection[str]) -> set[str]:
        """Studies that hold an object of one of these classes."""
        of = sa.select(_instances.c.study_ref).where(_instances.c.sop_class_uid.in_(sop_class_uids))
        with self._database.reading() as session:
            return set(session.execute(of.where(~_instances.c.conflict).distinct()).scalars())

    def conflicts(self) -> tuple[Instance, ...]:
        """Instances that came with other bytes under a SOP Instance UID that was known already."""
        return self._instances_where(_instances.c.conflict)

    def open(self, instance: Instance) -> bytes:
        """The whole Part 10 file."""
        return b"".join(self.chunks(instance))

    def chunks(self, instance: Instance) -> Iterator[bytes]:
        with self._database.reading() as session:
            row = session.execute(
                sa.select(_instances.c.key, _studies.c.key.label("study_key"))
                .join(_studies, _studies.c.ref == _instances.c.study_ref)
                .where(_instances.c.ref == instance.ref)
            ).first()
        if row is None or row.study_key is None:
            raise Shredded("The study of this instance was shredded: it cannot be read any more.")
        key = vault.unwrap_under(self._vault.unwrap(row.study_key), row.key)
        with self._path(instance.ref, instance.received_at).open("rb") as file:
            yield from vault.read_sealed(file, key)

    def study_uid(self, study_ref: str) -> str:
        with self._database.reading() as session:
            sealed = session.execute(sa.select(_studies.c.uid).where(_studies.c.ref == study_ref)).scalar_one()
        return self._vault.open_text(sealed)

    def find_study(self, study_instance_uid: str) -> str | None:
        with self._database.reading() as session:
            found = session.execute(self._study_of(study_instance_uid)).first()
        return found.ref if found else None

    def held(self, study_ref: str) -> str | None:
        """Why nothing may be sent for this study, if it is held."""
        with self._database.reading() as session:
            reason: str | None = session.execute(
                sa.select(_studies.c.held).where(_studies.c.ref == study_ref)
            ).scalar_one()
        return reason

    def two_patients(self, study_ref: str) -> bool:
        with self._database.reading() as session:
            query = sa.select(_studies.c.two_patients).where(_studies.c.ref == study_ref)
            return bool(session.execute(query).scalar_one())

    def held_studies(self) -> list[tuple[str, str]]:
        """References of the studies that wait for a person, with the reason; the longest waiting first."""
        query = sa.select(_studies.c.ref, _studies.c.held).where(_studies.c.held.is_not(None))
        with self._database.reading() as session:
            return [(row.ref, row.held) for row in session.execute(query.order_by(_studies.c.first_received_at))]

    def stated(self, study_ref: str) -> Stated | None:
        """Whose it is by a person's word, if there was doubt; only images that say the same are read."""
        with self._database.reading() as session:
            row = session.execute(sa.select(_studies).where(_studies.c.ref == study_ref)).one()
        return Stated(row.stated, self._patient(row)) if row.stated else None

    def hold(self, study_ref: str, reason: str, who: str = "system") -> None:
        self._set_held(study_ref, {"held": reason}, audit.Act("study held", who, reason, study_ref))

    def hold_two_patients(self, study_ref: str, reason: str, who: str = "system") -> None:
        """Its images show what the identifiers under which they were filed did not: whose it is, nobody can say."""
        values = {"held": reason, "two_patients": True}
        self._set_held(study_ref, values, audit.Act("study held", who, reason, study_ref))

    def release(self, study_ref: str, who: str, patient: Patient | None = None) -> None:
        """Let it go on. One with the images of two patients goes on only as the study of one of them."""
        if patient is None and self.two_patients(study_ref):
            raise Misconfigured(SAY_WHOSE)
        values: dict[str, Any] = {"held": None}
        if patient is not None:
            values |= {**self._sealed(patient), "two_patients": False, "stated": secrets.token_hex(16)}
        why = "a person stated whose it is" if patient else ""
        self._set_held(study_ref, values, audit.Act("study released", who, why, study_ref))

    def quarantined(self) -> list[Quarantined]:
        with self._database.reading() as session:
            rows = session.execute(sa.select(_quarantine).order_by(_quarantine.c.received_at)).all()
        return [
            Quarantined(
                row.ref,
                row.received_at,
                row.calling_ae,
                row.address,
                row.sop_class_uid,
                self._vault.open_text(row.sop_uid),
                row.transfer_syntax_uid,
                row.size,
                row.reason,
                row.times,
            )
            for row in rows
        ]

    def open_quarantined(self, ref: str) -> bytes:
        with self._database.reading() as session:
            key = session.execute(sa.select(_quarantine.c.key).where(_quarantine.c.ref == ref)).scalar_one()
        with (self._quarantine / ref).open("rb") as file:
            return b"".join(vault.read_sealed(file, self._vault.unwrap(key)))

    def answer_for(
        self, asked: Sequence[tuple[str, str]]
    ) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str, int], ...]]:
        """Storage commitment: which (SOP class, SOP instance) are kept, and which are not, with DICOM's reason."""
        verdicts = [(*pair, self._why_not(*pair)) for pair in asked]
        kept = tuple((sop_class, uid) for sop_class, uid, why in verdicts if why == 0)
        return kept, tuple(verdict for verdict in verdicts if verdict[2])

    def _why_not(self, sop_class_uid: str, sop_instance_uid: str) -> int:
        """PS3.3 C.14.1.1: why we do not answer for this instance; 0 when we do."""
        query = (
            sa.select(_instances)
            .join(_studies, _studies.c.ref == _instances.c.study_ref)
            .where(_instances.c.sop_uid_blind.in_(self._vault.blinds(sop_instance_uid)), _studies.c.key.is_not(None))
        )
        with self._database.reading() as session:
            rows = session.execute(query).all()
        if not rows:
            return NO_SUCH_INSTANCE
        if len(rows) > 1:
            return PROCESSING_FAILURE  # two contents came under this UID: the sender must keep its own
        if rows[0].sop_class_uid != sop_class_uid:
            return CLASS_INSTANCE_CONFLICT
        return 0 if self._path(rows[0].ref, rows[0].received_at).is_file() else PROCESSING_FAILURE

    def keep_books(self) -> None:
        """Be the inbox's clerk, in a process of its own, for as long as it lives."""
        clerk.serve(self._folder, self._commit_rows)

    # -- letting go ------------------------------------------------------------------------------------------------

    def shred(
        self,
        study_ref: str,
        who: str,
        *,
        also: Callable[[sa.Connection], object] | None = None,
        scrub: bool = True,
        if_still: sa.ColumnElement[bool] | None = None,
    ) -> bool:
        """Destroy the study's key, and with it every copy of its files; its names leave the database with it.

        What remains is the opaque reference, so that the record of acts still speaks of something. What others keep of
        the study they let go in `also`, in the same transaction. Who shreds many scrubs once, at the end. False: a
        study that was chosen for a reason (`if_still`) has it no longer, since an image or a word came for it.
        """
        gone = {"key": None, "held": None, "uid": b"", "patient": b"", "patient_blind": "", "uid_blind": study_ref}
        gone |= {"issuer": None, "stated": None}
        with self._one_at_a_time(), self._database.connection() as connection:
            this = _studies.c.ref == study_ref
            if if_still is not None and not connection.execute(sa.select(_studies.c.ref).where(this, if_still)).first():
                return False
            mine = _instances.c.study_ref == study_ref
            entries = connection.execute(sa.select(_instances.c.ref, _instances.c.received_at).where(mine)).all()
            connection.execute(sa.delete(_instances).where(mine))
            connection.execute(sa.update(_studies).where(this).values(**gone))
            detail = {"instances": [entry.ref for entry in entries]}
            if also is not None:
                also(connection)
            audit.record(connection, audit.Act("study shredded", who, "", study_ref, detail), at=self._clock())
        for entry in entries:
            self._path(entry.ref, entry.received_at).unlink(missing_ok=True)
        if scrub:
            self._database.scrub()
        return True

    def discard_quarantined(self, ref: str, who: str) -> None:
        """An object that was set aside is let go: its key with its row, then its file."""
        with self._database.transaction() as session:
            session.execute(sa.delete(_quarantine).where(_quarantine.c.ref == ref))
            audit.record(
                session, audit.Act("quarantined discarded", who, "", None, {"quarantine": ref}), at=self._clock()
            )
        (self._quarantine / ref).unlink(missing_ok=True)

    def why_not_shredded(self, study_ref: str) -> list[str]:
        """The proof that a study cannot be read any more: what still speaks against it, if anything does."""
        with self._database.reading() as session:
            study = session.execute(sa.select(_studies).where(_studies.c.ref == study_ref)).first()
            rows = session.execute(sa.select(_instances.c.ref).where(_instances.c.study_ref == study_ref)).all()
            acts = audit.acts_of(session, study_ref, "study shredded")
        if study is None or not acts:
            return ["the record of acts does not say that this study was shredded"]
        refs = {ref for act in acts for ref in act.detail["instances"]}
        left = sorted(path.name for path in self._kept.rglob("*") if path.name in refs)
        against = [("the study's key is there", study.key is not None), ("instances are in the database", bool(rows))]
        against += [("its identifiers are in the database", bool(study.uid or study.patient))]
        return [what for what, is_so in against if is_so] + [f"its file {name} is on the disk" for name in left]

    # -- housekeeping ----------------------------------------------------------------------------------------------

    def sweep(self) -> int:
        """Remove files that were never acknowledged: left by a crash, and belonging to nobody alive."""
        with self._database.reading() as session:
            kept = set(session.execute(sa.select(_instances.c.ref)).scalars())
            kept |= set(session.execute(sa.select(_quarantine.c.ref)).scalars())
        files = [path for folder in (self._incoming, self._kept, self._quarantine) for path in folder.rglob("*")]
        stale = [path for path in files if path.name not in kept and path.is_file() and _nobody_writes(path)]
        return sum(self._removed(path) for path in stale)

    def _removed(self, path: Path) -> bool:
        """No row was made since, and none is made while it goes."""
        with self._one_at_a_time():
            if self._has_row(path.name):
                return False
            path.unlink(missing_ok=True)
        return True

    def _has_row(self, ref: str) -> bool:
        with self._database.reading() as session:
            return any(
                session.execute(sa.select(table.c.ref).where(table.c.ref == ref)).first()
                for table in (_instances, _quarantine)
            )

    # -- inside ----------------------------------------------------------------------------------------------------

    def _instances_where(self, *conditions: sa.ColumnElement[bool]) -> tuple[Instance, ...]:
        query = sa.select(_instances).where(*conditions).order_by(_instances.c.received_at, _instances.c.ref)
        with self._database.reading() as session:
            rows = session.execute(query).all()
        return tuple(
            Instance(
                row.ref,
                row.study_ref,
                row.sop_class_uid,
                self._vault.open_text(row.sop_uid),
                row.transfer_syntax_uid,
                row.sha256,
                row.size,
                row.received_at,
                row.calling_ae,
            )
            for row in rows
        )

    def _set_held(self, study_ref: str, values: dict[str, Any], act: audit.Act) -> None:
        with self._database.transaction() as session:
            session.execute(sa.update(_studies).where(_studies.c.ref == study_ref).values(values))
            audit.record(session, act, at=self._clock())

    def _look_at_disk(self) -> None:
        if self._least_free and shutil.disk_usage(self._incoming).free < self._least_free:
            raise NoRoom("The disk of the inbox is below its watermark: free some space or add a disk.")

    def _path(self, ref: str, at: datetime) -> Path:
        return self._kept / at.astimezone(UTC).strftime("%Y-%m-%d") / ref

    def _study_of(self, uid: str) -> sa.Select[Any]:
        return sa.select(_studies).where(_studies.c.uid_blind.in_(self._vault.blinds(uid)))

    def _commit(self, entry: Entry, source: Path) -> Kept:
        """The file's name on the disk, then its row."""
        target = self._path(entry.ref, entry.at)
        self._make_folder(target.parent)
        source.rename(target)
        _sync_folder(target.parent)
        kept = self._commit_alone(entry) or self._line.ask(entry) or self._commit_together(entry)
        if kept.instance_ref != entry.ref:
            target.unlink()  # these bytes were kept, or set aside, before
        return kept

    def _commit_alone(self, entry: Entry) -> Kept | None:
        """At once, when nobody else is at it: the shortest way for a scanner that sends alone."""
        with self._one_at_a_time(wait=False) as free:
            return self._write_rows([entry])[0] if free else None

    def _commit_together(self, entry: Entry) -> Kept:
        """Without a clerk: whoever comes first commits for all of this process that wait by then."""
        mine = _Waiting(entry)
        with self._joining:
            self._waiting.append(mine)
        with self._leading:
            if mine.kept is None and mine.failed is None:
                with self._joining:
                    batch, self._waiting = self._waiting, []
                self._lead(batch)
        if mine.failed is not None:
            raise mine.failed
        assert mine.kept is not None
        return mine.kept

    def _lead(self, batch: Sequence[_Waiting]) -> None:
        try:
            answers = self._commit_rows([waiting.entry for waiting in batch])
        except BaseException as failed:  # noqa: BLE001 – each of those who wait raises it
            for waiting in batch:
                waiting.failed = failed
            return
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.kept = answer

    def _commit_rows(self, entries: Sequence[Entry]) -> list[Kept]:
        with self._one_at_a_time():
            return self._write_rows(entries)

    def _write_rows(self, entries: Sequence[Entry]) -> list[Kept]:
        if not all(self._path(entry.ref, entry.at).exists() for entry in entries):
            raise Transient("Who received it had died, and its file was swept away: it is to be sent again.")
        with self._database.connection() as connection:
            answers = self._enter(connection, entries)
            audit.record(connection, *map(_received, entries, answers), at=entries[0].at)
        return answers

    def _make_folder(self, folder: Path) -> None:
        # Where it is there, another process may have made it and not yet seen it through to the disk.
        if folder not in self._on_disk or not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            _sync_folder(folder.parent)
            self._on_disk.add(folder)

    @contextmanager
    def _one_at_a_time(self, *, wait: bool = True) -> Iterator[bool]:
        """Over all processes of the site, and without SQLite's polling; says whether it is our turn."""
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            free = True
        except BlockingIOError:
            free = False
        try:
            yield free
        finally:
            os.close(descriptor)

    def _enter(self, connection: sa.Connection, batch: Sequence[Entry]) -> list[Kept]:
        """Rows for the batch; what is known already, or comes twice in it, gets the answer it deserves."""
        studies: dict[str, _Filed] = {}
        known: dict[str, list[_Known]] = {}
        rows, answers = [], []
        for entry in batch:
            study = self._file_under(connection, entry, studies)
            uid = entry.header.sop_instance_uid
            same_uid = known[uid] = known.get(uid) or self._known_under(connection, uid)
            twin = next((one for one in same_uid if one.sha256 == entry.sha256), None)
            if twin is not None:
                # our own row is there when the clerk was lost between its commit and its answer
                again: Outcome = "conflict" if twin.conflict else "new" if twin.ref == entry.ref else "same"
                answers.append(Kept(again, twin.study_ref, twin.ref, study.held))
                continue
            study = studies[entry.header.study_instance_uid] = self._whose(connection, entry, study)
            outcome: Outcome = "conflict" if same_uid else "new"
            rows.append(self._row(entry, study, outcome))
            same_uid.append(_Known(entry.ref, study.ref, entry.sha256, outcome == "conflict"))
            answers.append(Kept(outcome, study.ref, entry.ref, study.held))
        if rows:
            connection.execute(_INSERT_INSTANCE, rows)
        return answers

    def _known_under(self, connection: sa.Connection, sop_instance_uid: str) -> list[_Known]:
        """What is kept already under this UID; while a site key is being changed, under either key's hash."""
        blinds = self._vault.blinds(sop_instance_uid)
        return [_Known(*row) for blind in blinds for row in connection.execute(_FIND_INSTANCES, {"blind": blind})]

    def _row(self, entry: Entry, study: _Filed, outcome: Outcome) -> dict[str, Any]:
        return {
            "ref": entry.ref,
            "study_ref": study.ref,
            "sop_uid_blind": self._vault.blind(entry.header.sop_instance_uid),
            "sop_uid": self._vault.seal_text(entry.header.sop_instance_uid),
            "sop_class_uid": entry.header.sop_class_uid,
            "transfer_syntax_uid": entry.arrival.transfer_syntax_uid,
            "sha256": entry.sha256,
            "size": entry.size,
            "received_at": entry.at,
            "calling_ae": entry.arrival.calling_ae,
            "key": vault.wrap_under(study.key, entry.key),
            "conflict": outcome == "conflict",
        }

    def _file_under(self, connection: sa.Connection, entry: Entry, studies: dict[str, _Filed]) -> _Filed:
        """The study of an instance, made when it is the first."""
        uid = entry.header.study_instance_uid
        study = studies[uid] = studies.get(uid) or self._find_or_make(connection, entry, _patient_of(entry))
        return study

    def _whose(self, connection: sa.Connection, entry: Entry, study: _Filed) -> _Filed:
        """Held when the instance shows a second patient; known better when it says what was missing."""
        both = [study.patient, _patient_of(entry)]
        two = contradiction(both)
        if two and not study.two_patients:
            study = study._replace(two_patients=True, held=study.held or two)
            connection.execute(_HOLD_STUDY, {"study": study.ref, "held_now": study.held})
        if not two and whose(both) != study.patient:
            study = study._replace(patient=whose(both))
            mine = sa.update(_studies).where(_studies.c.ref == study.ref)
            connection.execute(mine.values(self._sealed(study.patient)))
        return study

    def _sealed(self, patient: Patient) -> dict[str, Any]:
        issuer = self._vault.seal_text(patient.issuer) if patient.issuer else None
        sealed = {"patient_blind": self._vault.blind(patient.id), "patient": self._vault.seal_text(patient.id)}
        return {**sealed, "issuer": issuer}

    def _patient(self, row: sa.Row[Any]) -> Patient:
        issuer = self._vault.open_text(row.issuer) if row.issuer else ""
        return Patient(id=self._vault.open_text(row.patient), issuer=issuer)

    def _find_or_make(self, connection: sa.Connection, entry: Entry, patient: Patient) -> _Filed:
        blinds = self._vault.blinds(entry.header.study_instance_uid)
        row = next((row for blind in blinds for row in connection.execute(_FIND_STUDY, {"blind": blind})), None)
        if row is not None:
            return _Filed(row.ref, self._vault.unwrap(row.key), self._patient(row), row.two_patients, row.held)
        study = _Filed(secrets.token_hex(16), vault.new_key(), patient, False, None)
        connection.execute(
            _INSERT_STUDY,
            {
                "ref": study.ref,
                "uid_blind": self._vault.blind(entry.header.study_instance_uid),
                "uid": self._vault.seal_text(entry.header.study_instance_uid),
                **self._sealed(patient),
                "key": self._vault.wrap(study.key),
                "first_received_at": entry.at,
                "two_patients": False,
            },
        )
        return study

    def _enter_quarantine(self, entry: Entry, source: Path, reason: str) -> str:
        """The file's name on the disk, then its row; what came before is counted, and no second copy is made."""
        target = self._quarantine / entry.ref
        source.rename(target)
        _sync_folder(self._quarantine)
        with self._one_at_a_time(), self._database.transaction() as session:
            blinds = self._vault.blinds(entry.arrival.sop_instance_uid)
            same = _quarantine.c.sop_uid_blind.in_(blinds) & (_quarantine.c.sha256 == entry.sha256)
            twin = session.execute(sa.select(_quarantine.c.ref).where(same)).scalar()
            if twin is None:
                session.execute(sa.insert(_quarantine).values(self._quarantine_row(entry, reason)))
            else:
                again = sa.update(_quarantine).where(_quarantine.c.ref == twin)
                session.execute(again.values(times=_quarantine.c.times + 1))
            ref = twin or entry.ref
            act = audit.Act("instance quarantined", entry.arrival.calling_ae, reason, detail={"quarantine": ref})
            audit.record(session, act, at=entry.at)
        if twin is not None:
            target.unlink()
        return ref

    def _quarantine_row(self, entry: Entry, reason: str) -> dict[str, Any]:
        return {
            "ref": entry.ref,
            "received_at": entry.at,
            "calling_ae": entry.arrival.calling_ae,
            "address": entry.arrival.address,
            "sop_uid_blind": self._vault.blind(entry.arrival.sop_instance_uid),
            "sop_uid": self._vault.seal_text(entry.arrival.sop_instance_uid),
            "sop_class_uid": entry.arrival.sop_class_uid,
            "transfer_syntax_uid": entry.arrival.transfer_syntax_uid,
            "sha256": entry.sha256,
            "size": entry.size,
            "times": 1,
            "reason": reason,
            "key": self._vault.wrap(entry.key),
        }


class Receiving:
    """One instance on its way into the inbox. Ends by keep, quarantine or abandon."""

    def __init__(self, inbox: Inbox, arrival: Arrival) -> None:
        self._inbox, self._arrival = inbox, arrival
        self._ref, self._key = secrets.token_hex(16), vault.new_key()
        self._path = inbox._incoming / self._ref
        self._writer = SealedWriter(self._path, self._key)
        fcntl.flock(self._writer.descriptor, fcntl.LOCK_EX)  # tells `sweep` that somebody alive is writing
        self._digest = hashlib.sha256()
        self._size = 0
        self._look_again_at = _LOOK_AT_DISK_EVERY

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._size += len(data)
        if self._size >= self._look_again_at:
            self._inbox._look_at_disk()
            self._look_again_at += _LOOK_AT_DISK_EVERY
        self._writer.write(data)

    def keep(self, header: Peek) -> Kept:
        try:
            self._writer.sync()
            return self._inbox._commit(self._entry(header), self._path)
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            self._writer.close()

    def quarantine(self, reason: str) -> str:
        try:
            self._writer.sync()
            return self._inbox._enter_quarantine(self._entry(Peek("", "", "", "")), self._path, reason)
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            self._writer.close()

    def abandon(self) -> None:
        self._writer.close()
        self._path.unlink(missing_ok=True)

    def _entry(self, header: Peek) -> Entry:
        return Entry(
            self._arrival,
            header,
            self._ref,
            self._key,
            self._digest.hexdigest(),
            self._size,
            self._inbox._clock(),
        )


def _patient_of(entry: Entry) -> Patient:
    return Patient(id=entry.header.patient_id.strip(), issuer=entry.header.issuer_of_patient_id.strip())


def _received(entry: Entry, kept: Kept) -> audit.Act:
    kind = {"new": "instance received", "same": "instance received again", "conflict": "instance set aside"}
    detail = {"instance": kept.instance_ref, "bytes": entry.size, "sha256": entry.sha256}
    return audit.Act(kind[kept.outcome], entry.arrival.calling_ae, "", kept.study_ref, detail)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _nobody_writes(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
