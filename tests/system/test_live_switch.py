"""The product as `serve` runs it: a bundle reads along, becomes live, and is rolled back, without a restart."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from busgen_cds import app, settings
from busgen_cds.operations import serving
from tests.hospital import Scanner, study_uid
from tests.images import breast_study
from tests.store.test_shelf import REPORT, a_candidate

PASSPHRASE = "a passphrase for tests"
TEXT = """
[site]
name = "Switching"
prevalence = 0.3
[listener]
host = "127.0.0.1"
port = 0
processes = 0
free_bytes = 0
check_called_ae = false
allow = [{ ae_title = "US_ROOM_1" }]
[reader]
device = "cpu"
[study]
silence_seconds = 0.5
"""


def wait(true: Callable[[], Any], what: str, seconds: float = 200) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := true():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"{what} (waited {seconds:g} s)")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shadow_promote_roll_back_while_serving(tmp_path: Path) -> None:
    """While the product serves: shipped bundle reads, a candidate reads along, is promoted, and is rolled back."""
    chosen = settings.read(app.found(tmp_path / "site", TEXT, PASSPHRASE))
    with serving.receiving(chosen) as port, serving.reading(chosen) as site:
        scanner = Scanner(port)

        def read_by(seed: int) -> str:
            files = breast_study(1, seed=seed)
            scanner.sends(files)
            ref = wait(lambda: site.inbox.find_study(study_uid(files)), "not received")
            return str(wait(lambda: site.results.current(ref), "not read").bundle_digest)

        shipped = site.shelf.live().digest
        candidate = site.shelf.put(a_candidate("2"), report=REPORT, signer=app.night_signer(chosen)).digest
        site.shelf.to_shadow(candidate, person="phil")
        assert read_by(1) == shipped
        (beside,) = wait(lambda: site.shadow.beside(candidate), "not read in shadow")
        assert beside.live_digest == shipped and beside.word != "failed"
        with app.opened_site(chosen) as another:  # as another process does it
            app.promote(another, candidate, person="phil", passphrase=PASSPHRASE)
            wait(lambda: read_by(int(time.monotonic() * 1000)) == candidate, "the candidate does not read")
            app.roll_back(another, person="ada", passphrase=PASSPHRASE)
            wait(lambda: read_by(int(time.monotonic() * 1000)) == shipped, "the shipped bundle does not read again")
        assert site.jobs.engine_stopped() is None
        wait(lambda: site.drift.filled(shipped) >= 2 and site.drift.filled(candidate) >= 1, "not counted for drift")
