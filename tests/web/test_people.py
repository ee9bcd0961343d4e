"""Accounts: passwords, lock-out, second factor, roles, sessions and tokens, against a real database."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyotp
import pytest
import sqlalchemy as sa
from argon2 import PasswordHasher

from busgen_cds.store import audit, database
from busgen_cds.store.people import FAILURES, HASHED_AT_ONCE, IDLE, LOCKED_FOR, RIGHTS, ROLES, SESSION, People, Refused
from busgen_cds.store.vault import Vault

GOOD = "Correct horse 7 battery"


class Site:
    def __init__(self, folder: Path) -> None:
        self.database = database.open(f"sqlite:///{folder / 'site.sqlite'}")
        self.now = datetime(2026, 1, 2, 8, tzinfo=UTC)
        quick = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
        self.people = People(self.database, Vault(bytes(32)), lambda: self.now, quick)

    def acts(self) -> list[str]:
        with self.database.reading() as session:
            return [row.kind for row in session.execute(sa.text("SELECT kind FROM act ORDER BY number"))]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    made.people.add("ada", GOOD, ("admin",), "test")
    yield made
    made.database.close()


def test_log_in(site: Site) -> None:
    """Who knows name and password gets a session; anybody else gets nothing, and both are acts."""
    secret = site.people.log_in("ADA ", GOOD)
    assert secret
    person = site.people.of_session(secret)
    assert person is not None
    assert person.name == "ada"
    assert site.people.log_in("ada", "wrong") is None
    assert site.people.log_in("nobody", GOOD) is None
    assert site.people.of_session("made up") is None
    assert site.acts() == ["account made", "log-in", "log-in refused", "log-in refused"]
    assert audit.verify(site.database).sound


def test_nothing_readable_is_kept(site: Site, tmp_path: Path) -> None:
    """Neither passwords, session secrets, tokens nor keys of second factors can be read in the database."""
    key = site.people.new_totp_key()
    secret = site.people.log_in("ada", GOOD)
    site.people.start_second_factor("ada", key, pyotp.TOTP(key).at(site.now))
    account = site.people.accounts()[0]
    token, _ = site.people.make_token(account, "test", ["people.manage"], 1)
    site.database.close()
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret
    for each in (GOOD, secret, token, key):
        assert each.encode() not in kept
    assert b"$argon2id$" in kept


def test_lock_out(site: Site) -> None:
    """Five wrong passwords lock the account for a quarter of an hour, also for the right one."""
    for _ in range(FAILURES):
        assert site.people.log_in("ada", "wrong") is None
    assert site.people.log_in("ada", GOOD) is None
    site.now += LOCKED_FOR + timedelta(seconds=1)
    assert site.people.log_in("ada", GOOD)
    assert "account locked" in site.acts()


def test_lock_out_of_a_stolen_session(site: Site) -> None:
    """Who has a session and not the password cannot guess it on the account's page: it counts as at the log-in."""
    assert site.people.knows_password("ada", GOOD)
    for _ in range(FAILURES):
        assert not site.people.knows_password("ada", "wrong")
    assert not site.people.knows_password("ada", GOOD), "locked"
    assert site.people.log_in("ada", GOOD) is None
    assert site.acts().count("password refused") == FAILURES + 1 and "account locked" in site.acts()


def test_a_few_passwords_are_hashed_at_a_time(site: Site) -> None:
    """However many strangers try at once, no more memory is taken than a few hashes need."""
    at_once, most, lock = 0, 0, threading.Lock()

    class Slow(PasswordHasher):
        def verify(self, *_: Any) -> Any:
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
            time.sleep(0.05)
            with lock:
                at_once -= 1
            return False

    people = People(site.database, Vault(bytes(32)), lambda: site.now, Slow(time_cost=1, memory_cost=8, parallelism=1))
    trying = [threading.Thread(target=people.log_in, args=(f"n{n}", "x")) for n in range(20)]
    for each in trying:
        each.start()
    for each in trying:
        each.join()
    assert most == HASHED_AT_ONCE


def test_administrator_unlocks(site: Site) -> None:
    """An administrator takes a lock off; doing so twice is one act."""
    for _ in range(FAILURES):
        site.people.log_in("ada", "wrong")
    site.people.unlock("ada", "root")
    site.people.unlock("ada", "root")
    assert site.people.log_in("ada", GOOD)
    assert site.acts().count("account unlocked") == 1


