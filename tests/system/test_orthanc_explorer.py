"""The badge and the buttons on a study's page in Orthanc Explorer, in a real browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import images
from tests.dicom import answers
from tests.orthanc_plugin.clinic import altered, opened
from tests.system import ohif

pytestmark = [pytest.mark.program, pytest.mark.slow]


def test_badge_and_buttons(tmp_path: Path) -> None:
    """A study's page says what became of it, sends it on one press, and leads to the viewer."""
    with (
        opened(tmp_path, BusgenCds={"Viewer": "http://viewer.example"}) as clinic,
        ohif.browser() as chromium,
    ):
        study = answers.breast(1, seed=3)
        identifier = clinic.takes([altered(3, BodyPartExamined="", StudyDescription="small parts")])
        page = chromium.new_page()
        page.set_default_timeout(ohif.PATIENCE)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{clinic.pacs.url}/app/explorer.html#study?uuid={identifier}", wait_until="commit")
        badge = page.locator("#busgen-badge")

        def says(text: str) -> None:
            badge.filter(has_text=re.compile(text)).wait_for(timeout=ohif.PATIENCE)

        says("not for the AI: no rule matches")
        assert page.locator("li #busgen-badge, li #busgen-send").count() == 0, "inside the row that deletes the study"
        page.get_by_text("Send to the AI").click()
        says(r"waiting for the AI since \d\d:\d\d")
        clinic.is_sent(identifier, images=1)
        clinic.is_answered(study, answers.assessed(study, answers.finding(study.frames[0])))
        says(r"^AI: 4B, delivered \d\d:\d\d$")
        assert badge.get_attribute("data-state") == "delivered"
        link = page.locator("#busgen-view").get_attribute("href") or ""
        assert link.startswith(f"http://viewer.example/viewer?StudyInstanceUIDs={study.uid}&initialSeriesInstanceUID=")
        page.screenshot(path=str(tmp_path / "explorer.png"))

        clinic.product.full = True
        refused = clinic.takes(images.breast_study(1, seed=40))
        clinic.shows(refused, "refused: ")
        page.goto(f"{clinic.pacs.url}/app/explorer.html#study?uuid={refused}", wait_until="commit")
        page.reload(wait_until="commit")
        says("refused: .*0xA700")
        assert wrong == []
