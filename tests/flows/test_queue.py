"""What went wrong stays in sight, with its reason, until somebody puts it right."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pydicom
import pytest

from busgen_cds.dicom import identity
from tests import hospital, images
from tests.flows.test_read_study import waiting
from tests.hospital import a_lesion


def test_a_corrupt_image_is_in_the_queue(tmp_path: Path) -> None:
    """An image that cannot be filed gets an error status, is kept in quarantine, and stands in the queue with why."""
    with hospital.opened(tmp_path) as it:
        with pytest.raises(ConnectionError, match="not acknowledged"):
            it.scanner.sends([_without(a_lesion(1)[0], "StudyInstanceUID")])
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        assert len(it.reports(study)) == 1
        [item] = [one for one in waiting(it) if one.state == "quarantined"]
        assert item.stuck
        assert "US_ROOM_1" in item.reason


def test_other_content_under_a_known_uid_is_in_the_queue(tmp_path: Path) -> None:
    """Another image under a known SOP Instance UID is set aside and shown; the first one stays what is read."""
    with hospital.opened(tmp_path) as it:
        image = a_lesion(1)[0]
        study = it.scanner.sends([image])
        it.settles()
        other = pydicom.dcmread(io.BytesIO(image))
        other.PixelData = bytes(len(other.PixelData))
        with contextlib.suppress(ConnectionError):  # it may be told so
            it.scanner.sends([images.part10(other)])
        it.settles()
        assert [one.state for one in waiting(it)] == ["set aside"]
        assert it.reader.reads == [study]
        assert len(it.reports(study)) == 1


def test_an_upgrade_makes_no_other_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is sent again after the product was upgraded is the image that was kept."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        monkeypatch.setattr(identity, "IMPLEMENTATION_VERSION", "BUSGENCDS_9.9")
        it.scanner.sends(a_lesion(1))
        it.settles()
        assert it.reader.reads == [study] and waiting(it) == []


def test_what_is_received_reading_and_delivering(tmp_path: Path) -> None:
    """The queue follows a study: receiving, reading, delivering, and then nothing."""
    with hospital.opened(tmp_path, waits=hospital.quicker(silence=3.0, after_close=3.0)) as it:
        it.pacs.goes_down()
        it.reader.gate.clear()
        it.scanner.sends(a_lesion(1))
        for state in ("receiving", "reading", "delivering"):
            it.waits_until(lambda: [one.state for one in waiting(it)] == [state], otherwise=f"never {state}")  # noqa: B023
            if state == "reading":
                it.reader.gate.set()
        it.pacs.comes_up()
        it.settles()
        assert waiting(it) == []


def _without(data: bytes, keyword: str) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data))
    del dataset[keyword]
    return images.part10(dataset)
