"""What an operator asks of a site, as plain documents: for the command line and the pages alike.

No document names a patient; a study is named by its opaque reference.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

from busgen_cds import summary
from busgen_cds.app import Site
from busgen_cds.errors import Misconfigured
from busgen_cds.flows import queue as waiting
from busgen_cds.store import refusals
from busgen_cds.study import NotForUs


def queue(site: Site) -> list[dict[str, Any]]:
    """What waits and what is stuck, stuck first."""
    now = datetime.now(UTC)
    found = waiting.items(site.inbox, site.results, site.jobs, now=now, refused=refusals.lately(site.database, now))
    return [dataclasses.asdict(item) for item in found]


def waiting_study(site: Site, begins: str) -> str:
    """The one study in the queue whose reference begins so."""
    known: set[str] = {each["ref"] for each in queue(site) if each["what"] in ("study", "delivery", "object")}
    found = [ref for ref in known if ref.startswith(begins)]
    if len(found) != 1:
        raise Misconfigured(f"{len(found)} studies in the queue begin with {begins!r}: see `busgen-cds queue`.")
    return found[0]


def result(site: Site, result_ref: str) -> dict[str, Any]:
    """One result with its objects and their deliveries."""
    shown = site.results.show(result_ref)
    if shown is None:
        raise Misconfigured(f"There is no result {result_ref!r}: see `busgen-cds results list`.")
    uids = [each.sop_instance_uid for each in shown.objects]
    answer = shown.answer
    said = summary.of_not_for_us(answer, 0.0) if isinstance(answer, NotForUs) else summary.of_result(answer, uids)
    return {
        "result": shown.entry.ref,
        "study": shown.entry.study_ref,
        "made": shown.entry.made_at.isoformat(),
        "current": shown.entry.current,
        "alarm": shown.entry.alarm,
        **said,
        "deliveries": [
            {"destination": d.destination, "state": d.state, "tries": d.tries, "reason": d.reason}
            for d in shown.deliveries
        ],
        "delivered": [
            {"kind": d.kind, "destination": d.destination, "state": d.state, "reason": d.reason}
            for d in shown.delivered
        ],
    }
