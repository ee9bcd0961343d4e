"""What a scanner sent becomes frames of breast tissue, each with its place, its millimetres and its side."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import JPEGBaseline8Bit

from busgen_cds.dicom import intake, relevance, saying
from busgen_cds.study import Frame, Held, NotForUs, Patient, Region, Spacing, Study
from tests import images
from tests.dicom import real


def take(*files: bytes) -> Study | NotForUs | Held:
    return intake.study((data, hashlib.sha256(data).hexdigest()) for data in files)


def read(*files: bytes) -> Study:
    study = take(*files)
    assert isinstance(study, Study), study.reason
    return study


def refused(*files: bytes) -> str:
    study = take(*files)
    assert isinstance(study, NotForUs), study
    return study.reason


def altered(base: dict[str, Any] | None = None, **header: Any) -> bytes:
    """A breast image with other header values; None takes an element away."""
    ds = images.breast_dataset(**(base or {}))
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    for name, value in header.items():
        if value is None:
            if name in ds:
                delattr(ds, name)
        else:
            setattr(ds, name, value)
    return images.part10(ds)


def encoded_as(syntax: str) -> bytes:
    """An image whose file says another transfer syntax than it has."""
    data = images.breast_image(syntax=JPEGBaseline8Bit)
    old = b"1.2.840.10008.1.2.4.50"
    new = syntax.encode().ljust(len(old) + len(old) % 2, b"\0")
    at = data.index(old)
    return data[: at - 2] + len(new).to_bytes(2, "little") + new + data[at + len(old) + len(old) % 2 :]


def code(meaning: str) -> Items:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "1", "99TEST", meaning
    return Items([item])


def about(region: Region, expected: tuple[int, ...], within: int) -> bool:
    return all(abs(a - b) <= within for a, b in zip(region, expected, strict=True))


# ---- What is read


def test_the_study_says_whose_it_is() -> None:
    """Patient, study and scanner are carried in the header's own words, and appear in no repr."""
    study = read(*images.breast_study(2, seed=7))
    assert (study.patient.id, study.patient.name, study.patient.sex) == ("TEST-0007", "Test^Breast 7", "F")
    assert (study.header.accession_number, study.header.description) == ("A000007", "US Breast")
    assert (study.scanner.manufacturer, study.scanner.model) == ("Example Ultrasound", "Synthetic 1")
    assert "Breast 7" not in repr(study) and "TEST-0007" not in repr(study)


def test_names_in_any_alphabet() -> None:
    """A Japanese and a Cyrillic name arrive as they are."""
    for name in ("Yamada^Tarou=山田^太郎", "Люкceмбypг"):
        assert read(altered(PatientName=name)).patient.name == name


def test_the_region_and_its_millimetres() -> None:
    """The tissue region comes from the scanner; unit code 3 is cm, so a delta of 0.008 is 0.08 mm."""
    (frame,) = read(images.breast_image()).frames
    assert frame.region == Region(*images.REGION)
    assert frame.spacing == Spacing(0.08, 0.08)
    assert frame.tissue.shape == (500, 560)


def test_a_delta_in_another_unit_is_no_spacing() -> None:
    """Only centimetres are believed; seconds, or a negative sign, are not turned into millimetres by mistake."""
    ds = images.breast_dataset()
    ds.SequenceOfUltrasoundRegions[0].PhysicalUnitsXDirection = 4
    assert read(images.part10(ds)).frames[0].spacing is None
    ds = images.breast_dataset()
    ds.SequenceOfUltrasoundRegions[0].PhysicalDeltaX = -0.008
    assert read(images.part10(ds)).frames[0].spacing == Spacing(0.08, 0.08)
    ds.SequenceOfUltrasoundRegions[0].PhysicalDeltaX = 80.0
    assert read(images.part10(ds)).frames[0].spacing is None


def test_pixel_spacing_where_no_region_says_it() -> None:
    """Pixel Spacing is in millimetres, row first."""
    data = altered({"regions": False}, PixelSpacing=["0.07", "0.09"])
    assert read(data).frames[0].spacing == Spacing(row=0.07, column=0.09)


