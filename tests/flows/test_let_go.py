"""What becomes of the work on a study that was shredded, in the hospital's language."""

from __future__ import annotations

from pathlib import Path

from busgen_cds.store.retention import Letting
from tests import hospital
from tests.hospital import Hospital, a_lesion


def test_a_shredded_study_is_not_sent_again(tmp_path: Path) -> None:
    """Asking for a shredded study again sends nothing and stops nothing: the next study is read."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        sent, result = len(it.pacs.of(study)), it.result(study).entry
        _shred(it, result.study_ref)
        assert not it.desk.resend(result.ref, who="operator") + it.desk.retry(result.study_ref, who="operator")
        it.settles()
        _is_at_work(it)
        assert len(it.pacs.of(study)) == sent


def test_shredded_while_it_is_on_its_way(tmp_path: Path) -> None:
    """A study shredded while its delivery waits takes that with it; no engine stops, and nothing is stuck."""
    with hospital.opened(tmp_path) as it:
        it.pacs.goes_down()
        study = it.scanner.sends(a_lesion(1))
        (delivery,) = it.waits_until(it.site.results.deliveries.under_way)
        it.site.inbox.shred(delivery.study_ref, "operator")  # as another process does just after this one has looked
        it.pacs.comes_up()
        it.settles()
        now = it.site.results.deliveries.get(delivery.ref)
        assert now and (now.state, now.reason[:23]) == ("withdrawn", "This study was shredded")
        _is_at_work(it)
        assert not it.pacs.of(study)


def test_shredded_while_it_is_read(tmp_path: Path) -> None:
    """A study shredded while it is read is let go by the reading too; no engine stops, and nothing is stuck."""
    with hospital.opened(tmp_path) as it:
        it.reader.seconds = 1.0
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(lambda: it.reader.reads)
        ref = it.ref(study)
        it.site.inbox.shred(ref, "operator")
        it.waits_until(lambda: it.site.jobs.of(ref) is None)
        it.reader.seconds = 0.0
        _is_at_work(it)
        assert not it.pacs.of(study)


def test_received_again_after_it_was_shredded(tmp_path: Path) -> None:
    """A study that comes again after it was shredded is read anew; no UID ever gets two contents at the PACS."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        _shred(it, it.ref(study))
        it.scanner.sends(a_lesion(1))
        it.settles()
        assert it.parked(study) == ""
        assert len(it.reports(study)) == 2 and it.pacs.twice() == []


def _shred(it: Hospital, ref: str) -> None:
    assert Letting(it.site.inbox, it.site.database, it.site.vault).shred(ref, "operator", insist=True) == []


def _is_at_work(it: Hospital) -> None:
    """The next study comes in, and its result goes out."""
    assert it.site.jobs.engine_stopped() is None
    study = it.scanner.sends(a_lesion(1, seed=77))
    it.settles()
    assert it.reports(study)
