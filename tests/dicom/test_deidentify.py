"""Nobody can be found in what leaves: headers, pixels, file."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, config, dcmread
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.sequence import Sequence as Items

from busgen_cds.dicom import deidentify, intake
from busgen_cds.dicom.deidentify import NotCleaned, Pseudonyms
from busgen_cds.errors import Misconfigured
from busgen_cds.study import Scanner, Study
from tests import images

KEY = Pseudonyms(b"a key that a site keeps to itself")
MARKER = "Zyxwvuts"
NUMBER = 73519

# What makes a picture a picture: a marker here would only make it unreadable. None of it is free text.
PICTURE = {
    *("SOPClassUID", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows"),
    *("Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "FloatPixelData"),
    *("DoubleFloatPixelData", "SequenceOfUltrasoundRegions", "SpecificCharacterSet", "PixelDataProviderURL"),
    *("WindowCenter", "WindowWidth", "VOILUTSequence", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "DataSetTrailingPadding", "SmallestImagePixelValue"),
    *("LargestImagePixelValue", "PixelPaddingValue", "ImageType", "LossyImageCompression"),
}
VALUES: dict[str, Any] = {
    "PN": f"{MARKER}^{MARKER}",
    "UI": f"1.2.{NUMBER}.4",
    "DA": "20310203",
    "TM": "111213.14",
    "DT": "20310203111213",
    "AS": "047Y",
    "IS": str(NUMBER),
    "DS": str(NUMBER),
    "AE": MARKER,
    "CS": MARKER.upper(),
    "SH": MARKER,
    "LO": MARKER,
    "ST": MARKER,
    "LT": MARKER,
    "UT": MARKER,
    "UC": MARKER,
    "UR": f"http://{MARKER}",
    "OB": MARKER.encode(),
    "OW": MARKER.encode(),
    "UN": MARKER.encode(),
}
TELLING = [text.encode() for text in (MARKER, MARKER.upper(), str(NUMBER), "20310203", "111213", "047Y")]
TAGS = sorted(
    (tag, entry[0].split()[0], entry[4]) for tag, entry in DicomDictionary.items()
    if entry[4] and entry[4] not in PICTURE and tag >> 16 > 0x0002 and entry[0].split()[0] in VALUES
)  # fmt: skip


def told(ds: Dataset, entries: list[tuple[int, str, str]]) -> None:
    for tag, vr, _ in entries:
        ds.add(DataElement(tag, vr, VALUES[vr], validation_mode=config.IGNORE))


def cleaned(data: bytes) -> bytes:
    made = deidentify.instance(data, KEY)
    assert isinstance(made, bytes), made
    return made


def header_of(made: bytes) -> bytes:
    """The file without its pixels, in which any bytes may come up by chance."""
    ds = dcmread(io.BytesIO(made))
    del ds.PixelData
    buffer = io.BytesIO()
    ds.save_as(buffer)
    return buffer.getvalue()


def test_no_attribute_of_the_standard_carries_anything_across() -> None:
    """Of every attribute that DICOM knows and that can hold text, an identifier or a date, nothing is left."""
    assert len(TAGS) > 2000
    ds = images.breast_dataset(colour="rgb")
    told(ds, TAGS)
    made = header_of(cleaned(images.part10(ds)))
    for telling in TELLING:
        assert telling not in made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    entries=st.lists(st.sampled_from(TAGS), min_size=1, max_size=8, unique_by=lambda entry: entry[0]),
    group=st.integers(0x0009, 0x7FDF).map(lambda number: number | 1),
    depth=st.integers(0, 3),
)
def test_nothing_hides_in_sequences_or_private_groups(
    entries: list[tuple[int, str, str]], group: int, depth: int
) -> None:
    """Attributes nested in sequences, private attributes, overlays and curves leave nothing behind."""
    ds = dcmread(io.BytesIO(PLAIN))
    item = Dataset()
    told(item, entries)
    for _ in range(depth):
        outer = Dataset()
        outer.RequestAttributesSequence = Items([item])
        item = outer
    ds.ReferencedStudySequence = Items([item])
    ds.add(DataElement((group, 0x0010), "LO", MARKER))
    ds.add(DataElement((group, 0x1001), "UN", MARKER.encode()))
    ds.add(DataElement((0x6000, 0x3000), "OB", MARKER.encode()))
    ds.add(DataElement((0x6000, 0x0022), "LO", MARKER))
    made = header_of(cleaned(images.part10(ds)))
    for telling in TELLING:
        assert telling not in made


PLAIN = images.breast_image()


def test_the_file_says_what_was_done() -> None:
    """The result carries the profile's statement, empty type 2 attributes and no date."""
    ds = dcmread(io.BytesIO(cleaned(images.breast_image(laterality="L"))))
    assert ds.PatientIdentityRemoved == "YES" and ds.BurnedInAnnotation == "NO"
    assert [c.CodeValue for c in ds.DeidentificationMethodCodeSequence] == ["113100", "113101"]
    assert ds.LongitudinalTemporalInformationModified == "REMOVED"
    assert not [e for e in ds if e.VR in ("DA", "TM", "DT") and e.value]
    assert not ds.PatientBirthDate and not ds.AccessionNumber and ds.Laterality == "L"


