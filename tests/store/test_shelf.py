"""The shelf: what may follow what, and that nothing but the newest signed word says which bundle reads."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from busgen_cds import bundle, signing
from busgen_cds.bundle import Candidate
from busgen_cds.errors import Misconfigured, Untrusted
from busgen_cds.store import audit, database, shelf
from busgen_cds.store.shelf import STATES, TRANSITIONS, VERBS, Shelf
from tests import postgres
from tests.vision import readers

NIGHT, PROMOTER, RELEASE = (
    signing.KeySigner(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in (1, 2, 3)
)
VERIFIER = signing.Verifier.of(
    (NIGHT.key.public_key(), frozenset({bundle.KIND})),
    (RELEASE.key.public_key(), frozenset({bundle.KIND})),
    (PROMOTER.key.public_key(), frozenset({shelf.KIND})),
)
REPORT = {"tables": [{"title": "Judge", "rows": [["AUC", "0.91"]]}]}


def a_candidate(version: str, **changed: Any) -> Candidate:
    files = {**readers.files(), bundle.CARD: f"# Reader {version}\n".encode()}
    return Candidate(dataclasses.replace(readers.manifest(files), version=version, **changed), files)


class Room:
    """A shelf in a folder, with the bundle that came with the product, and what an attacker may do to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "shelf"
        self.home = folder / "product"
        a_candidate("shipped").seal(self.home, RELEASE)
        self.database = database.open(f"sqlite:///{folder / 'site.sqlite'}")
        self.shelf = self.opened()

    def opened(self) -> Shelf:
        """As another process opens it: it remembers nothing."""
        return Shelf(self.folder, self.database, VERIFIER, home=lambda: self.home)

    def shadowed(self, version: str) -> str:
        digest = self.shelf.put(a_candidate(version), report=REPORT, signer=NIGHT).digest
        return self.shelf.to_shadow(digest, person="phil").digest

    def promoted(self, version: str) -> str:
        digest = self.shadowed(version)
        self.shelf.promote(digest, person="phil", signer=PROMOTER)
        return digest

    def live_version(self) -> str:
        return self.opened().live().manifest.version

    def states(self) -> dict[str, str]:
        return {each.version: each.state for each in self.shelf.listing()}

    def acts(self) -> list[tuple[str, str]]:
        with self.database.reading() as session:
            return [
                (row.kind, row.who) for row in session.execute(sa.text("SELECT kind, who FROM act ORDER BY number"))
            ]

    def sql(self, text: str, **values: Any) -> None:
        with self.database.transaction() as session:
            session.execute(sa.text(text), values)

    def envelope(self, number: int) -> bytes:
        with self.database.reading() as session:
            query = sa.text("SELECT envelope FROM live_statement WHERE number = :number")
            return bytes(session.execute(query, {"number": number}).scalar_one())


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", [None, *STATES])
def test_every_pair(state: Any, verb: Any) -> None:
    """Each verb leads from the states of the table and from no other."""
    if (state, verb) in TRANSITIONS:
        assert shelf.step(state, verb) in STATES
    else:
        with pytest.raises(Misconfigured, match=verb):
            shelf.step(state, verb)


def test_the_product_comes_live(room: Room) -> None:
    """At first start the shipped bundle is live, without anybody's word."""
    assert room.shelf.live().manifest.version == "shipped" and room.shelf.standing().number == 0


def test_promoted_and_rolled_back(room: Room) -> None:
    """Promote and roll back change what is live; each is a numbered, signed statement and an act of a named person."""
    first, second = room.promoted("2"), room.promoted("3")
    assert room.live_version() == "3" and room.states() == {"3": "live", "2": "retired", "shipped": "retired"}
    assert room.shelf.roll_back(person="ada", signer=PROMOTER) == shelf.Standing(3, first)
    assert room.live_version() == "2" and room.states()["3"] == "retired"
    room.shelf.roll_back(person="ada", signer=PROMOTER)
    assert room.live_version() == "shipped"
    with pytest.raises(Misconfigured, match="nothing to roll back to"):
        room.shelf.roll_back(person="ada", signer=PROMOTER)
    assert [(s.number, s.verb, s.person) for s in room.shelf.statements()] == [
        (1, "promote", "phil"), (2, "promote", "phil"), (3, "roll back", "ada"), (4, "roll back", "ada"),
    ]  # fmt: skip
    assert ("bundle promoted", "phil") in room.acts() and ("bundle rolled back to", "ada") in room.acts()
    assert audit.verify(room.database).sound and second != first


