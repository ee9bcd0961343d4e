"""What shows a Result: secondary captures, segmentations, presentation states."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from pydicom import Dataset, dcmread

from busgen_cds.dicom import checks, contours, objects, overlay, picture, templates
from busgen_cds.dicom.saying import Saying
from busgen_cds.result import Result
from busgen_cds.study import Study
from tests.dicom import answers


def shown(kind: Any, study: Study, result: Result, **profile: Any) -> list[Dataset]:
    chosen = objects.Profile(tuple({kind, "sr"}), **profile)
    made = objects.render(study, result, profile=chosen, rendered_at=answers.AT)
    return [dcmread(io.BytesIO(it.data)) for it in made if it.kind == kind]


def drawn(study: Study, result: Result) -> picture.Pixels:
    return np.asarray(shown("sc", study, result)[0].pixel_array)


def test_one_picture_for_each_key_image() -> None:
    """Findings on one image share a secondary capture; another image gets its own; each names its source."""
    study = answers.breast(2)
    a, b = study.frames
    lower = tuple((x, y + 130) for x, y in answers.finding(a).contour)
    result = answers.assessed(
        study, answers.finding(a), answers.finding(a, "3", contour=lower), answers.finding(b, "3")
    )
    captures = shown("sc", study, result)
    assert [c.SourceImageSequence[0].ReferencedSOPInstanceUID for c in captures] == [
        a.source.sop_instance_uid, b.source.sop_instance_uid,
    ]  # fmt: skip
    assert "Lesion 2" in captures[0].ImageComments and "Lesion 3" in captures[1].ImageComments


def test_the_picture_says_what_it_is() -> None:
    """Category, probability, uncertainty, size, side, product, bundle and "not a diagnosis" stand on the picture."""
    study = answers.breast(laterality="L")
    (capture,) = shown("sc", study, answers.assessed(study, answers.finding(study.frames[0])))
    for words in (
        "AI result, not a diagnosis", "BI-RADS 4B", "37.5 % ± 7.2 %", "14.4 x 9.6 mm", "left breast", "10 mm",
        "Evidence for the score, not the extent of a lesion", "bundle busgen-reader 1.2.0", "BUSGen-CDS",
        "evidence: logits per 1 % of the region", "1 of 1 images analysed",
    ):  # fmt: skip
        assert words in capture.ImageComments
    assert capture.Laterality == "L" and capture.BurnedInAnnotation == "YES"


def test_the_picture_makes_nothing_up() -> None:
    """Without a scale there is no scale bar; without a stated side it says "side not stated"."""
    study = answers.breast(spacing=None)
    (capture,) = shown("sc", study, answers.assessed(study, answers.finding(study.frames[0])))
    assert "side not stated" in capture.ImageComments and not capture.Laterality
    assert "10 mm" not in capture.ImageComments and "no scale in the source" in capture.ImageComments


def test_declined_is_shown_without_any_image() -> None:
    """A declined study's secondary capture says NOT ANALYSED and shows no image, segmentation or contour."""
    study = answers.breast()
    result = answers.declined(study, "no frame is sharp enough")
    (capture,) = shown("sc", study, result)
    assert "NOT ANALYSED: no frame is sharp enough" in capture.ImageComments
    assert "SourceImageSequence" not in capture
    assert not shown("seg", study, result) and not shown("pr", study, result)


def test_evidence_has_one_absolute_scale() -> None:
    """The same evidence gives the same colour whatever else the image holds, and below the threshold none at all."""
    scale = templates.load()
    threshold, full = scale.number("picture.heat.threshold"), scale.number("picture.heat.full_scale")
    below = np.full((4, 4), threshold * 0.99, np.float32)
    mixed = below.copy()
    mixed[0, 0] = full * 50
    assert not picture.colours(below, threshold, full)[1].any()
    warm, cold = (picture.colours(sign * mixed, threshold, full) for sign in (1, -1))
    assert (warm[1] == cold[1]).all() and warm[0][0, 0, 0] > 128 > cold[0][0, 0, 0]
    for whole, part in zip(
        picture.colours(mixed, threshold, full), picture.colours(below, threshold, full), strict=True
    ):
        assert (whole[1:] == part[1:]).all()