def test_black_margins_are_cut_off_a_generous_region() -> None:
    """A region that covers the whole screen is brought to the tissue; its millimetres stay."""
    ds = images.breast_dataset(marks=False)
    box = ds.SequenceOfUltrasoundRegions[0]
    box.RegionLocationMinX0, box.RegionLocationMinY0 = 0, 0
    box.RegionLocationMaxX1, box.RegionLocationMaxY1 = 799, 599
    (frame,) = read(images.part10(ds)).frames
    assert about(frame.region, images.REGION, 3)
    assert frame.spacing == Spacing(0.08, 0.08)


@pytest.mark.parametrize("corners", [(700, 500, 100, 60), (-50, 900, 4000, 5000), (10, 10, 20, 20)])
def test_a_lying_region_is_not_believed(corners: tuple[int, int, int, int]) -> None:
    """Corners outside the frame, swapped or far too small: the pixels show the tissue instead."""
    ds = images.breast_dataset()
    box = ds.SequenceOfUltrasoundRegions[0]
    names = ("MinX0", "MinY0", "MaxX1", "MaxY1")
    for name, value in zip(names, corners, strict=True):
        element = f"RegionLocation{name}"
        box[element].value = value & 0xFFFFFFFF
    (frame,) = read(images.part10(ds)).frames
    assert about(frame.region, images.REGION, 10)
    assert frame.spacing is None


