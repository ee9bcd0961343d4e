"""Objects on their way to the PACS, in the hospital's language."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest

from busgen_cds.dicom.commitment import Commitment
from busgen_cds.errors import Misconfigured
from busgen_cds.flows.services import Destination
from tests import hospital
from tests.flows.test_read_study import waiting
from tests.hospital import Hospital, a_lesion
from tests.pacs import SR, Pacs


def test_the_pacs_is_down_the_whole_time(tmp_path: Path) -> None:
    """Bar 3: the PACS is down for the whole reception and comes back: all arrives, the model ran once per study."""
    with hospital.opened(tmp_path) as it:
        it.pacs.goes_down()
        studies = [it.scanner.sends(a_lesion(2, seed=10 * n)) for n in range(3)]
        it.waits_until(lambda: len(it.site.results.deliveries.under_way()) == 3)
        it.waits_until(lambda: all(each.tries > 1 for each in it.site.results.deliveries.under_way()))
        assert all("cannot be reached" in item.reason for item in waiting(it))
        it.pacs.comes_up()
        it.settles()
        assert sorted(it.reader.reads) == sorted(studies)
        assert all(len(it.reports(study)) == 1 for study in studies)


def test_when_the_pacs_answers_all_that_waits_goes(tmp_path: Path) -> None:
    """A destination that answers again gets everything that waits for it at once, not when each delay is over."""
    with hospital.opened(tmp_path, waits=hospital.quicker(first_retry=300, longest_retry=300)) as it:
        it.pacs.goes_down()
        for n in range(3):
            it.scanner.sends(a_lesion(1, seed=10 * n))
        it.waits_until(lambda: sum(each.tries for each in it.site.results.deliveries.under_way()) == 3)
        it.pacs.comes_up()
        study = it.scanner.sends(a_lesion(1, seed=99))
        it.settles()
        assert len(it.reports(study)) == 1
        assert len([each for each in it.pacs.datasets() if each.Modality == "SR"]) == 4


def test_the_word_that_a_pacs_answers_is_lost(tmp_path: Path) -> None:
    """What was to go at once, as its destination answers again, goes with the next sweep though nobody was told."""
    with hospital.opened(tmp_path, waits=hospital.quicker(first_retry=300, longest_retry=300)) as it:
        it.pacs.goes_down()
        study = it.scanner.sends(a_lesion(1))
        (delivery,) = it.waits_until(lambda: [each for each in it.site.results.deliveries.under_way() if each.tries])
        it.waits_until(lambda: it.statuses().get(f"deliver-{delivery.ref}-1") == "DELAYED")
        it.pacs.comes_up()
        it.site.results.deliveries.hasten(delivery.destination)  # and the process dies
        it.settles()
        assert len(it.reports(study)) == 1


def test_done_while_a_sweep_looked(tmp_path: Path) -> None:
    """A delivery that is done just after a sweep listed it as waiting stays done, whatever became of its study."""
    with hospital.opened(tmp_path, waits=hospital.quicker(sweep=600)) as it:
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        (done,) = it.site.results.deliveries.of(it.result(study).entry.ref)
        it.waits_until(lambda: it.statuses().get(f"deliver-{done.ref}-{done.tries}") == "SUCCESS")
        it.site.inbox.hold(it.ref(study), "Somebody looks into it.")
        assert it.desk.deliver(replace(done, state="waiting")) == "overtaken"
        assert it.site.results.deliveries.get(done.ref) == done and it.acts("delivery parked") == 0


def test_one_destination_waits_for_no_other(tmp_path: Path) -> None:
    """A destination that is down holds up no other; each has its own profile."""
    archive = Pacs("archive")

    def two(it: Hospital) -> None:
        it.destinations = [Destination(archive.node), Destination(it.pacs.node, kinds=("sr",))]

    with hospital.opened(tmp_path, prepare=two) as it:
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(lambda: it.reports(study))
        assert len(it.pacs.of(study)) == 1
        archive.comes_up()
        it.settles()
        archive.goes_down()
        assert {each.Modality for each in archive.of(study)} == {"SR", "OT", "SEG", "PR"}


def test_a_refused_report_stops_no_capture(tmp_path: Path) -> None:
    """A PACS that refuses the report still gets the secondary capture, and the refusal is in the queue."""
    with hospital.opened(tmp_path) as it:
        it.pacs.refuses.add(SR)
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        assert {each.Modality for each in it.pacs.of(study)} == {"OT", "SEG", "PR"}
        refused = [item for item in waiting(it) if item.state == "refused"]
        assert [item.reason for item in refused] == ["sr: data set does not match its SOP class (0xA900)"]
        assert it.acts("object refused") == 1
        it.pacs.refuses.clear()
        it.desk.retry(it.ref(study), who="operator")
        it.settles()
        assert len(it.reports(study)) == 1
        assert waiting(it) == []


def test_a_pacs_that_knows_no_reports(tmp_path: Path) -> None:
    """A PACS that accepts no presentation context for the report gets the rest; the refusal says why."""
    with hospital.opened(tmp_path, prepare=lambda it: it.pacs.refuses.add(SR)) as it:
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        assert {each.Modality for each in it.pacs.of(study)} == {"OT", "SEG", "PR"}
        assert "presentation context" in waiting(it)[0].reason


def test_a_full_pacs_gets_it_later(tmp_path: Path) -> None:
    """Out of resources is not a refusal: it is tried again until there is room."""
    with hospital.opened(tmp_path) as it:
        it.pacs.full = True
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(lambda: [each for each in waiting(it) if "out of resources" in each.reason])
        it.pacs.full = False
        it.settles()
        assert len(it.reports(study)) == 1
        assert it.reader.reads == [study]


def test_storage_commitment_confirms(tmp_path: Path) -> None:
    """Where the PACS offers storage commitment, what was sent is confirmed by it."""
    with hospital.opened(tmp_path, prepare=_commits) as it:
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        assert {each.state for each in it.result(study).delivered} == {"confirmed"}


def test_commitment_is_asked_for_until_it_comes(tmp_path: Path) -> None:
    """A PACS that takes the request and says nothing is asked again; until then nothing is called confirmed."""
    with hospital.opened(tmp_path, prepare=_commits, waits=hospital.quicker(commitment=0.2)) as it:
        it.pacs.commits = None
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(lambda: [item for item in waiting(it) if item.tries > 1])
        assert {each.state for each in it.result(study).delivered} == {"sent"}
        it.pacs.commits = True
        it.settles()
        assert {each.state for each in it.result(study).delivered} == {"confirmed"}


def test_a_late_word_of_commitment_counts(tmp_path: Path) -> None:
    """The PACS's word on an earlier request is heard, though it was asked again since."""
    with hospital.opened(tmp_path, prepare=_commits, waits=hospital.quicker(commitment=0.1)) as it:
        it.pacs.commits = None
        study = it.scanner.sends(a_lesion(1))
        first = it.waits_until(lambda: _asked(it))
        it.waits_until(lambda: _asked(it) not in ("", first))
        uids = tuple(each.sop_instance_uid for each in it.result(study).delivered)
        assert it.desk.committed(Commitment(first, uids), lambda name: name == it.pacs.name)
        it.settles()
        assert {each.state for each in it.result(study).delivered} == {"confirmed"}


