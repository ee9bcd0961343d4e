"""Study, Result → what shows it: secondary captures, segmentations, presentation states.

Rules:
- A secondary capture is one true-colour picture for each key image, for viewers that show nothing else.
- A segmentation has a frame for each finding on the frame where it was found. Ultrasound has no frame of
  reference: an invented plane makes some viewers load it, is called nominal, and a site can switch it off.
- A presentation state is grey or colour as its images are stored (PS3.3 A.33.1, A.33.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
from PIL import ImageCms
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pack_bits

import busgen_cds
from busgen_cds.birads import Code
from busgen_cds.dicom import contours, headers, picture
from busgen_cds.dicom.headers import SEGMENTATION_PURPOSE, code, put, reference
from busgen_cds.dicom.identity import PRODUCT
from busgen_cds.dicom.saying import Saying
from busgen_cds.result import Assessed, Declined, HeatMap
from busgen_cds.study import Frame, Source, Spacing

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
GREY_STATE = "1.2.840.10008.5.1.4.1.1.11.1"
COLOUR_STATE = "1.2.840.10008.5.1.4.1.1.11.2"

_DERIVED_BY_SEGMENTATION = Code("113076", "DCM", "Segmentation")
_GRAPHIC_RGB = (64, 224, 255)
_TEXT_DISTANCE = 14.0  # pixels between a contour and its text


def secondary_captures(saying: Saying) -> tuple[Dataset, ...]:
    """One for each key image, most suspicious first; one page of words when there is no image to show."""
    result = saying.result
    if isinstance(result, Declined):
        return (_capture(saying, picture.of_declined(saying), (), 0),)
    key_images = _key_images(saying, result)
    if not key_images:
        return (_capture(saying, picture.without_image(saying), (), 0),)
    return tuple(
        _capture(saying, picture.of_frame(saying, frame, numbers, heats), (frame,), index)
        for index, (frame, numbers, heats) in enumerate(key_images)
    )


def segmentations(saying: Saying) -> tuple[Dataset, ...]:
    """One for each instance with a finding."""
    return tuple(_segmentation(saying, numbers, i) for i, numbers in enumerate(_by_instance(saying)))


def presentation_states(saying: Saying) -> tuple[Dataset, ...]:
    """One for each instance with a finding."""
    return tuple(_presentation(saying, numbers, i) for i, numbers in enumerate(_by_instance(saying)))


def _key_images(saying: Saying, result: Assessed) -> list[tuple[Frame, list[int], list[HeatMap]]]:
    """The frames that findings were seen on, with the findings' numbers and the evidence over each region."""
    frames = {_address(frame.source): frame for frame in saying.study.frames}
    seen: dict[tuple[str, int], list[int]] = {}
    for number, finding in enumerate(saying.findings, 1):
        seen.setdefault(_address(finding.source), []).append(number)
    if not seen and result.key_image is not None:
        return [(frames[_address(result.key_image)], [], [heat for heat in (result.key_heat,) if heat is not None])]
    return [(frames[address], numbers, _heats(saying, numbers)) for address, numbers in seen.items()]


def _heats(saying: Saying, numbers: list[int]) -> list[HeatMap]:
    """One for each region: a dual screen has two in one frame."""
    heats = [saying.findings[number - 1].heat for number in numbers]
    return list({heat.region: heat for heat in reversed(heats) if heat is not None}.values())


def _address(source: Source) -> tuple[str, int]:
    return source.sop_instance_uid, source.frame_number


def _by_instance(saying: Saying) -> list[list[int]]:
    """The numbers of the findings on each instance, most suspicious instance first."""
    seen: dict[str, list[int]] = {}
    for number, finding in enumerate(saying.findings, 1):
        seen.setdefault(finding.source.sop_instance_uid, []).append(number)
    return list(seen.values())


def _spacing(saying: Saying, source: Source) -> Spacing | None:
    return next((f.spacing for f in saying.study.frames if _address(f.source) == _address(source)), None)


def _decimal(spacing: Spacing) -> list[float]:
    """As a decimal string can carry it (PS3.5 6.2: 16 characters)."""
    return [float(f"{spacing.row:.10g}"), float(f"{spacing.column:.10g}")]


# Secondary capture: PS3.3 A.8.1


