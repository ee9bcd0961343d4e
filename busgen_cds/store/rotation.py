"""Changing the site key while the site runs.

Rules:
- First every process is given both keys, the new one first: new things are sealed under it, old ones still open.
- Then `rotate` brings over what was sealed under the older key, some rows at a time, while scanners go on sending.
- It may be stopped and begun again; when it says that nothing is left, the older key can be taken away.
- Files are not touched: their data keys are wrapped by their study's key, and only that is wrapped by the site's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from busgen_cds.store import audit, database
from busgen_cds.store.database import Blind, Database, Sealed, WrappedKey
from busgen_cds.store.vault import Vault

_ROWS = 200


@dataclass
class Rotated:
    rows: int = 0
    left: list[str] = field(default_factory=list)  # hashed columns whose text is not at hand: keep the older key


def rotate(opened: Database, keys: Vault, who: str) -> Rotated:
    done = Rotated()
    for table in database.all_tables().sorted_tables:
        if any(isinstance(column.type, Sealed | WrappedKey | Blind) for column in table.columns):
            done.left += _not_at_hand(table)
            done.rows += sum(_bring_over(opened, keys, table, batch) for batch in _batches(opened, table))
    with opened.transaction() as session:
        audit.record(session, audit.Act("site key changed", who, "", detail={"rows": done.rows}))
    opened.scrub()
    return done


def _not_at_hand(table: sa.Table) -> list[str]:
    """Hashes of something else than a sealed column of the same row."""
    blinds = [(column.name, column.type) for column in table.columns if isinstance(column.type, Blind)]
    return [f"{table.name}.{name}" for name, kind in blinds if not _is_sealed(table, kind.of)]


def _is_sealed(table: sa.Table, name: str) -> bool:
    return name in table.columns and isinstance(table.columns[name].type, Sealed)


def _batches(opened: Database, table: sa.Table) -> Iterator[list[Any]]:
    """All primary keys as they are now; what comes later is sealed under the new key already."""
    with opened.reading() as session:
        keys = session.execute(sa.select(*table.primary_key.columns)).all()
    for at in range(0, len(keys), _ROWS):
        yield list(keys[at : at + _ROWS])


def _bring_over(opened: Database, keys: Vault, table: sa.Table, batch: list[Any]) -> int:
    changed = 0
    with opened.transaction() as session:
        for key in batch:
            this = sa.and_(*(column == part for column, part in zip(table.primary_key.columns, key, strict=True)))
            row = session.execute(sa.select(table).where(this)).first()
            values = _fresh(keys, table, row._asdict()) if row else {}
            if values:
                session.execute(sa.update(table).where(this).values(**values))
                changed += 1
    return changed


def _fresh(keys: Vault, table: sa.Table, row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that must change, as they must be."""
    values: dict[str, Any] = {}
    for column in table.columns:
        old = row[column.name]
        if not old:
            continue
        if isinstance(column.type, WrappedKey) and not keys.is_current(old):
            values[column.name] = keys.rewrap(old)
        elif isinstance(column.type, Sealed) and not keys.is_current(old):
            values[column.name] = keys.reseal(old)
        elif isinstance(column.type, Blind) and _is_sealed(table, column.type.of) and row[column.type.of]:
            hashed = keys.blind(keys.open_text(row[column.type.of]))
            values |= {} if hashed == old else {column.name: hashed}
    return values