def test_both_halves_of_a_dual_screen_show_their_evidence() -> None:
    """Two regions of one frame, each with a finding: one picture, with the evidence over both."""
    study = answers.breast()
    frame = study.frames[0]
    left, right = frame.region._replace(right=390), frame.region._replace(left=410)
    small = [(x / 3 + 130, y / 3 + 200) for x, y in answers.finding(frame).contour]
    first = answers.finding(frame, contour=tuple(small), heat=answers.heat(left))
    second = answers.finding(frame, "3", contour=tuple((x + 260, y) for x, y in small), heat=answers.heat(right))
    study = dataclasses.replace(study, frames=tuple(dataclasses.replace(frame, region=each) for each in (left, right)))
    both, one = (drawn(study, answers.assessed(study, *found)) for found in ((first, second), (first,)))
    changed = np.nonzero((both != one).any(-1)[200:700, picture.IMAGE[0] : picture.IMAGE[2]])[1]
    assert changed.min() > 400 * (picture.IMAGE[2] - picture.IMAGE[0]) / 800
    assert len(shown("sc", study, answers.assessed(study, first, second))) == 1


def test_faint_evidence_leaves_the_image_as_it_was() -> None:
    """Heat below the threshold changes no pixel of the image."""
    study = answers.breast(tissue="normal")
    frame = study.frames[0]
    faint = answers.assessed(study, key_heat=answers.heat(frame.region, 0.0001))
    flat = answers.assessed(study, key_heat=answers.heat(frame.region, 0.0))
    strong = answers.assessed(study, key_heat=answers.heat(frame.region, 0.5))
    assert (drawn(study, faint) == drawn(study, flat)).all()
    assert (drawn(study, strong) != drawn(study, flat)).any()


def test_the_same_evidence_on_a_finer_grid_looks_the_same() -> None:
    """Evidence is shown per share of the region: splitting cells in four changes nothing."""
    coarse = answers.heat(answers.REGION)
    fine = type(coarse)(np.kron(coarse.evidence / 4, np.ones((2, 2), np.float32)), coarse.region)
    assert np.allclose(picture.evidence(fine)[::2, ::2], picture.evidence(coarse))


def test_the_contour_is_drawn_where_it_is() -> None:
    """The outline on the picture lies on the finding's contour in the source frame."""
    study = answers.breast()
    found = answers.finding(study.frames[0], heat=None)
    page = drawn(study, answers.assessed(study, found))
    image = page[picture.IMAGE[1] : picture.IMAGE[3], picture.IMAGE[0] : picture.IMAGE[2]]
    rows, columns = np.nonzero((image == picture.CONTOUR).all(-1))
    scale = (picture.IMAGE[2] - picture.IMAGE[0]) / 800
    top = (picture.IMAGE[3] - picture.IMAGE[1] - 600 * scale) / 2
    xs, ys = zip(*found.contour, strict=True)
    assert abs(columns.min() / scale - min(xs)) < 4
    assert abs((rows.max() - top) / scale - max(ys)) < 4


@pytest.mark.parametrize("colour", ["grey", "rgb"])
def test_a_presentation_state_is_grey_or_colour_as_its_images_are(colour: Any) -> None:
    """Grey images get a grey presentation state, colour images one with an input-device profile."""
    study = answers.breast(colour=colour)
    (state,) = shown("pr", study, answers.assessed(study, answers.finding(study.frames[0])))
    assert state.SOPClassUID == (overlay.GREY_STATE if colour == "grey" else overlay.COLOUR_STATE)
    assert ("ICCProfile" in state) == (colour == "rgb")
    if colour == "rgb":
        assert state.ICCProfile[12:16] == b"scnr"
    graphic = state.GraphicAnnotationSequence[0].GraphicObjectSequence[0]
    assert list(graphic.GraphicData[:2]) == [490.5, 310.5]
    assert "AI: BI-RADS 4B, p=37.5 %" in state.GraphicAnnotationSequence[0].TextObjectSequence[0].UnformattedTextValue


