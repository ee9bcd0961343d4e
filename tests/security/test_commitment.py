"""A word on storage commitment makes us believe that a PACS keeps a report: whose word that may be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from busgen_cds import app, settings
from busgen_cds.dicom import outbox
from busgen_cds.dicom.association import CommitmentReport, CommitmentRequest
from busgen_cds.errors import Transient
from busgen_cds.store import audit, site_keys
from busgen_cds.store.deliveries import Delivery
from tests.images import breast_study
from tests.web.practice import SITE_KEY, Practice, Says

SETTINGS = """
[site]
name = "Example"
prevalence = 0.1
[listener]
host = "127.0.0.1"
port = 0
processes = 0
allow = [{{ ae_title = "ARCHIVE", addresses = {said} }}, {{ ae_title = "SCANNER", addresses = ["127.0.0.1"] }}]
[[nodes]]
name = "PACS"
ae_title = "ARCHIVE"
host = "{host}"
[[nodes]]
name = "console"
ae_title = "SCANNER"
host = "127.0.0.1"
[[destinations]]
node = "PACS"
commitment = true
"""
ASKED = "2.25.77"


@contextmanager
def asked(folder: Path, *, host: str = "127.0.0.1", said: str = "[]") -> Iterator[tuple[Practice, Delivery, int]]:
    """A site that sent a report to its PACS, asked it to commit, and listens for its word."""
    chosen = settings.read(app.found(folder, SETTINGS.format(host=host, said=said), site_keys.new_passphrase()))
    (folder / "keys" / "site.key").write_text(SITE_KEY.hex())
    site = Practice(folder, database_url=f"sqlite:///{folder / 'data' / 'busgen-cds.sqlite'}")
    ref = site.receives(breast_study(1, seed=5))
    (delivery,) = site.results.deliveries.of(site.answers(ref, Says(sent="waiting")).ref)
    for each in site.results.deliveries.delivered(delivery.ref):
        site.results.deliveries.said(delivery, each.sop_instance_uid, "sent")
    assert site.results.deliveries.move(delivery, "asked", transaction_uid=ASKED)
    listener = app.listener(chosen)
    listener.start()
    try:
        yield site, delivery, listener.port
    finally:
        listener.stop(2)
        site.close()


def says_it_keeps_all(site: Practice, delivery: Delivery, port: int, title: str) -> None:
    kept = tuple((e.sop_class_uid, e.sop_instance_uid) for e in site.results.deliveries.delivered(delivery.ref))
    report = CommitmentReport(CommitmentRequest(title, "127.0.0.1", ASKED, kept), kept, ())
    us = outbox.Node("us", "BUSGEN_CDS", "127.0.0.1", port, calling_ae=title, timeout_seconds=10)
    outbox.report_commitment(report, us)


def confirmed(site: Practice, delivery: Delivery) -> bool:
    return {each.state for each in site.results.deliveries.delivered(delivery.ref)} == {"confirmed"}


def test_the_word_of_another_system_is_not_believed(tmp_path: Path) -> None:
    """A scanner that may send to us cannot confirm a report in the PACS's place, though it knows the transaction."""
    with asked(tmp_path / "s") as (site, delivery, port):
        with pytest.raises(Transient, match="did not take a report"):
            says_it_keeps_all(site, delivery, port, "SCANNER")
        assert {each.state for each in site.results.deliveries.delivered(delivery.ref)} == {"sent"}
        says_it_keeps_all(site, delivery, port, "ARCHIVE")
        assert confirmed(site, delivery)
    with app.opened_site(settings.read(tmp_path / "s" / settings.FILE)) as opened:
        acts = list(audit.entries(opened.database, audit.Wanted(kind="commitment not believed")))
    assert [(entry.act.who, entry.act.what) for entry in acts] == [("SCANNER", "another system was asked for it")]


def test_the_title_alone_is_not_the_system(tmp_path: Path) -> None:
    """A title that may come from anywhere is the PACS's only from the PACS's host; one that the site binds to
    addresses is the PACS's from those, wherever its node lies."""
    with asked(tmp_path / "a", host="10.9.9.9") as (site, delivery, port):
        with pytest.raises(Transient, match="did not take a report"):
            says_it_keeps_all(site, delivery, port, "ARCHIVE")
        assert not confirmed(site, delivery)
    with asked(tmp_path / "b", host="10.9.9.9", said='["127.0.0.1"]') as (site, delivery, port):
        says_it_keeps_all(site, delivery, port, "ARCHIVE")
        assert confirmed(site, delivery)
