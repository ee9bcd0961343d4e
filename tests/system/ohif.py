"""OHIF in headless Chromium, as the radiologist has it: served as deploy/orthanc serves it, before a real Orthanc.

with ohif.served(pacs) as url, ohif.browser() as chromium:
    seat = ohif.Seat(chromium, url)
    seat.opens(study_uid, series_uid)  # the deep link that a report is opened by
    seat.shown()  # SOP Instance UID and number of the frame in the viewport
    seat.contours()  # what is drawn on it, in pixels of that frame
    seat.selects(903)  # another series, by its number
    seat.picture()  # what the radiologist sees, as an image
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from tests.programs import absent, need
from tests.system.orthanc import Orthanc

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "deploy" / "orthanc" / "ohif" / "ohif.py"
FOLDER = ROOT / "build" / "ohif" / "3.13.2"  # ignored by git; filled once
CHROMIUM = "/usr/bin/chromium"
SIZE = {"width": 1280, "height": 800}
PATIENCE = 240_000  # milliseconds; a busy machine without a graphics card takes minutes to start the viewer

# Asked of the viewer's own libraries in the page.
IMAGE_ID = "() => window.cornerstone?.getEnabledElements()[0]?.viewport.getCurrentImageId?.()"
CONTOURS = """() => {
  const { viewport } = cornerstone.getEnabledElements()[0];
  const image = viewport.getCurrentImageId();
  const toImage = p => cornerstone.utilities.worldToImageCoords(image, viewport.canvasToWorld([p.x, p.y]));
  return [...document.querySelectorAll('svg.svg-layer polyline')].map(line => [...line.points].map(toImage));
}"""
SEGMENTS = """() => (window.services?.segmentationService?.getSegmentations() ?? [])
  .reduce((sum, one) => sum + Object.keys(one.segments ?? {}).length, 0)"""


def dist() -> Path:
    """OHIF's prebuilt files, from npm the first time."""
    if not (FOLDER / "index.html").exists():
        need("npm")
        done = subprocess.run(
            [sys.executable, str(SERVER), "fetch", str(FOLDER)], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            absent(f"OHIF could not be fetched: {(done.stdout + done.stderr)[-500:]}")
    return FOLDER


@contextmanager
def served(pacs: Orthanc) -> Iterator[str]:
    """The viewer's address, of one origin with the PACS."""
    command = [sys.executable, str(SERVER), "serve", str(dist()), "--orthanc", pacs.url, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        yield server.stdout.readline().split()[-1].rstrip("/")
    finally:
        server.kill()
        server.wait()


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium that draws WebGL without a graphics card and speaks to nobody but this machine."""
    need(CHROMIUM)
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--force-color-profile=srgb"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        try:
            yield chromium
        finally:
            chromium.close()


class Seat:
    """One radiologist's viewer: a page, and everything that went wrong on it."""

    def __init__(self, chromium: Any, url: str, size: Mapping[str, int] = SIZE) -> None:
        self.url = url
        self.context = chromium.new_context(viewport=dict(size), locale="en-GB", timezone_id="UTC")
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on(
            "response", lambda answer: answer.status >= 400 and self.wrong.append(f"{answer.status} {answer.url}")
        )

    def opens(self, study_uid: str, series_uid: str = "") -> None:
        link = f"{self.url}/viewer?StudyInstanceUIDs={study_uid}"
        link += f"&initialSeriesInstanceUID={series_uid}" if series_uid else ""
        self.page.goto(link, timeout=PATIENCE, wait_until="commit")

    def selects(self, series_number: int) -> None:
        self.page.get_by_text(f"S:{series_number}", exact=True).first.dblclick(timeout=PATIENCE)

    def says(self, text: str) -> None:
        """Wait until this stands on the page."""
        self.page.get_by_text(text).first.wait_for(timeout=PATIENCE)

    def labels(self) -> list[str]:
        """What is written beside the contours."""
        return sorted(self.page.locator("svg.svg-layer text").all_text_contents())

    def shown(self) -> tuple[str, int]:
        """SOP Instance UID and number of the frame in the viewport."""
        self.page.wait_for_function(f"() => ({IMAGE_ID})()", timeout=PATIENCE)
        parts = str(self.page.evaluate(IMAGE_ID)).split("/")
        return parts[parts.index("instances") + 1], int(parts[parts.index("frames") + 1])

    def shows(self, sop_instance_uid: str) -> None:
        """Wait until this instance is in the viewport."""
        shown = f"uid => (({IMAGE_ID})() || '').includes(uid)"
        self.page.wait_for_function(shown, arg=sop_instance_uid, timeout=PATIENCE)

    def contours(self) -> list[list[tuple[float, float]]]:
        """Each contour once, in pixels of the frame; a viewer draws one for each number that has it."""
        self.page.wait_for_selector("svg.svg-layer polyline", state="attached", timeout=PATIENCE)
        drawn = {tuple(tuple(point) for point in line) for line in self.page.evaluate(CONTOURS)}
        return [list(line) for line in sorted(drawn)]

    def segments(self) -> int:
        """How many lesions the loaded segmentation has."""
        self.page.wait_for_function(f"() => ({SEGMENTS})() > 0", timeout=PATIENCE)
        return int(self.page.evaluate(SEGMENTS))

    def picture(self) -> Image.Image:
        """The page once nothing on it moves any more."""
        now = self._screenshot()
        for _ in range(20):
            before = now
            self.page.wait_for_timeout(700)
            now = self._screenshot()
            if ImageChops.difference(before, now).getbbox() is None:
                break
        return now

    def _screenshot(self) -> Image.Image:
        taken = self.page.screenshot(timeout=PATIENCE, animations="disabled")
        return Image.open(io.BytesIO(taken)).convert("RGB")

    def leaves(self) -> None:
        self.context.close()