def test_twice_is_once(room: Room) -> None:
    """Putting, shadowing and promoting twice are done once."""
    digest = room.promoted("2")
    before = len(room.acts())
    assert room.shelf.put(a_candidate("2"), report=REPORT, signer=NIGHT).state == "live"
    assert room.shelf.promote(digest, person="phil", signer=PROMOTER).number == 1
    assert len(room.acts()) == before
    again = room.shadowed("3")
    assert room.shelf.to_shadow(again, person="phil").state == "shadow" and len(room.acts()) == before + 2


def test_shadow_comes_first(room: Room) -> None:
    """What did not read along cannot be promoted, and one reads along at a time."""
    digest = room.shelf.put(a_candidate("2"), report=REPORT, signer=NIGHT).digest
    with pytest.raises(Misconfigured, match="needs one that is shadow"):
        room.shelf.promote(digest, person="phil", signer=PROMOTER)
    room.shadowed("3")
    with pytest.raises(Misconfigured, match="one reads along at a time"):
        room.shelf.to_shadow(digest, person="phil")
    assert room.live_version() == "shipped"


def test_refused_is_never_a_bundle(room: Room) -> None:
    """A refused candidate keeps its reasons and its files, and cannot be opened, shadowed or promoted."""
    kept = room.shelf.refuse(a_candidate("bad"), reasons=["AUC fell by 0.05"], report=REPORT)
    assert kept.state == "refused" and kept.reasons == ("AUC fell by 0.05",) and kept.report == REPORT
    assert (kept.folder / bundle.NETWORK).is_file() and not (kept.folder / bundle.ENVELOPE).exists()
    for attempt in (
        lambda: room.shelf.open(kept.digest),
        lambda: room.shelf.to_shadow(kept.digest, person="phil"),
        lambda: room.shelf.promote(kept.digest, person="phil", signer=PROMOTER),
    ):
        with pytest.raises((Misconfigured, Untrusted)):
            attempt()
    assert room.shelf.put(a_candidate("bad"), report=REPORT, signer=NIGHT).state == "refused"


def test_a_later_night_refuses_what_stands_there(room: Room) -> None:
    """The same candidate judged again and refused does not stay on the shelf, ready to be promoted."""
    digest = room.shadowed("2")
    kept = room.shelf.refuse(a_candidate("2"), reasons=["AUC fell by 0.05"], report=REPORT)
    assert (kept.digest, kept.state, kept.reasons) == (digest, "refused", ("AUC fell by 0.05",))
    with pytest.raises(Misconfigured):
        room.shelf.promote(digest, person="phil", signer=PROMOTER)
    promoted = room.promoted("3")
    assert room.shelf.refuse(a_candidate("3"), reasons=["later"], report=REPORT).digest == promoted
    assert room.live_version() == "3"  # what a person made live, a person takes away


def test_rolled_back_to_what_reads_along(room: Room) -> None:
    """What was live once can be gone back to at once, also while it reads along and after it did."""
    first = room.promoted("2")
    room.promoted("3")
    room.shelf.to_shadow(first, person="phil")
    room.shelf.end_shadow(first, person="phil")
    assert room.states()["2"] == "retired"
    room.shelf.to_shadow(first, person="phil")
    assert room.shelf.roll_back(person="ada", signer=PROMOTER).digest == first
    assert room.live_version() == "2" and room.shelf.in_shadow() == ""


def test_two_people_speak_at_once(room: Room) -> None:
    """Whoever rolls back goes back from what they saw: a promotion in the same moment is not undone unseen."""
    room.promoted("2")
    room.promoted("3")
    newest = room.shadowed("4")

    class Overtaken(Shelf):
        def before(self) -> str:
            found = super().before()
            room.shelf.promote(newest, person="phil", signer=PROMOTER)
            return found

    other = Overtaken(room.folder, room.database, VERIFIER, home=lambda: room.home)
    with pytest.raises(Misconfigured, match="Somebody else has just said"):
        other.roll_back(person="ada", signer=PROMOTER)
    assert room.live_version() == "4" and room.shelf.standing().number == 3