def test_pseudonyms_group_a_patient_and_need_the_key() -> None:
    """One key gives one patient one pseudonym and one study one UID; another key gives others."""
    first, second = (dcmread(io.BytesIO(cleaned(images.breast_image(number=n)))) for n in (1, 2))
    assert first.PatientID == second.PatientID and first.StudyInstanceUID == second.StudyInstanceUID
    assert first.SOPInstanceUID != second.SOPInstanceUID
    elsewhere = deidentify.instance(images.breast_image(number=1), Pseudonyms(b"the key of another site!"))
    assert isinstance(elsewhere, bytes)
    other = dcmread(io.BytesIO(elsewhere))
    assert {other.PatientID, other.StudyInstanceUID} & {first.PatientID, first.StudyInstanceUID} == set()
    with pytest.raises(Misconfigured, match="fewer than 16"):
        Pseudonyms(b"short")


@pytest.mark.parametrize("colour", ["grey", "rgb", "ybr", "palette"])
@pytest.mark.parametrize("regions", [True, False])
def test_outside_the_tissue_the_picture_is_black(colour: Any, regions: bool) -> None:
    """Burned-in header, scales and text outside the B-mode region are gone, whether or not the region is stated."""
    made = dcmread(io.BytesIO(cleaned(images.breast_image(colour=colour, regions=regions))))
    left, top, right, bottom = images.REGION
    pixels = made.pixel_array.copy()
    assert pixels[top:bottom, left:right].mean() > 10
    pixels[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = 0
    assert not pixels.any()


@pytest.mark.parametrize("colour", ["grey", "rgb"])
def test_calipers_and_their_text_are_gone_from_the_tissue(colour: Any) -> None:
    """Coloured and near-white calipers and figures inside the tissue become the tissue around them."""
    clean, marked = (images.picture("malignant", 3, marks=False, calipers=drawn) for drawn in (False, True))
    drawn_on, tissue = (clean != marked).any(-1), clean[..., 0].astype(int)
    ds = images.breast_dataset(seed=2, number=1, colour=colour, calipers=True)
    before = dcmread(io.BytesIO(images.part10(ds))).pixel_array
    after = dcmread(io.BytesIO(cleaned(images.part10(ds)))).pixel_array
    standing_out = [
        ((shown if shown.ndim == 2 else shown[..., 0]) > tissue + 60)[drawn_on] for shown in (before, after)
    ]
    assert standing_out[0].mean() > 0.75
    assert standing_out[1].mean() < 0.01


def test_a_lying_region_does_not_let_writing_through() -> None:
    """A scanner that calls its whole screen tissue does not get its header text through."""
    ds = images.breast_dataset()
    item = ds.SequenceOfUltrasoundRegions[0]
    item.RegionLocationMinX0 = item.RegionLocationMinY0 = 0
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = images.COLUMNS - 1, images.ROWS - 1
    made = dcmread(io.BytesIO(cleaned(images.part10(ds)))).pixel_array
    assert not made[:50].any() and not made[:, :100].any()


def test_writing_on_black_inside_the_region_is_gone() -> None:
    """Dim writing in the black corner of a region is removed, and speckled tissue is left as it is."""
    tissue = np.random.default_rng(1).integers(20, 140, (300, 400)).astype(np.uint8)
    tissue[:120, :200] = 0
    written = tissue.copy()
    for x in range(20, 150, 12):
        written[40:58, x : x + 3] = 120
        written[48:51, x : x + 8] = 120
    made = deidentify.only_tissue(written, [deidentify.Region(0, 0, 400, 300)])
    assert made[30:70, 10:160].max() < 40
    assert (made[140:, :] == tissue[140:, :]).mean() > 0.99


def test_a_clip_stays_a_clip() -> None:
    """Every frame of a cine is cleaned, and frame time and spacing are kept."""
    made = dcmread(io.BytesIO(cleaned(images.breast_image(cine=4, colour="rgb"))))
    assert made.NumberOfFrames == 4 and made.FrameTime == 40
    assert made.pixel_array.shape == (4, images.ROWS, images.COLUMNS)
    assert not made.pixel_array[:, :50].any()
    assert float(made.SequenceOfUltrasoundRegions[0].PhysicalDeltaX) == pytest.approx(images.MM_PER_PIXEL / 10)


def test_what_cannot_be_cleaned_is_not_handed_out() -> None:
    """Colour Doppler all over, other objects and damaged files give a reason, and the reason names nobody."""
    ds = images.breast_dataset()
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    for data in (
        images.breast_image(doppler="all", regions=False),
        images.part10(ds),
        PLAIN[: len(PLAIN) // 5],
        b"",
        b"x" * 999,
    ):
        made = deidentify.instance(data, KEY)
        assert isinstance(made, NotCleaned) and made.reason and "Test" not in made.reason


def test_a_cleaned_file_is_read_like_any_other() -> None:
    """Intake reads the cleaned file: same tissue, same millimetres, nobody's name."""
    study = intake.study([(cleaned(images.breast_image(colour="rgb")), "00")])
    assert isinstance(study, Study)
    assert study.patient.name.startswith("Anonymous") and study.frames[0].spacing is not None
    assert study.frames[0].tissue.mean() > 10


def test_a_frame_keeps_its_tissue_and_loses_its_way_back() -> None:
    """A Case's frame has only tissue, and UIDs that do not lead to the study."""
    study = intake.study([(PLAIN, "00")])
    assert isinstance(study, Study)
    original = study.frames[0]
    hidden = deidentify.frame(original, KEY)
    assert hidden.source.sop_instance_uid != original.source.sop_instance_uid
    assert not hidden.grey[: original.region.top].any() and hidden.tissue.shape == original.tissue.shape
    assert np.abs(hidden.tissue.astype(int) - original.tissue).mean() < 1


@pytest.mark.parametrize(
    ("maker", "model", "kept"),
    [
        ("GE Healthcare", "LOGIQ E9", "GE LOGIQ E9"),
        ("G.E. Medical Systems", "LOGIQ 700", "GE LOGIQ 700"),
        ("Philips Medical Systems", "CX50", "Philips CX50"),
        ("TOSHIBA_MEC", "Aplio 500", "Toshiba Aplio 500"),
        ("Philips of Dr. Meier", "Meier's CX50", "Philips"),
        ("Dr. Meier", "LOGIQ E9", ""),
        ("GE", "LOGIQ Meier", "GE"),
        ("", "", ""),
    ],
)  # fmt: skip
def test_only_known_devices_are_named(maker: str, model: str, kept: str) -> None:
    """A device is named only as one of the known product families."""
    assert deidentify.device(Scanner(maker, model)) == kept


REAL = Path(os.environ.get("BUSGEN_DATA", "")) / "dicom_us"
FILES = list(csv.DictReader((REAL / "manifest.csv").open())) if (REAL / "manifest.csv").exists() else []


@pytest.mark.skipif(not FILES, reason="BUSGEN_DATA with dicom_us is not set: real files are not tried")
@pytest.mark.parametrize("row", FILES, ids=lambda row: row["file"])
def test_real_files_lose_names_and_writing(row: dict[str, str]) -> None:
    """Real ultrasound files come out without name, id, date or writing outside the tissue, or not at all."""
    data = (REAL / row["file"]).read_bytes()
    made = deidentify.instance(data, KEY)
    if isinstance(made, NotCleaned):
        assert made.reason
        return
    original, ds = dcmread(io.BytesIO(data), force=True), dcmread(io.BytesIO(made))
    header = header_of(made)
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "SOPInstanceUID", "InstitutionName", "StudyDate"):
        value = str(original.get(keyword) or "").encode()
        assert len(value) < 5 or value not in header, keyword
    assert ds.PhotometricInterpretation == "MONOCHROME2" and ds.PatientIdentityRemoved == "YES"
