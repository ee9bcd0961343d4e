"""The last look at an object before it leaves: against its template, and against what must never be said.

Rules:
- What is checked is what is sent: the bytes are read back.
- A failure is our own bug (`Malformed`): nothing of the Result is sent, and the job parks.
- No public validator notices a missing tracking UID, an outline without its image, a side nobody stated,
  or a category that we cannot know: these are asserted here.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels.utils import unpack_bits
from pydicom.uid import UID

from busgen_cds import birads
from busgen_cds.dicom import content, headers, overlay, picture, report
from busgen_cds.dicom.identity import PRODUCT
from busgen_cds.dicom.saying import Saying, percentage
from busgen_cds.dicom.templates import as_code
from busgen_cds.result import Declined, Finding, Kind, Rendered
from busgen_cds.study import Source

# PS3.16 CID 6027: what only a physician can say.
NEVER = frozenset(
    {("397138000", "SCT"), ("397140005", "SCT"), ("397141009", "SCT"), ("397144001", "SCT"), ("MA.II.A.5.6", "BI")}
)
_EDGE = 0.5  # a contour's points are pixel centres; the image ends half a pixel further


class Malformed(AssertionError):
    """An object, or the Result it is made from, says what it must not, or does not say what it must."""


def result(saying: Saying) -> None:
    """The Result fits its Study and says nothing that cannot be shown."""
    study, answer = saying.study, saying.result
    _require(answer.study_uid == study.uid, "the Result is of another study")
    _require(answer.evidence_digest == study.evidence_digest, "the Result was made from other images")
    _require(answer.revision >= 1, f"revision {answer.revision}: revisions count from 1")
    _require(bool(study.frames), "the study has no image to refer to")
    if isinstance(answer, Declined):
        _require(bool(answer.reason.strip()), "declined without a reason")
        return
    _probability(answer.probability, "the study's probability")
    _probability(answer.prevalence, "the prevalence")
    if answer.birads is not None:
        _require(answer.birads in birads.CATEGORIES, f"category {answer.birads!r} is not ours to state")
    _require((answer.birads is None) == (not answer.findings), "a category is stated exactly where a finding is")
    frames = {(f.source.sop_instance_uid, f.source.frame_number): f for f in study.frames}
    for number, finding in enumerate(answer.findings, 1):
        frame = frames.get((finding.source.sop_instance_uid, finding.source.frame_number))
        _require(frame is not None, f"finding {number} lies on a frame that was not read")
        stated = frame.laterality if frame is not None else None
        _finding(finding, f"finding {number}")
        _require(finding.laterality in (None, stated), f"finding {number}: side {finding.laterality} is not stated")


def rendered(objects: Sequence[Rendered], saying: Saying) -> None:
    """Every object, by its kind; and all of them together."""
    uids = [it.sop_instance_uid for it in objects]
    _require(len(set(uids)) == len(uids), "two objects share a SOP Instance UID")
    old = {it.sop_instance_uid for it in saying.replaces}
    _require(not old & set(uids), "an object replaces itself: the revision must rise with every new rendering")
    for it in objects:
        ds = dcmread(io.BytesIO(it.data))
        try:
            _identity(ds, it, saying)
            _BY_KIND[it.kind](ds, saying)
        except Malformed as wrong:
            raise Malformed(f"{it.kind} {it.sop_instance_uid}: {wrong}") from wrong


def _identity(ds: Dataset, it: Rendered, saying: Saying) -> None:
    study = saying.study
    _require(ds.SOPInstanceUID == it.sop_instance_uid and ds.SOPClassUID == it.sop_class_uid, "identity differs")
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        _require(UID(ds[keyword].value).is_valid, f"{keyword} is no valid UID")
    _require(ds.StudyInstanceUID == study.uid, "it belongs to another study")
    _require(headers.identifier(ds.PatientID) == headers.identifier(study.patient.id), "it names another patient")
    _require(ds.Manufacturer == PRODUCT, "it does not carry our name: it would be read as a study")
    _require(saying.result.bundle.digest[:64] in ds.SoftwareVersions, "it does not name its bundle's digest")
    _require(ds.SeriesNumber == saying.series_number(it.kind), "its series number is not the template's")
    _revised(str(ds.SeriesDescription), saying, "series description")
    for element in ds.iterall():
        most = _MOST_CHARACTERS.get(element.VR)
        if most and element.keyword not in _AS_RECEIVED:
            values = element.value if element.VM > 1 else [element.value]
            too_long = any(len(str(value)) > most for value in values)
            _require(not too_long, f"{element.keyword} is longer than {most} characters")


# PS3.5 table 6.2-1; and what goes out exactly as it came in, however long it is
_MOST_CHARACTERS = {"LO": 64, "SH": 16}
_AS_RECEIVED = {"PatientID", "IssuerOfPatientID", "StudyID", "AccessionNumber"}


def _report(ds: Dataset, saying: Saying) -> None:
    _require(ds.VerificationFlag == "UNVERIFIED", "a machine cannot verify a report")
    _require(ds.PreliminaryFlag == "PRELIMINARY", "a machine's report is preliminary")
    _require(content.name_of(ds) == report.title(saying)[:2], "its title is not the template's")
    items = list(content.walk(ds))
    observers = _values(items, report.OBSERVER_TYPE)
    _require(observers == [report.DEVICE[:2]], "the observer is not a device")
    known = {frame.source.sop_instance_uid: frame.source for frame in saying.study.frames}
    for item in items:
        _require(_value(item) not in NEVER, f"category {_value(item)} is not ours to state")
        if item.ValueType == "SCOORD":
            _outline(item, known)
    groups = [item for item in items if content.name_of(item) == report.GROUP[:2]]
    _require(len(groups) == len(saying.findings), "measurement groups and findings differ in number")
    for group, finding in zip(groups, saying.findings, strict=True):
        _group(group, finding, saying)
    _answer(items, saying)


def _answer(items: list[Dataset], saying: Saying) -> None:
    """The sentences of the template stand there, and each kind of answer says what it is."""
    texts = [str(item.TextValue) for item in items if item.ValueType == "TEXT"]
    answer = report.kind_of_answer(saying)
    for line in saying.template.lines(f"report.{answer}.lines", saying.words):
        _require(line in texts, f"the template's line is missing: {line!r}")
    said = " ".join(texts).lower()
    _require("not a diagnosis" in said, "it does not say that it is no diagnosis")
    _revised(" ".join(texts), saying, "text")
    categories = _values(items, saying.template.code("finding.category"))
    if isinstance(saying.result, Declined):
        _require("not analysed" in said, "it does not say NOT ANALYSED")
        _require(not categories, "a declined report states a category")
        _require(not _named(items, report.PROBABILITY), "a declined report states a probability")
        return
    _require("prevalence" in said, "it does not say for which prevalence it holds")
    ours = {birads.CODES[category][:2] for category in birads.CATEGORIES}
    _require(set(categories) <= ours, f"categories {categories} are not ours to state")
    if saying.result.birads is None:
        _require("no lesion found in" in said, "it does not say that no lesion was found")
        _require("negative" not in said, "it calls the study negative")
        _require(not categories, "nothing was found and a category is stated")


def _group(group: Dataset, finding: Finding, saying: Saying) -> None:
    items = list(group.ContentSequence)
    _require(len(_named(items, report.TRACKING_UID)) == 1, "a finding has no tracking UID")
    _require(len(_named(items, report.TRACKING_IDENTIFIER)) == 1, "a finding has no tracking identifier")
    _require(len(_named(items, report.COMMENT)) == 1, "a finding has no comment, or several: viewers show one")
    category = _values(items, saying.template.code("finding.category"))
    _require(category == [birads.CODES[finding.birads][:2]], f"finding category {category} is not {finding.birads}")
    _numbers(items, finding, saying)
    sides = _values(list(content.walk(group)), report.LATERALITY)
    _require(len(sides) == (finding.laterality is not None), "a side is stated exactly where the source states it")


def _numbers(items: list[Dataset], finding: Finding, saying: Saying) -> None:
    """Those of the template that the finding has, in its order, each with its own outline."""
    where = "finding.measurements"
    entries = [entry for entry in saying.template.at(where) if getattr(finding, entry["of"]) is not None]
    numbers = [item for item in items if item.ValueType == "NUM"]
    expected = [as_code(entry["name"], where)[:2] for entry in entries]
    _require(
        [content.name_of(item) for item in numbers] == expected, "its numbers are not the template's, in its order"
    )
    for item, entry in zip(numbers, entries, strict=True):
        outlines = [child for child in item.get("ContentSequence", ()) if child.ValueType == "SCOORD"]
        _require(len(outlines) == 1, f"{entry['of']} has no outline of its own")
        _require(item.ContentSequence[0].ValueType == "SCOORD", f"{entry['of']}: viewers look for the outline first")
        _require(
            float(item.MeasuredValueSequence[0].NumericValue) == report.measured(finding, entry),
            f"{entry['of']} is not the finding's",
        )


def _outline(item: Dataset, known: dict[str, Source]) -> None:
    selected = item.ContentSequence[0].ReferencedSOPSequence[0]
    source = known.get(str(selected.ReferencedSOPInstanceUID))
    _require(source is not None, "an outline lies on an image that is not of this study")
    assert source is not None
    numbered = "ReferencedFrameNumber" in selected
    _require(numbered == (source.frame_count > 1), "an outline names a frame exactly where the image has several")
    _require(not numbered or 1 <= int(selected.ReferencedFrameNumber) <= source.frame_count, "there is no such frame")
    _require(item.GraphicType == "POLYLINE", "an outline is no polyline")
    _closed_inside(list(item.GraphicData), source)


def _closed_inside(data: list[float], source: Source) -> None:
    points = np.asarray(data, float).reshape(-1, 2)
    _require(len(points) >= 4 and bool((points[0] == points[-1]).all()), "an outline is not closed")
    inside = (points >= 0).all() and (points <= (source.columns, source.rows)).all()
    _require(bool(inside), f"an outline leaves its image of {source.columns} x {source.rows} pixels")


def _capture(ds: Dataset, saying: Saying) -> None:
    template, words = saying.template, saying.words
    _require(ds.PhotometricInterpretation == "RGB" and "NumberOfFrames" not in ds, "it is no single true-colour frame")
    _require((ds.Rows, ds.Columns) == (picture.HEIGHT, picture.WIDTH), "its size is not the page's")
    said = str(ds.ImageComments)
    _require(template.text("picture.heading", words) in said, "it does not say that it is no diagnosis")
    _require(template.text("picture.footer", words) in said, "it does not name product and bundle")
    _revised(said, saying, "text")
    side = str(ds.Laterality or "")
    _require(side in ("", *(frame.laterality or "" for frame in saying.study.frames)), f"nobody stated side {side}")
    if isinstance(saying.result, Declined):
        _require(template.text("picture.declined", words) in said, "it does not say NOT ANALYSED")
        _require("SourceImageSequence" not in ds, "a declined picture shows an image")
    elif not saying.findings:
        _require(template.text("picture.nothing_found", words) in said, "it does not say that nothing was found")


def _segmentation(ds: Dataset, saying: Saying) -> None:
    segments, frames = list(ds.SegmentSequence), list(ds.PerFrameFunctionalGroupsSequence)
    by_tracking = {saying.tracking_uid(n): finding for n, finding in enumerate(saying.findings, 1)}
    _require(len(segments) == len(frames) == ds.NumberOfFrames, "segments and frames differ in number")
    masks = unpack_bits(ds.PixelData, as_array=True)[: len(frames) * ds.Rows * ds.Columns]
    for segment, frame, mask in zip(segments, frames, np.reshape(masks, (len(frames), -1)), strict=True):
        finding = by_tracking.get(str(segment.get("TrackingUID", "")))
        _require(finding is not None, "a segment carries no finding's tracking UID")
        assert finding is not None
        source = frame.DerivationImageSequence[0].SourceImageSequence[0]
        _require(source.ReferencedSOPInstanceUID == finding.source.sop_instance_uid, "a frame shows another image")
        number = int(source.get("ReferencedFrameNumber", 1))
        _require(number == finding.source.frame_number, "a segment's frame is not the finding's")
        _require((ds.Rows, ds.Columns) == (finding.source.rows, finding.source.columns), "its size is not the source's")
        _require(bool(mask.any()), "a segment is empty")
    _revised(str(ds.ContentDescription), saying, "description")


def _presentation(ds: Dataset, saying: Saying) -> None:
    known = {frame.source.sop_instance_uid: frame.source for frame in saying.study.frames}
    tracked = {saying.tracking_uid(n) for n in range(1, len(saying.findings) + 1)}
    for annotation in ds.GraphicAnnotationSequence:
        source = known.get(str(annotation.ReferencedImageSequence[0].ReferencedSOPInstanceUID))
        _require(source is not None, "it shows an image that is not of this study")
        assert source is not None
        state = overlay.COLOUR_STATE if source.colour else overlay.GREY_STATE
        _require(ds.SOPClassUID == state, "grey and colour are mixed up")
        line = annotation.GraphicObjectSequence[0]
        _require(str(line.get("TrackingUID", "")) in tracked, "a contour carries no finding's tracking UID")
        _closed_inside(list(line.GraphicData), source)
        said = str(annotation.TextObjectSequence[0].UnformattedTextValue)
        _require("not a diagnosis" in said, "it does not say that it is no diagnosis")
        _revised(said, saying, "text")


def _rejection(ds: Dataset, saying: Saying) -> None:
    listed = {
        str(i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        for i in content.walk(ds)
        if "ReferencedSOPSequence" in i
    }
    _require(
        listed == {old.sop_instance_uid for old in saying.predecessors("sr", "sc", "seg", "pr")}, "it rejects others"
    )
    _require(content.name_of(ds) == saying.template.code("rejection.title")[:2], "its title is not the template's")


_BY_KIND: dict[Kind, Callable[[Dataset, Saying], None]] = {
    "sr": _report,
    "sc": _capture,
    "seg": _segmentation,
    "pr": _presentation,
    "ko": _rejection,
}


def _finding(finding: Finding, what: str) -> None:
    _require(finding.birads in birads.CATEGORIES, f"{what}: category {finding.birads!r} is not ours to state")
    _probability(finding.probability, f"{what}: the probability")
    points = np.asarray(finding.contour, float)
    _require(points.ndim == 2 and len(np.unique(points, axis=0)) >= 3, f"{what} has no contour")
    size = (finding.source.columns, finding.source.rows)
    inside = (points >= -_EDGE).all() and (points <= np.asarray(size) - _EDGE).all()
    _require(bool(inside), f"{what}: the contour leaves its image of {size[0]} x {size[1]} pixels")


def _probability(value: float, what: str) -> None:
    _require(0 <= percentage(value) <= 100, f"{what} is {value}, which is no probability")


def _revised(text: str, saying: Saying, what: str) -> None:
    revision = saying.result.revision
    _require(revision == 1 or f"REV {revision}" in text, f"its {what} does not say REV {revision}")


def _named(items: Sequence[Dataset], name: birads.Code) -> list[Dataset]:
    return [item for item in items if content.name_of(item) == name[:2]]


def _values(items: Sequence[Dataset], name: birads.Code) -> list[tuple[str, str]]:
    return [_value(item) for item in _named(items, name)]


def _value(item: Dataset) -> tuple[str, str]:
    codes = item.get("ConceptCodeSequence")
    return (str(codes[0].CodeValue), str(codes[0].CodingSchemeDesignator)) if codes else ("", "")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise Malformed(message)
