"""A reader's word, a final report and pathology make cases in which nobody can be found."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset

from busgen_cds.arrival import Arrival, Peek
from busgen_cds.flows import confirm_case
from busgen_cds.learning import data
from busgen_cds.operations import learning_loop
from busgen_cds.pathology import Report
from busgen_cds.store import audit
from busgen_cds.store.casebook import Casebook
from busgen_cds.store.cases import Word
from busgen_cds.store.retention import Letting
from busgen_cds.truth import Conflict, Known, Open
from tests.images import breast_study
from tests.web.practice import Practice, Says


class Site(Practice):
    @property
    def stations(self) -> confirm_case.Stations:
        return confirm_case.Stations(self.inbox, self.results, self.cases, self.book)

    @property
    def book(self) -> Casebook:
        return Casebook(self.database, self.vault, self.clock)

    def study(self, seed: int, says: Says, patient: str = "") -> str:
        ref = self.receives(breast_study(1, seed=seed, patient_id=patient or f"PAT-{seed}"))
        self.answers(ref, says)
        return ref

    def says(self, ref: str, word: str, finding: int = 1, findings: int = 1, **more: object) -> None:
        self.cases.say(Word(ref, 1, finding, word, "dr. ruth", **more), findings=findings)  # type: ignore[arg-type]

    def proves(self, ref: str, pathology: str, patient: str = "") -> None:
        who = patient or self.patient(ref)
        self.book.receive(Report(f"ACC-{ref[:6]}", who, pathology, "2026-03-04"), who="lab")  # type: ignore[arg-type]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


def test_an_agreed_finding_becomes_a_sealed_case_once(site: Site) -> None:
    """A reader who agrees makes a case with the outline, the category and the bundle that had said so."""
    ref = site.study(1, Says("5"))
    site.says(ref, "agree")
    (outcome,) = confirm_case.gather(site.stations)
    assert outcome.found == Known("malignant", "reader") and outcome.changed
    assert not confirm_case.gather(site.stations)[0].changed  # doing it again changes nothing
    (listed,) = site.book.listing()
    case = site.book.open(listed.ref)
    assert case.mask is not None and 0.001 < case.mask.mean() < 0.5 and case.mask.shape == case.tissue.shape
    assert (case.pathology, case.birads, case.word) == ("malignant", "5", "agree")
    assert case.said_by is not None and case.said_by.version == "1.2"
    stored = (site.folder / "site.sqlite").read_bytes() + (site.folder / "site.sqlite-wal").read_bytes()
    assert case.tissue.tobytes()[5000:5400] not in stored


def test_the_same_words_make_the_same_case(site: Site) -> None:
    """Where this study comes to make another case, `SHAPE` must be one more: what stands is then made anew."""
    site.says(site.study(1, Says("5")), "agree")
    confirm_case.gather(site.stations)
    case = site.book.open(site.book.listing()[0].ref)
    assert case.mask is not None
    digest = hashlib.sha256(case.tissue.tobytes() + case.mask.tobytes()).hexdigest()
    assert (confirm_case.SHAPE, digest[:16]) == (1, "36332f4afd79dd66")


def test_a_second_look_opens_no_image(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that was made is not made again to see that it is the same; another word, and it is."""
    ref = site.study(1, Says("5"))
    site.says(ref, "agree")
    confirm_case.gather(site.stations)
    with monkeypatch.context() as patched:
        patched.setattr(confirm_case, "_frames", lambda *_: pytest.fail("an image was opened"))
        assert [(each.found, each.changed) for each in confirm_case.gather(site.stations)] == [
            (Known("malignant", "reader"), False)
        ]
    site.proves(ref, "malignant")
    assert [(each.found, each.changed) for each in confirm_case.gather(site.stations)] == [
        (Known("malignant", "pathology"), True)
    ]


