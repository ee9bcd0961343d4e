"""One database for everything that must survive a power cut.

Rules:
- A commit is on the disk before it returns: SQLite runs in WAL mode with `synchronous=FULL`.
- A writing transaction takes the write lock when it begins (BEGIN IMMEDIATE), so that what it read is still true
  when it writes; readers never wait for writers.
- Names and identifiers stand in `Sealed` columns, or in `Blind` ones (a keyed hash) where they are searched for;
  everything else must be fit to be read by whoever steals the disk.
- A statement that fails, or is traced, shows none of its parameters.
- Times are aware and UTC. Deleted content is overwritten (`secure_delete`).
- Each store module defines its tables on `Base`; the schema only ever changes by a migration in `migrations/`.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Session

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 30
LOG_BYTES = 4 << 20
_CHECKPOINT_PAGES = 900  # of 4096 bytes: the log starts again from its beginning before it outgrows LOG_BYTES
_WRITES = "busgen_writes"


class Base(DeclarativeBase):
    """All tables of the store."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def table_of(model: type[Base]) -> sa.Table:
    """The table itself, for statements that need no objects."""
    table = model.__table__
    assert isinstance(table, sa.Table)
    return table


class UtcTime(sa.TypeDecorator[datetime]):
    """An aware time, kept as UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("A time without a zone cannot be kept.")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Sealed(sa.TypeDecorator[bytes]):
    """Bytes made by `Vault.seal_text` or `Vault.seal`; key rotation finds these columns by their type."""

    impl = sa.LargeBinary
    cache_ok = True


class WrappedKey(sa.TypeDecorator[bytes]):
    """A key made by `Vault.wrap`; key rotation finds these columns by their type."""

    impl = sa.LargeBinary
    cache_ok = True


class Blind(sa.TypeDecorator[str]):
    """A keyed hash made by `Vault.blind` of the text in the `Sealed` column that it names."""

    impl = sa.String(64)
    cache_ok = True

    def __init__(self, of: str = "") -> None:
        super().__init__()
        self.of = of


class Database:
    def __init__(self, url: str) -> None:
        self.url = sa.make_url(url)
        self.engine = sa.create_engine(self.url, **_engine_options(self.url))
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        self._writing = self.engine.execution_options(**{_WRITES: True})

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """All of it or nothing of it, and durable when it returns."""
        with Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def connection(self) -> Iterator[sa.Connection]:
        """As `transaction`, for statements alone: the receiving road does not pay for a session."""
        with self._writing.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One consistent view, without the write lock."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def scrub(self) -> None:
        """Leave no trace of what was deleted, in the file or in its log; takes a moment, and no writer may run long."""
        if self.engine.dialect.name != "sqlite":
            return
        with self.engine.connect() as connection:
            raw = connection.connection.driver_connection
            assert raw is not None
            for statement in ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                raw.execute(statement).close()
        _lengthen_log(self)

    def close(self) -> None:
        self.engine.dispose()


def open(url: str) -> Database:
    """The database at `url`, created or migrated to this version's schema."""
    database = Database(url)
    migrate(database)
    _lengthen_log(database)
    return database


def migrate(database: Database) -> None:
    configuration = Config()
    configuration.set_main_option("script_location", str(MIGRATIONS))
    with database._writing.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": 0x62757367})
        configuration.attributes["connection"] = connection
        command.upgrade(configuration, "head")


def _lengthen_log(database: Database) -> None:
    """Give SQLite's write-ahead log its full length now: syncing a file that does not grow is twice as fast.

    The log's own format makes this safe: frames are valid only with the salts of its header, zeros never are.
    """
    if database.engine.dialect.name != "sqlite" or not database.url.database:
        return
    with database._writing.begin():  # nobody else appends meanwhile
        log = Path(f"{database.url.database}-wal")
        missing = LOG_BYTES - log.stat().st_size
        if missing > 0:
            with log.open("ab") as file:
                file.write(bytes(missing))
                file.flush()
                os.fsync(file.fileno())


def all_tables() -> sa.MetaData:
    """The metadata with the tables of every store module, whether or not it was imported before."""
    package = importlib.import_module("busgen_cds.store")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg:
            importlib.import_module(f"busgen_cds.store.{module.name}")
    return Base.metadata


def _engine_options(url: sa.URL) -> dict[str, Any]:
    safe = {"hide_parameters": True}  # an error or a trace of a statement stands in logs
    if url.get_backend_name() != "sqlite":
        return {**safe, "pool_pre_ping": True}
    return {**safe, "connect_args": {"timeout": BUSY_SECONDS, "check_same_thread": False}}


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say, not where the driver guesses
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}").close()
    connection.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