@pytest.mark.parametrize("tissue", ["benign", "malignant", "normal"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("colour", ["grey", "rgb"])
def test_the_region_is_found_in_the_pixels(tissue: Any, seed: int, colour: Any) -> None:
    """Without stated regions the tissue is found among writing, grey bar and ruler; a black shadow may be cut."""
    (frame,) = read(images.breast_image(tissue=tissue, seed=seed, regions=False, colour=colour)).frames
    left, top, right, bottom = frame.region
    assert about(Region(left, top, right, images.REGION[3]), images.REGION, 10)
    assert 0.7 * images.REGION[3] <= bottom <= images.REGION[3] + 10


def test_a_picture_without_margins() -> None:
    """A picture that is tissue from edge to edge is its own region."""
    ds = images.breast_dataset(regions=False)
    whole = np.asarray(images._echoes("benign", 1, 800, 600, 0))
    ds.PixelData = whole.tobytes()
    (frame,) = read(images.part10(ds)).frames
    assert about(frame.region, (0, 0, 800, 600), 10)


def test_a_black_cyst_does_not_cut_the_picture() -> None:
    """A cyst as wide as the picture and wholly black leaves one region, from the skin to what lies behind it."""
    picture = images.picture(seed=1, marks=False)[..., 0].copy()
    picture[200:330] = 0
    ds = images.breast_dataset(regions=False)
    ds.PixelData = picture.tobytes()
    (frame,) = read(images.part10(ds)).frames
    assert about(frame.region, images.REGION, 10)


@pytest.mark.parametrize("regions", [True, False])
def test_a_dual_screen_has_two_regions(regions: bool) -> None:
    """Both halves of a dual screen are read, each in its own region of the same frame."""
    study = read(images.breast_image(dual=True, regions=regions))
    first, second = study.frames
    assert first.source == second.source
    assert about(first.region, images.DUAL[0], 8) and about(second.region, images.DUAL[1], 8)


def test_one_region_stated_twice_is_one() -> None:
    """Scanners repeat a region; its tissue is read once."""
    ds = images.breast_dataset()
    ds.SequenceOfUltrasoundRegions.append(images._region(images.REGION))
    assert len(read(images.part10(ds)).frames) == 1


def test_coloured_calipers_are_taken_out() -> None:
    """Yellow calipers and text over the tissue are replaced by the grey around them; the rest is untouched."""
    plain = read(images.breast_image(colour="rgb")).frames[0].tissue.astype(int)
    marked = read(images.breast_image(colour="rgb", calipers=True)).frames[0].tissue.astype(int)
    shown = np.asarray(images.picture(seed=1, calipers=True).max(-1))[60:560, 120:680].astype(int)
    assert (shown - plain).max() > 150
    assert np.abs(marked - plain).max() < 60
    assert (marked != plain).mean() < 0.03


def test_a_tinted_picture_is_grey() -> None:
    """A sepia map is a matter of taste: the picture is read, and nothing is taken for a mark."""
    ds = images.breast_dataset(colour="rgb", marks=False)
    grey = images.picture(seed=1, marks=False)[..., :1].astype(float)
    ds.PixelData = np.clip(grey * [1.0, 0.8, 0.45] + [8, 4, 0], 0, 255).astype(np.uint8).tobytes()
    (frame,) = read(images.part10(ds)).frames
    plain = read(images.breast_image(marks=False)).frames[0]
    assert np.corrcoef(frame.tissue.ravel(), plain.tissue.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("header", "side"),
    [
        ({}, None),
        ({"Laterality": "L"}, "L"),
        ({"ImageLaterality": "R"}, "R"),
        ({"Laterality": "L", "ImageLaterality": "R"}, None),
        ({"ImageLaterality": "B"}, None),
        ({"SeriesDescription": "LEFT BREAST 2 O'CLOCK"}, None),
    ],
)
def test_rule_6_side_only_as_stated(header: dict[str, str], side: str | None) -> None:
    """Safety rule 6: the side is what a laterality element says; contradiction, both or prose are not stated."""
    assert read(altered(**header)).frames[0].laterality == side


def test_frame_laterality() -> None:
    """Safety rule 6: the enhanced form of the statement is understood."""
    anatomy, group = Dataset(), Dataset()
    anatomy.FrameLaterality = "R"
    group.FrameAnatomySequence = Items([anatomy])
    assert read(altered(SharedFunctionalGroupsSequence=Items([group]))).frames[0].laterality == "R"


def test_a_short_clip_is_read_whole() -> None:
    """Every frame of a short clip is read, and counted from 1."""
    study = read(images.breast_image(cine=5))
    assert [frame.source.frame_number for frame in study.frames] == [1, 2, 3, 4, 5]
    assert {frame.source.frame_count for frame in study.frames} == {5}


def test_a_long_clip_is_sampled_evenly() -> None:
    """Of a long clip frames are spread from the first to the last, and each left out says so."""
    study = read(images.breast_image(cine=130, syntax=JPEGBaseline8Bit))
    numbers = [frame.source.frame_number for frame in study.frames]
    assert len(numbers) == intake.MAX_SAMPLED
    assert (numbers[0], numbers[-1]) == (1, 130)
    assert max(np.diff(numbers)) <= 3
    assert [round((number - 1) / study.frames[0].step) for number in numbers] == list(range(intake.MAX_SAMPLED))
    assert len(study.not_analysed) == 130 - intake.MAX_SAMPLED
    assert {left.reason for left in study.not_analysed} == {"not sampled: 96 of 130 frames of this clip are read"}


def test_a_study_is_held_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips share what may be held; the later ones are sampled more thinly, and none is silently lost."""
    monkeypatch.setattr(intake, "MAX_HELD", 20 * 800 * 600)
    study = read(*images.breast_study(4, cine=12))
    assert sum(frame.grey.nbytes for frame in study.frames) <= 20 * 800 * 600
    assert {frame.source.sop_instance_uid for frame in study.frames} >= {study.frames[0].source.sop_instance_uid}
    assert len(study.images) == 48


def test_the_order_of_arrival_changes_nothing() -> None:
    """The same instances in any order are the same study."""
    files = [*images.breast_study(4), images.breast_image(seed=0, number=9, doppler="box")]
    shuffled = files.copy()
    random.Random(3).shuffle(shuffled)
    a, b = read(*files), read(*shuffled)
    assert a.images == b.images
    assert a.evidence_digest == b.evidence_digest
    assert a.received == b.received


def test_the_same_file_twice_counts_once() -> None:
    """A file given twice is one image; another content under its UID is left out, and said."""
    data = images.breast_image()
    other = altered(ImageComments="changed")
    assert len(read(data, data).received) == 1
    study = read(data, other)
    assert len(study.frames) == 1
    assert "other content" in study.not_analysed[0].reason


# ---- What is left out, and why


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (images.breast_image(doppler="box"), "colour Doppler"),
        (images.breast_image(doppler="box", regions=False), "Doppler or elastography"),
        (images.breast_image(doppler="all", regions=False), "Doppler or elastography"),
        (images.breast_image(doppler="box", regions=False, colour="ybr422"), "Doppler or elastography"),
        (altered(SeriesDescription="Shear-Wave elastography"), "elastography"),
        (altered(ImageType=["ORIGINAL", "PRIMARY", "", "0002"]), "M-mode"),
        (altered(ImageType=["ORIGINAL", "PRIMARY", "", "0008"]), "spectral Doppler"),
        (altered(BodyPartExamined="THYROID", AnatomicRegionSequence=None), "thyroid"),
        (altered(BodyPartExamined="", AnatomicRegionSequence=code("Heart")), "heart"),
        (altered(BodyPartExamined=None, AnatomicRegionSequence=None, StudyDescription="US ABDOMEN"), "abdomen"),
        (altered(BodyPartExamined=None, AnatomicRegionSequence=None, StudyDescription="OB > 14 weeks"), "obstetric"),
        (altered(BodyPartExamined="AXILLA", AnatomicRegionSequence=None), "axilla"),
        (altered(TransducerType="SECTOR_PHASED"), "phased"),
        (altered(SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), "secondary capture"),
        (altered(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33"), "structured report"),
        (altered(SOPClassUID="1.2.840.10008.5.1.4.1.1.2"), "CT Image Storage"),
        (altered(SOPClassUID="1.2.3.4.5"), "unknown or private"),
        (altered(SOPClassUID="1.2.840.10008.5.1.4.1.1.6.2"), "3D ultrasound volume"),
        (encoded_as("1.2.840.10008.1.2.4.102"), "MPEG-4"),
        (encoded_as("1.2.3.4.5.6"), "private transfer syntax"),
        (altered(PixelData=None), "no pixel data"),
        (altered(PixelData=b"\0" * 1000), "end before"),
        (altered(PixelData=b"\0" * 480000), "no tissue"),
        (altered({"regions": False}, PixelData=b"\0" * 480000), "no tissue"),
        (altered(Rows=20000, Columns=20000), "20000"),
        (altered(Rows=0, Columns=0), "0 x 0"),
        (altered(NumberOfFrames=0), "0 frames"),
        (altered(SOPInstanceUID=None), "SOP Instance UID"),
        (altered(StudyInstanceUID=None), "Study Instance UID"),
        (b"not dicom", "not a DICOM file"),
    ],
)
def test_what_is_not_for_us_says_why(data: bytes, reason: str) -> None:
    """Doppler, elastography, M-mode, spectra, another organ, other objects, no usable frame: a correct reason."""
    study = take(data)
    assert isinstance(study, NotForUs)
    assert reason in study.reason
    assert len(study.not_analysed) == 1
    assert len(study.received) == 1


@pytest.mark.parametrize(("spatial_format", "reason"), [(2, "M-mode"), (3, "spectral Doppler")])
def test_a_curve_beside_the_picture(spatial_format: int, reason: str) -> None:
    """A frame that shares its screen with an M-mode or a spectrum is left out."""
    ds = images.breast_dataset()
    ds.SequenceOfUltrasoundRegions.append(images._region((0, 560, 800, 600), 3, spatial_format))
    assert reason in refused(images.part10(ds))


def test_an_ecg_is_no_breast() -> None:
    """A frame with an ECG trace comes from a heart examination."""
    ds = images.breast_dataset()
    ds.SequenceOfUltrasoundRegions.append(images._region((0, 560, 800, 600), 10, 4))
    assert "ECG" in refused(images.part10(ds))


def test_what_the_image_says_outweighs_the_study() -> None:
    """A breast image in a study that is called something else is a breast image, and the other way round."""
    assert isinstance(take(altered(StudyDescription="US abdomen and breast")), Study)
    assert isinstance(take(altered(StudyDescription="US ABDOMEN")), Study)
    organ = altered(StudyDescription="US BREAST", BodyPartExamined="LIVER", AnatomicRegionSequence=None)
    assert "abdomen" in refused(organ)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "Mamma links",
        "Ecografia mamaria",
        "乳腺超声",
        "Brust",
        "SMALL PARTS",
        "Screening",
        "Lump, upper outer quadrant",
    ],
)
def test_an_organ_that_is_not_named_goes_on(words: str) -> None:
    """What names no other organ is read: the picture itself decides."""
    assert isinstance(take(altered(BodyPartExamined=None, AnatomicRegionSequence=None, StudyDescription=words)), Study)


def test_the_half_without_colour_is_read() -> None:
    """Compare mode: B-mode beside colour flow; the B-mode half is read."""
    ds = images.breast_dataset(dual=True)
    ds.SequenceOfUltrasoundRegions[1].RegionDataType = 2
    (frame,) = read(images.part10(ds)).frames
    assert about(frame.region, images.DUAL[0], 4)


def test_a_sector_is_no_breast() -> None:
    """The fan of a curved or phased probe is seen in the pixels, where no header tells."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:600, :800]
    radius, angle = np.hypot(x - 400, y - 20), np.arctan2(x - 400, y - 20)
    fan = (radius > 30) & (radius < 560) & (np.abs(angle) < 0.7)
    ds = images.breast_dataset(regions=False)
    ds.PixelData = np.where(fan, rng.integers(30, 200, fan.shape), 0).astype(np.uint8).tobytes()
    assert "sector" in refused(images.part10(ds))


def test_a_trapezoid_is_read() -> None:
    """A linear probe that steers outwards widens a little with depth: that is no sector."""
    ds = images.breast_dataset(marks=False)
    picture = images.picture(seed=1, marks=False)[..., 0].copy()
    y, x = np.mgrid[:600, :800]
    picture[(np.abs(x - 400) > 190 + 0.18 * (y - 60))] = 0
    ds.PixelData = picture.tobytes()
    assert isinstance(take(images.part10(ds)), Study)


def test_one_bad_image_stops_no_other() -> None:
    """In a study with a damaged image, a Doppler image and a report, the good images are read."""
    good = images.breast_study(2)
    damaged = images.breast_image(number=8, syntax=JPEGBaseline8Bit)[:-3000]
    doppler = images.breast_image(number=9, doppler="box")
    report = altered({"number": 10}, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33")
    study = read(*good, damaged, doppler, report, b"rubbish")
    assert len(study.frames) == 2
    assert len(study.not_analysed) == 4
    assert len(study.received) == 6


def test_a_clip_that_breaks_off() -> None:
    """The whole frames of a truncated clip are read; the rest say that the data end."""
    study = read(images.breast_image(cine=6)[: -2 * 480000 - 5000])
    assert [frame.source.frame_number for frame in study.frames] == [1, 2, 3]
    assert [left.source.frame_number for left in study.not_analysed] == [4, 5, 6]
    assert "end before" in study.not_analysed[0].reason


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"PatientID": "A"}, {"PatientID": "B"}, "patient ids"),
        ({"IssuerOfPatientID": "NORTH"}, {"IssuerOfPatientID": "SOUTH"}, "issuers"),
        ({"PatientBirthDate": "19600101"}, {"PatientBirthDate": "19610101"}, "birth dates"),
        ({"PatientName": "Doe^Jane"}, {"PatientName": "Roe^Jane", "PatientID": ""}, "names"),
    ],
)
def test_two_patients_under_one_study(first: dict[str, str], second: dict[str, str], what: str) -> None:
    """Safety rule 8: two patients under one study: it is held, nothing is read, and the reason is not a name."""
    files = [altered({"number": 1}, **first), altered({"number": 2}, **second)]
    study = take(*files)
    assert isinstance(study, Held)
    assert study.reason.startswith(f"Two {what}") and not {*first.values(), *second.values()} & set(
        study.reason.split()
    )
    assert len(study.received) == 2


