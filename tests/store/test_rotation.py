"""Changing the site key: whatever is found by a keyed hash is found under the new key alone."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from busgen_cds.arrival import Arrival, Peek
from busgen_cds.cli import custody
from busgen_cds.store import audit, database, rotation, vault
from busgen_cds.store.cases import Cases
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.people import People
from busgen_cds.store.results import Results
from busgen_cds.store.vault import Vault
from busgen_cds.study import NotForUs
from tests import postgres

US = "1.2.840.10008.5.1.4.1.1.6.1"


def kept(inbox: Inbox, uid: str, patient: str = "P-1", part: int = 9) -> str:
    arrival = Arrival("US_ROOM_1", "127.0.0.1", US, f"{uid}.{part}", "1.2.840.10008.1.2.1")
    return inbox.keep(arrival, Peek(uid, f"{uid}.1", US, f"{uid}.{part}", patient), [b"x" * 500]).study_ref


def answered(results: Results, study_ref: str, accession: str) -> None:
    answer = NotForUs("1.2", "not a breast", (), ())
    results.keep(
        study_ref, answer, (), evidence_digest="e" * 64, instances=1, revision=results.next_revision(study_ref),
        bundle_digest="", accession_number=accession,
    )  # fmt: skip


def test_accession_numbers_are_found_after_the_key_changed(tmp_path: Path) -> None:
    """Patient, study and accession number are found by the new key alone; nothing is left under the older one."""
    old, new = vault.new_key(), vault.new_key()
    opened = database.open(f"sqlite:///{tmp_path / 'site.db'}")
    before, both, after = Vault(old), Vault(new, older=[old]), Vault(new)
    ref = kept(Inbox(tmp_path / "inbox", opened, before), "1.2.3")
    answered(Results(opened, before), ref, "A-77")
    People(opened, before).add("ann.smith", "correct horse battery", ["reader"], "system")
    assert any("result.accession_blind" in each for each in rotation.left(opened, both))
    done = rotation.rotate(opened, both, "ann")
    assert done.left == [] == rotation.left(opened, both)
    for text in ("A-77", "P-1", "1.2.3"):
        assert [each.study_ref for each in Results(opened, after).search(text)] == [ref], text
    assert not Results(opened, before).search("A-77")
    assert audit.verify(opened).sound and Cases(opened, after).words(ref) == ()


def test_a_hash_without_its_text_keeps_the_older_key(tmp_path: Path) -> None:
    """A hash whose text is not kept is named with its column and count: the older key must stay for it."""
    old, new = vault.new_key(), vault.new_key()
    opened = database.open(f"sqlite:///{tmp_path / 'site.db'}")
    ref = kept(Inbox(tmp_path / "inbox", opened, Vault(old)), "1.2.3")
    answered(Results(opened, Vault(old)), ref, "A-77")
    results = database.all_tables().tables["result"]
    with opened.transaction() as session:
        session.execute(results.update().values(accession=None))
    assert rotation.rotate(opened, Vault(new, older=[old]), "ann").left == ["result.accession_blind: 1"]
    assert Results(opened, Vault(new, older=[old])).search("A-77")


def test_images_of_one_study_stay_together_while_the_key_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever process takes up the new key first, the images of one study are filed as one, and all are opened."""
    file = vault.KeyFile(str(tmp_path / "site.key"))
    vault.write_key_file(tmp_path / "site.key")
    opened = database.open(f"sqlite:///{tmp_path / 'site.db'}")
    monkeypatch.setattr(vault, "LOOK_SECONDS", 0.0)
    prompt = Vault(*file.keys(), changed=file.keys)
    looks = [file.keys()]
    late = Vault(*file.keys(), changed=lambda: looks[-1])
    inboxes = [Inbox(tmp_path / "inbox", opened, keys) for keys in (prompt, late)]
    steps: list[int] = []

    def meanwhile(_seconds: float) -> None:
        """The late process still works with what it saw at the step before."""
        steps.append(len(steps))
        refs = {kept(inbox, f"1.2.{steps[-1]}", part=n) for n, inbox in enumerate(inboxes)}
        assert len(refs) == 1, "a study was filed twice"
        assert all(inbox.open(each) for inbox in inboxes for ref in refs for each in inbox.instances(ref))
        looks.append(file.keys())

    monkeypatch.setattr(custody, "time", SimpleNamespace(sleep=meanwhile))  # no other thread's sleep is a step
    custody._bring_in(file, key := vault.new_key())
    assert len(steps) == 2 and file.keys()[0] == key and len(file.keys()) == 2


@pytest.mark.program
def test_shredded_while_the_key_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process shreds during the change of the key stays shredded; PostgreSQL lets both work at once."""
    with postgres.running("site") as addresses:
        opened = database.open(addresses["site"])
        old, new = vault.new_key(), vault.new_key()
        ref, both = kept(Inbox(tmp_path / "inbox", opened, Vault(old)), "1.2.3"), Vault(new, older=[old])
        fresh = rotation._fresh
        shreds = threading.Thread(target=lambda: Inbox(tmp_path / "inbox", opened, both).shred(ref, "ann"))

        def fresh_as_it_is_shredded(keys: Vault, table: sa.Table, row: dict[str, Any]) -> dict[str, Any]:
            if table.name == "study" and shreds.ident is None:
                shreds.start()
                shreds.join(1)
            return fresh(keys, table, row)

        monkeypatch.setattr(rotation, "_fresh", fresh_as_it_is_shredded)
        rotation.rotate(opened, both, "ann")
        shreds.join(60)
        assert Inbox(tmp_path / "inbox", opened, both).why_not_shredded(ref) == []
        opened.close()