def test_one_form_pressed_twice_at_once(room: Room) -> None:
    """Who decides knows one statement as the last; two presses of one form, or two people's, are one change."""
    for version in ("2", "3", "4"):
        room.promoted(version)
    seen = room.shelf.standing().number
    room.shelf.roll_back(person="ada", signer=PROMOTER, heard=seen)
    with pytest.raises(Misconfigured, match="Somebody else has just said"):
        room.shelf.roll_back(person="ada", signer=PROMOTER, heard=seen)
    with pytest.raises(Misconfigured, match="Somebody else has just said"):
        room.shelf.promote(room.shadowed("5"), person="phil", signer=PROMOTER, heard=seen)
    assert room.live_version() == "3" and room.shelf.standing().number == seen + 1


def test_withdrawn(room: Room) -> None:
    """A person may withdraw what is on the shelf, with a reason; it never becomes live."""
    digest = room.shadowed("2")
    with pytest.raises(Misconfigured, match="Say why"):
        room.shelf.withdraw(digest, person="phil", reason=" ")
    assert room.shelf.withdraw(digest, person="phil", reason="too many 4A").reasons == ("too many 4A",)
    with pytest.raises(Misconfigured):
        room.shelf.promote(digest, person="phil", signer=PROMOTER)


def test_in_the_callers_transaction(room: Room) -> None:
    """Putting is part of the caller's transaction: it is rolled back with it, and done by the next attempt."""
    with pytest.raises(ZeroDivisionError), room.database.transaction() as session:
        room.shelf.put(a_candidate("2"), report=REPORT, signer=NIGHT, session=session)
        raise ZeroDivisionError
    assert room.states() == {} and room.acts() == []
    with room.database.transaction() as session:
        room.shelf.put(a_candidate("2"), report=REPORT, signer=NIGHT, session=session, plots={"roc.png": b"png"})
    assert room.states() == {"2": "shelved"} and room.shelf.plots(room.shelf.listing()[0].digest) == {"roc.png": b"png"}


def test_only_the_promoter_promotes(room: Room) -> None:
    """The night job's key signs no statement, the promoter's no bundle, and a foreign key neither."""
    digest = room.shadowed("2")
    foreign = signing.KeySigner(Ed25519PrivateKey.generate())
    for signer in (NIGHT, RELEASE, foreign):
        with pytest.raises(Untrusted, match="No trusted key"):
            room.shelf.promote(digest, person="phil", signer=signer)
    for signer in (PROMOTER, foreign):
        with pytest.raises(Untrusted, match="No trusted key"):
            room.shelf.put(a_candidate("3"), report=REPORT, signer=signer)
    assert room.live_version() == "shipped" and room.states() == {"2": "shadow"}
    assert not [path for path in room.folder.iterdir() if path.name.startswith(".")]


def replayed_in_its_row(room: Room) -> None:
    room.sql("UPDATE live_statement SET envelope = :old WHERE number = 2", old=room.envelope(1))


def replayed_as_a_new_number(room: Room) -> None:
    room.sql("INSERT INTO live_statement SELECT 9, digest, envelope, at FROM live_statement WHERE number = 1")


def newer_statement_deleted(room: Room) -> None:
    room.sql("DELETE FROM live_statement WHERE number = 2")
    room.sql("UPDATE shelf SET state = 'retired' WHERE state = 'live'")
    room.sql("UPDATE shelf SET state = 'live' WHERE version = '2'")


def all_statements_deleted(room: Room) -> None:
    room.sql("DELETE FROM live_statement")


def statement_altered(room: Room) -> None:
    document = json.loads(room.envelope(2))
    document["payload"] = json.loads(room.envelope(1))["payload"]
    room.sql("UPDATE live_statement SET envelope = :it WHERE number = 2", it=json.dumps(document).encode())


def statement_of_a_foreign_key(room: Room) -> None:
    said = room.shelf.statements()[-1]
    room.sql(
        "UPDATE live_statement SET envelope = :it WHERE number = 2",
        it=signing.seal(said.to_bytes(), shelf.KIND, signing.KeySigner(Ed25519PrivateKey.generate())),
    )


