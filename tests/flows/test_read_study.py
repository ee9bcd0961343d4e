"""The road of a study, in the hospital's language."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from busgen_cds.errors import Misconfigured, Transient, Untrusted
from busgen_cds.flows import queue
from busgen_cds.flows.services import Destination
from busgen_cds.result import Result
from busgen_cds.study import Patient, Study
from tests import hospital
from tests.hospital import Hospital, a_lesion


def test_a_study_comes_in_a_result_goes_out(tmp_path: Path) -> None:
    """A study sent by DICOM is read once, and the PACS receives a report, a capture, a segmentation and a state."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends(a_lesion(2))
        it.settles()
        assert it.reader.reads == [study]
        assert {each.Modality for each in it.pacs.of(study)} == {"SR", "OT", "SEG", "PR"}
        assert it.result(study).entry.birads == "4C"
        assert waiting(it) == []


def test_the_same_images_again_change_nothing(tmp_path: Path) -> None:
    """The same evidence is read once, and gives the same objects with the same bytes, however often it is sent."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends(a_lesion(2))
        it.settles()
        it.scanner.sends(a_lesion(2))
        it.settles()
        assert it.reader.reads == [study]
        assert it.result(study).entry.revision == 1
        assert all(len(versions) == 1 for versions in it.pacs.objects.values())


def test_a_late_image_supersedes_loudly(tmp_path: Path) -> None:
    """Rule 7: a late image makes a revision that names what it replaces, raises the series number, rejects the old
    objects where the PACS takes that, and sounds an alarm when the category falls."""
    with hospital.opened(tmp_path, prepare=_takes_rejection_notes) as it:
        study = it.scanner.sends(a_lesion(2))
        it.settles()
        it.reader.says = "3"
        it.scanner.sends(a_lesion(3)[2:])
        it.settles()
        first, second = it.reports(study)
        assert second.PredecessorDocumentsSequence
        assert "REV 2" in second.SeriesDescription
        note = next(each for each in it.pacs.of(study) if each.Modality == "KO")
        assert first.SOPInstanceUID in str(note)
        assert it.result(study).entry.alarm == (
            "Revision 1 said category 4C; the one that replaces it says category 3."
        )
        assert it.acts("category fell") == 1
        assert [item.state for item in waiting(it)] == ["alarm"]


def test_the_pacs_is_down_between_revisions(tmp_path: Path) -> None:
    """Rule 7: a revision replaces what the PACS really has, of whichever revision, and nothing that it has not."""
    with hospital.opened(tmp_path, prepare=_takes_rejection_notes) as it:
        lesion = a_lesion(4)
        study = it.scanner.sends(lesion[:2])
        it.settles()
        first = {str(each.SOPInstanceUID) for each in it.pacs.of(study)}
        (old,) = it.reports(study)
        it.pacs.goes_down()
        for revision in (2, 3):
            it.scanner.sends([lesion[revision]])
            it.waits_until(lambda now=revision: it.result(study).entry.revision == now)
        it.pacs.comes_up()
        it.settles()
        (note,) = it.pacs.of(study, modality="KO")
        assert set(_referenced(note.CurrentRequestedProcedureEvidenceSequence)) == first
        assert _referenced(it.reports(study)[-1].PredecessorDocumentsSequence) == [str(old.SOPInstanceUID)]


def test_declined_is_delivered_and_supersedes(tmp_path: Path) -> None:
    """Rule 4: a declined study is delivered with its reason, and supersedes an older result."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        it.reader.declines = "unlike anything seen in training"
        it.scanner.sends(a_lesion(2)[1:])
        it.settles()
        shown = it.result(study)
        assert (shown.entry.outcome, shown.entry.revision) == ("declined", 2)
        assert shown.entry.alarm.endswith("says not analysed.")
        assert len(it.reports(study)) == 2
        assert "unlike anything seen in training" in hospital.words(it.reports(study)[-1])


