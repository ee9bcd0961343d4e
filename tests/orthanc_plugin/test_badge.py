"""What the badge says of a study, read from the marks, the jobs and our own reports in Orthanc."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from busgen_cds.result import Result
from busgen_cds.study import Study
from tests import images
from tests.dicom import answers
from tests.orthanc_plugin.clinic import Clinic, opened

pytestmark = pytest.mark.program


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with opened(tmp_path_factory.mktemp("badge"), BusgenCds={"Viewer": "http://viewer.example"}) as started:
        yield started


def two(study: Study) -> Result:
    frame = study.frames[0]
    return answers.assessed(study, answers.finding(frame, "4C", probability=0.8), answers.finding(frame, "4A"))


@pytest.mark.parametrize(
    ("seed", "answer", "state", "says"),
    [
        (1, lambda study: answers.assessed(study, answers.finding(study.frames[0])), "delivered", "AI: 4B, "),
        (2, two, "delivered", "AI: 4C, "),
        (3, lambda study: answers.assessed(study), "delivered", "AI: no lesion found, "),
        (4, lambda study: answers.declined(study, "Doppler only"), "not analysed", "AI: NOT ANALYSED: Doppler only, "),
    ],
    ids=["one finding", "two findings", "no finding", "declined"],
)
def test_badge_says_the_answer(clinic: Clinic, seed: int, answer: Any, state: str, says: str) -> None:
    """The badge says the most suspicious category of our newest report, or why there is none, and when it came; a
    declined study never looks like an answered one."""
    study = answers.breast(1, seed=seed)
    identifier = clinic.takes(images.breast_study(1, seed=seed))
    clinic.is_sent(identifier, images=1)
    clinic.is_answered(study, answer(study))
    says += "delivered "
    badge = clinic.shows(identifier, says)
    assert badge["state"] == state
    assert badge["text"].removeprefix(says)[2] == ":", badge["text"]
    [report] = [dcmread(io.BytesIO(file)) for file in clinic.pacs.files(study.uid, Modality="SR")]
    at = f"StudyInstanceUIDs={study.uid}&initialSeriesInstanceUID={report.SeriesInstanceUID}"
    assert badge["viewer"] == f"http://viewer.example/viewer?{at}"


def test_newer_revision_is_what_counts(clinic: Clinic) -> None:
    """When a second revision has come, the badge says the second, also when it is the less suspicious one."""
    study = answers.breast(1, seed=20)
    identifier = clinic.takes(images.breast_study(1, seed=20))
    clinic.is_answered(study, answers.assessed(study, answers.finding(study.frames[0], "4C", probability=0.7)))
    clinic.shows(identifier, "AI: 4C")
    clinic.is_answered(
        study, answers.revised(answers.assessed(study, answers.finding(study.frames[0], "4A", probability=0.05)))
    )
    assert clinic.shows(identifier, "AI: 4A")["answer"]["series_number"] > 901


def test_unknown_study_is_said(clinic: Clinic) -> None:
    """A badge for a study that Orthanc does not have is an error 404, and other verbs are refused."""
    with pytest.raises(AssertionError, match="404"):
        clinic.pacs.get("/busgen-cds/studies/none")
    with pytest.raises(AssertionError, match="405"):
        clinic.pacs.request("DELETE", "/busgen-cds/studies/none")


def test_product_that_accepts_nobody_is_said(tmp_path: Path) -> None:
    """When the product does not know this Orthanc, the badge says so and where to look; allowed, the study goes."""
    with opened(tmp_path, product_is_up=False) as clinic:
        clinic.product.knows = ["SOMEBODY_ELSE"]
        clinic.product.comes_up()
        study = clinic.takes(images.breast_study(1, seed=30))
        badge = clinic.shows(study, "the AI does not accept this Orthanc; `busgen-cds queue` on its machine says why")
        assert badge["state"] == "refused"
        clinic.product.goes_down()
        clinic.product.knows = []
        clinic.product.comes_up()
        clinic.is_sent(study, images=1)
        assert clinic.badge(study)["problem"] is None
