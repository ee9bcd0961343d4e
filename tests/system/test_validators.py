"""Every kind of object before independent validators: dicom3tools, PixelMed, DCMTK.

Known noise is allowed by name, with the reason why it is noise; anything else fails.
"""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from busgen_cds.dicom import deidentify, objects
from busgen_cds.result import Rendered
from tests import images
from tests.dicom import answers
from tests.programs import need

pytestmark = pytest.mark.program

PIXELMED = "/usr/share/java/pixelmed.jar"
ALL = objects.Profile(("sr", "sc", "seg", "pr", "ko"))

DCIODVFY_NOISE = (
    # It reads no UTF-8 itself.
    r"The VR checker does not support this Specific Character Set: ISO_IR 192",
    # PS3.3 C.7.3.1: empty is right where the side is unknown, and we never infer one.
    r"</Laterality\(0020,0060\)> - is only permitted to be empty when actually unknown",
)
DCMTK_NOISE = (
    # It checks no UTF-8, and no template of a rejection note.
    r"Check for template constraints not yet supported",
    r"The VR checker does not support this Specific Character Set: ISO_IR 192",
)
PIXELMED_NOISE = (
    # PS3.16 CID 100 is a baseline group, which may be extended; it has no ultrasound of the breast.
    r'Code \(47079000,SCT,"Ultrasonography of breast"\) not found in context group 100',
    # TID 1501 takes any evaluation (its rows name no concept), and TID 1500 is extensible.
    r'CODE \(111005,DCM,"Assessment Category"\): Content Item not in template',
    r'CODE \(111354,DCM,"Orientation"\): Content Item not in template',
    r'TEXT \(121106,DCM,"Comment"\): Content Item not in template',
    r'UMLS,"Qualitative Evaluations"\)/NUM \(111047,DCM,"Probability of cancer"\): Content Item not in template',
)


def _found() -> tuple[Rendered, ...]:
    study = answers.breast(2, laterality="L", left_out=("colour Doppler",))
    return _made(study, answers.assessed(study, answers.finding(study.frames[0])))


def _found_without_side_or_scale() -> tuple[Rendered, ...]:
    study = answers.breast(2, spacing=None)
    found = [answers.finding(frame, "3", probability=0.011, orientation=None) for frame in study.frames]
    return _made(study, answers.assessed(study, *found))


def _found_in_colour_cine() -> tuple[Rendered, ...]:
    study = answers.breast(1, cine=6, colour="rgb")
    return _made(study, answers.assessed(study, answers.finding(study.frames[4], "4C", probability=0.71)))


def _nothing_found() -> tuple[Rendered, ...]:
    study = answers.breast(1, tissue="normal")
    return _made(study, answers.assessed(study))


def _declined() -> tuple[Rendered, ...]:
    study = answers.breast()
    return _made(study, answers.declined(study))


def _revised() -> tuple[Rendered, ...]:
    study = answers.breast()
    result = answers.assessed(study, answers.finding(study.frames[0], "5", probability=0.97))
    before = objects.render(study, result, rendered_at=answers.AT)
    return objects.render(study, answers.revised(result), profile=ALL, rendered_at=answers.AT, replaces=before)


def _plain_geometry() -> tuple[Rendered, ...]:
    study = answers.breast()
    profile = objects.Profile(("sr", "seg"), nominal_geometry=False)
    result = answers.assessed(study, answers.finding(study.frames[0]))
    return objects.render(study, result, profile=profile, rendered_at=answers.AT)


def _names_in_any_script() -> tuple[Rendered, ...]:
    study = answers.breast()
    object.__setattr__(study.patient, "name", "Wang^XiaoDong=王^小东")
    return _made(study, answers.assessed(study, answers.finding(study.frames[0])))


def _made(study: answers.Study, result: answers.Result) -> tuple[Rendered, ...]:
    return objects.render(study, result, profile=ALL, rendered_at=answers.AT)


ANSWERS: tuple[Callable[[], tuple[Rendered, ...]], ...] = (
    _found,
    _found_without_side_or_scale,
    _found_in_colour_cine,
    _nothing_found,
    _declined,
    _revised,
    _plain_geometry,
    _names_in_any_script,
)


def _name(answer: Callable[[], tuple[Rendered, ...]]) -> str:
    return answer.__name__.strip("_")


each_answer = pytest.mark.parametrize("answer", ANSWERS, ids=_name)


@each_answer
def test_dciodvfy_accepts_every_object(answer: Callable[[], tuple[Rendered, ...]], tmp_path: Path) -> None:
    """Every object of every kind of answer passes `dciodvfy -new` but for the noise named here."""
    need("dciodvfy")
    for path in _written(answer(), tmp_path):
        ran = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
        said = [line for line in (ran.stdout + ran.stderr).splitlines() if re.match(r"(Error|Warning|W:|E:)", line)]
        assert ran.returncode == 0, f"{path.name}: {said}"
        assert not _unknown(said, DCIODVFY_NOISE), path.name


@each_answer
def test_pixelmed_accepts_every_report(answer: Callable[[], tuple[Rendered, ...]], tmp_path: Path) -> None:
    """Every report and rejection note passes PixelMed's SR validator but for the noise named here."""
    need("java", PIXELMED)
    documents = [it for it in answer() if it.kind in ("sr", "ko")]
    for path in _written(documents, tmp_path):
        said = _pixelmed("com.pixelmed.validate.DicomSRValidator", path)
        assert "Root Template Validation Complete" in said and "IOD validation complete" in said
        complaints = [line for line in said.splitlines() if line.startswith(("Error", "Warning"))]
        assert not _unknown(complaints, PIXELMED_NOISE), path.name