def test_not_for_us_is_an_answer(tmp_path: Path) -> None:
    """What cannot be read is kept with its reason, shown, and nothing is sent."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends(a_lesion(1, doppler="all"))
        it.settles()
        shown = it.result(study)
        assert shown.entry.outcome == "not-for-us"
        assert "Doppler" in shown.entry.reason
        assert it.reader.reads == []
        assert not it.pacs.objects


def test_our_own_objects_coming_back(tmp_path: Path) -> None:
    """Results that a PACS sends back to us ask for no new answer, or each would ask for another."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        report = next(each for each in it.result(study).objects if each.kind == "sr")
        it.scanner.sends([report.data])
        it.settles()
        assert it.reader.reads == [study]
        assert it.result(study).entry.revision == 1


def test_two_patients_under_one_study(tmp_path: Path) -> None:
    """Rule 8: two patient ids under one study: all is kept, the study is held, nothing is read or sent."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends([*a_lesion(1, patient_id="A"), *a_lesion(2, patient_id="B")[1:]])
        item = it.waits_until(lambda: [one for one in waiting(it) if one.state == "held"])[0]
        it.settles()
        assert "Two patient ids" in item.reason
        assert item.verb == "release"
        assert len(it.site.inbox.instances(it.ref(study))) == 2
        assert it.reader.reads == []
        assert not it.pacs.objects


def test_two_patients_released(tmp_path: Path) -> None:
    """Rule 8: a study of two patients goes on only as the study of one, by a person's word: the other's images are left
    out, the objects carry the id that was stated, and a new image of the other holds and recalls it again."""
    mine, theirs, late = a_lesion(3, patient_id="P1")
    theirs, late = (hospital.relabelled(data, PatientID="P2") for data in (theirs, late))
    with hospital.opened(tmp_path, prepare=_takes_rejection_notes) as it:
        study = it.scanner.sends([mine, theirs])
        it.waits_until(lambda: [one for one in waiting(it) if one.state == "held"])
        with pytest.raises(Misconfigured, match="say whose it is"):
            it.desk.release(it.site.inbox, it.ref(study), who="operator")
        it.desk.release(it.site.inbox, it.ref(study), who="operator", patient=Patient(id="P1"))
        it.waits_until(lambda: it.reports(study))
        it.scanner.sends([theirs])
        it.settles()
        assert it.reader.reads == [study] and it.result(study).entry.images_read == 1
        assert {str(each.PatientID) for each in it.pacs.of(study)} == {"P1"}
        it.scanner.sends([late])
        it.waits_until(lambda: it.pacs.of(study, modality="KO"))
        it.desk.release(it.site.inbox, it.ref(study), who="operator", patient=Patient(id="P2"))
        it.waits_until(lambda: it.result(study).entry.revision == 3)
        assert it.result(study).entry.images_read == 2 and it.result(study).patient_id == "P2"


@pytest.mark.parametrize("engine", ["stopped", "forgetful"])
def test_released_and_nobody_is_told(tmp_path: Path, engine: str) -> None:
    """A person's word adds no image; a hint that is lost, or comes while the engine is stopped, loses no reading."""
    mine, theirs = a_lesion(2, patient_id="P1")
    with hospital.opened(tmp_path, prepare=_takes_rejection_notes) as it:
        study = it.scanner.sends([mine])
        it.settles()
        it.scanner.sends([hospital.relabelled(theirs, PatientID="P2")])
        it.waits_until(lambda: it.pacs.of(study, modality="KO"))
        it.settles()
        if engine == "stopped":
            it.site.jobs.stop_engine("The bundle's signature does not hold.")
        else:
            arrived, it.desk.arrived = it.desk.arrived, lambda *_: None
        it.desk.release(it.site.inbox, it.ref(study), who="operator", patient=Patient(id="P2"))
        if engine == "stopped":
            it.waits_until(lambda: it.idle())
            it.desk.resume(who="operator")
        else:
            it.desk.arrived = arrived
        it.settles()
        assert it.result(study).entry.revision == 3 and it.result(study).patient_id == "P2"


