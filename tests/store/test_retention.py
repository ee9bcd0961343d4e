"""What is let go is gone, and nothing is let go that still has to reach somebody."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from busgen_cds.errors import Misconfigured, Shredded
from busgen_cds.result import Rendered
from busgen_cds.store import audit, database, retention, vault
from busgen_cds.store.cases import Cases, Word
from busgen_cds.store.database import Database
from busgen_cds.store.deliveries import Addressee
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.results import Results
from busgen_cds.store.retention import Letting, due, overview
from busgen_cds.store.vault import Vault
from busgen_cds.study import NotForUs
from tests.store.test_rotation import US, kept

NOW = datetime.now(UTC) + timedelta(days=40)
OBJECT = b"a secondary capture with the patient's name on it" * 20
MONTH = timedelta(days=30)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Database]:
    site = database.open(f"sqlite:///{tmp_path / 'site.db'}")
    yield site
    site.close()


@pytest.fixture
def letting(tmp_path: Path, opened: Database) -> Letting:
    keys = Vault(vault.new_key())
    return Letting(Inbox(tmp_path / "inbox", opened, keys), opened, keys)


def answered(letting: Letting, ref: str, to: str = "") -> None:
    results = Results(letting.database, letting.vault)
    objects = [Rendered("sc", US, f"2.25.{int(ref[:12], 16)}", "2.25.2", "1.2.840.10008.1.2.1", OBJECT)]
    results.keep(
        ref, NotForUs("1.2", "not a breast", (), ()), objects, evidence_digest="e" * 64, instances=1, revision=1,
        bundle_digest="", accession_number="A-77", addressees=[Addressee(to, ("sc",))] if to else [],
    )  # fmt: skip


def test_everything_of_a_shredded_study_is_gone(tmp_path: Path, letting: Letting) -> None:
    """After shredding no image, result, object, note, accession number or key of the study can be read anywhere."""
    ref, other = kept(letting.inbox, "1.2.3"), kept(letting.inbox, "1.2.4", "P-2")
    for each in (ref, other):
        answered(letting, each)
    words = Cases(letting.database, letting.vault)
    words.say(Word(ref, 1, 0, "agree", "ann", note="Mrs. Example, tel. 555"), findings=0)
    before = _pages(letting.database)
    assert letting.why_not_shredded(ref)
    assert letting.shred(ref, "ann") == []
    results = Results(letting.database, letting.vault)
    entry = results.current(ref)
    assert entry is not None and results.search("A-77") == [results.current(other)]
    with pytest.raises(Shredded):
        results.show(entry.ref)
    for sealed in before[ref]:
        assert not any(sealed[:64] in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert audit.verify(letting.database).sound
    assert results.show(results.current(other).ref) and letting.why_not_shredded(other)  # type: ignore[union-attr]


def _pages(opened: Database) -> dict[str, list[bytes]]:
    """All sealed bytes by study, as they stand in the database."""
    tables, found = database.all_tables().tables, {}
    with opened.reading() as session:
        for row in session.execute(sa.select(tables["study"])):
            mine = tables["result"].c.study_ref == row.ref
            sealed = [row.uid, row.patient, row.key]
            for each in session.execute(sa.select(tables["result"]).where(mine)):
                sealed += [each.document, each.accession]
                of = tables["rendered"].c.result_ref == each.ref
                sealed += session.execute(sa.select(tables["rendered"].c.data).where(of)).scalars()
            sealed += session.execute(
                sa.select(tables["word"].c.note).where(tables["word"].c.study_ref == row.ref)
            ).scalars()
            found[row.ref] = sealed
    return found


def test_undelivered_studies_stay(letting: Letting) -> None:
    """A study whose result has not reached everybody is never let go by a rule, and by a person only who insists."""
    ref = kept(letting.inbox, "1.2.3")
    answered(letting, ref, to="pacs")
    results = Results(letting.database, letting.vault)
    for state in ("waiting", "asked", "parked"):
        (delivery,) = results.deliveries.of(results.current(ref).ref)  # type: ignore[union-attr]
        results.deliveries.move(delivery, state)  # type: ignore[arg-type]
        assert letting.apply({"not-for-us": MONTH}, NOW).studies == ()
        with pytest.raises(Misconfigured, match="has not reached pacs"):
            letting.shred(ref, "ann")
    assert letting.shred(ref, "ann", insist=True) == []
    assert results.deliveries.under_way() == () == results.deliveries.parked()


def test_rules_by_kind_and_age(letting: Letting) -> None:
    """Each kind is kept as long as the site says, from the last thing that happened; what is not stated stays."""
    old, unread = kept(letting.inbox, "1.2.3"), kept(letting.inbox, "1.2.4")
    answered(letting, old)
    assert letting.apply({}, NOW) == letting.apply({"not-for-us": timedelta(days=60)}, NOW)
    assert letting.apply({"assessed": MONTH, "declined": MONTH}, NOW).studies == ()
    assert due(letting.database, "unread", NOW) == [unread] and due(letting.database, "not-for-us", NOW) == [old]
    letting.inbox.hold(unread, "two patients")
    assert letting.apply({"not-for-us": MONTH, "unread": MONTH}, NOW).studies == (old,)
    assert letting.apply({"not-for-us": MONTH, "unread": MONTH}, NOW).studies == ()  # once more changes nothing
    letting.inbox.release(unread, "ann")
    assert [line[2] for line in overview(letting.database, {"unread": MONTH}, NOW)] == [0, 0, 0, 1, 0]
    words = Cases(letting.database, letting.vault)
    words.say(Word(unread, 1, 0, "agree", "ann"), findings=0)
    with letting.database.transaction() as session:
        session.execute(sa.update(database.all_tables().tables["word"]).values(at=NOW - timedelta(days=1)))
    assert due(letting.database, "unread", NOW - MONTH) == []


def test_a_late_image_saves_its_study(letting: Letting, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is acknowledged after its study was found old, and before it is let go, keeps it."""
    ref = kept(letting.inbox, "1.2.3")
    answered(letting, ref)

    def found_as_one_comes(*asked: object) -> list[str]:
        found = due(*asked)  # type: ignore[arg-type]
        kept(letting.inbox, "1.2.3", part=10)
        return found

    monkeypatch.setattr(retention, "due", found_as_one_comes)
    monkeypatch.setattr(letting.inbox, "_clock", lambda: NOW)
    assert letting.apply({"not-for-us": MONTH}, NOW).studies == ()
    assert [letting.inbox.open(each) for each in letting.inbox.instances(ref)] == [b"x" * 500] * 2


