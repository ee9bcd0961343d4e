"""Whoever steals the disk of a site that ran finds nobody on it: every file of its folder is searched."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.security import running
from tests.security.running import Running, Sent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
PICTURE_HEADS = (b"\x89PNG\r\n", b"\xff\xd8\xff\xe0", b"DICM\x02\x00", b"\xff\x4f\xff\x51", b"RIFF")


@dataclass
class Story:
    """A site that received, answered, showed and shredded, and was stopped."""

    folder: Path
    sent: list[Sent]
    pictures: list[bytes]  # pieces of what was shown and sent out
    shredded: Sent
    sealed: list[bytes]  # what stood in the database of the shredded study


@pytest.fixture(scope="module")
def story(made: Running) -> Story:
    site, sent, pictures = made if made.process else made.starts(), [running.telling_study(n) for n in (1, 4)], []
    for each in sent:
        site.receives(each)
        pictures += running.pieces_of(site.answers(each))
    _is_read(site, sent[0])
    sealed = _sealed(site, sent[1])
    said = site.runs("shred", sent[1].uid, "--yes")
    assert "is shredded" in said and not any(word in said for word in _all_words(sent) if word != sent[1].uid)
    site.stops()
    return Story(site.folder, sent, pictures, sent[1], sealed)


def _is_read(site: Running, sent: Sent) -> None:
    """A person looks at the study: list, page, picture and its objects."""
    with site.reader() as browser:
        ref = site.site().inbox.find_study(sent.uid)
        assert browser.get("/worklist", params={"q": sent.words["patient id"]}).status_code == 200
        page = browser.get(f"/studies/{ref}")
        assert page.status_code == 200 and sent.words["patient id"] in page.text
        assert browser.get(f"/studies/{ref}/frames/{sent.words['SOP Instance UID']}/1").status_code == 200
        assert browser.get("/audit", params={"patient": sent.words["patient id"]}).status_code in (200, 403)
        assert browser.get("/studies/" + sent.words["patient id"]).status_code == 404


def _sealed(site: Running, sent: Sent) -> list[bytes]:
    """The beginnings of what is kept of a study: its key, its names, its result and its files."""
    opened = site.site()
    ref = opened.inbox.find_study(sent.uid)
    with opened.database.reading() as session:
        connection = session.connection()
        found = list(connection.exec_driver_sql("SELECT key, uid, patient FROM study WHERE ref = ?", (ref,)).one())
        query = "SELECT document FROM result WHERE study_ref = ? UNION ALL SELECT data FROM rendered JOIN result ON "
        query += "result.ref = result_ref WHERE study_ref = ?"
        found += [row[0] for row in connection.exec_driver_sql(query, (ref, ref))]
        found += [row[0] for row in connection.exec_driver_sql("SELECT key FROM instance WHERE study_ref = ?", (ref,))]
    (instance,) = opened.inbox.instances(str(ref))
    kept = next(path for path in (site.folder / "data" / "inbox" / "kept").rglob(instance.ref))
    return [each[8:72] for each in found] + [kept.read_bytes()[100:164]]


def _all_words(sent: list[Sent]) -> list[str]:
    return sorted({word for each in sent for word in each.words.values()})


def _spellings(word: str) -> Iterator[bytes]:
    """As texts end up in files: encodings, cases, hexadecimal, base64 at any alignment; a name also by its parts."""
    parts = {word, word.replace("^", " "), *(part for part in word.split("^") if len(part) > 5)}
    for text in {spelt for part in parts for spelt in (part, part.upper(), part.lower())}:
        raw = text.encode()
        yield from (raw, text.encode("utf-16-le"), text.encode("utf-16-be"), raw.hex().encode(), raw[::-1])
        for shift in range(3):
            inner = base64.b64encode(bytes(shift) + raw)
            yield inner[4 if shift else 0 : len(inner) // 4 * 4 - 4]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def test_no_name_or_identifier_is_on_the_disk(story: Story) -> None:
    """No file of the site's folder (databases, logs, temporary files) holds a name or identifier that was sent."""
    files = {path: path.read_bytes() for path in _files(story.folder)}
    assert len(files) > 8 and any(path.name == "workflows.sqlite" for path in files)
    needles = {spelt: word for word in _all_words(story.sent) for spelt in _spellings(word) if len(spelt) >= 6}
    found = [(str(path), word) for path, data in files.items() for spelt, word in needles.items() if spelt in data]
    assert found == []


def test_no_picture_is_on_the_disk(story: Story) -> None:
    """No piece of an image, received or made, and no picture's or DICOM file's head stands in any file."""
    assert len(story.pictures) > 10
    pieces = [piece for each in story.sent for piece in each.pixels] + story.pictures
    for path in _files(story.folder):
        data = path.read_bytes()
        assert not any(piece in data for piece in pieces), path
        assert not any(head in data for head in PICTURE_HEADS), path


def test_what_is_kept_looks_like_noise(story: Story) -> None:
    """Every kept file has the entropy of random bytes: no structure of an image shows through."""
    kept = [path for path in _files(story.folder / "data" / "inbox" / "kept") if path.stat().st_size > 4096]
    assert kept
    for path in kept:
        data = path.read_bytes()[16:]
        bits = -sum(n / len(data) * math.log2(n / len(data)) for n in Counter(data).values())
        assert bits > 7.99, path


def test_the_log_names_nobody(story: Story) -> None:
    """What the running site logged speaks of studies by reference only."""
    log = (story.folder / "serve.log").read_text()
    assert "Listening as" in log and "Worker" in log
    for word in _all_words(story.sent):
        for part in (word, *word.split("^")):
            assert part not in log


def test_nothing_of_a_shredded_study_is_left_in_the_pages(story: Story) -> None:
    """After shredding and vacuum no file holds the study's keys, sealed names, results, objects or images any more."""
    assert len(story.sealed) >= 7
    for path in _files(story.folder):
        data = path.read_bytes()
        assert not any(each and each in data for each in story.sealed), path


def test_the_search_finds_what_is_there(tmp_path: Path, story: Story) -> None:
    """The search itself is tried: a name put into a file in any spelling is found."""
    word = story.sent[0].words["name"]
    for spelt in _spellings(word):
        assert any(each in b"\0" + spelt + b"\0" for each in _spellings(word))
    assert word.encode() in {*_spellings(word)}
