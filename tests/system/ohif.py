"""OHIF in headless Chromium, as the radiologist has it: served as deploy/orthanc serves it, before a real Orthanc.

with ohif.served(pacs) as url, ohif.browser() as chromium:
    seat = ohif.Seat(chromium, url)
    seat.opens(study_uid, series_uid)     # the deep link that a report is opened by
    seat.says("BI-RADS 4B")               # text on the page
    seat.picture()                        # what the radiologist sees, as an image
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from tests.programs import absent, need
from tests.system.orthanc import Orthanc

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "deploy" / "orthanc" / "ohif" / "ohif.py"
FOLDER = ROOT / "build" / "ohif" / "3.13.2"  # ignored by git; filled once
CHROMIUM = "/usr/bin/chromium"
SIZE = {"width": 1280, "height": 800}


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

    def __init__(self, chromium: Any, url: str) -> None:
        self.url = url
        self.context = chromium.new_context(viewport=SIZE, locale="en-GB", timezone_id="UTC")
        self.context.add_init_script("localStorage.setItem('shownTours', JSON.stringify(['basicViewerTour']))")
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on(
            "response", lambda answer: answer.status >= 400 and self.wrong.append(f"{answer.status} {answer.url}")
        )

    def opens(self, study_uid: str, series_uid: str = "") -> None:
        link = f"{self.url}/viewer?StudyInstanceUIDs={study_uid}"
        self.page.goto(link + (f"&initialSeriesInstanceUID={series_uid}" if series_uid else ""))
        self.page.wait_for_selector("canvas.cornerstone-canvas", timeout=60_000)

    def says(self, text: str, seconds: float = 20) -> None:
        self.page.get_by_text(text).first.wait_for(timeout=seconds * 1000)

    def picture(self) -> Image.Image:
        return Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")

    def leaves(self) -> None:
        self.context.close()
