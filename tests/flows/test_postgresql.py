"""The same stories on PostgreSQL: an address in place of a file, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hospital, postgres
from tests.hospital import Hospital, a_lesion


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Hospital]:
    with (
        postgres.running("site", "workflows") as addresses,
        hospital.opened(tmp_path, database_url=addresses["site"], workflows_url=addresses["workflows"]) as opened,
    ):
        yield opened


@pytest.mark.program
def test_on_postgresql(it: Hospital) -> None:
    """On PostgreSQL, for our database and the workflows': an outage, a late image, a fault and its retry."""
    it.pacs.goes_down()
    study = it.scanner.sends(a_lesion(2))
    it.waits_until(lambda: [each for each in it.site.results.deliveries.under_way() if each.tries > 0])
    it.pacs.comes_up()
    it.settles()
    it.reader.says, it.reader.fails = "3", [KeyError()]
    it.scanner.sends(a_lesion(3)[2:])
    it.settles()
    assert "A fault of ours" in it.parked(study)
    it.desk.retry(it.ref(study), who="operator")
    it.settles()
    assert [int(report.SeriesNumber) for report in it.reports(study)] == sorted(
        {int(report.SeriesNumber) for report in it.reports(study)}
    )
    assert it.result(study).entry.revision == 2
    assert it.reader.reads == [study] * 3
    assert it.site.results.search(study)[0].current
