"""All objects of a Result together: the same bytes each time, whole identities, quick, and safe with odd headers."""

from __future__ import annotations

import dataclasses
import io
import time
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.uid import UID

from busgen_cds import birads
from busgen_cds.dicom import checks, headers, objects, templates
from busgen_cds.errors import Misconfigured
from busgen_cds.result import BundleName
from busgen_cds.study import Header, Patient, Region, Study
from tests.dicom import answers

STUDY = answers.breast()
ALL = objects.Profile(("sr", "sc", "seg", "pr", "ko"))


def test_the_same_input_gives_the_same_bytes() -> None:
    """Rendering twice gives the same objects, byte for byte."""
    study = answers.breast(2, colour="rgb")
    result = answers.assessed(study, answers.finding(study.frames[0]), answers.finding(study.frames[1], "3"))
    once, again = (objects.render(study, result, profile=ALL, rendered_at=answers.AT) for _ in range(2))
    assert [it.kind for it in once] == ["sr", "sc", "sc", "seg", "seg", "pr", "pr"]
    assert once == again


def test_uids_follow_from_what_was_read_and_by_whom() -> None:
    """Every UID is below 2.25 and changes with study, evidence, bundle and revision, and with nothing else."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0]))
    uids = {it.sop_instance_uid for it in objects.render(study, result, rendered_at=answers.AT)}
    assert all(UID(uid).is_valid and uid.startswith("2.25.") for uid in uids)
    later = objects.render(study, result, rendered_at=answers.AT + timedelta(hours=1))
    assert {it.sop_instance_uid for it in later} == uids
    other_bundle = dataclasses.replace(result, bundle=BundleName("busgen-reader", "1.2.0", "f" * 64))
    for changed in (other_bundle, answers.revised(result)):
        assert not uids & {it.sop_instance_uid for it in objects.render(study, changed, rendered_at=answers.AT)}


def test_a_revision_is_said_on_every_object() -> None:
    """REV n stands in each object's series description and text, and series numbers rise."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0]))
    first = objects.render(study, result, profile=ALL, rendered_at=answers.AT)
    second = objects.render(study, answers.revised(result), profile=ALL, rendered_at=answers.AT, replaces=first)
    before = {it.kind: dcmread(io.BytesIO(it.data)).SeriesNumber for it in first}
    for it in second:
        ds = dcmread(io.BytesIO(it.data))
        assert "REV 2" in ds.SeriesDescription and len(ds.SeriesDescription) <= 64
        ds.pop("PixelData", None)
        assert "REV 2" in ds.to_json().replace(ds.SeriesDescription, "")
        assert it.kind == "ko" or ds.SeriesNumber > before[it.kind]


def test_an_object_cannot_replace_itself() -> None:
    """Rendering the same revision as the one that it replaces is refused."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0]))
    first = objects.render(study, result, rendered_at=answers.AT)
    with pytest.raises(checks.Malformed, match="replaces itself"):
        objects.render(study, result, rendered_at=answers.AT, replaces=first)


def test_a_result_of_another_study_is_refused() -> None:
    """Study and Result must belong together, down to the bytes received."""
    study, other = answers.breast(seed=1), answers.breast(seed=2)
    with pytest.raises(checks.Malformed, match="another study"):
        objects.render(study, answers.assessed(other), rendered_at=answers.AT)
    more = dataclasses.replace(study, received=(*study.received, ("1.2.3", "00")))
    with pytest.raises(checks.Malformed, match="other images"):
        objects.render(more, answers.assessed(study), rendered_at=answers.AT)


def test_a_profile_chooses_the_kinds() -> None:
    """A destination gets the kinds of its profile; one that could not be told of a decline is refused."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0]))
    made = objects.render(study, result, profile=objects.Profile(("sc", "pr")), rendered_at=answers.AT)
    assert [it.kind for it in made] == ["sc", "pr"]
    with pytest.raises(Misconfigured, match="'sr' or 'sc'"):
        objects.Profile(("seg", "pr"))
    with pytest.raises(Misconfigured, match="unknown kinds"):
        objects.Profile(("sr", "pdf"))  # type: ignore[arg-type]


def test_a_template_that_is_not_there_is_named() -> None:
    """An unknown template is Misconfigured and names the known ones."""
    study = answers.breast()
    with pytest.raises(Misconfigured, match="known: breast_ultrasound"):
        profile = objects.Profile(template="klingon")
        objects.render(study, answers.assessed(study), profile=profile, rendered_at=answers.AT)


def test_a_word_that_a_template_cannot_know_is_named() -> None:
    """A template with an unknown word or a broken code is Misconfigured, and says which."""
    template = templates.load()
    with pytest.raises(Misconfigured, match="biradz"):
        template.fill("BI-RADS {biradz}", {"birads": "3"})
    with pytest.raises(Misconfigured, match="a code is"):
        templates.as_code(["1", "2"], "here")
    with pytest.raises(Misconfigured, match=r"no 'report\.nowhere'"):
        template.at("report.nowhere")


ODD = (
    "",
    "   ",
    "a\\b",
    "x" * 300,
    "\x00\x1b$B",
    "line\nbreak\ttab",
    "99999999",
    "256199",
    "Z",
    "=^=^",
    "\x85",
    "é" * 70,
)


@pytest.mark.parametrize("odd", ODD)
def test_odd_headers_never_stop_a_result(odd: str) -> None:
    """Whatever the source's header holds, every object is made, and the patient's id goes out as it came in."""
    study = answers.breast()
    study = dataclasses.replace(study, patient=Patient(*[odd] * 5), header=Header(*[odd] * 6))
    for it in objects.render(study, answers.assessed(study), rendered_at=answers.AT):
        ds = dcmread(io.BytesIO(it.data))
        assert ds.StudyInstanceUID == study.uid and not ds.PatientSex and not ds.StudyDate
        assert headers.identifier(ds.PatientID) == headers.identifier(odd)