def statement_of_the_night_key(room: Room) -> None:
    said = dataclasses.replace(room.shelf.statements()[-1], number=3)
    values = {"d": said.digest, "e": signing.seal(said.to_bytes(), shelf.KIND, NIGHT)}
    room.sql("INSERT INTO live_statement SELECT 3, :d, :e, at FROM live_statement WHERE number = 1", **values)


def the_named_digest_changed(room: Room) -> None:
    room.sql("UPDATE live_statement SET digest = (SELECT digest FROM shelf WHERE version = '2') WHERE number = 2")


def network_swapped(room: Room) -> None:
    other = readers.network() + b"\x00"
    (room.shelf.listing()[0].folder / bundle.NETWORK).write_bytes(other)


def threshold_altered(room: Room) -> None:
    file = room.shelf.listing()[0].folder / bundle.ENVELOPE
    envelope = json.loads(file.read_bytes())
    manifest = room.shelf.live().manifest
    easier = dataclasses.replace(manifest, thresholds=dataclasses.replace(manifest.thresholds, rule_out=0.9))
    envelope["payload"] = json.loads(signing.seal(easier.to_bytes(), bundle.KIND, NIGHT))["payload"]
    file.write_bytes(json.dumps(envelope).encode())


def bundle_unsigned(room: Room) -> None:
    file = room.shelf.listing()[0].folder / bundle.ENVELOPE
    file.write_bytes(json.dumps({**json.loads(file.read_bytes()), "signatures": []}).encode())


def bundle_of_a_foreign_key(room: Room) -> None:
    folder = room.shelf.listing()[0].folder
    a_candidate("3").seal(folder, signing.KeySigner(Ed25519PrivateKey.generate()))


def older_bundle_in_its_folder(room: Room) -> None:
    newer, older = (next(s.folder for s in room.shelf.listing() if s.version == version) for version in "32")
    shutil.rmtree(newer)
    shutil.copytree(older, newer)


def file_added(room: Room) -> None:
    (room.shelf.listing()[0].folder / "more.bin").write_bytes(b"more")


def refused_in_the_database(room: Room) -> None:
    room.sql("UPDATE shelf SET state = 'refused' WHERE state = 'live'")


