"""Synthetic breast ultrasound as DICOM files, for every test: no patient is shown.

Rules:
- The same arguments give the same bytes, UIDs included.
- What a scanner draws around the tissue (header text, ruler, calipers, margins) is drawn here too.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
)

Colour = Literal["grey", "rgb", "ybr", "ybr422", "palette"]
Tissue = Literal["benign", "malignant", "normal"]
Doppler = Literal["", "box", "all"]
Pixels = NDArray[np.uint8]

DEMO_IMAGES = Path(__file__).parent.parent / "busgen_cds" / "demo_images"
COLUMNS, ROWS = 800, 600
REGION = (120, 60, 680, 560)  # left, top, right, bottom of the tissue; bottom and right excluded
DUAL = ((10, 100, 395, 480), (405, 100, 790, 480))
MM_PER_PIXEL = 0.08


def breast_study(
    n: int = 1,
    *,
    seed: int = 0,
    cine: int = 0,
    colour: Colour = "grey",
    tissue: Tissue = "malignant",
    patient_id: str | None = None,
    study_uid: str | None = None,
    **image: Any,
) -> list[bytes]:
    """A study of n instances (each a cine of so many frames, when asked), as Part 10 files."""
    return [
        breast_image(
            seed=seed,
            number=i + 1,
            cine=cine,
            colour=colour,
            tissue=tissue,
            patient_id=patient_id,
            study_uid=study_uid,
            **image,
        )
        for i in range(n)
    ]


def breast_image(**description: Any) -> bytes:
    return part10(breast_dataset(**description))


def breast_dataset(
    *,
    seed: int = 0,
    number: int = 1,
    cine: int = 0,
    colour: Colour = "grey",
    tissue: Tissue = "malignant",
    patient_id: str | None = None,
    study_uid: str | None = None,
    regions: bool = True,
    marks: bool = True,
    calipers: bool = False,
    dual: bool = False,
    doppler: Doppler = "",
    laterality: Literal["", "L", "R"] = "",
    syntax: str = ExplicitVRLittleEndian,
) -> Dataset:
    """One instance, for a test to alter before it is written by `part10`."""
    shown = [
        picture(tissue, seed + number, moment=t, marks=marks, calipers=calipers, dual=dual, doppler=doppler)
        for t in range(max(1, cine))
    ]
    ds = _header(seed, number, patient_id, study_uid, cine)
    if laterality:
        ds.Laterality = laterality
    if regions:
        ds.SequenceOfUltrasoundRegions = Items(_region(box) for box in (DUAL if dual else (REGION,)))
    if regions and doppler:
        ds.SequenceOfUltrasoundRegions.append(_region(_doppler_box(doppler), data_type=2))
    set_pixels(ds, np.stack(shown), "rgb" if doppler and colour == "grey" else colour, UID(syntax))
    return ds


def part10(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def uid(*what: object) -> str:
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:15])}"


def picture(
    tissue: Tissue = "malignant",
    seed: int = 0,
    *,
    moment: int = 0,
    marks: bool = True,
    calipers: bool = False,
    dual: bool = False,
    doppler: Doppler = "",
) -> Pixels:
    """What the scanner's screen shows, (rows, columns, 3)."""
    screen = Image.new("RGB", (COLUMNS, ROWS))
    for i, box in enumerate(DUAL if dual else (REGION,)):
        screen.paste(_echoes(tissue, seed + i, box[2] - box[0], box[3] - box[1], moment), box[:2])
    draw = ImageDraw.Draw(screen)
    if doppler:
        screen.paste(_flow(_doppler_box(doppler), seed, moment), _doppler_box(doppler)[:2])
    if marks:
        _draw_marks(draw)
    if calipers:
        _draw_calipers(draw)
    return np.asarray(screen)