def test_quarantine_is_let_go(letting: Letting) -> None:
    """Damaged objects that were set aside go after their time, key and file."""
    from busgen_cds.arrival import Arrival

    ref = letting.inbox.quarantine(Arrival("US1", "127.0.0.1", US, "1.2", "1.2.840.10008.1.2.1"), [b"x" * 99], "cut")
    assert letting.apply({"quarantine": MONTH}, datetime.now(UTC)).quarantined == ()
    assert letting.apply({"quarantine": MONTH}, NOW).quarantined == (ref,)
    assert letting.inbox.quarantined() == [] and letting.inbox.sweep() == 0
    assert not list(letting.inbox._quarantine.iterdir())


def test_a_key_file_that_changes_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running process takes up a new site key from its file, and goes on when the file is broken for a moment."""
    monkeypatch.setattr(vault, "LOOK_SECONDS", 0.0)
    path = tmp_path / "site.key"
    vault.write_key_file(path)
    running, file = vault.unlock(vault.key_source(f"file:{path}")), vault.KeyFile(str(path))
    sealed, hashed = running.seal_text("a"), running.blind("a")
    file.put_first(vault.new_key())
    assert running.blind("a") != hashed and hashed in running.blinds("a") and running.open_text(sealed) == "a"
    assert not running.is_current(sealed) and running.is_current(running.reseal(sealed))
    path.write_text("not a key")
    assert running.open_text(sealed) == "a"
    path.unlink()
    assert running.open_text(sealed) == "a"


def test_what_was_reported_of_a_shredded_study_goes_with_it(letting: Letting) -> None:
    """A pathology report that waits under the study's accession number goes with the study; others stay."""
    ref, keys = kept(letting.inbox, "1.2.3"), letting.vault
    answered(letting, ref)
    table = database.all_tables().tables["pathology"]
    named = {
        "patient_blind": keys.blind("P-1"), "patient": keys.seal_text("P-1"), "pathology": "benign",
        "reported_on": "2026-01-02", "withdrawn": False, "received_at": NOW,
    }  # fmt: skip
    with letting.database.transaction() as session:
        for number in ("A-77", "A-78"):
            sealed = {"accession_blind": keys.blind(number), "accession": keys.seal_text(number)}
            values = {**named, **sealed, "ref": number}
            session.execute(sa.insert(table).values(**values))
    assert letting.shred(ref, "ann") == []
    with letting.database.reading() as session:
        assert session.execute(sa.select(table.c.ref)).scalars().all() == ["A-78"]
