"""`queue` as an operator reads it."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from busgen_cds import app, cli
from busgen_cds.cli import results
from busgen_cds.cli.site import settings_text
from busgen_cds.errors import Misconfigured
from busgen_cds.operations import documents

REFS = ("ab" * 16, "ac" * 16)
REASON = "The PACS rejected the association because it does not know our title " * 3


def row(ref: str, **more: Any) -> dict[str, Any]:
    return {
        "what": "delivery", "ref": ref, "state": "delivering", "destination": "pacs", "reason": REASON, "verb": "",
        "next_try_at": datetime.now(UTC) + timedelta(seconds=300), **more,
    }  # fmt: skip


def test_an_empty_queue_says_so(tmp_path: Path) -> None:
    """`queue` says that nothing waits."""
    file = app.found(tmp_path / "site", settings_text("Here", 0.1, ["ANY"], "", 0), "a passphrase of some length")
    done = CliRunner().invoke(cli.app, ["queue", "-c", str(file)])
    assert (done.exit_code, done.output.strip()) == (0, "Nothing waits.")


def test_nothing_is_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A wide terminal shows whole references and reasons, and when the next try is."""
    monkeypatch.setattr(results, "opened", nullcontext)
    monkeypatch.setattr(documents, "queue", lambda _site: [row(REFS[0])])
    monkeypatch.setattr(results.out, "width", 160)
    results.queue(config=Path("here"), retry=None, release=None, patient="", issuer="", resume=False, as_json=False)
    shown = capsys.readouterr().out
    assert REFS[0] in shown and "…" not in shown and "in 5 min" in shown
    assert all(word in shown for word in REASON.split())


def test_a_reference_may_be_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study of the queue is named by any beginning that no other has."""
    monkeypatch.setattr(documents, "queue", lambda _site: [row(ref) for ref in REFS])
    assert documents.waiting_study(None, "ab") == REFS[0]  # type: ignore[arg-type]
    for begins, count in (("a", 2), ("f", 0)):
        with pytest.raises(Misconfigured, match=f"{count} studies"):
            documents.waiting_study(None, begins)  # type: ignore[arg-type]
