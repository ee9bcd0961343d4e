"""Generated images → ultrasound instances that any DICOM system takes, marked as showing nobody.

Rules:
- Synthetic Data (0008,001C) is YES on every instance, and the patient's name says so too.
- The same arguments give the same bytes, UIDs included.
- A name that DICOM would cut or read otherwise is refused.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, UltrasoundMultiFrameImageStorage

from busgen_cds import signing
from busgen_cds.errors import Misconfigured
from busgen_cds.study import Spacing

CENTIMETRES = 3  # PS3.3 C.8.5.5.1.15: physical units code
USUAL = Spacing(0.1, 0.1)
PATIENT = "Synthetic^"
MOST_NAME = 64 - len(PATIENT)  # PS3.5 6.2: a person's name (PN) has 64 characters at most
TWO_D, TISSUE = 1, 1  # PS3.3 C.8.5.5.1.1 and .2: spatial format and data type


def study(
    images: Sequence[NDArray[np.uint8]],
    *,
    name: str,
    at: datetime,
    spacing: Spacing = USUAL,
    description: str = "US Breast (synthetic)",
    manufacturer: str = "Synthetic scanner",
) -> list[bytes]:
    """One study with an instance for each image: grey (rows, columns), or (frames, rows, columns) for a cine."""
    check_name(name)
    study_uid = derived_uid("synthetic study", name)
    return [
        _instance(image, number, study_uid, name, at, spacing, description, manufacturer)
        for number, image in enumerate(images, 1)
    ]


def check_name(name: str) -> None:
    """PS3.5 6.2: what a person's name and an identifier (PN, LO) may hold; ^ and = part a name, \\ parts values."""
    if not 0 < len(name) <= MOST_NAME or not name.isprintable() or set(name) & set("\\^="):
        raise Misconfigured(
            f"{name!r} cannot stand in a DICOM patient's name: {MOST_NAME} printable characters at most, none of them"
            f" \\ ^ or =; it has {len(name)}."
        )


def derived_uid(*what: object) -> str:
    """PS3.5 B.2: a UUID-derived UID, here from what it names."""
    return f"2.25.{int(signing.digest(repr(what).encode())[:31], 16)}"


def _instance(
    image: NDArray[np.uint8],
    number: int,
    study_uid: str,
    name: str,
    at: datetime,
    spacing: Spacing,
    description: str,
    manufacturer: str,
) -> bytes:
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "", "0001"]
    ds.SOPClassUID = UltrasoundImageStorage if image.ndim == 2 else UltrasoundMultiFrameImageStorage
    ds.SOPInstanceUID = derived_uid("synthetic instance", name, number)
    ds.SyntheticData = "YES"
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = at.strftime("%Y%m%d")
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = at.strftime("%H%M%S")
    ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "US", manufacturer, "Generated"
    ds.StudyDescription = description
    ds.PatientName, ds.PatientID = f"{PATIENT}{name}", f"SYN-{name}"
    ds.PatientBirthDate, ds.PatientSex = "", "F"
    ds.BodyPartExamined = "BREAST"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study_uid, derived_uid("synthetic series", name)
    ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = "1", 1, number
    ds.PatientOrientation, ds.Laterality = "", ""
    ds.AnatomicRegionSequence = [_breast()]
    ds.SequenceOfUltrasoundRegions = [_whole(image.shape[-2], image.shape[-1], spacing)]
    ds.LossyImageCompression, ds.BurnedInAnnotation = "00", "NO"
    _add_pixels(ds, image)
    return _part10(ds)


def _breast() -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "76752008", "SCT", "Breast"
    return code


def _whole(rows: int, columns: int, spacing: Spacing) -> Dataset:
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = TWO_D, TISSUE, 0
    region.RegionLocationMinX0 = region.RegionLocationMinY0 = 0
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = columns - 1, rows - 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = CENTIMETRES
    region.PhysicalDeltaX, region.PhysicalDeltaY = spacing.column / 10, spacing.row / 10
    return region


def _add_pixels(ds: Dataset, image: NDArray[np.uint8]) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = image.shape[-2:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    if image.ndim == 3:
        ds.NumberOfFrames, ds.FrameTime, ds.FrameIncrementPointer = len(image), "40", 0x00181063
    data = np.ascontiguousarray(image).tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB"


def _part10(ds: Dataset) -> bytes:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
