"""Changing the site key while the site runs.

Rules:
- First every process has the new key behind the older one, and can open what is sealed under it; then the new one
  comes first, and new things are sealed under it. One step alone would let a process meet what it cannot open, and
  file the images of one study twice.
- Then `rotate` brings over what was sealed under the older key, some rows at a time, while scanners go on sending;
  it goes round until a whole round finds nothing more, for what was on its way when the key changed.
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
HASH_LENGTH = 64


@dataclass
class Rotated:
    rows: int = 0
    left: list[str] = field(default_factory=list)  # hashes whose text is not at hand: keep the older key


def rotate(opened: Database, keys: Vault, who: str) -> Rotated:
    done = Rotated()
    tables = [table for table in database.all_tables().sorted_tables if _columns(table)]
    while rows := sum(_bring_over(opened, keys, table, batch) for table in tables for batch in _batches(opened, table)):
        done.rows += rows
    done.left = left(opened, keys)
    with opened.transaction() as session:
        audit.record(session, audit.Act("site key changed", who, "", detail={"rows": done.rows, "left": done.left}))
    opened.scrub()
    return done


def left(opened: Database, keys: Vault) -> list[str]:
    """What still needs an older key, by column, with how many rows; nothing when it can be taken away."""
    found = []
    for table in database.all_tables().sorted_tables:
        for column in _columns(table):
            count = _count_left(opened, keys, table, column)
            found += [f"{table.name}.{column.name}: {count}"] if count else []
    return found


def _columns(table: sa.Table) -> list[sa.Column[Any]]:
    return [column for column in table.columns if isinstance(column.type, Sealed | WrappedKey | Blind)]


def _count_left(opened: Database, keys: Vault, table: sa.Table, column: sa.Column[Any]) -> int:
    of = column.type.of if isinstance(column.type, Blind) else ""
    beside = [table.columns[of]] if of and _is_sealed(table, of) else []
    with opened.reading() as session:
        rows = session.execute(sa.select(column, *beside).execution_options(yield_per=1000))
        return sum(_is_left(keys, column, *row) for row in rows)


def _is_left(keys: Vault, column: sa.Column[Any], value: Any, text: bytes | None = None) -> bool:
    if not value:
        return False
    if not isinstance(column.type, Blind):
        return not keys.is_current(value)
    if text:
        return bool(keys.blind(keys.open_text(text)) != value)
    return len(value) == HASH_LENGTH  # a shredded study has its reference in this place


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
            row = session.execute(sa.select(table).where(this).with_for_update()).first()
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
