"""Study → the DICOM headers of every object that answers it. One pure translation, and its way to bytes.

Rules:
- Who the patient is and which study it is go out exactly as they came in: an identifier is never repaired.
- What DICOM would refuse (a date that is none, an unknown sex) goes out empty; free text is cut to its length.
- Text is UTF-8. Every object is Explicit VR Little Endian and names product, bundle and digest.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from pydicom import config
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, ExplicitVRLittleEndian

import busgen_cds
from busgen_cds.birads import Code
from busgen_cds.dicom.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION, PRODUCT
from busgen_cds.dicom.saying import Saying, instances
from busgen_cds.result import Kind, Rendered
from busgen_cds.study import Source, Study

SEGMENTATION_PURPOSE = Code("121322", "DCM", "Source image for image processing operation")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # PS3.5 6.1.3: what text cannot hold
_SEXES = ("M", "F", "O", "")


def dataset_of(study: Study) -> Dataset:
    """Patient and study, as every object of the study must carry them."""
    patient, header = study.patient, study.header
    ds = Dataset()
    put(ds, "SpecificCharacterSet", "ISO_IR 192")
    put(ds, "PatientName", patient.name)
    put(ds, "PatientID", patient.id)
    if patient.issuer:
        put(ds, "IssuerOfPatientID", patient.issuer)
    put(ds, "PatientBirthDate", date(patient.birth_date))
    put(ds, "PatientSex", patient.sex if patient.sex in _SEXES else "")
    put(ds, "StudyInstanceUID", study.uid)
    put(ds, "StudyDate", date(header.study_date))
    put(ds, "StudyTime", time(header.study_time))
    put(ds, "AccessionNumber", header.accession_number)
    put(ds, "StudyID", header.study_id)
    put(ds, "ReferringPhysicianName", header.referring_physician)
    if header.description:
        put(ds, "StudyDescription", cut(header.description, 64))
    return ds


def begin(saying: Saying, kind: Kind, sop_class_uid: str, index: int = 0) -> Dataset:
    """An object's patient, study, series, equipment and identity."""
    ds = dataset_of(saying.study)
    template, now = saying.template, saying.at
    variant = () if saying.nominal_geometry else ("no nominal geometry",)
    put(ds, "SOPClassUID", sop_class_uid)
    put(ds, "SOPInstanceUID", saying.uid(kind, index, *(variant if kind == "seg" else ())))
    put(ds, "SeriesInstanceUID", saying.uid(kind, "series", *(variant if kind == "seg" else ())))
    put(ds, "Modality", template.at(f"series.{kind}.modality"))
    put(ds, "SeriesNumber", saying.series_number(kind))
    put(ds, "SeriesDescription", saying.series_description(kind))
    put(ds, "InstanceNumber", index + 1)
    # PS3.3 A.33: a presentation state has dates of its own, and no content date
    for prefix in ("InstanceCreation", "Series") if kind == "pr" else ("InstanceCreation", "Series", "Content"):
        put(ds, f"{prefix}Date", now.strftime("%Y%m%d"))
        put(ds, f"{prefix}Time", now.strftime("%H%M%S"))
    _equipment(ds, saying)
    return ds


def _equipment(ds: Dataset, saying: Saying) -> None:
    bundle = saying.result.bundle
    put(ds, "Manufacturer", PRODUCT)
    put(ds, "ManufacturerModelName", cut(bundle.name, 64))
    put(ds, "DeviceSerialNumber", bundle.digest[:16])  # a device, here, is the product with one bundle
    said = (busgen_cds.__version__, f"{bundle.name} {bundle.version}", bundle.digest)
    put(ds, "SoftwareVersions", [cut(text, 64) for text in said])
    scanner = saying.study.scanner
    if scanner.manufacturer:  # type 1 in the item
        made_by = Dataset()
        put(made_by, "Manufacturer", cut(scanner.manufacturer, 64))
        put(made_by, "ManufacturerModelName", cut(scanner.model, 64))
        put(made_by, "StationName", cut(scanner.station, 16))
        put(made_by, "PurposeOfReferenceCodeSequence", [code(Code("109101", "DCM", "Acquisition Equipment"))])
        put(ds, "ContributingEquipmentSequence", [made_by])


def put(ds: Dataset, keyword: str, value: object) -> None:
    """Set an element without judging its value: what came in is what goes out."""
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(f"{keyword} is no DICOM keyword")
    vr = dictionary_VR(tag)
    content = Items(value) if vr == "SQ" else value  # type: ignore[arg-type]
    if isinstance(content, str):
        content = _CONTROL.sub("", content)
    ds.add(DataElement(tag, vr, content, validation_mode=config.IGNORE))


def code(it: Code) -> Dataset:
    item = Dataset()
    put(item, "CodeValue", it.value)
    put(item, "CodingSchemeDesignator", it.scheme)
    if it.version:
        put(item, "CodingSchemeVersion", it.version)
    put(item, "CodeMeaning", it.meaning)
    return item


def reference(source: Source, *, frames: Sequence[int] = (), purpose: Code | None = None) -> Dataset:
    """An image, or frames of one. PS3.3 10.3: frame numbers only where the image has more than one."""
    item = Dataset()
    put(item, "ReferencedSOPClassUID", source.sop_class_uid)
    put(item, "ReferencedSOPInstanceUID", source.sop_instance_uid)
    if source.frame_count > 1 and frames:
        put(item, "ReferencedFrameNumber", list(frames) if len(frames) > 1 else frames[0])
    if purpose is not None:
        put(item, "PurposeOfReferenceCodeSequence", [code(purpose)])
    return item


def by_series(sources: Iterable[Source], list_keyword: str) -> list[Dataset]:
    """Referenced series, each with its instances."""
    series: dict[str, list[Source]] = {}
    for source in instances(tuple(sources)):
        series.setdefault(source.series_instance_uid, []).append(source)
    items = []
    for uid, members in series.items():
        item = Dataset()
        put(item, list_keyword, [reference(member) for member in members])
        put(item, "SeriesInstanceUID", uid)
        items.append(item)
    return items


def finish(ds: Dataset, kind: Kind) -> Rendered:
    """The whole Part 10 file, and how it is addressed."""
    return Rendered(
        kind,
        str(ds.SOPClassUID),
        str(ds.SOPInstanceUID),
        str(ds.SeriesInstanceUID),
        str(ExplicitVRLittleEndian),
        part10(ds),
    )


def date(text: str) -> str:
    try:
        return text if len(text) == 8 and datetime.strptime(text, "%Y%m%d") else ""
    except ValueError:
        return ""


def time(text: str) -> str:
    return text if re.fullmatch(r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?", text) else ""


def identifier(value: Any) -> str:
    """An identifier as it compares: without what encoding adds or cannot hold."""
    parts = value if isinstance(value, MultiValue) else [value or ""]
    return _CONTROL.sub("", "\\".join(str(part) for part in parts)).strip()


def cut(text: str, length: int) -> str:
    """Free text as DICOM allows it: no line breaks, no backslash (it would part values), not too long."""
    return re.sub(r"[\\\s]+", " ", text).strip()[:length].strip()


def part10(ds: Dataset) -> bytes:
    """A data set as a file of ours: explicit little endian, under our implementation's name."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.SOPClassUID
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION
    ds.file_meta = meta
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