def test_whose_it_is_by_a_persons_word() -> None:
    """Safety rule 8: once a person stated whose the study is, only images that carry that id are read, and no object
    refers to the others; a word that fits no image leaves it held."""
    files = [altered({"number": n}, PatientID=name) for n, name in enumerate(("A", "B", ""))]
    given = [(data, hashlib.sha256(data).hexdigest()) for data in files]
    study = intake.study(given, Patient(id="B"))
    assert isinstance(study, Study)
    assert (study.patient.id, len(study.frames)) == ("B", 1)
    assert {(left.source.sop_instance_uid, left.reason) for left in study.not_analysed} == {("", intake.ANOTHER)}
    assert isinstance(intake.study(given, Patient(id="C")), Held)
    assert isinstance(intake.study(given), Held)


def test_the_same_name_written_twice() -> None:
    """One name in other letters, shorter, or in a second alphabet is no second patient."""
    names = ("DOE^JANE", "Doe^Jane^M", "Döe^Jane", "doe jane=山田^太郎")
    files = [altered({"number": n}, PatientName=name) for n, name in enumerate(names)]
    assert len(read(*files).frames) == 4


def test_an_image_without_an_id_names_nobody() -> None:
    """Safety rule 8: whose the study is, its images say together: the first of them may lack the id and its issuer."""
    first = altered({"number": 1}, PatientID="", PatientBirthDate="")
    second = altered({"number": 2}, PatientID="P1", IssuerOfPatientID="NORTH", PatientBirthDate="19600101")
    for files in ((first, second), (second, first)):
        patient = read(*files).patient
        assert (patient.id, patient.issuer, patient.birth_date) == ("P1", "NORTH", "19600101")


