"""Which studies the rules choose, tried through the route that a site tries its own rules with."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests import images
from tests.orthanc_plugin.clinic import Clinic, altered, opened

pytestmark = pytest.mark.program

BREAST = {"Modality": "US", "BodyPartExamined": "BREAST", "StationName": "US1", "StudyDescription": "US Breast left"}


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with opened(tmp_path_factory.mktemp("rules")) as started:
        yield started


def tried(clinic: Clinic, tags: dict[str, str], *rules: dict[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {"tags": tags} | ({"rules": list(rules)} if rules else {})
    said: dict[str, Any] = clinic.pacs.post("/busgen-cds/rules", asked)
    return said


@pytest.mark.parametrize(
    ("rule", "routed"),
    [
        ({"Modality": "US"}, True),
        ({"Modality": "MG"}, False),
        ({"Modality": ["MG", "US"]}, True),
        ({"BodyPartExamined": "breast"}, True),
        ({"StationName": "US?"}, True),
        ({"StationName": "US2"}, False),
        ({"StudyDescription": "*breast*"}, True),
        ({"StudyDescription": "breast"}, False),
        ({"Modality": "US", "StationName": "US2"}, False),
        ({"SeriesDescription": ""}, True),
        ({"SeriesDescription": "?*"}, False),
    ],
)
def test_rule_matches(clinic: Clinic, rule: dict[str, Any], routed: bool) -> None:
    """A rule holds when every pattern in it does: modality, body part, station, description; * and ?, any case."""
    assert tried(clinic, BREAST, rule)["routed"] is routed


def test_first_matching_rule_is_named(clinic: Clinic) -> None:
    """The rule test names the rule that matches, and why nothing is routed when none does."""
    assert tried(clinic, BREAST, {"Modality": "MG"}, {"Modality": "US"}) == {
        "routed": True,
        "rule": 2,
        "why": "rule 2 matches",
    }
    assert tried(clinic, BREAST, {"Modality": "MG"})["why"] == "no rule matches"
    assert "never sent back" in tried(clinic, BREAST | {"Manufacturer": "BUSGen-CDS "}, {"Modality": "US"})["why"]


@pytest.mark.parametrize("tags", [{"BodyPartExamined": "BREAST"}, {"StudyDescription": "Mammasonographie"}])
def test_default_rules(clinic: Clinic, tags: dict[str, str]) -> None:
    """Without rules of its own a site routes breast ultrasound by body part or description, and no other modality."""
    assert tried(clinic, {"Modality": "US"} | tags)["routed"]
    assert not tried(clinic, {"Modality": "MR"} | tags)["routed"]
    assert not tried(clinic, {"Modality": "US"})["routed"]
    assert clinic.pacs.get("/busgen-cds/rules")["rules"][0] == {"Modality": "US", "BodyPartExamined": "BREAST"}


def test_rule_is_tried_on_a_study(clinic: Clinic) -> None:
    """Rules are tried on a study that Orthanc holds, series by series, without sending anything."""
    study = clinic.takes([altered(1, BodyPartExamined="NECK", StudyDescription="neck")])
    rule = {"StationName": "US1", "BodyPartExamined": "NECK"}
    [series] = clinic.pacs.post("/busgen-cds/rules", {"study": study, "rules": [rule]})["series"]
    assert series["routed"] and series["tags"]["StationName"] == "US1"
    assert clinic.sends() == 0


@pytest.mark.parametrize(
    ("rule", "complaint"), [({"Modalty": "US"}, '"Modalty" is not one of'), ({}, "must name at least one")]
)
def test_wrong_rule_is_refused(clinic: Clinic, rule: dict[str, Any], complaint: str) -> None:
    """A rule that misspells a tag, or would match everything, is refused with what would be right."""
    with pytest.raises(AssertionError, match="400") as refused:
        tried(clinic, BREAST, rule)
    assert complaint in str(refused.value).replace("\\", "")


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ([], "ask with"),
        ({"tags": "US"}, "ask with"),
        ({"rules": 5}, "must be a list"),
        ({"rules": {"Modality": "US"}}, "must be a list"),
        ({"study": "none"}, "no such study"),
    ],
)
def test_wrong_question_is_answered(clinic: Clinic, asked: Any, complaint: str) -> None:
    """Whoever asks the rule test wrongly is told what was wrong, never that the plugin failed."""
    with pytest.raises(AssertionError, match=r"40[04]") as refused:
        clinic.pacs.request("POST", "/busgen-cds/rules", json.dumps(asked).encode())
    assert complaint in str(refused.value)


@pytest.mark.parametrize(
    ("section", "complaints"),
    [
        ({"Rules": [{"Modalty": "US"}], "Retry": 3}, ('no such setting: "Retry"', '"Modalty" is not one of')),
        ({"Rules": None, "RetrySeconds": "soon", "SweepDays": 0}, ('"Rules" must be a list', '"SweepDays" must be')),
    ],
)
def test_wrong_configuration_routes_nothing_and_says_so(
    tmp_path: Path, section: dict[str, Any], complaints: tuple[str, ...]
) -> None:
    """With a mistake in its configuration Orthanc starts and stores; nothing is routed, and each badge says why."""
    with opened(tmp_path, BusgenCds=section) as clinic:
        study = clinic.takes(images.breast_study(1))
        time.sleep(2)
        badge = clinic.badge(study)
        assert badge["state"] == "refused"
        assert all(complaint in badge["text"] for complaint in complaints)
        assert clinic.sends() == 0


def test_unknown_node_is_said(tmp_path: Path) -> None:
    """When Orthanc does not know the product's node, the study waits and the badge says what to add where."""
    with opened(tmp_path, BusgenCds={"Modality": "elsewhere"}) as clinic:
        study = clinic.takes(images.breast_study(1))
        clinic.shows(study, 'add "elsewhere" to DicomModalities')
        clinic.pacs.knows("elsewhere", clinic.product.ae_title, clinic.product.port)
        clinic.is_sent(study, images=1)