def test_a_clip_is_segmented_on_its_key_frame() -> None:
    """A finding of a cine is segmented on the frame where it was found, and highdicom reads the mask back."""
    study = answers.breast(1, cine=6, colour="rgb")
    found = answers.finding(study.frames[4], "4C", probability=0.71)
    result = answers.assessed(study, found)
    made = objects.render(study, result, profile=objects.Profile(("sr", "seg")), rendered_at=answers.AT)
    read = hd.seg.segread(io.BytesIO(made[1].data))
    mask = read.get_pixels_by_source_frame(found.source.sop_instance_uid, [5], ignore_spatial_locations=True)
    assert (mask[0, ..., 0].astype(bool) == contours.mask(found)).all()
    assert abs(int(mask.sum()) - np.pi * 90 * 60) < 0.03 * np.pi * 90 * 60


def test_two_findings_are_two_segments() -> None:
    """Each finding is a segment of its own with its own tracking UID, also where they overlap."""
    study = answers.breast()
    frame = study.frames[0]
    moved = tuple((x + 40, y) for x, y in answers.finding(frame).contour)
    result = answers.assessed(study, answers.finding(frame), answers.finding(frame, "3", contour=moved))
    (seg,) = shown("seg", study, result)
    assert seg.NumberOfFrames == len(seg.SegmentSequence) == len({s.TrackingUID for s in seg.SegmentSequence}) == 2


def test_the_plane_is_nominal_and_can_be_switched_off() -> None:
    """A site can have segmentations without the invented plane; they are then other objects."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0]))
    (nominal,), (plain,) = shown("seg", study, result), shown("seg", study, result, nominal_geometry=False)
    assert "PlaneOrientationSequence" in nominal.SharedFunctionalGroupsSequence[0]
    assert "PlaneOrientationSequence" not in plain.SharedFunctionalGroupsSequence[0]
    assert "PlanePositionSequence" not in plain.PerFrameFunctionalGroupsSequence[0]
    assert nominal.SOPInstanceUID != plain.SOPInstanceUID


def test_a_scale_is_never_made_up() -> None:
    """Without a spacing the segmentation states neither pixel measures nor a plane."""
    study = answers.breast(spacing=None)
    (seg,) = shown("seg", study, answers.assessed(study, answers.finding(study.frames[0])))
    assert not list(seg.SharedFunctionalGroupsSequence[0].keys())


def test_every_object_says_the_same() -> None:
    """Report, picture, segmentation and presentation state state the same category, probability and tracking UID."""
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0]))
    made = {it.kind: dcmread(io.BytesIO(it.data)) for it in objects.render(study, result, rendered_at=answers.AT)}
    tracking = Saying(study, result, templates.load(), answers.AT).tracking_uid(1)
    assert tracking in str(made["sr"])
    assert made["seg"].SegmentSequence[0].TrackingUID == tracking
    assert made["pr"].GraphicAnnotationSequence[0].GraphicObjectSequence[0].TrackingUID == tracking
    for kind in ("sr", "sc", "pr"):
        made[kind].pop("PixelData", None)
        said = made[kind].to_json()
        assert "BI-RADS 4B" in said and "37.5 %" in said


@pytest.mark.parametrize("shift", [(-400, 0), (500, 0), (0, -300), (0, 400)])
def test_a_contour_outside_its_image_is_refused(shift: tuple[int, int]) -> None:
    """A contour that leaves its image makes no object."""
    study = answers.breast()
    found = answers.finding(study.frames[0])
    outside = tuple((x + shift[0], y + shift[1]) for x, y in found.contour)
    result = answers.assessed(study, answers.finding(study.frames[0], contour=outside))
    with pytest.raises(checks.Malformed, match="leaves its image"):
        objects.render(study, result, rendered_at=answers.AT)


def test_many_lesions_fit_on_the_picture() -> None:
    """An image with more lesions than fit says that the report has more."""
    study = answers.breast(spacing=None)
    frame = study.frames[0]
    base = answers.finding(frame).contour
    found = [
        answers.finding(frame, contour=tuple((x / 4 + 60 * i + 130, y / 4 + 200) for x, y in base)) for i in range(6)
    ]
    (capture,) = shown("sc", study, answers.assessed(study, *found))
    assert "More lesions on this image: see the report." in capture.ImageComments