def set_pixels(ds: Dataset, frames: Pixels, colour: Colour, syntax: UID = ExplicitVRLittleEndian) -> None:
    """Put (n, rows, columns, 3) RGB frames into a data set, as the colour and in the encoding asked for."""
    values, photometric = _PHOTOMETRIC[colour](frames)
    if colour == "palette":
        _write_palette(ds)
    samples = 3 if values.ndim == 4 else 1
    ds.Rows, ds.Columns = frames.shape[1:3]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = samples, photometric
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    if samples == 3:
        ds.PlanarConfiguration = 0
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.PixelData = _even(values.tobytes() if colour != "ybr422" else _subsample(values))
    if syntax == JPEGBaseline8Bit:
        _as_jpeg(ds, frames, colour)
    elif syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEG2000):
        options = {"j2k_cr": [10]} if syntax == JPEG2000 else {}
        ds.compress(syntax, generate_instance_uid=False, **options)
    elif syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian):
        ds.file_meta.TransferSyntaxUID = syntax
    else:
        raise ValueError(f"no encoder here for {syntax}")


def _header(seed: int, number: int, patient_id: str | None, study_uid: str | None, cine: int) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = UltrasoundMultiFrameImageStorage if cine else UltrasoundImageStorage
    ds.SOPInstanceUID = uid("instance", seed, number, study_uid, patient_id)
    ds.StudyInstanceUID = study_uid or uid("study", seed)
    ds.SeriesInstanceUID = uid("series", seed, study_uid)
    ds.PatientID = f"TEST-{seed:04d}" if patient_id is None else patient_id
    ds.PatientName = f"Test^Breast {seed}"
    ds.PatientBirthDate, ds.PatientSex = "19700101", "F"
    ds.StudyDate, ds.StudyTime = "20260102", "101500"
    ds.ContentDate, ds.ContentTime = "20260102", f"1015{number % 60:02d}"
    ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = f"A{seed:06d}", str(seed), ""
    ds.StudyDescription, ds.SeriesDescription = "US Breast", ""
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "US", "Example Ultrasound", "Synthetic 1"
    ds.StationName = "US1"
    ds.SeriesNumber, ds.InstanceNumber = 1, number
    ds.ImageType = ["ORIGINAL", "PRIMARY", "", "0001"]
    ds.BodyPartExamined = "BREAST"
    ds.AnatomicRegionSequence = Items([_code("76752008", "SCT", "Breast")])
    ds.LossyImageCompression = "00"
    ds.BurnedInAnnotation = "NO"
    if cine:
        ds.NumberOfFrames, ds.FrameTime = cine, "40"
        ds.FrameIncrementPointer = 0x00181063
    return ds


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _region(box: Sequence[int], data_type: int = 1, spatial_format: int = 1) -> Dataset:
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = spatial_format, data_type, 0
    region.RegionLocationMinX0, region.RegionLocationMinY0 = box[0], box[1]
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = box[2] - 1, box[3] - 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3
    region.PhysicalDeltaX = region.PhysicalDeltaY = MM_PER_PIXEL / 10  # PS3.3 C.8.5.5.1.17: unit code 3 is cm
    return region


@cache
def _demo_image(tissue: Tissue, index: int) -> Image.Image:
    return Image.open(DEMO_IMAGES / f"{tissue}_{index % 8}.png").convert("L")


@cache
def _enlarged(tissue: Tissue, index: int, width: int, height: int) -> Pixels:
    return np.asarray(_demo_image(tissue, index).resize((width, height), Image.Resampling.BICUBIC))


