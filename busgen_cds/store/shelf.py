"""The shelf: every bundle this site has, what became of each, and the signed, numbered word on which one reads.

Rules:
- What may follow what is `TRANSITIONS`, and nothing else. One bundle is live, one at most is in shadow.
- "Which is live" is a statement signed by the promoter's key, with a number that only rises. The last number stands in
  the database, in a file beside the bundles, and in this process: the largest of the three counts, so that a database
  or a file that was put back shows. Both put back together show only against a signed checkpoint of the record.
- Before the first statement the bundle that came with the product is live: a release key vouches for it.
- The night job's key signs bundles, never statements. A refused candidate is kept unsigned: it is no bundle.
- Each change of state is an act in the transaction that makes it. Doing a thing twice is doing it once.
- A bundle on the disk is whole or absent: its folder is made beside, synced, and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, Session, mapped_column

from busgen_cds import bundle, signing
from busgen_cds.bundle import Bundle, Candidate
from busgen_cds.errors import Misconfigured, Untrusted
from busgen_cds.store import audit
from busgen_cds.store.database import Base, Database, UtcTime, table_of

KIND = "application/vnd.busgen-cds.live+json"
STATEMENT = "live.dsse.json"
MANIFEST = "manifest.json"  # of a refused candidate: what it says of itself, unsigned

NAMELESS = "Name the person who says so."
SPOKEN = "Somebody else has just said what is live: look again, then decide."

State = Literal["shelved", "shadow", "live", "retired", "refused"]
Verb = Literal["put", "come", "refuse", "shadow", "end shadow", "rest", "promote", "replace", "roll back", "withdraw"]
STATES: tuple[State, ...] = get_args(State)
VERBS: tuple[Verb, ...] = get_args(Verb)

TRANSITIONS: Mapping[tuple[State | None, Verb], State] = {
    (None, "put"): "shelved",
    (None, "come"): "live",  # with the product
    (None, "refuse"): "refused",
    ("shelved", "come"): "live",
    ("shelved", "shadow"): "shadow",
    ("shelved", "withdraw"): "refused",
    ("shadow", "come"): "live",
    ("shadow", "promote"): "live",
    ("shadow", "end shadow"): "shelved",
    ("shadow", "rest"): "retired",  # as it was before it read along again
    ("shadow", "roll back"): "live",
    ("shadow", "withdraw"): "refused",
    ("live", "replace"): "retired",
    ("retired", "roll back"): "live",
    ("retired", "shadow"): "shadow",
}
_ACT: Mapping[Verb, str] = {
    "put": "bundle shelved",
    "come": "bundle came with the product",
    "refuse": "bundle refused",
    "shadow": "bundle in shadow",
    "end shadow": "bundle out of shadow",
    "rest": "bundle out of shadow",
    "promote": "bundle promoted",
    "replace": "bundle retired",
    "roll back": "bundle rolled back to",
    "withdraw": "bundle withdrawn",
}


def step(state: State | None, verb: Verb) -> State:
    """The state that follows; Misconfigured when nothing does."""
    try:
        return TRANSITIONS[state, verb]
    except KeyError:
        able = [str(each) for each, other in TRANSITIONS if other == verb and each]
        raise Misconfigured(
            f"A bundle that is {state or 'not on the shelf'} cannot be taken to “{verb}”; "
            f"that needs one that is {' or '.join(able) or 'new'}."
        ) from None


class ShelfTable(Base):
    __tablename__ = "shelf"
    __table_args__ = tuple(
        sa.Index(
            f"uq_shelf_{one}",
            "state",
            unique=True,
            sqlite_where=sa.text(f"state = '{one}'"),
            postgresql_where=sa.text(f"state = '{one}'"),
        )
        for one in ("live", "shadow")
    )

    digest: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(64))
    version: Mapped[str] = mapped_column(sa.String(64))
    state: Mapped[str] = mapped_column(sa.String(8))
    since: Mapped[datetime] = mapped_column(UtcTime)
    who: Mapped[str] = mapped_column(sa.String(128))
    reasons: Mapped[str] = mapped_column(sa.Text)  # JSON list
    report: Mapped[bytes] = mapped_column(sa.LargeBinary)  # JSON


class StatementTable(Base):
    __tablename__ = "live_statement"

    number: Mapped[int] = mapped_column(sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)
    digest: Mapped[str] = mapped_column(sa.String(64))
    envelope: Mapped[bytes] = mapped_column(sa.LargeBinary)
    at: Mapped[datetime] = mapped_column(UtcTime)


_shelf, _statements = table_of(ShelfTable), table_of(StatementTable)


@dataclass(frozen=True)
class Shelved:
    """A bundle, or a refused candidate, as the shelf shows it."""

    digest: str
    name: str
    version: str
    state: State
    since: datetime
    who: str
    reasons: tuple[str, ...]
    report: Mapping[str, Any] = field(repr=False)
    folder: Path


@dataclass(frozen=True)
class Statement:
    """Which bundle is live, said once and signed."""

    number: int
    digest: str
    before: str  # the digest of the one that was live until now
    verb: Verb
    person: str
    at: str

    def to_bytes(self) -> bytes:
        return signing.canonical(vars(self))


@dataclass(frozen=True)
class Standing:
    """The last statement's number and what it names; number 0: nobody has said anything yet."""

    number: int
    digest: str


