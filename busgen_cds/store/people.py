"""Who may use this site: accounts, their roles, sessions and tokens.

Rules:
- A password is kept as an Argon2id hash, a session or token as the SHA-256 of 32 random bytes: neither is read back.
- An unknown name, a wrong password and a wrong code take the same time and get the same answer.
- Five failures in a row lock an account for a quarter of an hour, wherever its password is asked for; a code of the
  second factor is accepted once.
- A few passwords are hashed at a time: each takes 64 MiB, and anybody may ask.
- A role is a set of rights (`RIGHTS`); a token holds some of its owner's rights and never more than the owner has now.
- Who comes from the site's log-in provider has an account without a password: its reference is made of issuer and
  subject, its roles are those that the provider's word gives at each log-in, and no name passes from a local account.
- Each log-in, refusal, log-out and change is an act in the transaction in which it happened.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

import pyotp
import sqlalchemy as sa
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy.orm import Mapped, Session, mapped_column

from busgen_cds.store import audit
from busgen_cds.store.database import Base, Database, Sealed, UtcTime, table_of
from busgen_cds.store.vault import Vault

Role = Literal["reader", "operator", "physicist", "auditor", "admin"]
Right = Literal[
    "studies.read",
    "studies.confirm",
    "studies.retry",
    "operations.read",
    "operations.act",
    "models.read",
    "models.act",
    "audit.read",
    "people.manage",
]
ROLES: tuple[Role, ...] = get_args(Role)
ALL_RIGHTS: tuple[Right, ...] = get_args(Right)

RIGHTS: dict[Role, frozenset[Right]] = {
    "reader": frozenset({"studies.read", "studies.confirm", "models.read"}),
    "operator": frozenset({"studies.read", "studies.retry", "operations.read", "operations.act", "models.read"}),
    "physicist": frozenset({"studies.read", "operations.read", "models.read", "models.act"}),
    "auditor": frozenset({"audit.read"}),
    "admin": frozenset(
        {"operations.read", "operations.act", "models.read", "models.act", "audit.read", "people.manage"}
    ),
}

FAILURES = 5
LOCKED_FOR = timedelta(minutes=15)
SESSION = timedelta(hours=12)  # a working day
IDLE = timedelta(minutes=60)
SEEN_EVERY = timedelta(minutes=1)
TOKEN_DAYS = 365
LEAST_PASSWORD = 12
MOST_PASSWORD = 256  # longer ones only make the hash work
HASHED_AT_ONCE = 4

Clock = Callable[[], datetime]


class Refused(Exception):
    """What was asked of an account cannot be done; the message is for the person who asked."""


class AccountTable(Base):
    __tablename__ = "account"

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(64), unique=True)
    roles: Mapped[str] = mapped_column(sa.Text)  # JSON list
    password: Mapped[str] = mapped_column(sa.Text)  # empty: the log-in provider knows this person
    totp: Mapped[bytes | None] = mapped_column(Sealed)
    totp_step: Mapped[int] = mapped_column(sa.BigInteger, default=0)  # the last time step a code was accepted for
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    disabled_at: Mapped[datetime | None] = mapped_column(UtcTime)
    failures: Mapped[int] = mapped_column(default=0)
    locked_until: Mapped[datetime | None] = mapped_column(UtcTime)


class SessionTable(Base):
    __tablename__ = "web_session"

    hash: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    account_ref: Mapped[str] = mapped_column(sa.ForeignKey("account.ref"), index=True)
    form_key: Mapped[str] = mapped_column(sa.String(64))
    started_at: Mapped[datetime] = mapped_column(UtcTime)
    seen_at: Mapped[datetime] = mapped_column(UtcTime)


class TokenTable(Base):
    __tablename__ = "api_token"

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    account_ref: Mapped[str] = mapped_column(sa.ForeignKey("account.ref"), index=True)
    hash: Mapped[str] = mapped_column(sa.String(64), unique=True)
    label: Mapped[str] = mapped_column(sa.String(64))
    scopes: Mapped[str] = mapped_column(sa.Text)  # JSON list
    made_at: Mapped[datetime] = mapped_column(UtcTime)
    expires_at: Mapped[datetime] = mapped_column(UtcTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcTime)


_accounts, _sessions, _tokens = table_of(AccountTable), table_of(SessionTable), table_of(TokenTable)
_LOCKED = sa.select(_accounts).with_for_update()  # one log-in of an account after the other: failures are counted


@dataclass(frozen=True)
class Account:
    ref: str
    name: str
    roles: tuple[Role, ...]
    second_factor: bool
    created_at: datetime
    disabled: bool
    locked_until: datetime | None
    vouched: bool = False  # the site's log-in provider knows this person

    @property
    def rights(self) -> frozenset[Right]:
        return frozenset().union(*(RIGHTS[role] for role in self.roles))


@dataclass(frozen=True)
class Person:
    """An account at work: through a session of the pages, or a token of the API."""

    account: Account
    rights: frozenset[Right]
    form_key: str = field(default="", repr=False)  # what a form of this session must carry

    @property
    def name(self) -> str:
        return self.account.name

    def may(self, right: Right) -> bool:
        return right in self.rights


@dataclass(frozen=True)
class Vouched:
    """Somebody of whom the site's log-in provider says who it is, and what that makes of them here."""

    issuer: str
    subject: str
    name: str
    roles: tuple[Role, ...]

    @property
    def ref(self) -> str:
        """Always the same account, whatever the person is called today."""
        return _digest(f"{self.issuer}\n{self.subject}")[:32]


