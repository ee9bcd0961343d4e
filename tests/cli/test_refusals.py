"""Who is refused at the door is named to the operator, with what would let it in."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from busgen_cds import app, settings
from busgen_cds.cli.site import settings_text
from busgen_cds.operations import documents
from tests.dicom.raw import Hung, Scanner

ALLOW = ["US1@10.9.9.9", "US2"]


def test_a_refused_sender_stands_in_the_queue(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong called title, an unknown title, a wrong address: logged seldom, and in the queue with a remedy."""
    text = settings_text("Here", 0.1, ALLOW, "", 0).replace('["10.9.9.9"]', '["10.9.9.9", "127.0.0.1"]', 1)
    text = text.replace("[listener]", '[listener]\nhost = "127.0.0.1"\nprocesses = 0')
    chosen = settings.read(app.found(tmp_path / "site", text, "a passphrase of some length"))
    listener = app.listener(chosen)
    listener.start()
    try:
        with caplog.at_level(logging.WARNING, logger="busgen_cds"):
            for calling, called in (("US2", "OTHER"), ("STRANGER", "BUSGEN_CDS"), ("STRANGER", "BUSGEN_CDS")):
                _refused(listener.port, calling, called)
                time.sleep(0.5)  # what is said twice in one breath is written down once
            _refused(listener.port, "US1", "BUSGEN_CDS")
    finally:
        listener.stop(2)
    logged = [each.getMessage() for each in caplog.records if each.getMessage().startswith("Refused")]
    assert len(logged) == 3 and "'STRANGER'" in logged[1]
    reasons = _reasons(chosen)
    assert len(reasons) == 3
    assert [each for each in reasons if '"US2" called "OTHER"' in each and "listener.ae_title" in each]
    (stranger,) = (each for each in reasons if each.startswith('"STRANGER"'))
    assert "2 times" in stranger and '{ ae_title = "STRANGER", addresses = ["127.0.0.1"] }' in stranger
    assert [each for each in reasons if each.startswith('"US1"') and "that title's addresses" in each]


def _refused(port: int, calling: str, called: str) -> None:
    with Scanner(port, calling, called=called) as scanner, pytest.raises(Hung, match="rejected"):
        scanner.associate()


def _reasons(chosen: settings.Settings) -> list[str]:
    with app.opened_site(chosen) as site:
        until = time.monotonic() + 30
        while True:
            found = [each["reason"] for each in documents.queue(site) if each["what"] == "association"]
            if len(found) >= 3 or time.monotonic() > until:
                return found
            time.sleep(0.2)
