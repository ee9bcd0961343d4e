"""The verbs of whoever answers for the data, at a site that runs meanwhile."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path

import pytest

from busgen_cds.store import rotation, vault
from tests import hospital, images
from tests.security import running
from tests.security.running import Running, Sent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def sent(made: Running) -> Sent:
    """A study that was received and answered."""
    study = running.telling_study(7)
    if made.process is None:
        made.starts()
    made.receives(study)
    made.answers(study)
    return study


def test_the_record_is_shown_by_person_patient_study_and_day(site: Running, sent: Sent, tmp_path: Path) -> None:
    """`audit show` and `export` filter by who, kind, patient, study and day; reading out is an act; no name shows."""
    words = sent.words
    every = site.says("audit", "show", "--limit", 500)
    by_patient = site.says("audit", "show", "--patient", words["patient id"], "--limit", 500)
    by_study = site.says("audit", "show", "--study", words["Study Instance UID"], "--limit", 500)
    by_number = site.says("audit", "show", "--study", words["accession number"], "--limit", 500)
    assert by_patient == by_study == by_number != [] and len(every) > len(by_patient)
    assert {act["kind"] for act in by_patient} >= {"instance received", "result made", "object sent"}
    assert site.says("audit", "show", "--kind", "object") != []
    assert (
        site.says("audit", "show", "--patient", "nobody") == site.says("audit", "show", "--until", "2020-01-01") == []
    )
    assert site.says("audit", "show", "--who", "US_ROOM_1") != []
    for wrong in (("--since", "yesterday"), ("--until", "9999-12-31"), ("--since", "0001-01-01T00:00+23:59")):
        assert "is not a day" in site.runs("audit", "show", *wrong, code=2)
        assert "is not a day" in site.runs("audit", "export", tmp_path / "none.ndjson", *wrong, code=2)
    assert not (tmp_path / "none.ndjson").exists()
    both = ("--study", words["Study Instance UID"], "--patient", "nobody")
    assert "a study or a patient" in site.runs("audit", "show", *both, code=2)
    site.runs("audit", "export", tmp_path / "acts.ndjson")
    lines = (tmp_path / "acts.ndjson").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(1, len(lines) + 1))
    assert any(act["kind"] == "record exported" for act in site.says("audit", "show"))
    assert not any(word in json.dumps(every) + "".join(lines) for word in words.values())


def test_a_cut_tail_shows_against_a_checkpoint(site: Running, tmp_path: Path) -> None:
    """A running site writes checkpoints by itself; a record whose tail is cut afterwards is found by `audit verify`."""
    folder = site.folder / "elsewhere" / "checkpoints"
    site.waits_until(lambda: list(folder.glob("*.checkpoint.json")), "no checkpoint was written")
    site.runs("audit", "checkpoint", "--to", tmp_path / "kept")
    assert site.says("audit", "verify", "--checkpoints", tmp_path / "kept")["sound"]
    copy = tmp_path / "copy"
    _copied(site, copy)
    with sqlite3.connect(copy / "data" / "busgen-cds.sqlite") as connection:
        last = connection.execute("SELECT max(number) FROM act").fetchone()[0]
        connection.execute("DELETE FROM act WHERE number > ?", (last - 12,))
    forged = Running(copy, site.pacs, site.port, site.web)
    verdict = forged.says("audit", "verify", "--checkpoints", tmp_path / "kept", code=1)
    assert not verdict["sound"] and "checkpoint names entry" in verdict["reason"]
    (file,) = (tmp_path / "kept").glob("*.checkpoint.json")
    file.write_bytes(file.read_bytes().replace(b'"sig":"', b'"sig":"AAAA'))
    forged.runs("audit", "verify", "--checkpoints", tmp_path / "kept", code=1)


def _copied(site: Running, to: Path) -> None:
    (to / "data").mkdir(parents=True)
    for name in ("busgen-cds.toml", "keys/site.key"):
        (to / name).parent.mkdir(exist_ok=True)
        (to / name).write_bytes((site.folder / name).read_bytes())
        (to / name).chmod(0o600)
    with sqlite3.connect(site.folder / "data" / "busgen-cds.sqlite") as source:
        source.execute("VACUUM INTO ?", (str(to / "data" / "busgen-cds.sqlite"),))


def test_the_site_key_changes_while_images_arrive(site: Running, sent: Sent) -> None:
    """`keys rotate` changes the key of a site that goes on receiving; `keys retire` takes the old away."""
    failed: list[BaseException] = []
    ending = threading.Event()

    def scanner() -> None:
        number = 0
        while not ending.is_set():
            number += 1
            try:
                hospital.Scanner(site.port).sends(images.breast_study(seed=900 + number, doppler="all"))
            except BaseException as error:
                failed.append(error)
            ending.wait(0.5)

    thread = threading.Thread(target=scanner)
    thread.start()
    try:
        said = site.runs("keys", "rotate")
    finally:
        ending.set()
        thread.join()
    assert failed == [] and "Nothing needs the older key" in said
    file = vault.KeyFile(str(site.folder / "keys" / "site.key"))
    assert len(file.keys()) == 2
    assert "1 older keys were taken away" in site.runs("keys", "retire") and len(file.keys()) == 1
    opened = site.site()
    assert rotation.left(opened.database, opened.vault) == []
    words = sent.words
    for text in (words["patient id"], words["accession number"], words["Study Instance UID"]):
        assert opened.results.search(text), text
    late = running.telling_study(8)
    site.receives(late)
    assert site.answers(late) and "no older key" in site.runs("keys", "retire")


def test_shredding_asks_for_a_study_and_proves_itself(site: Running) -> None:
    """`shred` lets go of one study that is named, proves it, and is refused a second time."""
    sent = running.telling_study(9)
    site.receives(sent)
    site.answers(sent)
    site.runs("shred", "no-such-study", "--yes", code=2)
    ref = str(site.site().inbox.find_study(sent.uid))
    assert f"{ref} is shredded" in site.runs("shred", sent.uid, "--yes")
    assert "shredded before" in site.runs("shred", ref, "--yes", code=2)
    with site.reader() as browser:
        assert browser.get("/worklist").status_code == 200
        assert browser.get(f"/studies/{ref}").status_code in (404, 409, 410)
    assert [line["kept"] for line in site.says("retention")] == ["for ever"] * 5
    assert "Let go: 0 studies" in site.runs("retention", "--now")


def test_a_running_site_is_rated(site: Running) -> None:
    """`check --security` tries the running site from outside: as a stranger at its DICOM port, and its pages."""
    found = {(each["control"], each["found"]) for each in site.says("check", "--security", code=0)}
    assert ("DICOM port", "a stranger's request for an association was turned away") in found
    assert ("pages", "they come with their protecting headers") in found