@pytest.mark.parametrize(
    ("category", "proven", "kind", "says"),
    [
        ("4C", "", "case made from a reader's opinion", "suspicious"),
        ("3", "", "case made from a reader's opinion", "benign-looking"),
        ("4C", "malignant", "case made from pathology", "malignant"),
    ],
)
def test_an_opinion_is_recorded_as_an_opinion(site: Site, category: str, proven: str, kind: str, says: str) -> None:
    """A reader who agrees has an opinion: the record calls it neither pathology nor confirmed."""
    ref = site.study(1, Says(category))
    site.says(ref, "agree")
    if proven:
        site.proves(ref, proven)
    confirm_case.gather(site.stations)
    (entry,) = audit.entries(site.database, audit.Wanted(kind="case "))
    assert (entry.act.kind, entry.act.what, entry.act.detail["says"]) == (kind, says, says)
    if not proven:
        assert not [word for word in (b"pathology", b"confirmed", b"malignant", b'benign"') if word in entry.line()]


def test_no_name_and_no_writing_is_in_a_case(site: Site, tmp_path: Path) -> None:
    """A case holds the tissue alone: no id, and nothing of the header's text or margins."""
    ref = site.study(2, Says("3"), patient="MUSTERMANN-77")
    site.says(ref, "agree")
    confirm_case.gather(site.stations)
    folder = learning_loop.write_cases(site.book, site.book.listing(), tmp_path / "out")
    everything = b"".join(path.read_bytes() for path in sorted(folder.iterdir()))
    assert b"MUSTERMANN" not in everything and ref.encode() not in everything
    case = site.book.open(site.book.listing()[0].ref)
    assert case.tissue.shape[0] < 600 and case.tissue.shape[1] < 800
    assert not np.any(np.asarray(case.tissue) > 250)  # burned-in marks are near white


def test_pathology_settles_what_a_category_leaves_open(site: Site) -> None:
    """A 4A waits; pathology that names accession number and patient makes it a case."""
    ref = site.study(3, Says("4A"))
    site.says(ref, "agree")
    assert isinstance(confirm_case.gather(site.stations)[0].found, Open)
    site.proves(ref, "malignant")
    assert confirm_case.gather(site.stations)[0].found == Known("malignant", "pathology")


def test_a_case_that_pathology_alone_made_stays_as_it_is(site: Site) -> None:
    """It is of its report's day, not of the day it is looked at: looked at again, it is new to no further night."""
    ref = site.study(3, Says("4A"))
    site.proves(ref, "malignant")
    confirm_case.gather(site.stations)
    (case,) = site.book.listing()
    assert case.confirmed_on == "2026-03-04"
    assert not confirm_case.gather(site.stations)[0].changed
    assert site.book.listing() == [case]


def test_pathology_of_another_patient_is_shown_and_not_used(site: Site) -> None:
    """An accession number alone matches nobody: the stranger is a conflict."""
    ref = site.study(4, Says("4A"))
    site.proves(ref, "malignant", patient="SOMEBODY-ELSE")
    found = [outcome.found for outcome in confirm_case.gather(site.stations)]
    assert any(isinstance(each, Conflict) and "another patient" in each.reason for each in found)
    assert site.book.listing() == []


def test_a_conflict_takes_the_case_back_until_a_person_settles_it(site: Site) -> None:
    """A case whose truth is in doubt again is dropped; another word or a withdrawn report settles it."""
    ref = site.study(5, Says("3"))
    site.says(ref, "agree")
    confirm_case.gather(site.stations)
    site.proves(ref, "malignant")
    (outcome,) = confirm_case.gather(site.stations)
    assert isinstance(outcome.found, Conflict) and outcome.changed and site.book.listing() == []
    site.says(ref, "edit", birads="5")
    assert confirm_case.gather(site.stations)[0].found == Known("malignant", "pathology")
    report = site.book.pathology_of(ref)[0].ref
    assert site.book.withdraw(report[:8], who="ruth") and not site.book.withdraw(report, who="ruth")
    assert confirm_case.gather(site.stations)[0].found == Known("malignant", "reader")
    assert ("case dropped", "case maker") in site.acts("case")


