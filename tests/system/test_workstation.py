"""The radiologist's seat: what stands in OHIF when the objects are in Orthanc.

First known answers, put into the product's real objects, whose pictures were looked at and accepted; then the whole
road, scanner → Orthanc → plugin → product → Orthanc → OHIF, where what is drawn must be what the report says.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pydicom import Dataset, dcmread

from busgen_cds import app
from busgen_cds.dicom import objects
from busgen_cds.result import Assessed, Declined, Rendered, Result
from busgen_cds.study import Study
from tests import images
from tests.dicom import answers
from tests.programs import need, wait_for
from tests.system import ohif, orthanc, pictures, product
from tests.system.orthanc import Orthanc

pytestmark = [pytest.mark.program, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Room:
    pacs: Orthanc
    seat: ohif.Seat


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    folder = tmp_path_factory.mktemp("room")
    routing = {"Modality": "busgen-cds", "RetrySeconds": 1}
    with (
        orthanc.running(folder / "pacs", ae_title="ORTHANC", script=orthanc.PLUGIN, BusgenCds=routing) as pacs,
        ohif.served(pacs) as url,
        ohif.browser() as chromium,
    ):
        yield Room(pacs, ohif.Seat(chromium, url))


# Known answers


@dataclass(frozen=True)
class Case:
    image: dict[str, Any]
    answer: Callable[[Study], Result]


def one(study: Study) -> Assessed:
    """In a cine on its fifth frame."""
    return answers.assessed(study, answers.finding(study.frames[min(4, len(study.frames) - 1)]))


def two(study: Study) -> Assessed:
    frame = study.frames[0]
    moved = tuple((x - 170, y + 110) for x, y in answers.finding(frame).contour)
    return answers.assessed(
        study,
        answers.finding(frame, "4C", probability=0.8),
        answers.finding(frame, "4A", probability=0.07, uncertainty=0.03, contour=moved),
    )


FOUND = {
    "grey": Case({"seed": 200}, one),
    "colour": Case({"seed": 201, "colour": "rgb"}, one),
    "cine": Case({"seed": 202, "cine": 8}, one),
    "colour cine": Case({"seed": 203, "cine": 6, "colour": "ybr"}, one),
    "two findings": Case({"seed": 204}, two),
}
NOT_FOUND = {
    "no finding": (Case({"seed": 205, "tissue": "normal"}, answers.assessed), "No lesion found in 1 of 1 images"),
    "declined": (Case({"seed": 206}, answers.declined), "NOT ANALYSED: the images are unlike anything"),
}


def put(pacs: Orthanc, case: Case) -> tuple[Study, Result, dict[str, Rendered]]:
    study = answers.breast(1, **case.image)
    pacs.upload(*images.breast_study(1, **case.image))
    result = case.answer(study)
    return study, result, rendered(pacs, study, result)


def rendered(pacs: Orthanc, study: Study, result: Result, **how: Any) -> dict[str, Rendered]:
    made = objects.render(study, result, rendered_at=answers.AT, **how)
    pacs.upload(*(it.data for it in made))
    return {it.kind: it for it in made}


@pytest.mark.parametrize("name", FOUND)
def test_report_opens_on_the_finding(room: Room, name: str) -> None:
    """A report opens by its link on the right frame with contour, category and probability; SEG and capture load."""
    study, result, made = put(room.pacs, FOUND[name])
    assert isinstance(result, Assessed)
    seat = room.seat
    seat.opens(study.uid, made["sr"].series_instance_uid)
    assert len(seat.contours()) == len(result.findings)
    source = result.findings[0].source
    assert seat.shown() == (source.sop_instance_uid, source.frame_number)
    same_contours(seat.contours(), [np.asarray(f.contour) + 0.5 for f in result.findings])
    for finding, label in zip(sorted(result.findings, key=lambda f: f.birads), seat.labels(), strict=True):
        assert label.startswith(f"AI: BI-RADS {finding.birads}, p={100 * finding.probability:g} % ± ")
        assert "Probability of cancer: " in label and "Area: 108.60 mm2" in label
    pictures.check(seat.picture(), f"{name} report")

    seat.selects(903)
    assert seat.segments() == len(result.findings)
    assert seat.shown() == (source.sop_instance_uid, source.frame_number)
    pictures.check(seat.picture(), f"{name} segmentation")

    seat.selects(902)
    seat.shows(made["sc"].sop_instance_uid)
    pictures.check(seat.picture(), f"{name} capture")
    assert seat.wrong == []


@pytest.mark.parametrize("name", NOT_FOUND)
def test_answer_without_finding_is_read_in_words(room: Room, name: str) -> None:
    """A report that found nothing, or was declined, shows its words in the viewer; so does its capture."""
    case, words = NOT_FOUND[name]
    study, _, made = put(room.pacs, case)
    room.seat.opens(study.uid, made["sr"].series_instance_uid)
    room.seat.says(words)
    room.seat.says("not a diagnosis")
    room.seat.selects(902)
    room.seat.shows(made["sc"].sop_instance_uid)
    pictures.check(room.seat.picture(), f"{name} capture")
    assert room.seat.wrong == []


def test_second_revision_replaces_the_first_loudly(room: Room) -> None:
    """A second revision stands beside the first under a higher series number and says everywhere what it replaces."""
    study, _, first = put(room.pacs, Case({"seed": 207}, one))
    milder = answers.assessed(study, answers.finding(study.frames[0], "4A", probability=0.05, uncertainty=0.02))
    second = rendered(room.pacs, study, answers.revised(milder), replaces=tuple(first.values()))
    room.seat.opens(study.uid, second["sr"].series_instance_uid)
    room.seat.contours()
    assert "AI: BI-RADS 4A" in room.seat.labels()[0] and "REV 2" in room.seat.labels()[0]
    pictures.check(room.seat.picture(), "second revision report")
    room.seat.selects(912)
    room.seat.shows(second["sc"].sop_instance_uid)
    pictures.check(room.seat.picture(), "second revision capture")
    assert room.seat.wrong == []


def test_presentation_state_renders(tmp_path: Path) -> None:
    """DCMTK renders the image through the presentation state and reads from it the finding's contour and words."""
    need("dcmp2pgm")
    study = answers.breast(1)
    made = {it.kind: it.data for it in objects.render(study, one(study), rendered_at=answers.AT)}
    (tmp_path / "pr.dcm").write_bytes(made["pr"])
    (tmp_path / "image.dcm").write_bytes(images.breast_study(1)[0])
    said = subprocess.run(
        ["dcmp2pgm", "-v", "-p", "pr.dcm", "image.dcm", "out.pgm"], cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    with Image.open(tmp_path / "out.pgm") as shown:
        assert np.array_equal(np.asarray(shown), study.frames[0].grey)
    [drawn] = [line for line in said.stderr.splitlines() if "coordinates:" in line]
    points = [tuple(map(float, p.split("\\"))) for p in drawn.split("coordinates:")[1].strip(" ,").split(", ")]
    same_contours([points[:-1]], [np.asarray(one(study).findings[0].contour) + 0.5], within=0.01)
    assert "AI: BI-RADS 4B, p=37.5 %" in said.stderr and "not a diagnosis" in said.stderr


def test_changed_picture_is_noticed() -> None:
    """The comparison of pictures passes over small noise and notices a filled contour that is missing."""
    seen = Image.new("RGB", pictures.SMALL, (40, 40, 40))
    noisy = Image.fromarray(np.asarray(seen) + np.random.default_rng(0).integers(0, 4, (315, 476, 3), dtype=np.uint8))
    assert pictures.difference(seen, noisy) < pictures.TOLERANCE
    ImageDraw.Draw(noisy).ellipse((200, 150, 260, 190), fill=(64, 120, 120))
    assert pictures.difference(seen, noisy) > pictures.TOLERANCE


# The whole road


PREVALENCE = 0.3  # what the test's site states


def test_from_the_scanner_to_the_screen(room: Room, tmp_path: Path) -> None:
    """What a scanner sends is read by the product and stands in OHIF as its report says, whatever that is: one finding
    or two, none, not analysed, in grey, colour and cine; a late image gives REV 2."""
    sent = {
        "grey": images.breast_study(2, seed=0)[:1],
        "cine": images.breast_study(1, seed=1, cine=8),
        "colour": images.breast_study(1, seed=2, colour="rgb"),
        **chosen_by_the_reader(),
    }
    with product.running(tmp_path / "site", to=room.pacs) as busgen:
        room.pacs.knows("busgen-cds", busgen.ae_title, busgen.port)
        for name, files in sent.items():
            scanned(room.pacs, files, tmp_path / name)
        said = {}
        for name, files in sent.items():
            report = newest_report(room.pacs, study_uid(files))
            said[name] = stands_as_reported(room, report)
        assert (said["two findings"], said["no finding"], said["declined"]) == (2, 0, 0)
        late = images.breast_study(2, seed=0)
        scanned(room.pacs, late[1:], tmp_path / "late")
        second = newest_report(room.pacs, study_uid(late), series_number=911)
        assert "REV 2" in second.SeriesDescription
        assert str(second.PredecessorDocumentsSequence[0].StudyInstanceUID) == study_uid(late)
        stands_as_reported(room, second)


def chosen_by_the_reader() -> dict[str, list[bytes]]:
    """Studies that the shipped reader answers with two findings, with none, and not at all. Which images these are
    depends on what it has learnt, so it is asked: the first that fits, of a few that should."""
    reader = app.open_engine(device="cpu")
    stations = app.file_stations(reader, PREVALENCE)

    def first(wanted: Callable[[Result], bool], studies: Iterable[list[bytes]]) -> list[bytes]:
        for files in studies:
            study = stations.intake([(data, hashlib.sha256(data).hexdigest()) for data in files])
            assert isinstance(study, Study), study
            if wanted(stations.assess(study)):
                return files
        raise AssertionError("the shipped reader answers none of the candidates so: add some")

    def found(count: int) -> Callable[[Result], bool]:
        return lambda result: isinstance(result, Assessed) and len(result.findings) == count

    chosen = {
        "two findings": first(found(2), (images.breast_study(2, seed=seed) for seed in range(300, 340, 4))),
        "no finding": first(found(0), (images.breast_study(1, seed=s, tissue="normal") for s in range(400, 410))),
        "declined": first(lambda r: isinstance(r, Declined), (no_tissue(seed) for seed in range(500, 505))),
    }
    reader.close()
    return chosen


def no_tissue(seed: int) -> list[bytes]:
    """What says that it is breast ultrasound and shows a test pattern."""
    dataset = images.breast_dataset(seed=seed)
    y, x = np.mgrid[0 : dataset.Rows, 0 : dataset.Columns]
    pattern = (((x // 40 + y // 40) % 2) * 200 + np.random.default_rng(seed).integers(0, 50, x.shape)).astype(np.uint8)
    images.set_pixels(dataset, np.repeat(pattern[None, :, :, None], 3, axis=3), "grey")
    return [images.part10(dataset)]


def scanned(pacs: Orthanc, files: list[bytes], folder: Path) -> None:
    """The scanner's storescu."""
    folder.mkdir()
    paths = [folder / f"{i}.dcm" for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    orthanc.store(paths, pacs)


def study_uid(files: list[bytes]) -> str:
    return str(dcmread(io.BytesIO(files[0])).StudyInstanceUID)


def newest_report(pacs: Orthanc, study: str, series_number: int = 901) -> Dataset:
    def found() -> Dataset | None:
        reports = [dcmread(io.BytesIO(data)) for data in pacs.files(study, Modality="SR")]
        return next((each for each in reports if each.SeriesNumber == series_number), None)

    report: Dataset = wait_for(found, 240, f"no report with series number {series_number} came back")
    return report


def stands_as_reported(room: Room, report: Dataset) -> int:
    """OHIF shows each contour of the report where the report says it is, and the badge says its category; without one
    it shows why in words. How many findings there are."""
    badge = room.pacs.get(f"/busgen-cds/studies/{room.pacs.study(str(report.StudyInstanceUID))}")
    assert badge["state"] == ("not analysed" if "NOT ANALYSED" in badge["text"] else "delivered"), badge
    room.seat.opens(str(report.StudyInstanceUID), str(report.SeriesInstanceUID))
    outlines = contours_of(report)
    if not outlines:
        room.seat.says("NOT ANALYSED: " if "NOT ANALYSED" in badge["text"] else "No lesion found in 1 of 1 images")
        room.seat.selects(902)
        capture = next(dcmread(io.BytesIO(d)) for d in room.pacs.files(str(report.StudyInstanceUID), Modality="OT"))
        room.seat.shows(str(capture.SOPInstanceUID))
        assert room.seat.wrong == []
        return 0
    (sop_uid, frame), _ = outlines[0]
    here = [points for address, points in outlines if address == (sop_uid, frame)]
    same_contours(room.seat.contours(), here)
    assert room.seat.shown() == (sop_uid, frame)
    assert any(f"BI-RADS {badge['answer']['says']}" in label for label in room.seat.labels()), badge
    assert room.seat.wrong == []
    return len(outlines)


def contours_of(report: Dataset) -> list[tuple[tuple[str, int], np.ndarray]]:
    """Each contour of a report once, with the frame it lies on; the first finding's first."""
    found: dict[bytes, tuple[tuple[str, int], np.ndarray]] = {}

    def walk(item: Dataset) -> None:
        for child in item.get("ContentSequence", []):
            if child.ValueType == "SCOORD":
                image = child.ContentSequence[0].ReferencedSOPSequence[0]
                address = (str(image.ReferencedSOPInstanceUID), int(image.get("ReferencedFrameNumber") or 1))
                points = np.asarray(child.GraphicData, float).reshape(-1, 2)
                found.setdefault(points.tobytes(), (address, points))
            walk(child)

    walk(report)
    return list(found.values())


def same_contours(drawn: list[Any], expected: list[np.ndarray], within: float = 1.5) -> None:
    """Each expected contour is drawn, within so many pixels, whatever the order of contours."""
    assert len(drawn) == len(expected)
    boxes = sorted(_box(np.asarray(one)) for one in drawn)
    for seen, wanted in zip(boxes, sorted(_box(one) for one in expected), strict=True):
        assert np.abs(np.subtract(seen, wanted)).max() < within, (seen, wanted)


def _box(points: np.ndarray) -> tuple[float, float, float, float]:
    low, high = points.min(0), points.max(0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])