def test_another_patients_image_as_it_is_read(tmp_path: Path) -> None:
    """Rule 8: an image of a second patient that comes as a reading begins is not counted as read: it is recalled."""
    mine, late, more = a_lesion(3, patient_id="P1")
    with hospital.opened(tmp_path, prepare=_takes_rejection_notes) as it:
        study = it.scanner.sends([mine])
        it.settles()
        held, came = it.site.inbox.held, []

        def held_as_another_comes(study_ref: str) -> str | None:
            word = held(study_ref)
            if not came and sys._getframe(1).f_code.co_name == "_gather_and_keep":
                came.append(hospital.keep(it.site, [hospital.relabelled(more, PatientID="P2")]))
                it.desk.arrived(study_ref)
            return word

        it.site.inbox.held = held_as_another_comes  # type: ignore[method-assign]
        it.scanner.sends([late])
        it.waits_until(lambda: came)
        it.waits_until(lambda: it.pacs.of(study, modality="KO"))
        it.settles()
        assert it.acts("results recalled") == 1


def test_two_issuers_of_one_id(tmp_path: Path) -> None:
    """Rule 8: the same id from two issuers is two patients: the study is held; nothing is said of it."""
    first, second = a_lesion(2, patient_id="P1")
    with hospital.opened(tmp_path) as it:
        north, south = (hospital.relabelled(d, IssuerOfPatientID=i) for d, i in ((first, "NORTH"), (second, "SOUTH")))
        study = it.scanner.sends([north, south])
        (item,) = it.waits_until(lambda: [one for one in waiting(it) if one.state == "held"])
        it.settles()
        assert item.reason.startswith("Two issuers")
        assert it.site.results.current(it.ref(study)) is None and not it.pacs.objects


def test_an_image_without_an_id_names_nobody(tmp_path: Path) -> None:
    """Rule 8: what reaches the PACS carries the one id that was received, though the first image has none."""
    first, second = a_lesion(2, patient_id="P1")
    without = hospital.relabelled(first, PatientID="")
    with hospital.opened(tmp_path, prepare=_asks_the_pacs) as it:
        it.pacs.patients[hospital.study_uid([first])] = "P1"
        study = it.scanner.sends([without, second])
        it.settles()
        assert {str(each.PatientID) for each in it.pacs.of(study)} == {"P1"}
        assert [entry.study_ref for entry in it.site.results.search("P1")] == [it.ref(study)]


def test_a_stranger_without_an_id(tmp_path: Path) -> None:
    """Rule 8: an image without an id that bears another name: the study is held, nothing is read or sent."""
    first, second = a_lesion(2, patient_id="P1")
    with hospital.opened(tmp_path) as it:
        it.scanner.sends([second, hospital.relabelled(first, PatientID="", PatientName="SOMEBODY^ELSE")])
        (item,) = it.waits_until(lambda: [one for one in waiting(it) if one.state == "held"])
        it.settles()
        assert item.reason.startswith("Two names") and "SOMEBODY" not in item.reason
        assert it.reader.reads == [] and not it.pacs.objects


def test_asked_for_again_as_it_is_held(tmp_path: Path) -> None:
    """Its reading ends with the study held; asked for once more at that moment, it does not wait for ever."""
    first, second = a_lesion(2, patient_id="P1")
    with hospital.opened(tmp_path) as it:
        drop, asked = it.site.jobs.drop, []

        def drops_and_is_asked(study_ref: str, *digests: str) -> None:
            drop(study_ref, *digests)
            if not asked:
                asked.append(it.desk.read(study_ref, digests[0]))

        it.site.jobs.drop = drops_and_is_asked  # type: ignore[method-assign]
        it.scanner.sends([second, hospital.relabelled(first, PatientID="", PatientName="SOMEBODY^ELSE")])
        it.waits_until(lambda: asked)
        it.settles()
        assert asked == ["under way"] and it.reader.reads == []
        assert [item.state for item in waiting(it)] == ["held"]


def test_a_stranger_without_an_id_after_the_answer(tmp_path: Path) -> None:
    """Rule 8: a late image without an id that bears another name: what was sent is recalled."""
    first, second = a_lesion(2, patient_id="P1")
    with hospital.opened(tmp_path, prepare=_takes_rejection_notes) as it:
        study = it.scanner.sends([first])
        it.settles()
        it.scanner.sends([hospital.relabelled(second, PatientID="", PatientName="SOMEBODY^ELSE")])
        it.waits_until(lambda: it.pacs.of(study, modality="KO"))
        it.settles()
        assert it.acts("results recalled") == 1
        assert {str(each.PatientName) for each in it.pacs.of(study)} == {str(hospital.opened_file(first).PatientName)}