def test_commitment_that_never_comes_is_given_up(tmp_path: Path) -> None:
    """A PACS that stores and never commits is asked for days; then the delivery is parked and says so."""
    with hospital.opened(tmp_path, prepare=_commits, waits=hospital.quicker(commitment=0.1)) as it:
        it.pacs.commits = None
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(lambda: _asked(it))
        it.clock.passes(days=15)
        it.settles()
        assert "Given up after 15 days" in it.parked(study) and "commitment" in it.parked(study)


def test_not_committed_again_and_again(tmp_path: Path) -> None:
    """What a PACS stores and does not keep is sent again after delays that grow, and not for ever."""
    waits = hospital.quicker(commitment=0.1, commitment_again=60, first_retry=0.2, longest_retry=600)
    with hospital.opened(tmp_path, prepare=_commits, waits=waits) as it:
        it.pacs.commits = None
        study = it.scanner.sends(a_lesion(1))
        delays, last = [], ""
        for _ in range(3):
            last = it.waits_until(lambda said=last: _asked(it) if _asked(it) not in ("", said) else "")
            uids = [each.sop_instance_uid for each in it.result(study).delivered]
            lost = Commitment(last, (), tuple((uid, "resource limitation") for uid in uids))
            assert it.desk.committed(lost, lambda name: name == it.pacs.name)
            (delivery,) = it.site.results.deliveries.under_way()
            delays.append((delivery.next_try_at - it.clock()).total_seconds())
        assert delays[0] < delays[1] < delays[2]
        it.clock.passes(days=15)
        it.settles()
        assert "Given up after 15 days" in it.parked(study)


def test_what_the_pacs_lost_is_sent_again(tmp_path: Path) -> None:
    """An object that the PACS stored and does not commit to is sent again, the same bytes."""
    with hospital.opened(tmp_path, prepare=_commits) as it:
        it.pacs.full = True
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(lambda: it.site.results.current(it.ref(study)))
        uid = it.result(study).objects[0].sop_instance_uid
        it.pacs.lost.add(uid)
        it.pacs.full = False
        it.waits_until(lambda: len(it.pacs.objects[uid]) > 1)
        it.pacs.lost.clear()
        it.settles()
        assert len(set(it.pacs.objects[uid])) == 1
        assert {each.state for each in it.result(study).delivered} == {"confirmed"}


