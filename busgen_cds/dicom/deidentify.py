"""An instance or a frame in which nobody can be found: PS3.15 Annex E, Basic Profile, with the pixels cleaned.

Rules:
- Nothing is copied: the file is built anew from what was understood (frames, tissue, millimetres, side, frame time),
  so that no attribute, private or future, can carry anybody across.
- What is kept comes from closed lists or is a number within bounds. Text is never kept; a device only when
  it is one of the known product families.
- Identifiers become keyed hashes: the same key groups a patient's images, another key cannot be joined with it, and
  without the key nobody can be found by trying ids.
- Dates and times are removed.
- Outside the tissue the picture is black. Inside, coloured and thin near-white marks, and writing on black, become
  the tissue around them. Where the tissue cannot be told from writing nothing is handed out: `NotCleaned(reason)`.
- Grey writing over tissue looks like tissue: no rule finds it for certain, so a person looks before
  images leave a site.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID

from busgen_cds import geometry, pixels
from busgen_cds.birads import Code
from busgen_cds.dicom import colour, decode, region, relevance
from busgen_cds.dicom.decode import Frames, Opened, Unreadable
from busgen_cds.dicom.headers import code, part10, put
from busgen_cds.dicom.identity import PRODUCT
from busgen_cds.dicom.relevance import text
from busgen_cds.errors import Misconfigured
from busgen_cds.study import Frame, Region, Scanner, Spacing

SINGLE, MULTIPLE = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.3.1"
METHOD = "PS3.15 Annex E Basic Profile with Clean Pixel Data Option; file built anew"
# PS3.16 CID 7050
METHOD_CODES = (
    Code("113100", "DCM", "Basic Application Confidentiality Profile"),
    Code("113101", "DCM", "Clean Pixel Data Option"),
)
BREAST = Code("76752008", "SCT", "Breast")

# Maker → the product families that may be named. What follows a family is a short model number.
DEVICES = {
    "GE": ("LOGIQ", "Voluson", "Vivid", "Venue", "Invenia"),
    "Philips": ("EPIQ", "Affiniti", "iU", "HD", "CX", "ClearVue", "Lumify"),
    "Siemens": ("Acuson", "Sequoia", "Antares", "Juniper", "Redwood", "Freestyle"),
    "Canon": ("Aplio", "Xario", "Viamo"),
    "Toshiba": ("Aplio", "Xario", "Viamo", "Nemio"),
    "Hitachi": ("Arietta", "Ascendus", "Preirus", "Avius", "Noblus"),
    "Aloka": ("SSD", "ProSound"),
    "Samsung": ("RS", "HS", "WS", "HERA"),
    "Mindray": ("Resona", "DC", "Zonare", "TE"),
    "Esaote": ("MyLab",),
    "SuperSonic": ("Aixplorer",),
    "Fujifilm": ("Arietta", "Sonosite"),
    "SonoSite": ("Edge", "Turbo", "MicroMaxx"),
    "U-Systems": ("Somo",),
}
_MODEL_NUMBER = r"([ -]?)([A-Z]{0,3}\d{0,4}|[A-Z]\d{1,2}[A-Z]?)"

FRAME_MILLISECONDS = (1.0, 1000.0)
ON_BLACK = 12  # of 255: what counts as drawn on, beside black
SPARSE = 0.45  # share of a neighbourhood that writing fills, and tissue exceeds
WRITING = 60  # of 255: height of writing above black
STROKE = 3 / 224  # of the region's longer side: strokes of text and calipers are thinner than twice that

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class NotCleaned:
    """This instance is not handed out; the reason names nobody."""

    reason: str


class Pseudonyms:
    """Keyed hashes in place of identifiers."""

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise Misconfigured("The key for pseudonyms has fewer than 16 bytes: ids could be found by trying.")
        self._key = key

    def uid(self, original: str) -> str:
        return f"2.25.{int.from_bytes(self._digest('uid', original)[:15])}"

    def patient(self, patient_id: str, issuer: str = "") -> str:
        return self._digest("patient", issuer.strip(), patient_id.strip()).hex()[:16]

    def _digest(self, *what: str) -> bytes:
        return hmac.digest(self._key, "\n".join(what).encode("utf-8", "surrogateescape"), hashlib.sha256)


def frame(original: Frame, pseudonyms: Pseudonyms) -> Frame:
    """The frame with only its tissue left, and UIDs that lead nowhere."""
    source = original.source
    hidden = dataclasses.replace(
        source,
        sop_instance_uid=pseudonyms.uid(source.sop_instance_uid),
        series_instance_uid=pseudonyms.uid(source.series_instance_uid),
    )
    return dataclasses.replace(original, source=hidden, grey=only_tissue(original.grey, (original.region,)))


def device(scanner: Scanner) -> str:
    """Maker and model, as far as they are known ones."""
    return " ".join(_known_device(scanner.manufacturer, scanner.model)).strip()


def instance(data: bytes, pseudonyms: Pseudonyms) -> bytes | NotCleaned:
    """A whole Part 10 file → one in which nobody can be found."""
    try:
        opened = decode.open_file(data)
        if text(opened.header, "SOPClassUID") not in relevance.READ:
            return NotCleaned("no ultrasound image")
        said = decode.shape(opened)
        stated = region.stated(opened.header, said.rows, said.columns)
        frames = Frames(opened, said)
        regions, cleaned = _clean(frames, stated)
    except Unreadable as reason:
        return NotCleaned(str(reason))
    except Exception as broken:  # noqa: BLE001 - a damaged file may raise anything; its text may hold a name
        return NotCleaned(f"damaged: it cannot be read ({type(broken).__name__})")
    return part10(_dataset(opened, regions, cleaned, pseudonyms))


Tissue = tuple[Region, Spacing | None]


def _clean(frames: Frames, stated: region.Stated) -> tuple[list[Tissue], Grey]:
    """The regions that may be shown, and (n, rows, columns) with nothing but them."""
    if frames.available == 0:
        raise Unreadable("its pixel data hold no whole frame")
    first = frames.decode(0)
    tissue = _tissue(first.grey, stated)
    if not tissue:
        raise Unreadable("no tissue is seen in it: writing cannot be told from picture")
    cleaned = np.zeros((frames.available, *first.grey.shape), np.uint8)
    for i in range(frames.available):
        picture = frames.decode(i)
        strong = colour.coloured(picture)
        tissue = [pair for pair in tissue if not colour.covers(strong, pair[0])]
        if not tissue:
            raise Unreadable("colour over the tissue: writing cannot be told from flow")
        boxes = [box for box, _ in tissue]
        cleaned[i] = only_tissue(colour.without_marks(picture.grey, strong, boxes), boxes)
    shown = np.zeros(first.grey.shape, bool)
    for left, top, right, bottom in (box for box, _ in tissue):
        shown[top:bottom, left:right] = True
    return tissue, np.where(shown, cleaned, 0).astype(np.uint8)


def _tissue(grey: Grey, stated: region.Stated) -> list[Tissue]:
    """What the pixels show to be tissue; where the scanner states regions, only inside them."""
    seen = region.found(grey)
    said = region.readable(stated)
    if not said:
        return [(box, None) for box in seen]
    shared = [(_shared(box, other), spacing) for box, spacing in said for other in seen]
    return [(box, spacing) for box, spacing in shared if min(box.width, box.height) >= region.MIN_SIDE]


def _shared(a: Region, b: Region) -> Region:
    return Region(max(a.left, b.left), max(a.top, b.top), min(a.right, b.right), min(a.bottom, b.bottom))


def only_tissue(grey: Grey, regions: tuple[Region, ...] | list[Region]) -> Grey:
    """Black but for the regions; in them, thin near-white strokes and writing on black are gone."""
    cleaned = np.zeros_like(grey)
    for left, top, right, bottom in regions:
        cleaned[top:bottom, left:right] = _without_strokes(grey[top:bottom, left:right])
    return cleaned


def _without_strokes(tissue: Grey) -> Grey:
    """As `pixels.suppress_marks`, in the frame's own resolution, and also for dimmer writing where all is black."""
    if tissue.size == 0:
        return tissue
    radius = max(2, round(STROKE * max(tissue.shape)))
    image = tissue.astype(np.float32)
    around = _slide(_slide(image, np.minimum, radius), np.maximum, radius)  # grey opening
    height = image - around
    marks = (image > pixels.MARK_BRIGHTNESS) & (height > pixels.MARK_CONTRAST)
    drawn = geometry.box_sum(tissue > ON_BLACK, 2 * radius)
    share = drawn / geometry.box_sum(np.ones_like(tissue), 2 * radius)
    marks |= (height > WRITING) & (share < SPARSE)
    if not marks.any():
        return tissue
    for _ in range(radius):
        marks |= geometry.dilate(marks, 1) & (height > pixels.MARK_SKIRT / 2)
    return np.where(geometry.dilate(marks, 1), around, image).astype(np.uint8)