def test_a_second_patient_after_the_answer(tmp_path: Path) -> None:
    """Rule 8: a second patient id under an answered study: what was sent is recalled loudly, once; no more goes."""
    with hospital.opened(tmp_path, prepare=_takes_rejection_notes) as it:
        study = it.scanner.sends(a_lesion(1, patient_id="A"))
        it.settles()
        sent = {str(each.SOPInstanceUID) for each in it.pacs.of(study)}
        it.scanner.sends(a_lesion(2, patient_id="B")[1:])
        (note,) = it.waits_until(lambda: it.pacs.of(study, modality="KO"))
        it.settles()
        assert all(uid in str(note) for uid in sent) and note.PatientID == "A"
        assert {str(each.SOPInstanceUID) for each in it.pacs.of(study)} == sent | {str(note.SOPInstanceUID)}
        assert it.reader.reads == [study]
        (alarm,) = it.site.results.alarms()
        assert "recalled" in alarm.alarm and it.acts("results recalled") == 1
        assert {one.state for one in waiting(it)} == {"held", "alarm"}


def test_a_second_patient_where_no_rejection_is_taken(tmp_path: Path) -> None:
    """Rule 8: a PACS that takes no rejection notes gets nothing more; the alarm and the record say it all the same."""
    with hospital.opened(tmp_path) as it:
        study = it.scanner.sends(a_lesion(1, patient_id="A"))
        it.settles()
        sent = len(it.pacs.of(study))
        it.scanner_without_a_bell_sends(a_lesion(2, patient_id="B")[1:])
        it.waits_until(lambda: it.acts("results recalled"))
        it.settles()
        assert len(it.pacs.of(study)) == sent
        assert it.site.results.alarms()


def test_complete_by_the_count_of_the_pacs(tmp_path: Path) -> None:
    """Where the PACS can be asked, a study waits for the images that it counts and we lack: one reading, not two."""
    with hospital.opened(tmp_path, prepare=_asks_the_pacs, waits=hospital.quicker(count=60)) as it:
        lesion = a_lesion(3)
        it.pacs.counts[hospital.study_uid(lesion)] = 3
        study = it.scanner.sends(lesion[:2])
        it.stays_unread(study, seconds=1.0)
        it.scanner.sends(lesion[2:])
        it.settles()
        assert it.reader.reads == [study]
        assert it.result(study).entry.images_read == 3


def test_a_count_that_is_never_reached(tmp_path: Path) -> None:
    """A PACS that counts images we never get delays the reading, and does not prevent it."""
    with hospital.opened(tmp_path, prepare=_asks_the_pacs, waits=hospital.quicker(count=0.5)) as it:
        lesion = a_lesion(2)
        it.pacs.counts[hospital.study_uid(lesion)] = 9
        study = it.scanner.sends(lesion)
        it.settles()
        assert it.reader.reads == [study]


def test_a_closed_association_needs_less_silence(tmp_path: Path) -> None:
    """While the association is open the whole silence is waited for; once it is closed, less is enough."""
    with hospital.opened(tmp_path, waits=hospital.quicker(silence=60, after_close=0.2)) as it:
        lesion = a_lesion(2)
        with it.scanner.association(lesion) as association:
            study = it.scanner.sends_one(association, lesion[0])
            it.stays_unread(study, seconds=1.0)
            it.scanner.sends_one(association, lesion[1])
        it.settles(10)
        assert it.reader.reads == [study]


def test_what_fails_for_a_while_is_tried_again(tmp_path: Path) -> None:
    """A transient failure of reading is retried with a growing delay; nobody needs to do anything."""
    with hospital.opened(tmp_path) as it:
        it.reader.fails = [Transient("the disk is busy"), Transient("the disk is busy")]
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        assert len(it.reader.reads) == 3
        assert len(it.reports(study)) == 1


