"""How fast is a site's store asked when it is full? `python -m tests.bench.queries [--studies 100000]`

Rows are written straight into the tables; every question is then asked through the store, as commands and pages do.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from busgen_cds.flows import queue
from busgen_cds.store.database import Base
from busgen_cds.store.vault import Vault
from tests.hospital import SITE_KEY, Site

INSTANCES = 3
START = datetime(2026, 1, 1, tzinfo=UTC)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder))
        fill(site, chosen.studies)
        figures = {"studies": chosen.studies, "milliseconds": ask(site, chosen.studies)}
        site.close()
    print(json.dumps(figures, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def ask(site: Site, studies: int) -> dict[str, dict[str, float]]:
    results = site.results
    last = _ref("result", studies - 1)
    now = START + timedelta(days=400)
    questions: dict[str, Callable[[], Any]] = {
        "list newest": lambda: results.listing(limit=100),
        "list page in the middle": lambda: results.listing(before=START + timedelta(minutes=studies // 2)),
        "search patient": lambda: results.search("PATIENT-77"),
        "search study": lambda: results.search("1.2.77"),
        "search nothing": lambda: results.search("nobody"),
        "history": lambda: results.history(_ref("study", 77)),
        "deliveries of a result": lambda: results.deliveries.of(last),
        "queue": lambda: queue.items(site.inbox, results, site.jobs, now=now),
        "sweep at start": lambda: results.unread(settled_before=now),
        "sweep": lambda: results.unread(settled_before=now, received_after=START + timedelta(minutes=studies - 60)),
    }
    return {name: _milliseconds(question) for name, question in questions.items()}


def _milliseconds(question: Callable[[], Any]) -> dict[str, float]:
    """The best of three, by the clock and in processor time of this process, where SQLite works and PostgreSQL not."""
    question()
    clock, processor = [], []
    for _ in range(3):
        began, busy = time.perf_counter(), time.process_time()
        question()
        clock.append(time.perf_counter() - began)
        processor.append(time.process_time() - busy)
    return {"clock": round(1000 * min(clock), 1), "processor": round(1000 * min(processor), 1)}


def fill(site: Site, studies: int) -> None:
    tables = Base.metadata.tables
    vault = Vault(SITE_KEY)
    sealed = vault.seal_text("x" * 40)
    rows: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
        "study": lambda n: iter([_study(n, vault, sealed)]),
        "instance": lambda n: (_instance(n, i, sealed) for i in range(INSTANCES)),
        "result": lambda n: iter([_result(n, sealed)]),
        "delivery": lambda n: iter([_delivery(n, studies)]),
    }
    with site.database.transaction() as session:
        for name, make in rows.items():
            for start in range(0, studies, 5000):
                batch = [row for n in range(start, min(studies, start + 5000)) for row in make(n)]
                session.execute(sa.insert(tables[name]), batch)


def _ref(kind: str, number: int) -> str:
    return f"{kind}-{number:020d}"


def _study(n: int, vault: Vault, sealed: bytes) -> dict[str, Any]:
    return {
        "ref": _ref("study", n), "uid_blind": vault.blind(f"1.2.{n}"), "uid": sealed, "patient": sealed,
        "patient_blind": vault.blind(f"PATIENT-{n // 2}"), "key": vault.wrap(bytes(32)),
        "first_received_at": START + timedelta(minutes=n), "two_patients": False,
        "held": "held for a reason" if n % 20_000 == 0 else None,
    }  # fmt: skip


def _instance(n: int, i: int, sealed: bytes) -> dict[str, Any]:
    return {
        "ref": _ref(f"i{i}", n), "study_ref": _ref("study", n), "sop_uid_blind": f"{n}.{i}", "sop_uid": sealed,
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.6.1", "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "sha256": "0" * 64, "size": 480_000, "received_at": START + timedelta(minutes=n), "calling_ae": "US_ROOM_1",
        "key": sealed, "conflict": False,
    }  # fmt: skip


def _result(n: int, sealed: bytes) -> dict[str, Any]:
    return {
        "ref": _ref("result", n), "study_ref": _ref("study", n), "revision": 1, "evidence_digest": f"{n:064d}",
        "bundle_digest": "b" * 64, "instances": INSTANCES, "outcome": "assessed", "reason": "", "birads": "4A",
        "probability": 0.05, "images_read": INSTANCES, "made_at": START + timedelta(minutes=n),
        "current": True, "supersedes": None, "alarm": "It fell." if n % 20_000 == 0 else "", "accession_blind": f"{n}",
        "document": sealed,
    }  # fmt: skip


def _delivery(n: int, studies: int) -> dict[str, Any]:
    waits = n >= studies - 50
    return {
        "ref": _ref("delivery", n), "result_ref": _ref("result", n), "study_ref": _ref("study", n),
        "destination": "pacs", "state": "waiting" if waits else "done", "since": START, "tries": 0,
        "next_try_at": START, "reason": "", "transaction_uid": "",
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