def test_the_validators_do_find_faults(tmp_path: Path) -> None:
    """A report without its completion flag and with a broken template is noticed: the allow-lists hide nothing else."""
    need("dciodvfy", "java", PIXELMED)
    ds = dcmread(io.BytesIO(_found()[0].data))
    del ds.CompletionFlag
    ds.ContentSequence[1].ConceptCodeSequence[0].CodeValue = "121006"
    path = tmp_path / "broken.dcm"
    ds.save_as(path)
    ran = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode != 0 and "CompletionFlag" in ran.stdout + ran.stderr
    said = _pixelmed("com.pixelmed.validate.DicomSRValidator", path)
    assert _unknown([line for line in said.splitlines() if line.startswith("Error")], PIXELMED_NOISE)


@each_answer
def test_dcmtk_reads_every_report(answer: Callable[[], tuple[Rendered, ...]], tmp_path: Path) -> None:
    """DCMTK's report reader takes every report and rejection note without a complaint."""
    need("dsrdump")
    for path in _written([it for it in answer() if it.kind in ("sr", "ko")], tmp_path):
        ran = subprocess.run(["dsrdump", str(path)], capture_output=True, text=True, check=False)
        said = [line for line in ran.stderr.splitlines() if line.startswith(("E:", "W:"))]
        assert ran.returncode == 0 and not _unknown(said, DCMTK_NOISE)


@pytest.mark.parametrize("answer", [made for made in ANSWERS if made is not _names_in_any_script], ids=_name)
def test_dcmtk_accepts_every_presentation_state(answer: Callable[[], tuple[Rendered, ...]], tmp_path: Path) -> None:
    """Every presentation state passes DCMTK's checker (which takes no name in several scripts)."""
    need("dcmpschk")
    for path in _written([it for it in answer() if it.kind == "pr"], tmp_path):
        ran = subprocess.run(["dcmpschk", str(path)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0 and "Test passed" in ran.stderr + ran.stdout, ran.stderr


def test_a_presentation_state_shows_its_image_as_it_is(tmp_path: Path) -> None:
    """Rendered through DCMTK, the grey presentation state changes no grey value, and keeps contour and text."""
    need("dcmp2pgm")
    (source,) = images.breast_study(1)
    (tmp_path / "image.dcm").write_bytes(source)
    study = answers.study_of([source])
    made = _made(study, answers.assessed(study, answers.finding(study.frames[0])))
    (state,) = _written([it for it in made if it.kind == "pr"], tmp_path)
    command = ["dcmp2pgm", "-p", str(state), "+S", str(tmp_path / "kept.dcm"), str(tmp_path / "image.dcm")]
    subprocess.run([*command, str(tmp_path / "shown.pgm")], capture_output=True, check=True)
    with Image.open(tmp_path / "shown.pgm") as shown:
        assert np.abs(np.asarray(shown).astype(int) - study.frames[0].grey).max() <= 1
    ours, kept = (dcmread(path).GraphicAnnotationSequence[0] for path in (state, tmp_path / "kept.dcm"))
    assert list(ours.GraphicObjectSequence[0].GraphicData) == list(kept.GraphicObjectSequence[0].GraphicData)
    assert ours.TextObjectSequence[0].UnformattedTextValue == kept.TextObjectSequence[0].UnformattedTextValue


@pytest.mark.parametrize("image", [{"laterality": "L"}, {"cine": 3, "colour": "rgb"}, {"regions": False}], ids=str)
def test_dciodvfy_accepts_a_de_identified_image(image: dict[str, Any], tmp_path: Path) -> None:
    """An image in which nobody can be found is still a valid ultrasound image."""
    need("dciodvfy")
    made = deidentify.instance(images.breast_image(**image), deidentify.Pseudonyms(b"a key of sixteen"))
    assert isinstance(made, bytes)
    (tmp_path / "clean.dcm").write_bytes(made)
    ran = subprocess.run(["dciodvfy", "-new", str(tmp_path / "clean.dcm")], capture_output=True, text=True, check=False)
    said = [line for line in (ran.stdout + ran.stderr).splitlines() if re.match(r"(Error|Warning|W:|E:)", line)]
    # dates and numbers are gone on purpose
    assert ran.returncode == 0
    assert not _unknown(said, (*DCIODVFY_NOISE, r"needed to build DICOMDIR"))


def test_dcmtk_shows_the_secondary_capture(tmp_path: Path) -> None:
    """DCMTK renders the secondary capture pixel for pixel as it was drawn."""
    need("dcm2pnm")
    (capture,) = [it for it in _found() if it.kind == "sc"]
    (path,) = _written([capture], tmp_path)
    subprocess.run(["dcm2pnm", "+opw", str(path), str(tmp_path / "shown.ppm")], capture_output=True, check=True)
    with Image.open(tmp_path / "shown.ppm") as shown:
        assert (np.asarray(shown) == dcmread(path).pixel_array).all()


def _written(made: tuple[Rendered, ...] | list[Rendered], folder: Path) -> list[Path]:
    paths = [folder / f"{it.kind}_{i}.dcm" for i, it in enumerate(made)]
    for path, it in zip(paths, made, strict=True):
        path.write_bytes(it.data)
    return paths


def _unknown(complaints: list[str], noise: tuple[str, ...]) -> list[str]:
    return [line for line in complaints if not any(re.search(known, line) for known in noise)]


def _pixelmed(program: str, path: Path) -> str:
    unlimited = [f"-Djdk.xml.xpath{limit}=0" for limit in ("ExprGrpLimit", "ExprOpLimit", "TotalOpLimit")]
    ran = subprocess.run(
        [
            "java",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-Xss64m",
            "-Xmx1g",
            *unlimited,
            "-cp",
            PIXELMED,
            program,
            str(path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.stdout + ran.stderr