def test_a_missing_patient_id_contradicts_nothing() -> None:
    """One image without an id, as a scanner's overview may be, does not hold a study."""
    files = [
        images.breast_image(number=1, study_uid="1.2.3", patient_id="A"),
        images.breast_image(number=2, study_uid="1.2.3", patient_id=""),
    ]
    assert len(read(*files).frames) == 2


def test_our_own_objects_change_nothing() -> None:
    """Our own results that come back from the PACS are neither read nor counted as evidence."""
    mine = [altered({"number": 7}, Manufacturer=saying.PRODUCT)]
    files = images.breast_study(2)
    assert read(*files, *mine).evidence_digest == read(*files).evidence_digest
    assert read(*files, *mine).images == read(*files).images
    assert refused(*mine) == "no image was received"
    assert saying.PRODUCT.startswith(relevance.OURS)


def test_images_of_several_studies_are_our_mistake() -> None:
    """Whoever calls keeps studies apart."""
    with pytest.raises(ValueError, match="several studies"):
        take(images.breast_image(seed=1), images.breast_image(seed=2))


# ---- Bad input


@pytest.mark.parametrize(
    "header",
    [
        {"SpecificCharacterSet": "ISO 2022 IR 999"},
        {"SpecificCharacterSet": ["", "ISO 2022 IR 87", "NONSENSE"]},
        {"InstanceNumber": None, "SeriesNumber": None},
        {"PatientBirthDate": None, "StudyDate": None, "StudyTime": None},
        {"SequenceOfUltrasoundRegions": None},
        {"Manufacturer": None, "PatientID": None, "PatientName": None},
    ],
)
def test_headers_that_lack_or_lie_are_survived(header: dict[str, Any]) -> None:
    """Unknown character sets and missing elements cost no image."""
    assert len(read(altered(**header)).frames) == 1