def _capture(saying: Saying, shown: picture.Picture, frames: tuple[Frame, ...], index: int) -> Dataset:
    ds = headers.begin(saying, "sc", SECONDARY_CAPTURE, index)
    put(ds, "ConversionType", "WSD")
    put(ds, "SecondaryCaptureDeviceManufacturer", PRODUCT)
    put(ds, "DateOfSecondaryCapture", ds.ContentDate)
    put(ds, "TimeOfSecondaryCapture", ds.ContentTime)
    put(ds, "ImageType", ["DERIVED", "SECONDARY"])
    put(ds, "PatientOrientation", "")
    put(ds, "BodyPartExamined", "BREAST")
    put(ds, "Laterality", _one_side(frame.laterality for frame in frames))
    put(ds, "BurnedInAnnotation", "YES")
    put(ds, "DerivationDescription", saying.series_description("sc"))
    put(ds, "ImageComments", "\n".join(shown.texts)[:10240])
    if frames:
        put(
            ds,
            "SourceImageSequence",
            [reference(f.source, frames=(f.source.frame_number,), purpose=SEGMENTATION_PURPOSE) for f in frames],
        )
    _set_pixels(ds, shown.pixels)
    return ds


def _set_pixels(ds: Dataset, pixels: picture.Pixels) -> None:
    put(ds, "SamplesPerPixel", 3)
    put(ds, "PhotometricInterpretation", "RGB")
    put(ds, "PlanarConfiguration", 0)
    put(ds, "Rows", pixels.shape[0])
    put(ds, "Columns", pixels.shape[1])
    _set_depth(ds, 8)
    ds.add_new("PixelData", "OB", pixels.tobytes())  # 3 x 1280 x 880: always even


def _set_depth(ds: Dataset, bits: int) -> None:
    put(ds, "BitsAllocated", bits)
    put(ds, "BitsStored", bits)
    put(ds, "HighBit", bits - 1)
    put(ds, "PixelRepresentation", 0)


def _one_side(sides: Iterable[str | None]) -> str:
    """The side, where all state the same one."""
    stated = set(sides)
    return str(stated.pop()) if len(stated) == 1 and None not in stated else ""


# Segmentation: PS3.3 A.51, for a source without a frame of reference


def _segmentation(saying: Saying, numbers: list[int], index: int) -> Dataset:
    template, source = saying.template, saying.findings[numbers[0] - 1].source
    ds = headers.begin(saying, "seg", SEGMENTATION, index)
    put(ds, "ImageType", ["DERIVED", "PRIMARY"])
    put(ds, "PatientOrientation", "")
    put(ds, "ContentLabel", template.at("segmentation.label"))
    put(ds, "ContentDescription", template.text("segmentation.description", saying.words))
    put(ds, "ContentCreatorName", "")
    put(ds, "SegmentationType", "BINARY")
    put(ds, "SegmentsOverlap", "UNDEFINED")
    put(ds, "LossyImageCompression", "00")
    put(ds, "SegmentSequence", [_segment(saying, i, number) for i, number in enumerate(numbers, 1)])
    put(ds, "ReferencedSeriesSequence", headers.by_series([source], "ReferencedInstanceSequence"))
    _add_dimensions(ds, saying, index)
    put(ds, "SharedFunctionalGroupsSequence", [_shared(saying, source)])
    frames = [_segment_frame(saying, i, number) for i, number in enumerate(numbers, 1)]
    put(ds, "PerFrameFunctionalGroupsSequence", frames)
    _set_masks(ds, source, [contours.mask(saying.findings[number - 1]) for number in numbers])
    return ds


def _segment(saying: Saying, segment: int, number: int) -> Dataset:
    template, words = saying.template, saying.finding_words(number)
    algorithm, item = Dataset(), Dataset()
    put(algorithm, "AlgorithmFamilyCodeSequence", [code(template.code("report.algorithm_family"))])
    put(algorithm, "AlgorithmName", PRODUCT)
    put(algorithm, "AlgorithmVersion", busgen_cds.__version__)
    put(algorithm, "AlgorithmParameters", "; ".join(template.lines("report.algorithm_parameters", words)))
    put(item, "SegmentNumber", segment)
    put(item, "SegmentLabel", headers.cut(template.text("segmentation.segment", words), 64))
    put(item, "SegmentedPropertyCategoryCodeSequence", [code(template.code("segmentation.category"))])
    put(item, "SegmentedPropertyTypeCodeSequence", [code(template.code("finding.type"))])
    put(item, "SegmentAlgorithmType", "AUTOMATIC")
    put(item, "SegmentAlgorithmName", PRODUCT)
    put(item, "SegmentationAlgorithmIdentificationSequence", [algorithm])
    put(item, "RecommendedDisplayCIELabValue", list(cielab(_GRAPHIC_RGB)))
    put(item, "TrackingID", saying.tracking_identifier(number))
    put(item, "TrackingUID", saying.tracking_uid(number))
    put(item, "AnatomicRegionSequence", [_site(saying, number)])
    return item