ATTACKS: dict[Callable[[Room], None], str] = {
    replayed_in_its_row: "another one was put in its place",
    replayed_as_a_new_number: "another one was put in its place",
    newer_statement_deleted: "number 2 was seen before",
    all_statements_deleted: "number 2 was seen before",
    statement_altered: "No trusted key",
    statement_of_a_foreign_key: "No trusted key",
    statement_of_the_night_key: "No trusted key",
    the_named_digest_changed: "another one was put in its place",
    network_swapped: "not the file that was signed",
    threshold_altered: "No trusted key",
    bundle_unsigned: "signed by: nobody",
    bundle_of_a_foreign_key: "No trusted key",
    older_bundle_in_its_folder: "they were swapped",
    file_added: "that no one signed",
    refused_in_the_database: "holds as refused",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("remembers", [True, False], ids=["same process", "new process"])
def test_attacks(room: Room, attack: Callable[[Room], None], remembers: bool) -> None:
    """An old, altered, swapped or foreign statement or bundle is Untrusted, with the reason."""
    room.promoted("2")
    room.promoted("3")
    assert room.live_version() == "3"
    attack(room)
    with pytest.raises(Untrusted, match=ATTACKS[attack]):
        (room.shelf if remembers else room.opened()).live()


def test_an_old_statement_file(room: Room) -> None:
    """The file beside the bundles is only ever behind: an old one changes nothing, a newer one unmasks the database."""
    room.promoted("2")
    old = (room.folder / shelf.STATEMENT).read_bytes()
    room.promoted("3")
    (room.folder / shelf.STATEMENT).write_bytes(old)
    assert room.live_version() == "3" and (room.folder / shelf.STATEMENT).read_bytes() != old


def test_after_an_older_database(room: Room) -> None:
    """When an older database was put back, a person's new word is numbered above all that was ever seen."""
    room.promoted("2")
    room.promoted("3")
    newer_statement_deleted(room)
    digest = next(each.digest for each in room.shelf.listing() if each.version == "2")
    assert room.opened().promote(digest, person="phil", signer=PROMOTER).number == 3
    assert room.live_version() == "2"


def test_a_new_promoter_after_the_key_was_lost(room: Room) -> None:
    """Nothing is live under a new promoter's key until a person says so with it, numbered above all that was said."""
    room.promoted("2")
    digest = room.promoted("3")
    new = signing.KeySigner(Ed25519PrivateKey.generate())
    believed = signing.Verifier.of(
        *((key, kinds) for key, kinds in VERIFIER.keys.values() if shelf.KIND not in kinds),
        (new.key.public_key(), frozenset({shelf.KIND})),
    )
    changed = Shelf(room.folder, room.database, believed, home=lambda: room.home)
    with pytest.raises(Untrusted, match="No trusted key"):
        changed.live()
    with pytest.raises(Untrusted, match="No trusted key"):  # the old one says nothing any more
        changed.promote(digest, person="phil", signer=PROMOTER)
    assert changed.promote(digest, person="phil", signer=new).number == 3
    assert changed.live().digest == digest and changed.statements()[-1].person == "phil"


def test_a_bundle_that_does_not_verify_is_not_promoted(room: Room) -> None:
    """Promotion verifies first: an altered bundle stays where it is."""
    digest = room.shadowed("2")
    (room.folder / digest / bundle.NETWORK).write_bytes(b"else")
    with pytest.raises(Untrusted):
        room.shelf.promote(digest, person="phil", signer=PROMOTER)
    assert room.states() == {"2": "shadow"} and room.live_version() == "shipped"


def test_power_fails_after_the_promotion(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """A promotion is whole when the database has it: the file that lags behind catches up by itself."""
    room.promoted("2")
    digest = room.shadowed("3")

    def cut(self: Shelf, envelope: bytes) -> None:
        if (self.folder / shelf.STATEMENT).read_bytes() != envelope:
            raise OSError("no power")

    monkeypatch.setattr(Shelf, "_write_file", cut)
    with pytest.raises(OSError, match="no power"):
        room.shelf.promote(digest, person="phil", signer=PROMOTER)
    monkeypatch.undo()
    before = (room.folder / shelf.STATEMENT).read_bytes()
    assert room.live_version() == "3" and (room.folder / shelf.STATEMENT).read_bytes() != before


def test_power_fails_while_a_bundle_is_made(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle on the disk is whole or absent, and is made by the next attempt."""
    candidate, seal = a_candidate("2"), Candidate.seal

    def cut(self: Candidate, folder: Path, signer: signing.Signer) -> None:
        seal(self, folder, signer)
        (folder / bundle.NETWORK).unlink()
        raise OSError("no power")

    monkeypatch.setattr(Candidate, "seal", cut)
    with pytest.raises(OSError, match="no power"):
        room.shelf.put(candidate, report=REPORT, signer=NIGHT)
    assert room.states() == {} and not (room.folder / candidate.digest).exists()
    monkeypatch.undo()
    assert room.shelf.put(candidate, report=REPORT, signer=NIGHT).state == "shelved"
    assert room.shelf.open(candidate.digest).manifest.version == "2"


def test_on_postgresql(tmp_path: Path) -> None:
    """The shelf works on PostgreSQL as on SQLite."""
    with postgres.running("site") as addresses:
        room = Room(tmp_path)
        room.database = database.open(addresses["site"])
        room.shelf = room.opened()
        room.promoted("2")
        room.shelf.roll_back(person="ada", signer=PROMOTER)
        assert room.live_version() == "shipped" and room.shelf.standing().number == 2
        room.promoted("3")
        digest, said = room.shadowed("4"), threading.Barrier(2)

        def speaks(one: Callable[[Shelf], object]) -> str:
            shelf = room.opened()
            said.wait()
            try:
                one(shelf)
            except Misconfigured as why:
                return str(why)
            return ""

        def promotes(shelf: Shelf) -> object:
            return shelf.promote(digest, person="phil", signer=PROMOTER)

        def goes_back(shelf: Shelf) -> object:
            return shelf.roll_back(person="ada", signer=PROMOTER)

        with futures.ThreadPoolExecutor(2) as people:
            heard = list(people.map(speaks, (promotes, goes_back)))
        assert "" in heard and all(each in ("", shelf.SPOKEN) for each in heard), heard
        numbers = [said.number for said in room.shelf.statements()]
        assert numbers == list(range(1, len(numbers) + 1)) and audit.verify(room.database).sound
        room.opened().live()
        room.database.close()