def _slide(image: NDArray[np.float32], pick: np.ufunc, radius: int) -> NDArray[np.float32]:
    """A square running minimum or maximum: one axis after the other, each in steps that double."""
    for axis in (0, 1):
        padded = np.pad(image, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        image = _running(padded if axis == 0 else padded.T, pick, 2 * radius + 1)
        image = image if axis == 0 else image.T
    return image


def _running(rows: NDArray[np.float32], pick: np.ufunc, width: int) -> NDArray[np.float32]:
    reached = 1
    while 2 * reached <= width:
        rows, reached = pick(rows[:-reached], rows[reached:]), 2 * reached
    rest = width - reached
    return np.asarray(pick(rows[: len(rows) - rest], rows[rest:]) if rest else rows)


# The new file


def _dataset(opened: Opened, tissue: list[Tissue], frames: Grey, pseudonyms: Pseudonyms) -> Dataset:
    header, several = opened.header, len(frames) > 1
    ds = Dataset()
    put(ds, "SpecificCharacterSet", "ISO_IR 192")
    put(ds, "SOPClassUID", MULTIPLE if several else SINGLE)
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        put(ds, keyword, pseudonyms.uid(text(header, keyword)))
    patient = pseudonyms.patient(text(header, "PatientID"), text(header, "IssuerOfPatientID"))
    put(ds, "PatientName", f"Anonymous^{patient[:8]}")
    put(ds, "PatientID", patient)
    for empty in _TYPE_2:
        put(ds, empty, "")
    put(ds, "Modality", "US")
    maker, model = _known_device(text(header, "Manufacturer"), text(header, "ManufacturerModelName"))
    put(ds, "Manufacturer", maker)
    if model:
        put(ds, "ManufacturerModelName", model)
    put(ds, "LossyImageCompression", "01" if _was_lossy(header, opened.syntax) else "00")
    put(ds, "Laterality", relevance.laterality(header) or "")
    breast = relevance.other_organ(header) is None and _says_breast(header)
    # PS3.3 C.8.5.6.1.1: examination, and 1 for two dimensions
    put(ds, "ImageType", ["DERIVED", "PRIMARY", *(("BREAST", "0001") if breast else ())])
    if breast:
        put(ds, "AnatomicRegionSequence", [code(BREAST)])
    _add_method(ds)
    regions = [_region(box, spacing) for box, spacing in tissue if spacing is not None]
    if regions:
        put(ds, "SequenceOfUltrasoundRegions", regions)
    if several:
        put(ds, "FrameTime", f"{_frame_time(header):g}")
        put(ds, "FrameIncrementPointer", 0x00181063)
        put(ds, "NumberOfFrames", len(frames))
    _set_pixels(ds, frames)
    return ds


_TYPE_2 = (
    *("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"),
    *("ReferringPhysicianName", "SeriesNumber", "InstanceNumber", "PatientOrientation", "ContentDate", "ContentTime"),
)


def _add_method(ds: Dataset) -> None:
    """PS3.15 E.1: what was done stands in the file."""
    put(ds, "PatientIdentityRemoved", "YES")
    put(ds, "DeidentificationMethod", METHOD[:64])
    put(ds, "DeidentificationMethodCodeSequence", [code(each) for each in METHOD_CODES])
    put(ds, "LongitudinalTemporalInformationModified", "REMOVED")
    put(ds, "BurnedInAnnotation", "NO")
    put(ds, "RecognizableVisualFeatures", "NO")
    made_by = Dataset()
    put(made_by, "Manufacturer", PRODUCT)
    put(made_by, "PurposeOfReferenceCodeSequence", [code(Code("109104", "DCM", "De-identifying Equipment"))])
    put(ds, "ContributingEquipmentSequence", [made_by])


def _region(box: Region, spacing: Spacing) -> Dataset:
    """PS3.3 C.8.5.5: tissue, in centimetres."""
    item = Dataset()
    put(item, "RegionSpatialFormat", region.TWO_DIMENSIONAL)
    put(item, "RegionDataType", region.TISSUE)
    put(item, "RegionFlags", 0)
    put(item, "RegionLocationMinX0", box.left)
    put(item, "RegionLocationMinY0", box.top)
    put(item, "RegionLocationMaxX1", box.right - 1)
    put(item, "RegionLocationMaxY1", box.bottom - 1)
    for axis, size in (("X", spacing.column), ("Y", spacing.row)):
        put(item, f"PhysicalUnits{axis}Direction", region.CENTIMETRES)
        put(item, f"PhysicalDelta{axis}", round(size / 10, 6))
    return item


def _set_pixels(ds: Dataset, frames: Grey) -> None:
    put(ds, "SamplesPerPixel", 1)
    put(ds, "PhotometricInterpretation", "MONOCHROME2")
    put(ds, "Rows", frames.shape[1])
    put(ds, "Columns", frames.shape[2])
    put(ds, "BitsAllocated", 8)
    put(ds, "BitsStored", 8)
    put(ds, "HighBit", 7)
    put(ds, "PixelRepresentation", 0)
    data = frames.tobytes()
    ds.add_new("PixelData", "OB", data + b"\0" * (len(data) % 2))


def _known_device(maker: str, model: str) -> tuple[str, str]:
    """The maker when it is a known one, and the model when it is one of the maker's families with a model number."""
    plain = re.sub(r"\bG\.E\.", "GE", maker)
    for known, families in DEVICES.items():
        if not re.search(rf"(?<![a-z]){known}(?![a-z])", plain, re.IGNORECASE):
            continue
        named = re.fullmatch(rf"({'|'.join(families)}){_MODEL_NUMBER}", model.strip(), re.IGNORECASE)
        if named is None:
            return known, ""
        family, gap, number = named.groups()
        return known, f"{_spelled(family, families)}{gap}{number.upper()}"
    return "", ""


def _spelled(said: str, families: tuple[str, ...]) -> str:
    return next(family for family in families if family.lower() == said.lower())


def _says_breast(header: Dataset) -> bool:
    words = (text(header, "BodyPartExamined"), text(header, "StudyDescription"))
    return any(relevance.BREAST.search(word.lower()) for word in words)


def _was_lossy(header: Dataset, syntax: UID) -> bool:
    lossy = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91"}
    return str(syntax) in lossy or text(header, "LossyImageCompression") == "01"


def _frame_time(header: Dataset) -> float:
    low, high = FRAME_MILLISECONDS
    try:
        return round(min(max(float(header.FrameTime), low), high), 3)
    except (AttributeError, TypeError, ValueError):
        return 40.0