def test_values_of_the_wrong_kind() -> None:
    """Text where a number belongs, and bytes that are no text, are survived or refused with a reason."""
    data = images.breast_image()
    for old, new in ((b"IS\x02\x001 ", b"IS\x02\x00zz"), (b"19700101", b"\xff\xfe\xfd__xx!"), (b"DA", b"OB")):
        assert old in data
        assert isinstance(take(data.replace(old, new, 1)), (Study, NotForUs))


def test_a_name_never_reaches_a_log(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is wrong with a data set, its values are not quoted in warnings, logs or reasons."""
    secret = "Geheim^Gerda"
    data = images.part10(images.breast_dataset(syntax=JPEGBaseline8Bit))
    broken = data.replace(b"19700101", b"Geheim_G", 1).replace(b"Test^Breast 0", secret.encode() + b" ", 1)
    for bad in (broken, broken[:-5000], broken.replace(b"ISO_IR 192", b"ISO_IR XXX")):
        result = take(bad)
        assert "Geheim" not in repr(result)
    assert "Geheim" not in caplog.text
    assert "Geheim" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("seed", range(6))
def test_damaged_files_are_answered_for(seed: int) -> None:
    """Truncated, overwritten and shortened files of every kind are read or refused; none crashes or hangs."""
    rng = random.Random(seed)
    kinds = [{}, {"colour": "palette"}, {"colour": "ybr422"}, {"cine": 3, "colour": "rgb", "syntax": JPEGBaseline8Bit}]
    for _ in range(40):
        data = bytearray(images.breast_image(**rng.choice(kinds)))
        reach = rng.choice([1500, 4000, len(data)])
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        for _ in range(rng.randrange(1, 10)):
            at = rng.randrange(0, min(reach, len(data)))
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", bytes([rng.randrange(256)])])
        study = take(bytes(data))
        assert isinstance(study, Study) or study.reason


@real.needs_files
@pytest.mark.parametrize("path", real.FILES, ids=lambda path: path.name)
def test_real_files_are_refused_for_the_right_reason(path: Path) -> None:
    """None of the real files shows a breast, and each says in its header or by its colour that it is not for us."""
    reasons = {
        "US1": "Doppler",  # power Doppler of a lymph node
        "examples_rgb": "Doppler",
        "examples_jpeg2k": "Doppler",
        "OBXXXX": "obstetric",
        "examples_palette": "obstetric",
        "color-p": "heart",  # transoesophageal
        "examples_ybr": "heart",  # epicardial
        "JPGLossless": "heart",
        "no-pixel-spacing": "heart",
        "IM00001": "phased",  # stress echo
        "gdcm-US-ALOKA": "abdomen",  # pelvis, by a preset for the abdomen
    }
    (expected,) = [reason for name, reason in reasons.items() if path.name.startswith(name)]
    assert expected in refused(path.read_bytes())


@real.needs_files
@pytest.mark.parametrize("path", real.FILES, ids=lambda path: path.name)
def test_real_files_that_say_nothing_are_read_or_refused(path: Path) -> None:
    """The same files with a header that names no organ: a reason from the pixels, or frames for the gate to judge."""
    from pydicom import dcmread

    ds = dcmread(path)
    for name in ("StudyDescription", "SeriesDescription", "ProcessingFunction", "TransducerType",
                 "PerformedProcedureStepDescription", "ProcedureCodeSequence"):  # fmt: skip
        if name in ds:
            delattr(ds, name)
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    study = take(images.part10(ds))
    assert isinstance(study, Study) or study.reason
    frames: tuple[Frame, ...] = study.frames if isinstance(study, Study) else ()
    assert all(frame.tissue.size > 48 * 48 for frame in frames)


@pytest.mark.slow
def test_a_long_clip_needs_little_memory(tmp_path: Path) -> None:
    """300 uncompressed colour frames are sampled in a process that stays under 1.5 GB."""
    path = tmp_path / "clip.dcm"
    ds = images.breast_dataset(cine=2, colour="rgb")
    ds.NumberOfFrames, ds.PixelData = 300, ds.PixelData * 150
    path.write_bytes(images.part10(ds))
    del ds
    program = (
        "import re, sys; from pathlib import Path; from busgen_cds.dicom import intake;"
        "study = intake.study([(Path(sys.argv[1]).read_bytes(), 'x')]);"
        "status = Path('/proc/self/status').read_text();"  # a child's ru_maxrss begins at its parent's
        "print(len(study.frames), re.search(r'VmHWM:\\s+(\\d+)', status)[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    frames, kilobytes = (int(part) for part in done.stdout.split())
    assert frames == intake.MAX_SAMPLED
    assert kilobytes < 1.5 * 1024 * 1024