class Shelf:
    """`verifier` trusts release keys and the night key for bundles, and the promoter's key for statements.

    `home`: the folder of the bundle that is live before anybody says anything; `release` trusts who may sign that one.
    """

    def __init__(
        self,
        folder: Path,
        database: Database,
        verifier: signing.Verifier,
        *,
        home: Callable[[], Path] | None = None,
        release: signing.Verifier | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.folder, self.verifier, self._release = folder, verifier, release or verifier
        self._database, self._home, self._clock = database, home, clock
        self._seen = 0
        self._lock = threading.Lock()

    # -- putting there -----------------------------------------------------------------------------------------------

    def put(
        self,
        candidate: Candidate,
        *,
        report: Mapping[str, Any],
        signer: signing.Signer,
        session: Session | None = None,
        who: str = "night",
        plots: Mapping[str, bytes] | None = None,
    ) -> Shelved:
        """Seal a candidate onto the shelf; one that is there already is left as it is."""

        def seal(making: Path) -> None:
            candidate.seal(making, signer)
            Bundle.open(making, self.verifier)  # a key that may not sign bundles makes none

        return self._keep(candidate, "put", self.folder / candidate.digest, seal, who, (), report, session, plots)

    def refuse(
        self,
        candidate: Candidate,
        *,
        reasons: Sequence[str],
        report: Mapping[str, Any],
        session: Session | None = None,
        who: str = "night",
        plots: Mapping[str, bytes] | None = None,
    ) -> Shelved:
        """Keep a candidate that failed, with the reasons, unsigned; one that stood on the shelf is withdrawn."""
        known = self.find(candidate.digest, session)
        if known and known.state in ("shelved", "shadow"):
            with self._writing(session) as writing:
                self._move(writing, self._row(writing, candidate.digest), "withdraw", who, reasons=reasons)
            return self.get(candidate.digest)

        def write(making: Path) -> None:
            (making / MANIFEST).write_bytes(candidate.manifest.to_bytes())
            for name, data in candidate.files.items():
                (making / name).write_bytes(data)

        folder = self._refused(candidate.digest)
        return self._keep(candidate, "refuse", folder, write, who, reasons, report, session, plots)

    def adopt(self, source: Path, *, person: str, report: Mapping[str, Any] | None = None) -> Shelved:
        """Copy a bundle that a trusted key has signed onto the shelf, as it is."""
        opened = Bundle.open(source, self.verifier)
        known = self.find(opened.digest)
        if known:
            return known
        self._copy(source, opened)
        return self._add(Candidate(opened.manifest, {}), "put", person, (), report or {}, None)

    # -- moving ------------------------------------------------------------------------------------------------------

    def to_shadow(self, digest: str, *, person: str) -> Shelved:
        """From now on it reads along, and nobody is told what it says."""
        self._opened(digest)
        with self._database.transaction() as session:
            row = self._row(session, digest)
            other = session.execute(sa.select(_shelf.c.digest).where(_shelf.c.state == "shadow")).scalar()
            if other == digest:
                return self._shelved(row)
            if other:
                raise Misconfigured(f"Bundle {other[:12]} is in shadow: end that first, one reads along at a time.")
            self._move(session, row, "shadow", person)
        return self.get(digest)

    def end_shadow(self, digest: str, *, person: str) -> Shelved:
        """Back to where it came from: what was live once can still be rolled back to."""
        said_before = self.statements()
        with self._database.transaction() as session:
            row = self._row(session, digest)
            if row.state not in ("shelved", "retired"):
                was_live = any(digest in (said.digest, said.before) for said in said_before)
                self._move(session, row, "rest" if was_live else "end shadow", person)
        return self.get(digest)

    def withdraw(self, digest: str, *, person: str, reason: str) -> Shelved:
        """A person's refusal: it never becomes live."""
        if not reason.strip():
            raise Misconfigured("Say why the bundle is withdrawn.")
        with self._database.transaction() as session:
            row = self._row(session, digest)
            if row.state != "refused":
                self._move(session, row, "withdraw", person, reasons=(reason.strip(),))
        return self.get(digest)

    def promote(self, digest: str, *, person: str, signer: signing.Signer, heard: int | None = None) -> Standing:
        """Make a bundle live. It must verify, and the signer must be the promoter. `heard`: the last statement that
        the person knew of; where another was said meanwhile, nothing is."""
        return self._say(digest, "promote", person, signer, heard)

    def roll_back(self, *, person: str, signer: signing.Signer, heard: int | None = None) -> Standing:
        """Make live again what was live before the present one was promoted; `heard` as for a promotion."""
        return self._say("", "roll back", person, signer, heard)

    # -- asking ------------------------------------------------------------------------------------------------------

    def live(self) -> Bundle:
        """The bundle that reads, verified step by step."""
        with self._lock:
            return self._live()

    def standing(self) -> Standing:
        """What the database says at this moment, unverified: cheap enough to ask every second."""
        last = self._last()
        return Standing(last.number, last.digest)

    def statements(self) -> list[Statement]:
        """All that was ever said, oldest first; what does not verify was not said."""
        with self._database.reading() as session:
            rows = list(session.execute(sa.select(_statements).order_by(_statements.c.number)))
        said = []
        for row in rows:
            with suppress(Untrusted):
                said.append(self._statement(_Last(row.number, row.digest, row.envelope)))
        return said

    def before(self) -> str:
        """The digest that a roll-back would lead to: promotions pile up, and a roll-back takes one away."""
        said = self.statements()
        pile = [said[0].before] if said else []
        for each in said:
            if each.verb == "promote" and each.digest != pile[-1]:
                pile.append(each.digest)
            elif each.verb == "roll back" and len(pile) > 1:
                pile.pop()
        if len(pile) < 2:
            raise Misconfigured("No other bundle was live before this one: there is nothing to roll back to.")
        return pile[-2]

    def listing(self) -> list[Shelved]:
        """Everything on the shelf: live first, the refused last, each newest first."""
        with self._database.reading() as session:
            rows = list(session.execute(sa.select(_shelf).order_by(_shelf.c.since.desc(), _shelf.c.digest)))
        order = {"live": 0, "shadow": 1, "shelved": 2, "retired": 3, "refused": 4}
        return sorted((self._shelved(row) for row in rows), key=lambda each: order[each.state])

    def in_shadow(self) -> str:
        """The digest of the bundle that reads along; empty: none does."""
        with self._database.reading() as session:
            return session.execute(sa.select(_shelf.c.digest).where(_shelf.c.state == "shadow")).scalar() or ""

    def open(self, digest: str) -> Bundle:
        """A bundle of the shelf, verified; a refused candidate is none."""
        if self.get(digest).state == "refused":
            raise Untrusted(f"{digest[:12]} was refused: it is not opened.")
        return self._opened(digest)

    def get(self, digest: str) -> Shelved:
        """By digest, or by how it begins."""
        with self._database.reading() as session:
            beginning = _shelf.c.digest.startswith(digest, autoescape=True)
            rows = list(session.execute(sa.select(_shelf).where(beginning).limit(2)))
        if len(rows) != 1 or not digest:
            raise Misconfigured(f"{len(rows) or 'No'} bundles on the shelf begin with {digest!r}: see `bundle list`.")
        return self._shelved(rows[0])

    def find(self, digest: str, session: Session | None = None) -> Shelved | None:
        with self._reading(session) as reading:
            row = reading.execute(sa.select(_shelf).where(_shelf.c.digest == digest)).first()
        return self._shelved(row) if row else None

    def plots(self, digest: str) -> dict[str, bytes]:
        """The pictures of its report, by file name."""
        folder = self._report(digest)
        return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))} if folder.is_dir() else {}

    # -- inside: saying what is live ---------------------------------------------------------------------------------

    def _live(self) -> Bundle:
        # 1. The largest number ever seen, here or elsewhere, is the one that counts.
        on_file = self._number_on_file()  # before the database, which is always written first
        last = self._last()
        number = max(last.number, self._seen, on_file)
        if number == 0:
            return self._home_bundle()
        # 2. The database has that statement: an older one was put back otherwise.
        if last.number < number:
            raise Untrusted(
                f"The statement of what is live has number {last.number}, but number {number} was seen before: an "
                "older database or statement was put back. Promote or roll back again to say what is live now."
            )
        # 3. The promoter's key vouches for it, and it says what the shelf says.
        self._statement(last)
        state = self._state(last.digest)
        if state != "live":
            raise Untrusted(f"Statement {number} names {last.digest[:12]}, which the shelf holds as {state}.")
        # 4. The bundle it names is the one on the disk, whole and signed.
        opened = self._opened(last.digest)
        # 5. The number is remembered everywhere.
        self._seen = number
        if self._number_on_file() <= number:  # somebody else may have said more while this one was opened
            self._write_file(last.envelope)
        return opened

    def _say(self, digest: str, verb: Verb, person: str, signer: signing.Signer, heard: int | None) -> Standing:
        if not person.strip():
            raise Misconfigured(NAMELESS)
        with self._lock, _one_speaks():
            known = self._last().number
            if heard not in (None, known):
                raise Misconfigured(SPOKEN)
            digest = digest or self.before()
            home = self._take_home()
            if home and home.digest == digest:
                return Standing(0, digest)
            self._opened(self.get(digest).digest)  # what does not verify is not promoted
            with suppress(Untrusted):
                if home is None and self._live().digest == digest:
                    return self.standing()  # said already
            floor = max(self._seen, self._claimed_on_file())
            with self._database.transaction() as session:
                row, last = self._row(session, digest), _last(session)
                if last.number != known:
                    raise Misconfigured(SPOKEN)
                before = self._live_row(session, home, person)
                number = max(last.number, floor) + 1
                said = Statement(number, digest, before.digest if before else "", verb, person, self._now_text())
                envelope = signing.seal(said.to_bytes(), KIND, signer)
                self.verifier.open(envelope, KIND)  # a key that may not say so has said nothing
                if before and before.digest != digest:
                    self._move(session, before, "replace", person, number=number)
                if row.state != "live":  # live: the same one again, after an older database was put back
                    self._move(session, row, verb, person, number=number)
                values = {"number": number, "digest": digest, "envelope": envelope, "at": self._clock()}
                session.execute(sa.insert(_statements).values(**values))
            self._seen = number
            self._write_file(envelope)
        return Standing(number, digest)

    def _take_home(self) -> Bundle | None:
        """What is live without a statement is copied onto the shelf, so that one can come back to it."""
        if self._last().number or self._home is None:
            return None
        home = self._home_bundle()
        self._copy(self._home(), home)
        return home

    def _live_row(self, session: Session, home: Bundle | None, person: str) -> Any:
        if home is not None:
            known = self.find(home.digest, session)
            if known is None:
                self._add(Candidate(home.manifest, {}), "come", person, (), {}, session)
            elif known.state != "live":
                self._move(session, self._row(session, home.digest), "come", person)
        return session.execute(sa.select(_shelf).where(_shelf.c.state == "live")).first()

    def _home_bundle(self) -> Bundle:
        if self._home is None:
            raise Misconfigured("No bundle is live at this site: put one into shadow, then promote it.")
        return Bundle.open(self._home(), self._release)

    def _statement(self, last: _Last) -> Statement:
        payload = self.verifier.open(last.envelope, KIND)
        try:
            said = Statement(**json.loads(payload))
        except (ValueError, TypeError) as broken:
            raise Untrusted(f"Statement {last.number} is not one that this version understands: {broken}") from broken
        if (said.number, said.digest) != (last.number, last.digest):
            raise Untrusted(
                f"The statement kept as number {last.number} is number {said.number}, for {said.digest[:12]}: "
                "another one was put in its place."
            )
        return said

    def _last(self) -> _Last:
        with self._database.reading() as session:
            return _last(session)

    def _number_on_file(self) -> int:
        """The number that the file beside the bundles holds; 0 when there is none yet."""
        try:
            envelope = (self.folder / STATEMENT).read_bytes()
        except FileNotFoundError:
            return 0
        return int(json.loads(self.verifier.open(envelope, KIND))["number"])

    def _claimed_on_file(self) -> int:
        """The same, also when the key that vouches for it is gone: a new word is numbered above it."""
        try:
            payload = signing.unverified((self.folder / STATEMENT).read_bytes(), KIND)
            return int(json.loads(payload)["number"])
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError) as broken:
            raise Untrusted(f"{self.folder / STATEMENT} is no statement of what is live: take it away.") from broken

    def _write_file(self, envelope: bytes) -> None:
        file = self.folder / STATEMENT
        if file.exists() and file.read_bytes() == envelope:
            return
        making = file.with_name(f".{uuid.uuid4().hex}")
        self.folder.mkdir(parents=True, exist_ok=True)
        making.write_bytes(envelope)
        _sync(making)
        making.rename(file)
        _sync(self.folder)

    # -- inside: rows ------------------------------------------------------------------------------------------------

    def _keep(
        self,
        candidate: Candidate,
        verb: Verb,
        folder: Path,
        fill: Callable[[Path], None],
        who: str,
        reasons: Sequence[str],
        report: Mapping[str, Any],
        session: Session | None,
        plots: Mapping[str, bytes] | None,
    ) -> Shelved:
        """Files first, then the row: what a row names is on the disk."""
        known = self.find(candidate.digest, session)
        if known:
            return known
        if not folder.exists():
            with _made(folder) as making:
                fill(making)
        self._keep_plots(candidate.digest, plots or {})
        return self._add(candidate, verb, who, reasons, report, session)

    def _add(
        self,
        candidate: Candidate,
        verb: Verb,
        who: str,
        reasons: Sequence[str],
        report: Mapping[str, Any],
        session: Session | None,
    ) -> Shelved:
        now, manifest = self._clock(), candidate.manifest
        values = {
            "digest": candidate.digest,
            "name": manifest.name,
            "version": manifest.version,
            "state": step(None, verb),
            "since": now,
            "who": who,
            "reasons": json.dumps(list(reasons)),
            "report": signing.canonical(dict(report)),
        }
        detail = {"digest": candidate.digest, "name": manifest.name, "version": manifest.version}
        with self._writing(session) as writing:
            writing.execute(sa.insert(_shelf).values(**values))
            audit.record(writing, audit.Act(_ACT[verb], who, "; ".join(reasons), detail=detail), at=now)
            row = writing.execute(sa.select(_shelf).where(_shelf.c.digest == candidate.digest)).one()
        return self._shelved(row)

    def _move(
        self, session: Session, row: Any, verb: Verb, person: str, *, reasons: Sequence[str] = (), number: int = 0
    ) -> None:
        if not person.strip():
            raise Misconfigured(NAMELESS)
        now, mine = self._clock(), _shelf.c.digest == row.digest
        changed = {"state": step(row.state, verb), "since": now, "who": person}
        if reasons:
            changed["reasons"] = json.dumps([*json.loads(row.reasons), *reasons])
        session.execute(sa.update(_shelf).where(mine).values(**changed))
        detail = {"digest": row.digest, "name": row.name, "version": row.version} | (
            {"number": number} if number else {}
        )
        audit.record(session, audit.Act(_ACT[verb], person, "; ".join(reasons), detail=detail), at=now)

    def _row(self, session: Session, digest: str) -> Any:
        row = session.execute(sa.select(_shelf).where(_shelf.c.digest == digest)).first()
        if row is None:
            raise Misconfigured(f"No bundle {digest[:12]} is on the shelf: see `bundle list`.")
        return row

    def _state(self, digest: str) -> State | None:
        found = self.find(digest)
        return found.state if found else None

    def _shelved(self, row: Any) -> Shelved:
        refused = row.state == "refused" and self._refused(row.digest).exists()
        folder = self._refused(row.digest) if refused else self.folder / row.digest
        reasons = tuple(json.loads(row.reasons))
        return Shelved(
            row.digest, row.name, row.version, row.state, row.since, row.who, reasons, json.loads(row.report), folder
        )

    def _opened(self, digest: str) -> Bundle:
        opened = Bundle.open(self.folder / digest, self.verifier)
        if opened.digest != digest:
            raise Untrusted(f"The folder of {digest[:12]} holds bundle {opened.digest[:12]}: they were swapped.")
        return opened

    # -- inside: files -----------------------------------------------------------------------------------------------

    def _copy(self, source: Path, opened: Bundle) -> None:
        folder = self.folder / opened.digest
        if folder.exists():
            return
        with _made(folder) as making:
            for name, data in (*opened.files.items(), (bundle.ENVELOPE, (source / bundle.ENVELOPE).read_bytes())):
                (making / name).write_bytes(data)
            Bundle.open(making, self.verifier)

    def _refused(self, digest: str) -> Path:
        return self.folder / "refused" / digest

    def _report(self, digest: str) -> Path:
        return self.folder / "reports" / digest

    def _keep_plots(self, digest: str, plots: Mapping[str, bytes]) -> None:
        folder = self._report(digest)
        if not plots or folder.exists():
            return
        with _made(folder) as making:
            for name, data in plots.items():
                if Path(name).name != name or not name.endswith(".png"):
                    raise ValueError(f"A plot is named like figure.png, not {name!r}.")
                (making / name).write_bytes(data)

    def _now_text(self) -> str:
        return self._clock().astimezone(UTC).isoformat()

    @contextmanager
    def _writing(self, session: Session | None) -> Iterator[Session]:
        if session is not None:
            yield session
            return
        with self._database.transaction() as own:
            yield own

    @contextmanager
    def _reading(self, session: Session | None) -> Iterator[Session]:
        if session is not None:
            yield session
            return
        with self._database.reading() as own:
            yield own


@dataclass(frozen=True)
class _Last:
    number: int
    digest: str
    envelope: bytes = field(repr=False)


def _last(session: Session) -> _Last:
    row = session.execute(sa.select(_statements).order_by(_statements.c.number.desc()).limit(1)).first()
    return _Last(row.number, row.digest, row.envelope) if row else _Last(0, "", b"")


@contextmanager
def _one_speaks() -> Iterator[None]:
    """Of two people who speak at the same moment, the database hears one."""
    try:
        yield
    except sa.exc.IntegrityError as both:
        raise Misconfigured(SPOKEN) from both


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it is on the disk."""
    making = folder.with_name(f".{folder.name[:12]}-{uuid.uuid4().hex[:8]}")
    making.mkdir(parents=True)
    try:
        yield making
        for path in (*making.iterdir(), making):
            _sync(path)
        making.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
