"""`check`: systems that do not answer make nobody wait; the record is held against its checkpoints."""

from __future__ import annotations

import time
from pathlib import Path

import sqlalchemy as sa

from busgen_cds import app, settings
from busgen_cds.operations import checks, housekeeping
from busgen_cds.store import audit, site_keys

NODE = """
[[nodes]]
name = "{name}"
ae_title = "NOBODY"
host = "{host}"
port = 104
"""


def test_nodes_that_do_not_answer(tmp_path: Path) -> None:
    """Nodes are asked at once and for a few seconds; it is said for whom it waits, and what to check."""
    text = '[site]\nname = "Here"\nprevalence = 0.1\n[listener]\nallow = []\n'
    silent = {f"silent{number}": f"192.0.2.{number}" for number in range(1, 5)}  # RFC 5737: nobody is there
    chosen = settings.parse(text + "".join(NODE.format(name=n, host=h) for n, h in silent.items()), tmp_path / "s.toml")
    told: list[str] = []
    began = time.monotonic()
    found = checks._echoes(chosen, told.append)
    assert time.monotonic() - began < 4 * checks.ECHO_SECONDS
    assert len(told) == 1 and all(name in told[0] for name in silent)
    assert [each.good for each in found] == [False] * 4
    assert all("check host, port, firewall, and that our title 'BUSGEN_CDS' is known there" in e.found for e in found)


def test_a_cut_tail_of_the_record(tmp_path: Path) -> None:
    """`check` holds the record against the site's checkpoints: a tail that was cut since is found, and named."""
    text = '[site]\nname = "Here"\nprevalence = 0.1\n[listener]\nallow = []\n[record]\ncheckpoints = "points"\n'
    chosen = settings.read(app.found(tmp_path / "site", text, site_keys.new_passphrase()))
    with app.opened_site(chosen) as site:
        with site.database.transaction() as session:
            audit.record(session, *(audit.Act("log-in", f"reader {n}") for n in range(9)))
        assert "against no checkpoint: a cut tail would not show" in _record(chosen).found
        housekeeping.write_checkpoint(site)
        assert _record(chosen).good and "9 entries, against 1 checkpoint." in _record(chosen).found
        with site.database.transaction() as session:
            session.execute(sa.text("DELETE FROM act WHERE number > 5"))
    assert not _record(chosen).good
    assert "A signed checkpoint names entry 9; the record ends before." in _record(chosen).found


def _record(chosen: settings.Settings) -> checks.Checked:
    return next(each for each in checks._site(chosen, lambda _line: None) if each.what == "record of acts")
