"""`results list` as somebody at the terminal reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from busgen_cds import app, cli
from busgen_cds.cli.site import settings_text
from tests import images
from tests.web import practice
from tests.web.practice import Practice, Says


def test_triage_is_the_sites_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`results list --triage` lists as the site's worklist does, whatever rule the site has chosen."""
    file = app.found(tmp_path / "site", settings_text("Here", 0.1, ["ANY"], "", 0), "a passphrase of some length")
    monkeypatch.setattr(practice, "SITE_KEY", bytes.fromhex((file.parent / "keys" / "site.key").read_text()))
    own = Practice(tmp_path, database_url=f"sqlite:///{file.parent / 'data' / 'busgen-cds.sqlite'}")
    said = [Says("3"), Says(None), Says("4A"), Says(declines="Doppler only"), Says("5"), Says(not_for_us="an X-ray")]
    for number, says in enumerate(said):
        own.answers(own.receives(images.breast_study(1, seed=number), minutes_ago=60 - number), says)
    own.close()

    def listed(*options: str) -> list[str]:
        done = CliRunner().invoke(cli.app, ["results", "list", "-c", str(file), "--json", *options])
        assert done.exit_code == 0, done.output
        return [row["birads"] or row["outcome"] for row in json.loads(done.output)]

    assert listed() == ["not-for-us", "5", "declined", "4A", "assessed", "3"]
    assert listed("--triage") == ["5", "4A", "declined", "3", "assessed", "not-for-us"]
    assert "no lesion found" in CliRunner().invoke(cli.app, ["results", "list", "-c", str(file)]).output
    file.write_text(file.read_text() + '\n[triage]\norder = "arrival"\ndeclined_above = "4A"\n')
    assert listed("--triage", "--limit", "4") == ["5", "declined", "4A", "3"]