@dataclass(frozen=True)
class Token:
    ref: str
    label: str
    scopes: tuple[Right, ...]
    made_at: datetime
    expires_at: datetime
    revoked: bool


def _now() -> datetime:
    return datetime.now(UTC)


class People:
    def __init__(
        self, database: Database, vault: Vault, clock: Clock = _now, hasher: PasswordHasher | None = None
    ) -> None:
        self._database, self._vault, self._clock = database, vault, clock
        self._hasher = hasher or PasswordHasher()
        self._nobody = self._hasher.hash(secrets.token_hex())
        self._hashing = threading.BoundedSemaphore(HASHED_AT_ONCE)

    # -- accounts --------------------------------------------------------------------------------------------------

    def nobody_yet(self) -> bool:
        with self._database.reading() as session:
            return session.execute(sa.select(_accounts.c.ref).limit(1)).first() is None

    def accounts(self) -> list[Account]:
        with self._database.reading() as session:
            return [_account(row) for row in session.execute(sa.select(_accounts).order_by(_accounts.c.name))]

    def add(self, name: str, password: str, roles: Iterable[Role], who: str, *, first: bool = False) -> Account:
        """`first`: only while there is nobody, decided in the same transaction."""
        name, wanted = _name(name), _roles(roles)
        hashed = self._hash(password, name)
        with self._database.transaction() as session:
            if first and session.execute(sa.select(_accounts.c.ref).limit(1)).first():
                raise Refused("This site has its first account already: log in, or ask an administrator.")
            if session.execute(sa.select(_accounts.c.ref).where(_accounts.c.name == name)).first():
                raise Refused(f"There is an account named {name} already.")
            row = {"ref": secrets.token_hex(16), "name": name, "roles": json.dumps(wanted), "password": hashed}
            session.execute(sa.insert(_accounts).values(**row, totp_step=0, created_at=self._clock(), failures=0))
            self._act(session, "account made", who, name, roles=list(wanted))
            return self._by_name(session, name)

    def set_roles(self, name: str, roles: Iterable[Role], who: str) -> None:
        wanted = _roles(roles)
        with self._database.transaction() as session:
            account = self._by_name(session, name)
            if account.vouched:
                raise Refused(f"The roles of {name} come from the log-in provider: change them there.")
            if account.roles == wanted:
                return
            self._keep_an_admin(session, account, "admin" in wanted)
            self._change(session, name, roles=json.dumps(wanted))
            self._act(session, "roles changed", who, name, before=list(account.roles), after=list(wanted))

    def set_disabled(self, name: str, disabled: bool, who: str) -> None:
        with self._database.transaction() as session:
            account = self._by_name(session, name)
            if account.disabled == disabled:
                return
            self._keep_an_admin(session, account, not disabled)
            self._change(session, name, disabled_at=self._clock() if disabled else None)
            if disabled:
                session.execute(sa.delete(_sessions).where(_sessions.c.account_ref == account.ref))
            self._act(session, "account disabled" if disabled else "account enabled", who, name)

    def unlock(self, name: str, who: str) -> None:
        with self._database.transaction() as session:
            if self._by_name(session, name).locked_until is None:
                return
            self._change(session, name, failures=0, locked_until=None)
            self._act(session, "account unlocked", who, name)

    def knows_password(self, name: str, password: str, address: str = "") -> bool:
        """Asked again of who is logged in, before the account itself changes: a session may be a stolen one."""
        right = self._right_for(name, password)
        with self._database.transaction() as session:
            now = self._clock()
            row = session.execute(_LOCKED.where(_accounts.c.name == name)).first()
            refusal = self._refusal(row, right, now)
            if refusal:
                self._note_failure(session, row, refusal, now)
                self._act(session, "password refused", name, refusal, address=address)
            return not refusal

    def set_password(self, name: str, password: str, who: str) -> None:
        """Ends every session of the account."""
        hashed = self._hash(password, name)
        with self._database.transaction() as session:
            account = self._by_name(session, name)
            if account.vouched:
                raise Refused("Your password is kept by the log-in provider: change it there.")
            self._change(session, name, password=hashed, failures=0, locked_until=None)
            session.execute(sa.delete(_sessions).where(_sessions.c.account_ref == account.ref))
            self._act(session, "password changed", who, name)

    # -- the second factor -----------------------------------------------------------------------------------------

    @staticmethod
    def new_totp_key() -> str:
        return pyotp.random_base32()

    def start_second_factor(self, name: str, key: str, code: str) -> None:
        """On only once a code shows that the person's device has the key."""
        step = _matching_step(key, code, self._clock())
        if step is None:
            raise Refused("That code does not belong to this key: check the clock of the device that made it.")
        with self._database.transaction() as session:
            account = self._by_name(session, name)
            if account.vouched:
                raise Refused("Your second factor is asked for by the log-in provider: set it there.")
            if account.second_factor:
                raise Refused("Your second factor is on already: an administrator can take it off.")
            self._change(session, name, totp=self._vault.seal_text(key), totp_step=step)
            self._act(session, "second factor set", name, name)

    def stop_second_factor(self, name: str, who: str) -> None:
        with self._database.transaction() as session:
            if not self._by_name(session, name).second_factor:
                return
            self._change(session, name, totp=None)
            self._act(session, "second factor removed", who, name)

    # -- sessions --------------------------------------------------------------------------------------------------

    def log_in(self, name: str, password: str, code: str = "", address: str = "") -> str | None:
        """A new session's secret, or nothing: why is told to nobody but the record."""
        name = name.strip().lower()[:64]
        right = self._right_for(name, password)
        with self._database.transaction() as session:
            now = self._clock()
            row = session.execute(_LOCKED.where(_accounts.c.name == name)).first()
            refusal = self._refusal(row, right, now) or self._code_refusal(row, code, now)
            if row is None or refusal:
                self._note_failure(session, row, refusal, now)
                self._act(session, "log-in refused", name if row else "unknown", refusal, address=address)
                return None
            step = _matching_step(self._vault.open_text(row.totp), code, now) if row.totp else row.totp_step
            self._change(session, name, failures=0, locked_until=None, totp_step=step)
            return self._begin(session, row.ref, name, address)

    def log_in_vouched(self, who: Vouched, address: str = "") -> str | None:
        """A new session's secret for somebody the provider vouches for; their account is made or brought up to date."""
        with self._database.transaction() as session:
            row = session.execute(sa.select(_accounts).where(_accounts.c.ref == who.ref)).first()
            name = row.name if row else who.name.strip().lower()[:64]
            if refusal := self._vouched_refusal(session, row, name, who):
                self._act(session, "log-in refused", row.name if row else "unknown", refusal, address=address)
                return None
            if row is None:
                self._add_vouched(session, who, name)
            elif (before := _account(row).roles) != who.roles:
                self._change(session, name, roles=json.dumps(who.roles))
                self._act(session, "roles changed", "log-in provider", name, before=list(before), after=list(who.roles))
            return self._begin(session, who.ref, name, address)

    def note_not_vouched(self, why: str, address: str = "") -> None:
        with self._database.transaction() as session:
            self._act(session, "log-in refused", "unknown", why, address=address)

    def _vouched_refusal(self, session: Session, row: Any, name: str, who: Vouched) -> str:
        if not who.roles:
            return "the log-in provider gives no role here"
        if row is not None:
            return "account disabled" if row.disabled_at else ""
        try:
            _name(name)
        except Refused:
            return "the log-in provider gives no usable name"
        taken = session.execute(sa.select(_accounts.c.ref).where(_accounts.c.name == name)).first()
        return "the name belongs to another account" if taken else ""

    def _add_vouched(self, session: Session, who: Vouched, name: str) -> None:
        row = {"ref": who.ref, "name": name, "roles": json.dumps(who.roles), "password": ""}
        session.execute(sa.insert(_accounts).values(**row, totp_step=0, created_at=self._clock(), failures=0))
        self._act(session, "account made", "log-in provider", name, roles=list(who.roles))

    def _begin(self, session: Session, account_ref: str, name: str, address: str) -> str:
        secret, now = secrets.token_urlsafe(32), self._clock()
        session.execute(
            sa.insert(_sessions).values(
                hash=_digest(secret),
                account_ref=account_ref,
                form_key=secrets.token_urlsafe(32),
                started_at=now,
                seen_at=now,
            )
        )
        self._act(session, "log-in", name, "", address=address)
        return secret

    def of_session(self, secret: str) -> Person | None:
        now = self._clock()
        query = (
            sa.select(_accounts, _sessions.c.form_key, _sessions.c.started_at, _sessions.c.seen_at)
            .join(_sessions, _sessions.c.account_ref == _accounts.c.ref)
            .where(_sessions.c.hash == _digest(secret))
        )
        with self._database.reading() as session:
            row = session.execute(query).first()
        if row is None or row.disabled_at or now > row.started_at + SESSION or now > row.seen_at + IDLE:
            return None
        if now > row.seen_at + SEEN_EVERY:
            with self._database.transaction() as session:
                session.execute(sa.update(_sessions).where(_sessions.c.hash == _digest(secret)).values(seen_at=now))
        account = _account(row)
        return Person(account, account.rights, row.form_key)

    def log_out(self, secret: str) -> None:
        person = self.of_session(secret)
        if person is None:
            return
        with self._database.transaction() as session:
            session.execute(sa.delete(_sessions).where(_sessions.c.hash == _digest(secret)))
            self._act(session, "log-out", person.name, "")

    # -- tokens ----------------------------------------------------------------------------------------------------

    def make_token(
        self, owner: Account, label: str, scopes: Iterable[Right], days: int, ref: str = ""
    ) -> tuple[str, Token]:
        """The token's secret is shown once, here. `ref` is whoever asks' own name for this wish: one token for each."""
        wanted = tuple(right for right in ALL_RIGHTS if right in set(scopes))
        label = label.strip()[:64]
        if not label or not wanted or not 1 <= days <= TOKEN_DAYS:
            raise Refused(f"A token needs a label, at least one scope and a life of 1 to {TOKEN_DAYS} days.")
        if beyond := set(wanted) - owner.rights:
            raise Refused(f"Your roles do not include {', '.join(sorted(beyond))}.")
        secret, now = f"busgen_{secrets.token_urlsafe(32)}", self._clock()
        token = Token(ref or secrets.token_hex(16), label, wanted, now, now + timedelta(days=days), revoked=False)
        with self._database.transaction() as session:
            if session.execute(sa.select(_tokens.c.ref).where(_tokens.c.ref == token.ref)).first():
                raise Refused("That token is made already, and was shown once: revoke it if you did not copy it.")
            session.execute(
                sa.insert(_tokens).values(
                    ref=token.ref,
                    account_ref=owner.ref,
                    hash=_digest(secret),
                    label=label,
                    scopes=json.dumps(wanted),
                    made_at=now,
                    expires_at=token.expires_at,
                )
            )
            self._act(session, "token made", owner.name, label, token=token.ref, scopes=list(wanted), days=days)
        return secret, token

    def tokens(self, owner: Account) -> list[Token]:
        query = sa.select(_tokens).where(_tokens.c.account_ref == owner.ref).order_by(_tokens.c.made_at.desc())
        with self._database.reading() as session:
            return [_token(row) for row in session.execute(query)]

    def revoke_token(self, owner: Account, ref: str) -> None:
        with self._database.transaction() as session:
            changed = session.execute(
                sa.update(_tokens)
                .where(_tokens.c.ref == ref, _tokens.c.account_ref == owner.ref, _tokens.c.revoked_at.is_(None))
                .values(revoked_at=self._clock())
                .returning(_tokens.c.label)
            ).first()
            if changed:
                self._act(session, "token revoked", owner.name, changed.label, token=ref)

    def of_token(self, secret: str) -> Person | None:
        query = (
            sa.select(_accounts, _tokens.c.scopes, _tokens.c.expires_at, _tokens.c.revoked_at)
            .join(_tokens, _tokens.c.account_ref == _accounts.c.ref)
            .where(_tokens.c.hash == _digest(secret))
        )
        with self._database.reading() as session:
            row = session.execute(query).first()
        if row is None or row.disabled_at or row.revoked_at or self._clock() > row.expires_at:
            return None
        account = _account(row)
        return Person(account, account.rights & frozenset(json.loads(row.scopes)))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _hash(self, password: str, name: str) -> str:
        if not LEAST_PASSWORD <= len(password) <= MOST_PASSWORD:
            raise Refused(f"A password needs {LEAST_PASSWORD} to {MOST_PASSWORD} characters.")
        if name in password.lower() or len(set(password)) < 5:
            raise Refused("That password is too easy to guess: leave out the account's name and repeat less.")
        with self._hashing:
            return self._hasher.hash(password)

    def _right_for(self, name: str, password: str) -> str:
        """The kept hash that it is right for; empty: none. An unknown account takes as long as a known one."""
        with self._database.reading() as session:
            hashed = session.execute(sa.select(_accounts.c.password).where(_accounts.c.name == name)).scalar()
        try:
            with self._hashing:
                self._hasher.verify(hashed or self._nobody, password[:MOST_PASSWORD])
            return hashed or ""
        except (VerificationError, InvalidHashError):
            return ""

    def _refusal(self, row: Any, right: str, now: datetime) -> str:
        if row is None:
            return "unknown account"
        if row.disabled_at:
            return "account disabled"
        if row.locked_until and now < row.locked_until:
            return "account locked"
        return "" if right and right == row.password else "wrong password"  # it may have been changed just now

    def _code_refusal(self, row: Any, code: str, now: datetime) -> str:
        if row.totp:
            step = _matching_step(self._vault.open_text(row.totp), code, now)
            if step is None or step <= row.totp_step:
                return "wrong code"
        return ""

    def _note_failure(self, session: Session, row: Any, refusal: str, now: datetime) -> None:
        if row is None or refusal not in ("wrong password", "wrong code"):
            return
        failures = row.failures + 1
        locked = now + LOCKED_FOR if failures >= FAILURES else None
        self._change(session, row.name, failures=0 if locked else failures, locked_until=locked)
        if locked:
            self._act(session, "account locked", "system", row.name, until=locked.isoformat(timespec="seconds"))

    def _keep_an_admin(self, session: Session, account: Account, stays: bool) -> None:
        if stays or "admin" not in account.roles or account.disabled:
            return
        rows = session.execute(sa.select(_accounts).where(_accounts.c.ref != account.ref))
        if not any("admin" in other.roles and not other.disabled for other in map(_account, rows)):
            raise Refused(f"{account.name} is the last administrator: make another one first.")

    def _by_name(self, session: Session, name: str) -> Account:
        row = session.execute(sa.select(_accounts).where(_accounts.c.name == name)).first()
        if row is None:
            raise Refused(f"There is no account named {name}.")
        return _account(row)

    def _change(self, session: Session, account_name: str, **values: Any) -> None:
        session.execute(sa.update(_accounts).where(_accounts.c.name == account_name).values(**values))

    def _act(self, session: Session, kind: str, who: str, what: str, **detail: Any) -> None:
        audit.record(session, audit.Act(kind, who, what, detail=detail), at=self._clock())


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _account(row: Any) -> Account:
    roles = tuple(role for role in ROLES if role in json.loads(row.roles))
    return Account(
        row.ref,
        row.name,
        roles,
        row.totp is not None,
        row.created_at,
        row.disabled_at is not None,
        row.locked_until,
        not row.password,
    )


def _token(row: Any) -> Token:
    scopes = tuple(json.loads(row.scopes))
    return Token(row.ref, row.label, scopes, row.made_at, row.expires_at, row.revoked_at is not None)


def _name(name: str) -> str:
    name = name.strip().lower()
    if not 2 <= len(name) <= 64 or not all(c.isalnum() or c in "._-@" for c in name):
        raise Refused("An account's name has 2 to 64 letters, digits, dots, dashes or @.")
    return name


def _roles(roles: Iterable[Role]) -> tuple[Role, ...]:
    asked = set(roles)
    if not asked or asked - set(ROLES):
        raise Refused(f"An account needs at least one of the roles {', '.join(ROLES)}.")
    return tuple(role for role in ROLES if role in asked)


def _matching_step(key: str, code: str, now: datetime) -> int | None:
    """RFC 6238: the time step a code belongs to, one step of clock drift either way."""
    code = code.replace(" ", "")
    step = int(now.timestamp()) // 30
    with suppress(ValueError):  # what is no key has no codes
        totp = pyotp.TOTP(key)
        for near in (step, step - 1, step + 1):
            if secrets.compare_digest(totp.generate_otp(near).encode(), code.encode()):
                return near
    return None
