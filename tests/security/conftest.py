"""One running site for the tests of this folder: each test sends studies of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.security import running
from tests.security.running import Running


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running.running(tmp_path_factory.mktemp("security") / "site") as it:
        yield it


@pytest.fixture
def site(made: Running) -> Running:
    """It runs, whoever stopped it before."""
    return made if made.process else made.starts()