def _echoes(tissue: Tissue, seed: int, width: int, height: int, moment: int) -> Image.Image:
    """The tissue; between moments the probe sways a little and the speckle changes."""
    still = _enlarged(tissue, seed, width, height)
    if not moment:
        return Image.fromarray(still)
    sway = round(6 * np.sin(moment / 9))
    grain = np.random.default_rng((seed, moment)).integers(0, 12, (height // 4, width // 4), dtype=np.uint8)
    speckle = np.kron(grain, np.ones((4, 4), np.uint8))
    moved = np.roll(still, sway, axis=1)
    moved[: speckle.shape[0], : speckle.shape[1]] = (
        np.minimum(moved[: speckle.shape[0], : speckle.shape[1]], 240) + speckle
    )
    return Image.fromarray(moved)


def _doppler_box(doppler: Doppler) -> tuple[int, int, int, int]:
    left, top, right, bottom = REGION
    if doppler == "all":
        return REGION
    return left + 150, top + 120, right - 150, bottom - 130


def _flow(box: tuple[int, int, int, int], seed: int, moment: int) -> Image.Image:
    """Smooth red and blue, as colour flow or an elastogram is drawn."""
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = np.meshgrid(np.linspace(0, 5, width), np.linspace(0, 4, height))
    wave = np.sin(x + seed + moment / 10) * np.cos(y)
    red, blue = np.clip(wave, 0, 1), np.clip(-wave, 0, 1)
    return Image.fromarray((np.stack([red, 0.2 * np.abs(wave), blue], -1) * 235).astype(np.uint8))


def _draw_marks(draw: ImageDraw.ImageDraw) -> None:
    _, top, right, bottom = REGION
    draw.text((12, 10), "EXAMPLE HOSPITAL   US Breast   12L  MI 0.9  TIs 0.2", fill=(235, 235, 235))
    draw.text((12, 90), "2D\nG 55\nDR 60\nFR 31", fill=(200, 200, 60))
    draw.rectangle((30, 220, 44, 420), outline=(120, 120, 120))
    for y in range(220, 420):
        draw.line((31, y, 43, y), fill=(420 - y,) * 3)
    for y in range(top, bottom, 50):
        draw.line((right + 8, y, right + 16, y), fill=(220, 220, 220))


def _draw_calipers(draw: ImageDraw.ImageDraw) -> None:
    for x, y in ((300, 250), (480, 255), (390, 180), (395, 330)):
        draw.line((x - 7, y, x + 7, y), fill=(250, 250, 60), width=2)
        draw.line((x, y - 7, x, y + 7), fill=(250, 250, 60), width=2)
    draw.text((560, 520), "1  14.4 mm\n2  12.0 mm", fill=(250, 250, 60))


def _grey(frames: Pixels) -> tuple[Pixels, str]:
    return np.stack([np.asarray(Image.fromarray(f).convert("L")) for f in frames]), "MONOCHROME2"


def _rgb(frames: Pixels) -> tuple[Pixels, str]:
    return frames, "RGB"


def _ybr(frames: Pixels, name: str = "YBR_FULL") -> tuple[Pixels, str]:
    return np.stack([np.asarray(Image.fromarray(f).convert("YCbCr")) for f in frames]), name


def _ybr422(frames: Pixels) -> tuple[Pixels, str]:
    return _ybr(frames, "YBR_FULL_422")


def _palette(frames: Pixels) -> tuple[Pixels, str]:
    return 255 - _grey(frames)[0], "PALETTE COLOR"


_PHOTOMETRIC = {"grey": _grey, "rgb": _rgb, "ybr": _ybr, "ybr422": _ybr422, "palette": _palette}


def _write_palette(ds: Dataset) -> None:
    """An inverted 16-bit ramp, so that an index taken for a grey value shows at once."""
    ramp = (np.arange(255, -1, -1, dtype=np.uint16) * 257).tobytes()
    for name in ("Red", "Green", "Blue"):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(ds, f"{name}PaletteColorLookupTableData", ramp)


def _subsample(values: Pixels) -> bytes:
    """PS3.3 C.7.6.3.1.2: Y Y Cb Cr for every two pixels of a row."""
    y, chroma = values[..., 0], values[:, :, ::2, 1:]
    return np.stack([y[:, :, ::2], y[:, :, 1::2], chroma[..., 0], chroma[..., 1]], -1).tobytes()


def _as_jpeg(ds: Dataset, frames: Pixels, colour: Colour) -> None:
    """Baseline JPEG; a colour picture is YCbCr inside, whatever the tag then says."""
    encoded = []
    for frame in frames:
        buffer = io.BytesIO()
        image = Image.fromarray(frame)
        (image.convert("L") if colour == "grey" else image).save(buffer, "JPEG", quality=92)
        encoded.append(buffer.getvalue())
    if colour != "grey":
        ds.PhotometricInterpretation = "RGB" if colour == "rgb" else "YBR_FULL_422"
    ds.LossyImageCompression, ds.LossyImageCompressionMethod = "01", "ISO_10918_1"
    ds.LossyImageCompressionRatio = "10"
    ds.PixelData = encapsulate(encoded)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit


def _even(data: bytes) -> bytes:
    return data + b"\0" * (len(data) % 2)