def test_a_worker_that_ends_leaves_nothing_behind(tmp_path: Path) -> None:
    """A worker that is told to end and is killed before its reading is over is missed: one of another name goes on."""
    with hospital.opened(tmp_path) as it:
        reads, begun, killed = it.reader, threading.Event(), threading.Event()

        def reads_until_killed(study: Study, revision: int) -> Result:
            if not begun.is_set():
                begun.set()
                killed.wait(60)
                raise SystemExit
            return reads(study, revision)  # type: ignore[no-any-return]

        it.worker.stop()
        it.reader = reads_until_killed
        it.worker_starts("container-1")
        study = it.scanner.sends(a_lesion(1))
        it.waits_until(begun.is_set)
        it.worker.stop()
        killed.set()
        it.worker_starts("container-2")
        it.settles()
        assert reads.reads == [study] and it.acts("worker taken over") == 1


def test_a_late_image_while_the_first_attempt_fails(tmp_path: Path) -> None:
    """A failure of reading older evidence neither parks nor overwrites the job of newer evidence."""
    with hospital.opened(tmp_path) as it:
        lesion = a_lesion(2)
        it.reader.fails, it.reader.seconds = [Misconfigured("wrong")], 1.0
        study = it.scanner.sends(lesion[:1])
        it.waits_until(lambda: it.reader.reads)
        it.scanner.sends(lesion[1:])
        it.waits_until(lambda: len(it.reader.reads) == 2)
        it.settles()
        assert it.parked(study) == ""
        assert it.result(study).entry.images_read == 2


def test_what_is_misconfigured_is_parked(tmp_path: Path) -> None:
    """A wrong setting parks the study and names the setting; once it is right, `retry` takes the study on."""
    with hospital.opened(tmp_path) as it:
        it.reader.fails = [Misconfigured("Set site.prevalence.")]
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        assert it.parked(study) == "Set site.prevalence."
        assert [(item.state, item.verb) for item in waiting(it)] == [("parked", "retry")]
        assert it.desk.retry(it.ref(study), who="operator") == ["reading"]
        it.settles()
        assert len(it.reports(study)) == 1


def test_a_fault_of_ours_is_parked_without_its_words(tmp_path: Path) -> None:
    """An unforeseen exception parks the study, says where it was raised, and repeats nothing that it says."""
    with hospital.opened(tmp_path) as it:
        it.reader.fails = [KeyError("Doe^Jane")]
        study = it.scanner.sends(a_lesion(1))
        it.settles()
        assert "A fault of ours" in it.parked(study)
        assert "Doe" not in it.parked(study)
        assert b"Doe" not in (tmp_path / "workflows.sqlite").read_bytes()
        it.desk.retry(it.ref(study), who="operator")
        it.settles()
        assert len(it.reports(study)) == 1


def test_what_is_not_to_be_trusted_stops_the_engine(tmp_path: Path) -> None:
    """Untrusted is never retried: no study is read any more until a person resumes; then nothing is lost."""
    with hospital.opened(tmp_path) as it:
        it.reader.fails = [Untrusted("The bundle's signature does not hold.")]
        bad = it.scanner.sends(a_lesion(1))
        it.settles()
        good = it.scanner.sends(a_lesion(1, seed=7))
        it.stays_unread(good, seconds=1.0)
        assert it.reader.reads == [bad]
        assert [(item.what, item.verb) for item in waiting(it) if item.stuck] == [
            ("engine", "resume"),
            ("study", "retry"),
        ]
        it.desk.resume(who="operator")
        it.settles()
        assert it.reader.reads == [bad, good]


def test_read_when_the_engine_goes_on_after_a_weekend(tmp_path: Path) -> None:
    """What was received before an engine stood still for days is shown as stuck, and read when the engine goes on."""
    with hospital.opened(tmp_path) as it:
        it.site.jobs.stop_engine("The bundle's signature does not hold.")
        study = it.scanner.sends(a_lesion(1))
        it.stays_unread(study, seconds=1.5)
        it.clock.passes(days=3)
        assert [(item.what, item.state, item.verb) for item in waiting(it)] == [
            ("engine", "stopped", "resume"), ("study", "unread", "retry"),
        ]  # fmt: skip
        it.desk.resume(who="operator")
        it.settles()
        assert it.reader.reads == [study]


