"""The record of acts shows every edit, and with a signed checkpoint a cut tail too."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from busgen_cds import signing
from busgen_cds.errors import Untrusted
from busgen_cds.store import audit, database
from busgen_cds.store.audit import Act
from busgen_cds.store.database import Database, table_of

ACTS = table_of(audit.ActRow)
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ENTRIES = 12
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
VERIFIER = signing.Verifier.of((KEY.public_key(), frozenset({audit.CHECKPOINT_KIND})))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return database.open(f"sqlite:///{tmp_path_factory.mktemp('audit') / 'site.db'}")


@pytest.fixture
def record(opened: Database) -> Database:
    """A record of some acts, made anew."""
    with opened.transaction() as session:
        session.execute(sa.delete(ACTS))
        for number in range(ENTRIES):
            audit.record(session, Act("kind", f"who {number}", "what", f"{number:032x}", {"n": number}), at=AT)
    return opened


def test_a_sound_record(record: Database) -> None:
    """An untouched record is sound, alone and against its checkpoints."""
    point = audit.read_checkpoint(audit.checkpoint(record, signing.KeySigner(KEY), AT), VERIFIER)
    assert audit.verify(record) == audit.Verdict(ENTRIES)
    assert audit.verify(record, [point]) == audit.Verdict(ENTRIES, checkpoints=1)


def test_a_cut_tail(record: Database) -> None:
    """A cut tail shows only against a signed checkpoint; so does a record begun anew."""
    point = audit.read_checkpoint(audit.checkpoint(record, signing.KeySigner(KEY), AT), VERIFIER)
    with record.transaction() as session:
        session.execute(sa.delete(ACTS).where(ACTS.c.number > ENTRIES - 3))
    assert audit.verify(record).sound
    assert audit.verify(record, [point]).first_bad == ENTRIES - 2
    with record.transaction() as session:
        for _ in range(3):
            audit.record(session, Act("another", "story"), at=AT)
    assert audit.verify(record).sound and audit.verify(record, [point]).first_bad == ENTRIES


def test_a_checkpoint_over_a_rewritten_record(record: Database) -> None:
    """Who rewrites the record and signs another checkpoint of the same length does not hide the one that left."""
    left = audit.read_checkpoint(audit.checkpoint(record, signing.KeySigner(KEY), AT), VERIFIER)
    with record.transaction() as session:
        session.execute(sa.delete(ACTS))
        audit.record(session, *(Act("another", "story") for _ in range(ENTRIES)), at=AT)
    signed_after = audit.read_checkpoint(audit.checkpoint(record, signing.KeySigner(KEY), AT), VERIFIER)
    for points in ([left, signed_after], [signed_after, left]):
        assert audit.verify(record, points).first_bad == ENTRIES


def test_a_forged_checkpoint(record: Database) -> None:
    """A checkpoint that no trusted key signed is no checkpoint."""
    stranger = signing.KeySigner(Ed25519PrivateKey.generate())
    with pytest.raises(Untrusted):
        audit.read_checkpoint(audit.checkpoint(record, stranger, AT), VERIFIER)


EDITS = st.one_of(
    st.tuples(
        st.just("alter"),
        st.integers(1, ENTRIES),
        st.sampled_from(["kind", "who", "what", "study_ref", "detail", "hash", "at"]),
    ),
    st.tuples(st.just("remove"), st.integers(1, ENTRIES - 1), st.booleans()),
    st.tuples(st.just("insert"), st.integers(1, ENTRIES), st.text(max_size=5)),
    st.tuples(st.just("swap"), st.integers(1, ENTRIES - 1), st.integers(1, ENTRIES - 1)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edit=EDITS)
def test_any_edit_is_found(record: Database, edit: tuple[str, int, Any]) -> None:
    """Altering, removing, inserting or re-ordering any entry is found, and the first bad entry is named."""
    with record.reading() as session:
        rows = [row._asdict() for row in session.execute(sa.select(ACTS).order_by(ACTS.c.number))][:ENTRIES]
    edited, first_bad = _edit([dict(row) for row in rows], *edit)
    _write(record, edited)
    verdict = audit.verify(record)
    assert not verdict.sound and verdict.first_bad == first_bad
    _write(record, rows)
    assert audit.verify(record).sound


def _edit(rows: list[dict[str, Any]], kind: str, at: int, how: Any) -> tuple[list[dict[str, Any]], int]:
    if kind == "alter":
        old = rows[at - 1][how]
        rows[at - 1][how] = old.replace(year=2025) if how == "at" else f"{old}x"[-64:]
        return rows, at
    if kind == "remove":
        del rows[at - 1]
        if how:  # and the numbers closed up behind it
            for row in rows[at - 1 :]:
                row["number"] -= 1
        return rows, at
    if kind == "insert":
        for row in rows[at - 1 :]:
            row["number"] += 1
        rows.insert(at - 1, {**rows[at - 1], "number": at, "what": how + "!"})
        return rows, at
    other = how if how != at else ENTRIES
    for name in set(rows[0]) - {"number"}:
        rows[at - 1][name], rows[other - 1][name] = rows[other - 1][name], rows[at - 1][name]
    return rows, min(at, other)


def _write(opened: Database, rows: list[dict[str, Any]]) -> None:
    with opened.transaction() as session:
        session.execute(sa.delete(ACTS))
        session.execute(sa.insert(ACTS), rows)


def test_the_schema_is_what_the_migrations_make(tmp_path: Path) -> None:
    """The migrations make exactly the tables that the store declares."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    opened = database.open(f"sqlite:///{tmp_path / 'site.db'}")
    with opened.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), database.all_tables())
    assert differences == []