def test_no_text_of_ours_is_too_long(recwarn: pytest.WarningsRecorder) -> None:
    """Our own texts keep to DICOM's lengths, however long names are; a patient's id goes out whole, unwarned."""
    study = dataclasses.replace(answers.breast(), patient=Patient(*["9" * 65] * 5), header=Header(*["x" * 300] * 6))
    result = dataclasses.replace(answers.assessed(study), bundle=BundleName("b" * 70, "1" * 70, "c" * 64))
    for it in objects.render(study, result, rendered_at=answers.AT):
        ds = dcmread(io.BytesIO(it.data))
        assert ds.PatientID == "9" * 65
        assert len(ds.ManufacturerModelName) == 64 and all(len(each) <= 64 for each in ds.SoftwareVersions)
    assert not [each for each in recwarn if "value length" in str(each.message)]


def test_a_template_that_writes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of ours that is too long for its element stops the object, by name."""
    study = answers.breast()
    monkeypatch.setattr(headers, "cut", lambda text, _length: text)
    result = dataclasses.replace(answers.assessed(study), bundle=BundleName("b" * 70, "1", "c" * 64))
    with pytest.raises(checks.Malformed, match="ManufacturerModelName is longer than 64"):
        objects.render(study, result, rendered_at=answers.AT)


# Text as PACS and scanners really send it, and as nobody should.
odd_text = st.text(st.characters(codec="utf-8"), max_size=80)


@settings(max_examples=200, deadline=None)
@given(
    patient=st.builds(Patient, *[odd_text] * 5),
    header=st.builds(Header, *[odd_text] * 6),
)
def test_headers_of_any_text_are_written_and_read_back(patient: Patient, header: Header) -> None:
    """Any text in a source's header can be written and read back, and identifies the same patient and study."""
    study = dataclasses.replace(STUDY, patient=patient, header=header)
    buffer = io.BytesIO()
    headers.dataset_of(study).save_as(buffer, implicit_vr=False, little_endian=True)
    ds = dcmread(io.BytesIO(buffer.getvalue()), force=True)
    assert headers.identifier(ds.PatientID) == headers.identifier(patient.id)
    assert headers.identifier(ds.AccessionNumber) == headers.identifier(header.accession_number)
    assert ds.StudyDate in ("", header.study_date) and ds.PatientSex in ("M", "F", "O", "")


@pytest.mark.parametrize("name", ["Ünsal^Şebnem", "Wang^XiaoDong=王^小东", "山田^花子", "Иванова^Анна"])
def test_names_keep_their_letters(name: str) -> None:
    """Patient names of any script go out in UTF-8 as they came in."""
    study = answers.breast()
    study = dataclasses.replace(study, patient=dataclasses.replace(study.patient, name=name))
    for it in objects.render(study, answers.assessed(study), rendered_at=answers.AT):
        ds = dcmread(io.BytesIO(it.data))
        assert str(ds.PatientName) == name and ds.SpecificCharacterSet == "ISO_IR 192"


def test_times_are_the_ones_given() -> None:
    """Dates and times of every object are those passed in; the study's own stay as received."""
    study = answers.breast()
    for it in objects.render(study, answers.assessed(study), rendered_at=datetime(2027, 3, 4, 5, 6, 7)):
        ds = dcmread(io.BytesIO(it.data))
        assert (ds.SeriesDate, ds.SeriesTime) == ("20270304", "050607")
        assert (ds.StudyDate, ds.StudyTime) == (study.header.study_date, study.header.study_time)


centres = st.tuples(st.floats(0, 1), st.floats(0, 1))
outlines = st.lists(centres, min_size=3, max_size=12, unique=True)


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    shapes=st.lists(st.tuples(outlines, st.floats(0, 1), st.sampled_from(birads.CATEGORIES)), min_size=1, max_size=7),
    spaced=st.booleans(),
    frames=st.integers(1, 3),
)
def test_any_finding_within_its_image_can_be_shown(shapes: list[Any], spaced: bool, frames: int) -> None:
    """Outlines of any shape and place inside the image, in any number, give objects that pass every check."""
    study = _small(frames, spaced)
    found = []
    for i, (points, probability, category) in enumerate(shapes):
        frame = study.frames[i % len(study.frames)]
        contour = tuple((x * (frame.source.columns - 1), y * (frame.source.rows - 1)) for x, y in points)
        found.append(answers.finding(frame, category, probability=probability, contour=contour))
    made = objects.render(study, answers.assessed(study, *found), rendered_at=answers.AT)
    assert {it.kind for it in made} == {"sr", "sc", "seg", "pr"}


def _small(frames: int, spaced: bool) -> Study:
    """A corner of a known study's frames: quick to draw on."""
    region = Region(4, 4, 120, 90)
    shrunk = [
        dataclasses.replace(
            STUDY.frames[0],
            source=dataclasses.replace(
                STUDY.frames[0].source, rows=96, columns=128, frame_number=n, frame_count=frames
            ),
            grey=STUDY.frames[0].grey[100:196, 200:328],
            region=region,
            spacing=answers.SPACING if spaced else None,
        )
        for n in range(1, frames + 1)
    ]
    return dataclasses.replace(STUDY, frames=tuple(shrunk))


def test_a_result_is_rendered_quickly() -> None:
    """All objects of a study with one finding are made and checked in at most 0.4 s of one core."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0]))
    taken = min(_seconds(study, result) for _ in range(3))
    assert taken <= 0.4


def _seconds(study: Any, result: Any) -> float:
    began = time.process_time()
    objects.render(study, result, profile=ALL, rendered_at=answers.AT)
    return time.process_time() - began
