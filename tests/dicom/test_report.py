"""The structured report: what it says of each kind of answer, and what it can never say."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import highdicom as hd
import pytest
from pydicom import Dataset, dcmread

from busgen_cds import birads
from busgen_cds.birads import Category
from busgen_cds.dicom import checks, content, headers, objects, report, templates
from busgen_cds.dicom.saying import Saying
from busgen_cds.result import Result
from busgen_cds.study import NotAnalysed, Source, Study
from tests.dicom import answers, golden

REPORT = objects.Profile(("sr",))


def reported(study: Study, result: Result, **more: Any) -> Dataset:
    (made,) = objects.render(study, result, profile=REPORT, rendered_at=answers.AT, **more)
    return dcmread(io.BytesIO(made.data))


def texts(ds: Dataset) -> str:
    return "\n".join(str(item.TextValue) for item in content.walk(ds) if item.ValueType == "TEXT")


def values(ds: Dataset, name: birads.Code) -> list[str]:
    return [
        str(item.ConceptCodeSequence[0].CodeValue)
        for item in content.walk(ds)
        if content.name_of(item) == name[:2]
        if item.ValueType == "CODE"
    ]


def test_a_lesion_is_reported_in_the_form_that_viewers_draw() -> None:
    """Each number of a finding has its own closed outline on the source image and frame, the area first."""
    study = answers.breast(1, cine=6)
    ds = reported(study, answers.assessed(study, answers.finding(study.frames[3])))
    (group,) = [item for item in content.walk(ds) if content.name_of(item) == report.GROUP[:2]]
    numbers = [item for item in group.ContentSequence if item.ValueType == "NUM"]
    assert [n.ConceptNameCodeSequence[0].CodeMeaning for n in numbers] == [
        "Area", "Long axis", "Short axis", "Probability of cancer",
    ]  # fmt: skip
    for number in numbers:
        outline = number.ContentSequence[0]
        image = outline.ContentSequence[0].ReferencedSOPSequence[0]
        assert outline.GraphicType == "POLYLINE" and outline.GraphicData[:2] == outline.GraphicData[-2:]
        assert (image.ReferencedSOPInstanceUID, image.ReferencedFrameNumber) == (
            study.frames[3].source.sop_instance_uid, 4,
        )  # fmt: skip
    assert "AI: BI-RADS 4B, p=37.5 %" in texts(group)


def test_highdicom_reads_our_report() -> None:
    """An independent library finds the finding, its tracking identifier and its measurements in our report."""
    study = answers.breast(1, laterality="R")
    (made,) = objects.render(
        study, answers.assessed(study, answers.finding(study.frames[0])), profile=REPORT, rendered_at=answers.AT
    )
    read = hd.sr.srread(io.BytesIO(made.data))
    (group,) = read.content.get_image_measurement_groups(tracking_uid=None)
    assert group.tracking_identifier == "Lesion 1" and hd.UID(group.tracking_uid).is_valid
    assert group.finding_type.meaning == "Mass" and group.finding_sites[0].laterality.meaning == "Right"
    assert {m.name.meaning: m.value for m in group.get_measurements()} == {
        "Area": 108.6, "Long axis": 14.4, "Short axis": 9.6, "Probability of cancer": 37.5,
    }  # fmt: skip


@pytest.mark.parametrize("category", birads.CATEGORIES)
def test_a_category_is_stated_with_its_code(category: Category) -> None:
    """Each category that we can state has its own code, in the finding and for the study."""
    study = answers.breast()
    ds = reported(study, answers.assessed(study, answers.finding(study.frames[0], category)))
    assert values(ds, templates.load().code("finding.category")) == [birads.CODES[category].value] * 2


@pytest.mark.parametrize("forbidden", ["0", "1", "2", "4", "6", ""])
def test_categories_that_only_a_physician_can_state_are_refused(forbidden: Any) -> None:
    """Categories 0, 1, 2 and 6 are never emitted: such a Result makes no object at all."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0], forbidden))
    with pytest.raises(checks.Malformed, match="not ours to state"):
        reported(study, result)