def test_an_unread_study_is_taken_up_by_a_person(tmp_path: Path) -> None:
    """`retry` takes up a study that was received and that nobody reads."""
    with hospital.opened(tmp_path, waits=hospital.quicker(sweep=600)) as it:
        study = it.scanner_without_a_bell_sends(a_lesion(1))
        assert it.desk.retry(it.ref(study), who="operator") == ["reading"]
        it.settles()
        assert it.reader.reads == [study]


def test_the_engine_holds_references_and_words(tmp_path: Path) -> None:
    """Nothing in the workflow engine's database names a patient, a study or an image, and nothing there is code."""
    with hospital.opened(tmp_path) as it:
        lesion = a_lesion(2, patient_id="PATIENT-7")
        study = it.scanner.sends(lesion)
        it.settles()
        names = [study, "PATIENT-7", *(str(hospital.opened_file(data).SOPInstanceUID) for data in lesion)]
        names += [each.sop_instance_uid for each in it.result(study).objects]
        workflows = it.desk.client.list_workflows()
        assert {each.name for each in workflows} == {"complete_study", "read_study", "deliver_result"}
    held = b"".join(file.read_bytes() for file in tmp_path.glob("workflows.sqlite*"))
    assert not [name for name in names if name.encode() in held]
    assert b"py_pickle" not in held


def test_received_while_nobody_worked(tmp_path: Path) -> None:
    """What was received and not read is put to work by the sweep of the next worker."""
    with hospital.opened(tmp_path) as it:
        it.worker.stop()
        study = it.scanner_without_a_bell_sends(a_lesion(2))
        it.worker_starts()
        it.settles()
        assert it.reader.reads == [study]
        assert len(it.reports(study)) == 1


def test_a_damaged_image_does_not_stop_the_others(tmp_path: Path) -> None:
    """A truncated image among good ones is refused or left out with a reason; the others are read."""
    with hospital.opened(tmp_path) as it:
        good = a_lesion(2)
        broken = hospital.with_pixels_cut(a_lesion(3)[2])
        study = it.scanner.sends([*good, broken])
        it.settles()
        shown = it.result(study)
        assert shown.entry.images_read == 2
        assert len(shown.answer.not_analysed) == 1


def test_results_are_listed_searched_and_shown(tmp_path: Path) -> None:
    """Results are listed newest first, found by patient id, accession number or study, and shown in full."""
    with hospital.opened(tmp_path) as it:
        first = it.scanner.sends(a_lesion(1, patient_id="P-1"))
        it.settles()
        it.reader.says = "3"
        second = it.scanner.sends(a_lesion(1, seed=3, patient_id="P-2"))
        it.settles()
        results = it.site.results
        assert [entry.study_ref for entry in results.listing()] == [it.ref(second), it.ref(first)]
        assert [entry.study_ref for entry in results.search("P-2")] == [it.ref(second)]
        assert [entry.study_ref for entry in results.search(first)] == [it.ref(first)]
        shown = it.result(first)
        assert (shown.study_uid, shown.patient_id) == (first, "P-1")
        assert shown.answer.findings[0].birads == "4C"  # type: ignore[union-attr]
        assert {each.state for each in shown.delivered} == {"sent"}


def waiting(it: Hospital) -> list[queue.Item]:
    return queue.items(it.site.inbox, it.site.results, it.site.jobs, now=it.clock())


def _referenced(studies: Any) -> list[str]:
    series = [each for study in studies for each in study.ReferencedSeriesSequence]
    return [str(item.ReferencedSOPInstanceUID) for each in series for item in each.ReferencedSOPSequence]


def _takes_rejection_notes(it: Hospital) -> None:
    it.destinations = [Destination(it.pacs.node, rejection_notes=True)]


def _asks_the_pacs(it: Hospital) -> None:
    it.query_node = it.pacs.node
