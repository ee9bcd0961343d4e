"""The inbox keeps what was acknowledged, once, sealed, and lets it go for good."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from busgen_cds.arrival import Arrival, Kept, NoRoom, Peek
from busgen_cds.errors import Shredded, Transient, Untrusted
from busgen_cds.store import audit, database, rotation, vault
from busgen_cds.store.database import Database
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.vault import CHUNK, Vault

US = "1.2.840.10008.5.1.4.1.1.6.1"
DATA = secrets.token_bytes(3000)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Database]:
    site = database.open(f"sqlite:///{tmp_path / 'site.db'}")
    yield site
    site.close()


@pytest.fixture
def keys() -> Vault:
    return Vault(vault.new_key())


@pytest.fixture
def inbox(tmp_path: Path, opened: Database, keys: Vault) -> Inbox:
    return Inbox(tmp_path / "inbox", opened, keys)


def arrival(uid: str = "1.2.3.4") -> Arrival:
    return Arrival("SCANNER", "10.0.0.1", US, uid, "1.2.840.10008.1.2.1")


def header(uid: str = "1.2.3.4", study: str = "1.2.3", patient: str = "PATIENT^ONE") -> Peek:
    return Peek(study, study + ".1", US, uid, patient)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_what_is_kept_is_found(inbox: Inbox, size: int) -> None:
    """What was kept is found again, byte for byte, whatever its size, with the digest of what was received."""
    data = secrets.token_bytes(size)
    kept = inbox.keep(arrival(), header(), [data[: size // 3], data[size // 3 :]])
    (instance,) = inbox.instances(kept.study_ref)
    assert inbox.open(instance) == data
    assert instance.sha256 == hashlib.sha256(data).hexdigest() and instance.bytes == size


def test_a_study_is_named_by_an_opaque_reference(inbox: Inbox) -> None:
    """The reference of a study says nothing about it, and the study is found by its UID only with the key."""
    kept = inbox.keep(arrival(), header(), [DATA])
    assert len(kept.study_ref) == 32 and inbox.study_uid(kept.study_ref) == "1.2.3"
    assert inbox.find_study("1.2.3") == kept.study_ref and inbox.find_study("1.2.4") is None


def test_many_at_once_are_each_kept_once(inbox: Inbox, opened: Database) -> None:
    """Twenty threads keep five instances four times over: five are kept, and each caller learns which."""
    outcomes: list[str] = []

    def keep(number: int) -> None:
        uid = f"1.2.3.{number % 5}"
        outcomes.append(inbox.keep(arrival(uid), header(uid), [DATA]).outcome)

    threads = [threading.Thread(target=keep, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["new"] * 5 + ["same"] * 15
    (study,) = inbox.studies()
    assert study.instances == 5 and audit.verify(opened).sound
    assert len(_files(inbox)) == 5


def test_nobody_who_waits_is_left_out(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever joins while another takes those who wait is committed with them, or with the next."""
    inbox._waiting = _Slow()
    monkeypatch.setattr(inbox, "_commit_rows", lambda jobs: [Kept("new", "study", "instance") for _ in jobs])
    kept: list[Kept] = []
    threads = [threading.Thread(target=lambda: kept.append(inbox._commit_together(_ANY))) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert len(kept) == 2


_ANY: Any = object()


class _Slow(list[Any]):
    """It takes a while until somebody who joins is in it."""

    def append(self, one: Any) -> None:
        time.sleep(0.3)
        super().append(one)


def test_nothing_plain_is_on_the_disk(tmp_path: Path, inbox: Inbox, opened: Database) -> None:
    """A stolen disk shows no name, identifier or image byte: neither in the files nor in the database's pages."""
    inbox.keep(arrival("1.2.99999.4"), header("1.2.99999.4", "1.2.88888.3"), [DATA])
    inbox.quarantine(arrival("1.2.77777.5"), [DATA], "cut")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            found = path.read_bytes()
            for secret in (b"99999", b"88888", b"77777", b"PATIENT", DATA[:16], DATA[-16:]):
                assert secret not in found, path


def test_a_failed_commit_keeps_nothing(inbox: Inbox, opened: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the row cannot be written, keep raises, and the sweep takes the file away."""
    monkeypatch.setattr(inbox, "_enter", _raise)
    with pytest.raises(RuntimeError):
        inbox.keep(arrival(), header(), [DATA])
    assert inbox.studies() == [] and inbox.sweep() == 1 and _files(inbox) == []


def _raise(*_: object) -> None:
    raise RuntimeError


def test_the_sweep_leaves_what_is_being_written(inbox: Inbox) -> None:
    """The sweep takes what a crash left, and nothing that somebody writes now or that has a row."""
    kept = inbox.keep(arrival(), header(), [DATA])
    receiving = inbox.receive(arrival("1.2.3.5"))
    receiving.write(DATA)
    (inbox._incoming / ("0" * 32)).write_bytes(b"left by a crash")
    (inbox._kept / ("1" * 32)).write_bytes(b"renamed, then a crash")
    assert inbox.sweep() == 2
    assert receiving.keep(header("1.2.3.5")).outcome == "new"
    assert len(inbox.instances(kept.study_ref)) == 2


def test_no_room(inbox: Inbox) -> None:
    """Below the watermark nothing is begun; and what was begun before is abandoned without a trace."""
    receiving = inbox.receive(arrival())
    inbox._least_free = 1 << 60
    with pytest.raises(NoRoom):
        inbox.receive(arrival("1.2.3.5"))
    with pytest.raises(NoRoom):
        receiving.write(bytes(65 << 20))
    receiving.abandon()
    assert _files(inbox) == []


def test_hold_and_release(inbox: Inbox) -> None:
    """A study is held with a reason and released by a person; both are acts."""
    kept = inbox.keep(arrival(), header(), [DATA])
    inbox.hold(kept.study_ref, "why")
    assert inbox.held(kept.study_ref) == "why" and inbox.held_studies() == [(kept.study_ref, "why")]
    inbox.release(kept.study_ref, "ann")
    assert inbox.held(kept.study_ref) is None


def test_quarantine(inbox: Inbox) -> None:
    """What is quarantined is kept sealed, with its reason, and is no part of any study."""
    ref = inbox.quarantine(arrival(), [DATA], "it is cut")
    (held,) = inbox.quarantined()
    assert (held.ref, held.reason, held.sop_instance_uid) == (ref, "it is cut", "1.2.3.4")
    assert inbox.open_quarantined(ref) == DATA and inbox.studies() == []


def test_what_is_refused_again_takes_no_more_room(inbox: Inbox, opened: Database) -> None:
    """A damaged object that its sender sends again and again is kept once, and how often it came is counted."""
    refs = {inbox.quarantine(arrival(), [DATA], "it is cut") for _ in range(5)}
    other = inbox.quarantine(arrival(), [DATA[:-1]], "it is cut")
    assert [(each.ref, each.times) for each in inbox.quarantined()] == [(*refs, 5), (other, 1)]
    assert len(_files(inbox)) == 2 and inbox.sweep() == 0
    inbox.discard_quarantined(*refs, "ann")
    assert inbox.quarantine(arrival(), [DATA], "it is cut") not in refs


def test_shredding(tmp_path: Path, inbox: Inbox, opened: Database, keys: Vault) -> None:
    """A shredded study cannot be read, from no copy of its files; no trace of key or names is in the database."""
    kept = inbox.keep(arrival(), header(), [DATA])
    other = inbox.keep(arrival("1.9.1"), header("1.9.1", "1.9"), [DATA])
    (instance,) = inbox.instances(kept.study_ref)
    copy = inbox._path(instance.ref, instance.received_at).read_bytes()
    with opened.reading() as session:
        rows = session.execute(database.all_tables().tables["study"].select()).all()
    key, uid = next((row.key, row.uid) for row in rows if row.ref == kept.study_ref)
    assert inbox.why_not_shredded(kept.study_ref)
    inbox.shred(kept.study_ref, "ann")
    assert inbox.why_not_shredded(kept.study_ref) == []
    with pytest.raises(Shredded):
        inbox.open(instance)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            found = path.read_bytes()
            assert key not in found and uid not in found and copy[100:200] not in found
    assert inbox.find_study("1.2.3") is None and [study.ref for study in inbox.studies()] == [other.study_ref]
    again = inbox.keep(arrival(), header(), [DATA])  # sent again, it is a new study
    assert again.outcome == "new" and again.study_ref != kept.study_ref
    assert audit.verify(opened).sound


def test_the_site_key_is_changed_while_images_arrive(tmp_path: Path, opened: Database) -> None:
    """The site key is changed while the site runs: all is readable at any time, and at the end by the new key alone."""
    old, new = vault.new_key(), vault.new_key()
    before = Inbox(tmp_path / "inbox", opened, Vault(old))
    refs = [before.keep(arrival(f"1.{n}.1"), header(f"1.{n}.1", f"1.{n}"), [DATA]).study_ref for n in range(3)]
    before.quarantine(arrival(), [DATA], "cut")
    both = Inbox(tmp_path / "inbox", opened, Vault(new, older=[old]))
    assert both.keep(arrival("1.0.1"), header("1.0.1", "1.0"), [DATA]).outcome == "same"
    assert both.keep(arrival("1.0.2"), header("1.0.2", "1.0"), [DATA]).study_ref == refs[0]
    done = rotation.rotate(opened, Vault(new, older=[old]), "ann")
    assert done.rows == 7 and rotation.rotate(opened, Vault(new, older=[old]), "ann").rows == 0
    after = Inbox(tmp_path / "inbox", opened, Vault(new))
    for ref in refs:
        assert [after.open(instance) for instance in after.instances(ref)] == [DATA] * len(after.instances(ref))
    assert after.find_study("1.1") == refs[1] and after.open_quarantined(after.quarantined()[0].ref) == DATA
    assert after.keep(arrival("1.0.1"), header("1.0.1", "1.0"), [DATA]).outcome == "same"
    with pytest.raises(Untrusted):
        before.instances(refs[0])


def test_commit_is_durable(opened: Database) -> None:
    """SQLite runs with a write-ahead log that is synced at every commit, and overwrites what is deleted."""
    with opened.reading() as session:
        connection = session.connection()
        pragma = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        }
    assert pragma == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}


def _files(inbox: Inbox) -> list[Path]:
    return [path for path in inbox._folder.rglob("*") if path.is_file() and len(path.name) == 32]


def test_file_mode(inbox: Inbox) -> None:
    """Nobody but the site's account can read what was received."""
    inbox.keep(arrival(), header(), [DATA])
    (path,) = _files(inbox)
    assert path.stat().st_mode & 0o077 == 0 and os.access(path, os.R_OK)


def test_what_was_set_aside_is_set_aside_again(inbox: Inbox) -> None:
    """Other bytes under a known UID are refused each time that they are sent, and kept once."""
    said = [inbox.keep(arrival(), header(), [data]).outcome for data in (b"A", b"B", b"B", b"A")]
    assert said == ["new", "conflict", "conflict", "same"]
    assert len(inbox.conflicts()) == 1 and len([path for path in inbox._kept.rglob("*") if path.is_file()]) == 2


def test_swept_while_its_row_is_made(inbox: Inbox) -> None:
    """A file whose receiver died is swept or kept, never both: what was swept gets no row, and is to be sent again."""
    receiving = inbox.receive(arrival())
    receiving.write(DATA)
    receiving._writer.sync()
    entry = receiving._entry(header())
    target = inbox._path(entry.ref, entry.at)
    inbox._make_folder(target.parent)
    receiving._path.rename(target)
    receiving._writer.close()  # and the process dies; its entry waits for the clerk
    assert inbox.sweep() == 1
    with pytest.raises(Transient, match="sent again"):
        inbox._commit_rows([entry])
    kept = inbox.keep(arrival(), header(), [DATA])
    assert kept.outcome == "new" and inbox.open(inbox.instances(kept.study_ref)[0]) == DATA