def test_an_outline_beside_the_tissue_is_none(site: Site, tmp_path: Path) -> None:
    """A lesion drawn where no tissue is would teach that the image shows none: it goes out without an outline."""
    ref = site.study(5, Says("5"))
    site.says(ref, "edit", contour=((9001.0, 9001.0), (9009.0, 9001.0), (9009.0, 9009.0)))
    confirm_case.gather(site.stations)
    folder = learning_loop.write_cases(site.book, site.book.listing(), tmp_path / "out")
    (row,) = data.read_manifest(folder)
    assert (row.pathology, row.outlined) == ("malignant", False)


def test_an_edited_contour_is_the_mask(site: Site) -> None:
    """What the reader drew counts, not what was said before."""
    ref = site.study(6, Says("5"))
    square = ((300.0, 200.0), (400.0, 200.0), (400.0, 260.0), (300.0, 260.0))
    site.says(ref, "edit", contour=square)
    confirm_case.gather(site.stations)
    case = site.book.open(site.book.listing()[0].ref)
    assert case.mask is not None and abs(int(case.mask.sum()) - 101 * 61) < 10


def test_a_rejected_finding_makes_a_normal_frame(site: Site) -> None:
    """A rejection that says there is no lesion is a normal case without a mask."""
    ref = site.study(7, Says("4B"))
    site.says(ref, "reject", reason="normal structure")
    confirm_case.gather(site.stations)
    (listed,) = site.book.listing()
    assert listed.pathology == "normal" and site.book.open(listed.ref).mask is None


def test_nothing_found_and_agreed_is_a_normal_case(site: Site) -> None:
    """Where nothing was found, a reader who agrees makes a normal case."""
    ref = site.study(8, Says(None))
    site.says(ref, "agree", finding=0, findings=0)
    assert confirm_case.gather(site.stations)[0].found == Known("normal", "reader")


def test_what_a_newer_revision_does_not_show_is_no_case(site: Site) -> None:
    """A newer revision with fewer findings, or without an answer, takes the older one's cases back."""
    ref = site.study(9, Says("5", findings=2))
    for finding in (1, 2):
        site.says(ref, "edit", finding, 2, birads="5")
    confirm_case.gather(site.stations)
    assert [each.finding for each in site.book.listing()] == [1, 2]
    site.answers(ref, Says("5", findings=1))
    outdated, waits = confirm_case.gather(site.stations)
    assert (outdated.finding, outdated.changed, waits.finding) == (2, True, 1) and site.book.listing() == []
    site.cases.say(Word(ref, 2, 1, "agree", "dr. ruth"), findings=1)
    confirm_case.gather(site.stations)
    site.answers(ref, Says(declines="two patient ids under one study"))
    assert len(confirm_case.gather(site.stations)) == 1 and site.book.listing() == []


def test_a_study_that_was_let_go_keeps_its_case_and_stops_nobody(site: Site) -> None:
    """A case outlives its study, and the next night's look at all studies goes on past it."""
    gone, there = site.study(10, Says("5")), site.study(11, Says("3"))
    site.says(gone, "agree")
    confirm_case.gather(site.stations)
    files = breast_study(1, seed=15, patient_id="PAT-15")
    reported = site.receives(files)
    site.answers(reported, Says("4C"))
    data, arrival, peek = _final_report(files[0], "397145000")
    site.inbox.keep(arrival, peek, [data])
    for ref in (gone, reported):
        Letting(site.inbox, site.database, site.vault).shred(ref, "retention", insist=True)
    site.says(there, "agree")
    assert [each.study_ref for each in confirm_case.gather(site.stations)] == [there]
    assert {each.study_ref for each in site.book.listing()} == {gone, there}