def _site(saying: Saying, number: int) -> Dataset:
    site = code(saying.template.code("finding.site"))
    side = saying.findings[number - 1].laterality
    if side is not None:
        stated = code(saying.template.code("finding.left" if side == "L" else "finding.right"))
        put(site, "AnatomicRegionModifierSequence", [stated])
    return site


def _add_dimensions(ds: Dataset, saying: Saying, index: int) -> None:
    """Frames are ordered by segment, then by the source's frame."""
    organisation, uid = Dataset(), saying.uid("seg", index, "dimensions")
    put(organisation, "DimensionOrganizationUID", uid)
    put(ds, "DimensionOrganizationSequence", [organisation])
    indices = []
    for pointer, group, label in (
        (0x0062000B, 0x0062000A, "Referenced Segment Number"),
        (0x00209057, 0x00209111, "In-Stack Position Number"),
    ):
        item = Dataset()
        put(item, "DimensionOrganizationUID", uid)
        put(item, "DimensionIndexPointer", pointer)
        put(item, "FunctionalGroupPointer", group)
        put(item, "DimensionDescriptionLabel", label)
        indices.append(item)
    put(ds, "DimensionIndexSequence", indices)


def _shared(saying: Saying, source: Source) -> Dataset:
    """Scale and nominal plane, both only where the source has a scale: a millimetre is never made up."""
    shared = Dataset()
    spacing = _spacing(saying, source)
    if spacing is None:
        return shared
    measures, plane = Dataset(), Dataset()
    put(measures, "PixelSpacing", _decimal(spacing))
    if saying.nominal_geometry:
        put(measures, "SliceThickness", 1.0)
        put(plane, "ImageOrientationPatient", [1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
        put(shared, "PlaneOrientationSequence", [plane])
    put(shared, "PixelMeasuresSequence", [measures])
    return shared


def _segment_frame(saying: Saying, segment: int, number: int) -> Dataset:
    source = saying.findings[number - 1].source
    item, content, derivation, identified = Dataset(), Dataset(), Dataset(), Dataset()
    put(content, "StackID", "1")
    put(content, "InStackPositionNumber", source.frame_number)
    put(content, "DimensionIndexValues", [segment, source.frame_number])
    put(
        derivation,
        "SourceImageSequence",
        [reference(source, frames=(source.frame_number,), purpose=SEGMENTATION_PURPOSE)],
    )
    put(derivation, "DerivationCodeSequence", [code(_DERIVED_BY_SEGMENTATION)])
    put(identified, "ReferencedSegmentNumber", segment)
    put(item, "FrameContentSequence", [content])
    put(item, "DerivationImageSequence", [derivation])
    put(item, "SegmentIdentificationSequence", [identified])
    if saying.nominal_geometry and "PlaneOrientationSequence" in _shared(saying, source):
        position = Dataset()
        put(position, "ImagePositionPatient", [0.0, 0.0, 0.0])
        put(item, "PlanePositionSequence", [position])
    return item


def _set_masks(ds: Dataset, source: Source, masks: list[contours.Mask]) -> None:
    put(ds, "SamplesPerPixel", 1)
    put(ds, "PhotometricInterpretation", "MONOCHROME2")
    put(ds, "NumberOfFrames", len(masks))
    put(ds, "Rows", source.rows)
    put(ds, "Columns", source.columns)
    _set_depth(ds, 1)
    packed = pack_bits(np.stack(masks).astype(np.uint8).ravel(), pad=True)
    ds.add_new("PixelData", "OB", packed)


# Presentation state: PS3.3 A.33


def _presentation(saying: Saying, numbers: list[int], index: int) -> Dataset:
    template, findings = saying.template, [saying.findings[number - 1] for number in numbers]
    source = findings[0].source
    ds = headers.begin(saying, "pr", COLOUR_STATE if source.colour else GREY_STATE, index)
    put(ds, "PresentationCreationDate", ds.InstanceCreationDate)
    put(ds, "PresentationCreationTime", ds.InstanceCreationTime)
    put(ds, "ContentLabel", template.at("presentation.label"))
    put(ds, "ContentDescription", template.text("presentation.description", saying.words))
    put(ds, "ContentCreatorName", "")
    put(ds, "Laterality", _one_side(finding.laterality for finding in findings))
    put(ds, "ReferencedSeriesSequence", headers.by_series([source], "ReferencedImageSequence"))
    put(ds, "DisplayedAreaSelectionSequence", [_whole_image(source, _spacing(saying, source))])
    put(ds, "GraphicAnnotationSequence", [_annotation(saying, number) for number in numbers])
    put(ds, "GraphicLayerSequence", [_layer(saying)])
    if source.colour:
        put(ds, "ICCProfile", input_profile())
    else:
        put(ds, "PresentationLUTShape", "IDENTITY")
    return ds


def _whole_image(source: Source, spacing: Spacing | None) -> Dataset:
    area = Dataset()
    put(area, "DisplayedAreaTopLeftHandCorner", [1, 1])
    put(area, "DisplayedAreaBottomRightHandCorner", [source.columns, source.rows])
    put(area, "PresentationSizeMode", "SCALE TO FIT")
    if spacing is None:
        put(area, "PresentationPixelAspectRatio", [1, 1])
    else:
        put(area, "PresentationPixelSpacing", _decimal(spacing))
    return area


def _annotation(saying: Saying, number: int) -> Dataset:
    """The contour and what is said of it, on the frame where it was found."""
    finding, item, line, text = saying.findings[number - 1], Dataset(), Dataset(), Dataset()
    points = contours.closed(finding)
    put(line, "GraphicAnnotationUnits", "PIXEL")
    put(line, "GraphicDimensions", 2)
    put(line, "NumberOfGraphicPoints", len(points))
    put(line, "GraphicData", [value for point in points for value in point])
    put(line, "GraphicType", "POLYLINE")
    put(line, "GraphicFilled", "N")
    put(line, "TrackingID", saying.tracking_identifier(number))
    put(line, "TrackingUID", saying.tracking_uid(number))
    right, top = max(x for x, _ in points), min(y for _, y in points)
    put(text, "UnformattedTextValue", saying.template.text("presentation.text", saying.finding_words(number)))
    put(text, "AnchorPointAnnotationUnits", "PIXEL")
    put(text, "AnchorPoint", [min(right + _TEXT_DISTANCE, float(finding.source.columns)), top])
    put(text, "AnchorPointVisibility", "N")
    frames = (finding.source.frame_number,)
    put(item, "ReferencedImageSequence", [reference(finding.source, frames=frames)])
    put(item, "GraphicLayer", saying.template.at("presentation.layer"))
    put(item, "TextObjectSequence", [text])
    put(item, "GraphicObjectSequence", [line])
    return item


def _layer(saying: Saying) -> Dataset:
    layer = Dataset()
    put(layer, "GraphicLayer", saying.template.at("presentation.layer"))
    put(layer, "GraphicLayerOrder", 1)
    put(layer, "GraphicLayerRecommendedDisplayGrayscaleValue", 0xFFFF)
    put(layer, "GraphicLayerRecommendedDisplayCIELabValue", list(cielab(_GRAPHIC_RGB)))
    put(layer, "GraphicLayerDescription", saying.template.at("presentation.layer_description"))
    return layer


@cache
def cielab(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """PS3.3 C.10.7.1.1: L* 0..100 and a*, b* -128..127, each spread over 16 bits."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    # sRGB to XYZ adapted to the D50 white of the profile connection space (Bradford)
    matrix = ((0.4361, 0.3851, 0.1431), (0.2225, 0.7169, 0.0606), (0.0139, 0.0971, 0.7141))
    white = (0.9642, 1.0, 0.8251)
    xyz = [sum(m * c for m, c in zip(row, linear, strict=True)) / w for row, w in zip(matrix, white, strict=True)]
    x, y, z = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in xyz)
    light, a, b = 116 * y - 16, 500 * (x - y), 200 * (y - z)
    return round(light / 100 * 65535), round((a + 128) / 255 * 65535), round((b + 128) / 255 * 65535)


@cache
def input_profile() -> bytes:
    """sRGB as an input-device profile, which is what PS3.3 C.11.15 asks for; without the time it was made."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[12:16] = b"scnr"
    profile[24:36] = bytes((7, 208, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0))  # 2000-01-01 00:00:00
    profile[84:100] = bytes(16)  # ICC.1 7.2.18: no profile ID
    return bytes(profile)