def test_another_patient_at_the_pacs(tmp_path: Path) -> None:
    """Rule 8: the PACS says that the study is another patient's: it is parked and nothing is sent, until released."""
    with hospital.opened(tmp_path, prepare=_asks_the_pacs) as it:
        lesion = a_lesion(1, patient_id="RIGHT")
        study = hospital.study_uid(lesion)
        it.pacs.patients[study] = "WRONG"
        it.scanner.sends(lesion)
        it.settles()
        assert not it.pacs.objects
        assert "another patient" in it.parked(study)
        assert "release" in {item.verb for item in waiting(it)}
        it.pacs.patients[study] = "RIGHT"
        it.desk.release(it.site.inbox, it.ref(study), who="operator")
        it.settles()
        assert len(it.reports(study)) == 1
        assert {str(each.PatientID) for each in it.pacs.of(study)} == {"RIGHT"}
        assert it.reader.reads == [study]


def test_unchecked_is_unsent(tmp_path: Path) -> None:
    """Rule 8: a query node that does not answer lets nothing out unchecked."""
    asked = Pacs("index")

    def asks(it: Hospital) -> None:
        it.query_node = asked.node

    with hospital.opened(tmp_path, prepare=asks) as it:
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(lambda: [item for item in waiting(it) if item.tries > 1 and item.what == "delivery"])
        assert not it.pacs.objects
        asked.comes_up()
        it.settles()
        asked.goes_down()
        assert len(it.reports(study)) == 1


def test_superseded_before_it_was_sent(tmp_path: Path) -> None:
    """What was not yet sent of a superseded result never is."""
    with hospital.opened(tmp_path) as it:
        it.pacs.goes_down()
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(lambda: it.site.results.current(it.ref(study)))
        it.scanner.sends(a_lesion(2)[1:])
        it.waits_until(lambda: it.result(study).entry.revision == 2)
        it.pacs.comes_up()
        it.settles()
        assert ["REV 2" in report.SeriesDescription for report in it.reports(study)] == [True]


def test_a_superseded_result_is_never_sent_again(tmp_path: Path) -> None:
    """`resend` of a result that was replaced is refused, and nothing of it reaches the PACS."""
    with hospital.opened(tmp_path) as it:
        lesion = a_lesion(2)
        it.pacs.goes_down()
        study = it.scanner.sends(lesion[:1])
        it.waits_until(lambda: it.site.inbox.find_study(study) and it.site.results.current(it.ref(study)))
        old = it.result(study).entry
        it.scanner.sends(lesion[1:])
        it.waits_until(lambda: it.result(study).entry.revision == 2)
        with pytest.raises(Misconfigured, match="newer revision"):
            it.desk.resend(old.ref, who="operator")
        it.pacs.comes_up()
        it.settles()
        assert ["REV 2" in report.SeriesDescription for report in it.reports(study)] == [True]


def test_given_up_after_days_and_taken_up_again(tmp_path: Path) -> None:
    """Delivery is tried for days; then it is parked with its reason, and `retry` takes it up again."""
    with hospital.opened(tmp_path) as it:
        it.pacs.goes_down()
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(lambda: it.site.results.deliveries.under_way())
        it.clock.passes(days=15)
        it.settles()
        assert "Given up after 15 days" in it.parked(study)
        it.pacs.comes_up()
        assert it.desk.retry(it.ref(study), who="operator") == ["delivery to pacs"]
        it.settles()
        assert len(it.reports(study)) == 1


def test_resent_byte_for_byte(tmp_path: Path) -> None:
    """`resend` sends the bytes that were rendered, and what reached the PACS are those bytes."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        entry = it.result(study).entry
        assert it.desk.resend(entry.ref, who="operator") == ["pacs"]
        it.settles()
        for each in it.site.results.objects(entry.ref):
            versions = it.pacs.objects[each.sop_instance_uid]
            assert len(versions) == 2
            assert {_data_set(version) for version in versions} == {_data_set(each.data)}


def test_a_destination_that_is_gone(tmp_path: Path) -> None:
    """A delivery to a destination that the settings no longer name is parked, and says so."""
    with hospital.opened(tmp_path) as it:
        it.pacs.goes_down()
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(lambda: it.site.results.deliveries.under_way())
        it.destinations = []
        it.worker_restarts()
        it.settles()
        assert "No destination is named 'pacs'" in it.parked(study)


def test_a_title_that_the_pacs_does_not_know(tmp_path: Path) -> None:
    """A PACS that rejects our AE title is a setting to change: the delivery is parked and names it."""
    with hospital.opened(tmp_path) as it:
        it.pacs.goes_down()
        it.pacs.knows = ["SOMEBODY_ELSE"]
        it.pacs.comes_up()
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        assert "does not know our AE title 'BUSGEN_CDS'" in it.parked(study)


def _data_set(part10: bytes) -> bytes:
    """Without the file meta information, which each side writes for itself."""
    file = io.BytesIO(part10)
    file.seek(132)
    meta = pydicom.filereader._read_file_meta_info(file)
    return part10[132 + 12 + meta.FileMetaInformationGroupLength :]


def _asked(it: Hospital) -> str:
    """The request for storage commitment that is under way."""
    return next((each.transaction_uid for each in it.site.results.deliveries.under_way() if each.state == "asked"), "")


def _commits(it: Hospital) -> None:
    it.destinations = [Destination(it.pacs.node, commitment=True)]


def _asks_the_pacs(it: Hospital) -> None:
    it.query_node = it.pacs.node
