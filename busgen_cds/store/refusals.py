"""Who was refused at the door lately, as the record of acts has it.

Rules:
- One line for each sender, title called, address and reason, with how often; nothing of a patient is in it.
- Who was let in afterwards, under the same title from the same address, is no longer in the list.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from busgen_cds.store.audit import ActRow
from busgen_cds.store.database import Database, table_of

REFUSED, ACCEPTED = "association refused", "association accepted"
LATELY = timedelta(days=7)
_LAST_ACTS = 50_000  # of the record; an older refusal is asked of the record itself
_acts = table_of(ActRow)

REMEDIES = {
    "it calls another title than ours": "let it call the title that stands in `listener.ae_title`",
    "no plain DICOM from this address": "if it may speak without TLS, add {address} to `listener.plain_from`",
    "its title is not on the list": "if it is yours, add {peer} to `listener.allow`",
    "its title may not come from this address": "if it is yours, add {address} to that title's addresses "
    "in `listener.allow`",
    "its title must come by TLS": "let it use TLS, or list the title once more without a certificate",
    "its certificate does not speak for its title": "add its certificate's SHA-256 to that title in `listener.allow`",
    "too many associations": "let it open fewer, or raise `listener.associations_per_peer`",
}


@dataclass(frozen=True)
class Refused:
    calling_ae: str
    called_ae: str
    address: str
    reason: str
    times: int
    first_at: datetime
    last_at: datetime

    def sentence(self) -> str:
        """Who was refused, why, how often, and what would let it in."""
        title, address = json.dumps(self.calling_ae), json.dumps(self.address)
        times = "once" if self.times == 1 else f"{self.times} times"
        said = f"{title} called {json.dumps(self.called_ae)} from {self.address} {times}: {self.reason}"
        peer = f"{{ ae_title = {title}, addresses = [{address}] }}"
        remedy = REMEDIES.get(self.reason, "").format(peer=peer, address=address)
        return f"{said}; {remedy}." if remedy else f"{said}."


def lately(database: Database, now: datetime) -> list[Refused]:
    """Newest first."""
    newest = sa.select(sa.func.max(_acts.c.number)).scalar_subquery()
    query = (
        sa.select(
            _acts.c.kind,
            _acts.c.who,
            _acts.c.what,
            _acts.c.detail,
            sa.func.count().label("times"),
            sa.func.min(_acts.c.at, type_=_acts.c.at.type).label("first_at"),
            sa.func.max(_acts.c.at, type_=_acts.c.at.type).label("last_at"),
        )
        .where(_acts.c.number > newest - _LAST_ACTS, _acts.c.at >= now - LATELY, _acts.c.kind.in_((REFUSED, ACCEPTED)))
        .group_by(_acts.c.kind, _acts.c.who, _acts.c.what, _acts.c.detail)
    )
    with database.reading() as session:
        rows = [(row, json.loads(row.detail)) for row in session.execute(query)]
    let_in: dict[tuple[str, str], datetime] = {}
    for row, detail in rows:
        if row.kind == ACCEPTED:
            key = (row.who, detail.get("address", ""))
            let_in[key] = max(row.last_at, let_in.get(key, row.last_at))
    found = [
        Refused(
            row.who,
            detail.get("called", ""),
            detail.get("address", ""),
            row.what,
            row.times,
            row.first_at,
            row.last_at,
        )
        for row, detail in rows
        if row.kind == REFUSED and let_in.get((row.who, detail.get("address", "")), row.first_at) <= row.last_at
    ]
    return sorted(found, key=lambda each: each.last_at, reverse=True)