def test_nothing_found_is_never_negative() -> None:
    """Nothing found says in how many of how many images, with the probability, without a category or "negative"."""
    study = answers.breast(3, tissue="normal", left_out=("colour Doppler",))
    ds = reported(study, answers.assessed(study))
    assert "No lesion found in 2 of 3 images analysed; 1 not analysed: colour Doppler." in texts(ds)
    assert "Probability of malignancy of the study 0.4 %." in texts(ds)
    assert "negative" not in texts(ds).lower()
    assert values(ds, templates.load().code("finding.category")) == []


def test_declined_is_loud() -> None:
    """A declined study is delivered as "NOT ANALYSED: reason", without a probability or a category."""
    study = answers.breast()
    ds = reported(study, answers.declined(study, "no frame is sharp enough"))
    assert "NOT ANALYSED: no frame is sharp enough" in texts(ds)
    names = {content.name_of(item) for item in content.walk(ds)}
    assert report.PROBABILITY[:2] not in names and report.GROUP[:2] not in names


def test_the_reporter_is_a_device_and_the_report_unverified() -> None:
    """The observer is a Device, the report is preliminary and UNVERIFIED, and says that it is no diagnosis."""
    study = answers.breast()
    ds = reported(study, answers.assessed(study, answers.finding(study.frames[0])))
    assert (ds.VerificationFlag, ds.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    assert values(ds, report.OBSERVER_TYPE) == [report.DEVICE.value]
    assert "VerifyingObserverSequence" not in ds and "not a diagnosis" in texts(ds)


def test_the_report_names_what_made_it_and_for_whom_it_holds() -> None:
    """The report prints product, bundle, digest, the site's prevalence and the one of calibration."""
    study = answers.breast()
    ds = reported(study, answers.assessed(study, answers.finding(study.frames[0])))
    said = texts(ds)
    for word in (
        "BUSGen-CDS",
        "busgen-reader 1.2.0",
        answers.BUNDLE.digest,
        "prevalence of 0.6 %",
        "calibrated at 32 %",
    ):
        assert word in said
    assert answers.BUNDLE.digest in ds.SoftwareVersions


@pytest.mark.parametrize(("stated", "written"), [("", []), ("L", ["7771000"]), ("R", ["24028007"])])
def test_a_side_is_stated_only_by_the_source(stated: Any, written: list[str]) -> None:
    """Side is written exactly where the source states it."""
    study = answers.breast(laterality=stated)
    ds = reported(study, answers.assessed(study, answers.finding(study.frames[0])))
    assert values(ds, report.LATERALITY) == written


def test_a_side_that_the_source_does_not_state_is_refused() -> None:
    """A Result that infers a side makes no object."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0], laterality="L"))
    with pytest.raises(checks.Malformed, match="side L is not stated"):
        reported(study, result)


def test_without_a_scale_there_are_no_millimetres() -> None:
    """A source without spacing gets no lengths, only the probability with its outline."""
    study = answers.breast(spacing=None)
    ds = reported(study, answers.assessed(study, answers.finding(study.frames[0])))
    units = {
        item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue
        for item in content.walk(ds) if item.ValueType == "NUM"
    }  # fmt: skip
    assert units == {"%", "{pixels}"}


def test_a_revision_replaces_loudly() -> None:
    """A newer revision names the report it replaces, raises the series number and says REV n."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0]))
    first = objects.render(study, result, rendered_at=answers.AT)
    ds = reported(study, answers.revised(result), replaces=first)
    assert (ds.SeriesNumber, ds.SeriesDescription) == (911, "AI breast ultrasound report REV 2, replaces earlier")
    replaced = ds.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert [item.ReferencedSOPInstanceUID for item in replaced] == [first[0].sop_instance_uid]
    assert "REV 2, replaces every earlier AI result of this study" in texts(ds)


def test_replaced_objects_are_rejected_where_the_pacs_takes_it() -> None:
    """The IOCM rejection note lists every object of the earlier revision, and is made only when asked for."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0]))
    first = objects.render(study, result, rendered_at=answers.AT)
    profile = objects.Profile(("sr", "ko"))
    made = objects.render(study, answers.revised(result), profile=profile, rendered_at=answers.AT, replaces=first)
    (note,) = [dcmread(io.BytesIO(it.data)) for it in made if it.kind == "ko"]
    listed = {
        i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for i in note.ContentSequence if i.ValueType == "COMPOSITE"
    }
    assert listed == {it.sop_instance_uid for it in first}
    assert note.ConceptNameCodeSequence[0].CodeValue == "113037"
    assert not [it for it in objects.render(study, result, profile=profile, rendered_at=answers.AT) if it.kind == "ko"]


def test_every_image_of_the_study_is_evidence() -> None:
    """The report refers to each image read, and names each one left out that says who it is."""
    study = answers.breast(3, left_out=("no B-mode",))
    nameless = NotAnalysed(Source("", "", "", 0, 0), "damaged: it cannot be read")
    study = dataclasses.replace(study, not_analysed=(*study.not_analysed, nameless))
    ds = reported(study, answers.assessed(study, answers.finding(study.frames[0])))
    named = [
        {item.ReferencedSOPInstanceUID for item in evidence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence}
        for evidence in (ds.CurrentRequestedProcedureEvidenceSequence, ds.PertinentOtherEvidenceSequence)
    ]
    assert named == [
        {frame.source.sop_instance_uid for frame in study.frames}, {study.not_analysed[0].source.sop_instance_uid},
    ]  # fmt: skip
    assert "2 of 4 images analysed; 1 not analysed: no B-mode; 1 not analysed: damaged" in texts(ds)


@pytest.mark.parametrize("name", golden.known())
def test_the_report_is_the_golden_one(name: str) -> None:
    """The template's reports are the golden ones (`python -m tests.dicom.golden` shows the difference)."""
    kept = (golden.FOLDER / f"breast_ultrasound.{name}.golden.txt").read_text("utf-8")
    assert golden.known()[name] == kept


def test_the_template_is_really_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another title, order and wording in the template file is another report."""
    template = templates.load()
    other = {**template.document, "finding": {**template.at("finding")}, "report": {**template.at("report")}}
    other["finding"]["measurements"] = template.at("finding.measurements")[::-1]
    other["report"]["title"] = ["126001", "DCM", "Oncology Measurement Report"]
    changed = templates.Template("other", "2", other)
    monkeypatch.setattr(templates, "load", lambda name: changed)
    study = answers.breast()
    ds = reported(study, answers.assessed(study, answers.finding(study.frames[0])))
    names = [i.ConceptNameCodeSequence[0].CodeMeaning for i in content.walk(ds) if i.ValueType == "NUM"]
    assert ds.ConceptNameCodeSequence[0].CodeValue == "126001"
    assert names[-5:-1] == ["Probability of cancer", "Short axis", "Long axis", "Area"]


def test_the_checks_find_what_no_validator_finds() -> None:
    """A finding without its tracking UID, or a number without its outline, does not leave the house."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0]))
    saying = Saying(study, result, templates.load(), answers.AT)
    for spoil, complaint in ((_untracked, "no tracking UID"), (_unplaced, "no outline of its own")):
        ds = report.structured_report(saying)
        spoil(next(item for item in content.walk(ds) if content.name_of(item) == report.GROUP[:2]))
        made = headers.finish(ds, "sr")
        with pytest.raises(checks.Malformed, match=complaint):
            checks.rendered([made], saying)


def _untracked(group: Dataset) -> None:
    group.ContentSequence = [i for i in group.ContentSequence if content.name_of(i) != report.TRACKING_UID[:2]]


def _unplaced(group: Dataset) -> None:
    number = next(i for i in group.ContentSequence if i.ValueType == "NUM")
    number.ContentSequence = []
