"""What docs/operations.md tells a site to do: its commands exist, and a backup taken while the site runs comes back."""

from __future__ import annotations

import re
import shutil
import sqlite3
import threading
from pathlib import Path

import typer.main

from busgen_cds import cli
from busgen_cds.store import audit
from busgen_cds.store.audit import Act
from tests.images import breast_study
from tests.web.practice import Practice, Says

DOC = Path(__file__).parent.parent / "docs" / "operations.md"


def test_the_verbs_exist() -> None:
    """Each verb of the program that the page names is one."""
    program = typer.main.get_command(cli.app)
    verbs = program.commands  # type: ignore[attr-defined]
    named = re.findall(r"(?:`|/bin/)busgen-cds ([a-z]+)(?: ([a-z]+))?(?=[ `])", DOC.read_text())
    assert len(named) >= 6
    for verb, under in named:
        assert verb in verbs, verb
        group = verbs.get(verb)
        assert not under or under in getattr(group, "commands", {under}), (verb, under)


def test_a_backup_comes_back(tmp_path: Path) -> None:
    """A backup taken while acts are written opens elsewhere with the site's key: images, answers, a sound record."""
    (tmp_path / "site").mkdir()
    (tmp_path / "restored").mkdir()
    site = Practice(tmp_path / "site")
    ref = site.receives(breast_study(1, seed=5, patient_id="PAT-5"))
    site.answers(ref, Says("4B"))
    stop = threading.Event()

    def works() -> None:
        while not stop.is_set():
            with site.database.transaction() as session:
                audit.record(session, Act("node asked", "otto", "PACS"), at=site.clock())

    writer = threading.Thread(target=works)
    writer.start()
    try:
        here, there = (sqlite3.connect(tmp_path / place / "site.sqlite") for place in ("site", "restored"))
        here.backup(there, pages=50)
        there.close()
        shutil.copytree(tmp_path / "site" / "inbox", tmp_path / "restored" / "inbox")
    finally:
        stop.set()
        writer.join()
        site.close()
    restored = Practice(tmp_path / "restored")
    assert audit.verify(restored.database).sound
    slide = restored.screen.slides(ref)[0]
    assert restored.screen.picture(ref, slide.source.sop_instance_uid, 1).startswith(b"\x89PNG")
    entry = restored.results.history(ref)[0]
    assert restored.results.show(entry.ref).answer.birads == "4B"  # type: ignore[union-attr]
    assert restored.patient(ref) == "PAT-5"
    restored.close()