def test_second_factor(site: Site) -> None:
    """With a second factor the password alone opens nothing, and a code opens once."""
    key = site.people.new_totp_key()
    totp = pyotp.TOTP(key)
    with pytest.raises(Refused):
        site.people.start_second_factor("ada", key, "000000")
    with pytest.raises(Refused):
        site.people.start_second_factor("ada", "no key at all!", "000000")
    site.people.start_second_factor("ada", key, totp.at(site.now))
    site.now += timedelta(seconds=60)
    assert site.people.log_in("ada", GOOD) is None
    code = totp.at(site.now)
    assert site.people.log_in("ada", GOOD, code)
    assert site.people.log_in("ada", GOOD, code) is None, "a code that was used"


def test_sessions_end(site: Site) -> None:
    """A session ends by log-out, by an hour of silence, after a working day, and with its account."""
    people = site.people
    people.add("rita", GOOD, ("reader",), "ada")

    def fresh() -> str:
        secret = people.log_in("rita", GOOD)
        assert secret
        return secret

    secret = fresh()
    people.log_out(secret)
    assert people.of_session(secret) is None
    secret = fresh()
    site.now += IDLE + timedelta(seconds=1)
    assert people.of_session(secret) is None
    secret, began = fresh(), site.now
    while site.now < began + SESSION:
        assert people.of_session(secret)
        site.now += IDLE - timedelta(minutes=1)
    assert people.of_session(secret) is None
    secret = fresh()
    people.set_disabled("rita", True, "ada")
    assert people.of_session(secret) is None
    assert people.log_in("rita", GOOD) is None
    people.set_disabled("rita", False, "ada")
    secret = fresh()
    people.set_password("rita", "Another good 1 password", "rita")
    assert people.of_session(secret) is None


def test_tokens(site: Site) -> None:
    """A token does what it was made for, never more than its owner may now, and ends by date or revocation."""
    people = site.people
    owner = people.add("rita", GOOD, ("reader", "operator"), "ada")
    with pytest.raises(Refused):
        people.make_token(owner, "too much", ["people.manage"], 1)
    with pytest.raises(Refused):
        people.make_token(owner, "for ever", ["studies.read"], 10_000)
    secret, token = people.make_token(owner, "worklist", ["studies.read", "studies.retry"], 2)
    person = people.of_token(secret)
    assert person is not None
    assert person.rights == {"studies.read", "studies.retry"}
    people.set_roles("rita", ("reader",), "ada")
    person = people.of_token(secret)
    assert person is not None
    assert person.rights == {"studies.read"}, "the role that gave the other right is gone"
    people.revoke_token(owner, token.ref)
    assert people.of_token(secret) is None
    secret, _ = people.make_token(people.accounts()[1], "short", ["studies.read"], 1)
    site.now += timedelta(days=1, seconds=1)
    assert people.of_token(secret) is None


def test_last_administrator(site: Site) -> None:
    """A site always keeps one administrator who can log in."""
    with pytest.raises(Refused):
        site.people.set_roles("ada", ("reader",), "ada")
    with pytest.raises(Refused):
        site.people.set_disabled("ada", True, "ada")
    site.people.add("eve", GOOD, ("admin",), "ada")
    site.people.set_disabled("ada", True, "eve")
    with pytest.raises(Refused):
        site.people.set_roles("eve", ("auditor",), "eve")


@pytest.mark.parametrize("password", ["short", "x" * 20, "adalovelaceada", "y" * 300])
def test_poor_passwords(site: Site, password: str) -> None:
    """A short, repeated or self-named password is refused."""
    with pytest.raises(Refused):
        site.people.set_password("ada", password, "ada")


def test_first_account_is_made_once(site: Site) -> None:
    """The first account is made only while there is none."""
    with pytest.raises(Refused):
        site.people.add("second", GOOD, ("admin",), "somebody", first=True)


def test_roles_are_apart() -> None:
    """No single role both reads studies and manages people, and the auditor can change nothing."""
    assert set(RIGHTS) == set(ROLES)
    assert RIGHTS["auditor"] == {"audit.read"}
    for role in ROLES:
        assert not {"studies.read", "people.manage"} <= RIGHTS[role]
    assert [role for role in ROLES if "studies.confirm" in RIGHTS[role]] == ["reader"]


def test_a_password_changed_while_it_is_tried(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who logs in by a password that is changed in that moment gets no session."""
    people = site.people
    people.add("mona", GOOD, ("reader",), "ada")
    right = people._right_for

    def right_until_now(name: str, password: str) -> str:
        found = right(name, password)
        people.set_password("mona", f"{GOOD} and longer", "mona")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(people, "_right_for", right_until_now)
        assert people.log_in("mona", GOOD) is None
    assert people.log_in("mona", f"{GOOD} and longer") is not None
