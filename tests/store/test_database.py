"""The database: what a failing statement leaves in a log."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from busgen_cds.store.database import Database

NAME, ID = "DOE^JANE", "PAT-4711"
ROW = {"who": NAME, "detail": ID}
log = logging.getLogger("busgen_cds.test")


@pytest.mark.parametrize("rows", [ROW, [ROW, ROW]], ids=["one row", "many rows"])
def test_a_failing_statement_logs_no_parameter(tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: Any) -> None:
    """A statement that fails is in the log, its parameters are not: neither in the error nor in a trace."""
    caplog.set_level(logging.DEBUG, "sqlalchemy")
    database = Database(f"sqlite:///{tmp_path / 'without-tables.sqlite'}")
    try:
        with database.transaction() as session:
            session.execute(sa.text("INSERT INTO act (who, detail) VALUES (:who, :detail)"), rows)
    except SQLAlchemyError as failed:
        log.exception("A failure")
        assert failed.__cause__ is not None
    database.close()
    assert caplog.text.count("INSERT INTO act") >= 2, "traced, and in the error"
    assert NAME not in caplog.text and ID not in caplog.text
