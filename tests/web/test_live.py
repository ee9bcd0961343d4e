"""News of changes: who listens is told, whatever happened in between."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from busgen_cds.store.audit import Act
from busgen_cds.web import live
from busgen_cds.web.front import Front
from tests.web.practice import Practice


def test_news_outlive_a_database_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that cannot be asked for a while silences nobody: the next change is told to who still listens."""
    monkeypatch.setattr(live, "LOOK_EVERY", 0.05)
    practice = Practice(tmp_path)
    front = Front(practice.site())

    def renamed(old: str, new: str) -> None:
        with practice.database.transaction() as session:
            session.execute(sa.text(f"ALTER TABLE {old} RENAME TO {new}"))

    async def listens() -> None:
        async with live.News(front).listening() as changed:
            while not changed.is_set():
                front.note(Act("record exported", "audi"))
                await asyncio.sleep(0.1)
            renamed("act", "away")
            await asyncio.sleep(0.5)
            changed.clear()
            renamed("away", "act")
            front.note(Act("record exported", "audi"))
            await asyncio.wait_for(changed.wait(), 30)

    with ThreadPoolExecutor(1) as elsewhere:  # a browser that other tests have opened keeps a loop in this thread
        elsewhere.submit(asyncio.run, listens()).result()
    practice.close()