def test_images_without_a_patient_id_make_no_case(site: Site) -> None:
    """Nobody can say whether such a patient tests or teaches."""
    ref = site.receives(breast_study(1, seed=12, patient_id=""))
    site.answers(ref, Says("5"))
    site.says(ref, "agree")
    (outcome,) = confirm_case.gather(site.stations)
    assert isinstance(outcome.found, Open) and "no patient id" in outcome.found.reason and site.book.listing() == []


def test_two_scanners_know_one_patient(site: Site) -> None:
    """One scanner names the issuer of the patient id, the other does not: it is one patient, on one side."""
    for seed, issuer in ((13, "HOSPITAL"), (14, "")):
        image = pydicom.dcmread(io.BytesIO(breast_study(1, seed=seed, patient_id="SAME")[0]))
        image.IssuerOfPatientID = issuer
        buffer = io.BytesIO()
        image.save_as(buffer)
        ref = site.receives([buffer.getvalue()])
        site.answers(ref, Says("5"))
        site.says(ref, "agree")
    confirm_case.gather(site.stations)
    assert len(site.book.listing()) == 2 and len({each.patient for each in site.book.listing()}) == 1


def test_a_patient_stays_on_one_side_for_ever(site: Site) -> None:
    """Patients are split once: the same patient's later studies, and another process, find the same side."""
    sides = {f"p{i}": site.book.part_of(f"p{i}") for i in range(200)}
    assert {name: Casebook(site.database, site.vault).part_of(name) for name in sides} == sides
    assert 0.2 < sum(side == "test" for side in sides.values()) / len(sides) < 0.4
    for seed in (20, 21):
        site.says(site.study(seed, Says("5"), patient="SAME"), "agree")
    confirm_case.gather(site.stations)
    assert len({(each.patient, each.part) for each in site.book.listing()}) == 1


def _final_report(study: bytes, category: str, verified: str = "VERIFIED") -> tuple[bytes, Arrival, Peek]:
    of = pydicom.dcmread(io.BytesIO(study), stop_before_pixels=True)
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.33", "2.25.7788"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = of.StudyInstanceUID, "2.25.7789", of.PatientID
    ds.Modality, ds.Manufacturer, ds.ValueType = "SR", "RIS", "CONTAINER"
    ds.CompletionFlag, ds.VerificationFlag = "COMPLETE", verified
    item, code = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = category, "SCT", "category"
    item.ValueType, item.RelationshipType, item.ConceptCodeSequence = "CODE", "CONTAINS", [code]
    ds.ContentSequence = [item]
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    arrival = Arrival("RIS", "127.0.0.1", ds.SOPClassUID, ds.SOPInstanceUID, "1.2.840.10008.1.2.1")
    peek = Peek(
        str(ds.StudyInstanceUID), "2.25.7789", str(ds.SOPClassUID), "2.25.7788", str(ds.PatientID), "", "SR"
    )  # fmt: skip
    return buffer.getvalue(), arrival, peek


@pytest.mark.parametrize(("verified", "expected"), [("VERIFIED", Known("malignant", "report")), ("UNVERIFIED", Open)])
def test_a_radiologists_verified_report_is_heard(site: Site, verified: str, expected: object) -> None:
    """A final SR received by DICOM states the truth of a study with one finding, though nobody said a word of it here;
    an unverified one does not."""
    study = breast_study(1, seed=30, patient_id="PAT-30")
    ref = site.receives(study)
    site.answers(ref, Says("4C"))
    data, arrival, peek = _final_report(study[0], "397145000", verified)
    site.inbox.keep(arrival, peek, [data])
    made = [each.found for each in confirm_case.gather(site.stations)]
    assert made == ([expected] if verified == "VERIFIED" else [])
    (outcome,) = confirm_case.gather(site.stations, [ref])
    assert outcome.found == expected or (isinstance(expected, type) and isinstance(outcome.found, expected))
