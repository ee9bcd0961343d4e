"""Pictures of every page, as they stand in the documentation: `python -m tests.screens`, or `make screens`.

The practice, its people and its answers are made up (`tests.web.practice`); no patient is shown. Look at each picture
before it is committed. `--width 1600 --dark --to build/screens` shows the same pages as somebody else has them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from busgen_cds import app
from busgen_cds.dicom import objects
from busgen_cds.learning.studio import Studio
from busgen_cds.store.cases import Word
from tests import images
from tests.dicom import answers
from tests.system import ohif, orthanc
from tests.web.conftest import CHROMIUM, FLAGS, STAFF
from tests.web.practice import PASSWORD, Practice, Says, served
from tests.web.shelf import Room

ROOT = Path(__file__).parents[1]
Prepare = Callable[[Any], object]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "screens")
    parser.add_argument("--width", type=int, default=1440)
    parser.add_argument(
        "--dark", action="store_true", help="every page in dark, instead of each as the documents have it"
    )
    parser.add_argument("--only", default="", help="only pictures whose names begin like these, with commas between")
    chosen = parser.parse_args(arguments)
    chosen.to.mkdir(parents=True, exist_ok=True)
    if "ohif-report".startswith(tuple(chosen.only.split(","))) and not chosen.dark:
        in_the_viewer(chosen.to / "ohif-report.png")
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        camera = Camera(browser, chosen.to, chosen.width, chosen.dark, chosen.only)
        before_anything(camera, Path(folder) / "new")
        at_work(camera, Path(folder) / "practice")
    return 0


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Camera:
    def __init__(self, browser: Any, to: Path, width: int, dark: bool, only: str) -> None:
        self._browser, self._to, self._width, self._dark, self._only = browser, to, width, dark, only
        self._cookies: dict[tuple[str, str], Any] = {}
        self.address = ""

    def takes(self, name: str, person: str, path: str, *, dark: bool = False, before: Prepare | None = None) -> None:
        if not name.startswith(tuple(self._only.split(","))):
            return
        scheme = "dark" if dark or self._dark else "light"
        size = {"width": self._width, "height": round(self._width * 0.6)}
        context = self._browser.new_context(viewport=size, color_scheme=scheme, locale="en-GB", reduced_motion="reduce")
        context.set_default_timeout(120_000)
        page = context.new_page()
        if person:
            self._enters(context, page, person)
        page.goto(self.address + path, wait_until="load")
        if page.query_selector("#view"):
            page.wait_for_selector("#view[data-shown]")
            page.wait_for_function("() => [...document.images].every(image => image.complete)")
        if before:
            before(page)
        page.evaluate("() => scrollTo(0, 0)")
        page.wait_for_timeout(300)
        page.screenshot(path=str(self._to / f"{name}.png"), animations="disabled")
        context.close()
        print(name, flush=True)  # noqa: T201

    def _enters(self, context: Any, page: Any, person: str) -> None:
        """Logs in once for each person: the pages allow few log-ins a minute."""
        known = self._cookies.get((self.address, person))
        if known:
            context.add_cookies(known)
            return
        page.goto(f"{self.address}/login")
        page.fill("[name=name]", person)
        page.fill("[name=password]", PASSWORD)
        page.press("[name=password]", "Enter")
        page.wait_for_url(lambda url: "/login" not in url)
        self._cookies[self.address, person] = context.cookies()


def before_anything(camera: Camera, folder: Path) -> None:
    """What a site looks like on its first day."""
    folder.mkdir()
    practice = Practice(folder)
    site = replace(practice.site(), nodes=(), viewer="", first_code="TRY-ME")
    with served(site) as camera.address:
        camera.takes("first", "", "/first")
        practice.person("anna", "admin", "operator", "reader")
        camera.takes("worklist-empty", "anna", "/worklist")
        camera.takes("operations-empty", "anna", "/operations")
    practice.close()


def at_work(camera: Camera, folder: Path) -> None:
    folder.mkdir()
    practice = Practice(folder)
    for name, roles in {**STAFF, "anna": ("reader", "operator")}.items():
        practice.person(name, *roles)
    refs = a_morning(practice)
    room = Room(practice)
    room.weeks(room.shelf.live().digest)
    room.refused("0.9")
    room.shelved("1.9")
    digest = room.shadowed("2.0")
    for number, (live, said) in enumerate([("4A", "4A"), ("4B", "4A"), ("3", "4C"), ("4C", "4C"), ("5", "5")]):
        ref = practice.receives(images.breast_study(1, seed=7100 + number, patient_id=f"PAT-31{number}"), 300)
        room.read_beside(digest, ref, Says(live), Says(said))
        practice.cases.say(Word(ref, 1, 1, "agree", "rita"), findings=1)
    site = replace(room.site(), studio=Studio)
    with served(site) as camera.address:
        readers_room(camera, refs)
        the_others(camera, digest)
    practice.close()


def a_morning(practice: Practice) -> dict[str, str]:
    """Studies in every state; the references of those that are shown."""
    made: dict[str, str] = {}

    def study(name: str, says: Says | None, minutes: float, n: int = 1, **image: Any) -> str:
        number = 1000 + 37 * len(made)
        files = images.breast_study(n, seed=number, patient_id=f"PAT-{number}", **image)
        made[name] = ref = practice.receives(files, minutes)
        if says:
            practice.ahead = -timedelta(minutes=max(0.0, minutes - 0.1))
            practice.answers(ref, says)
            practice.ahead = timedelta()
        return ref

    ref = study("finding", Says("4B", findings=2), 24, 3)
    practice.answers(ref, Says("4C", findings=2, left_out=1))
    study("five", Says("5", sent="sent"), 11)
    study("cine", Says("4B", frame=4), 18, cine=8)
    study("fell", Says("4A"), 34, 2)
    practice.answers(made["fell"], Says("3"))
    study("three", Says("3", sent="sent"), 31)
    study("none", Says(None), 38, 2, tissue="normal")
    study("declined", Says(declines="the images are unlike anything this bundle has learnt from"), 45)
    study("parked", Says("4B", sent="parked"), 52)
    study("refused", Says("4A", sent="refused"), 59)
    study("waiting", None, 1)
    study("disk", None, 30)
    practice.jobs.begin(made["disk"], "e")
    practice.jobs.park(made["disk"], "e", "The disk was full when its frames were read: free some space, then retry.")
    uid = images.uid("a study of two patients")
    practice.receives(images.breast_study(2, seed=1500, patient_id="PAT-1500", study_uid=uid), 41)
    made["whose"] = practice.receives(images.breast_study(3, seed=1500, patient_id="PAT-1510", study_uid=uid)[2:], 41)
    for number in range(26):
        birads = ["3", None, "4A", "3", "4B", None][number % 6]
        ref = study(f"read {number}", Says(birads), 75 + 31 * number, tissue="benign" if birads else "normal")
        practice.cases.say(Word(ref, 1, 1 if birads else 0, "agree", "rita"), findings=1 if birads else 0)
    practice.inbox.quarantine(practice.arrival(), [b"not DICOM"], "It is not a DICOM data set.")
    return made


def readers_room(camera: Camera, refs: dict[str, str]) -> None:
    def study(name: str) -> str:
        return f"/studies/{refs[name]}"

    camera.takes("login", "", "/login")
    camera.takes("worklist-light", "anna", "/worklist")
    camera.takes("worklist-dark", "anna", "/worklist", dark=True)
    camera.takes("worklist-stuck", "anna", "/worklist?view=stuck")
    camera.takes("worklist-nothing-found", "anna", "/worklist?search=PAT-9999")
    camera.takes("reading-light", "anna", study("finding"))
    camera.takes("reading-dark", "anna", study("finding"), dark=True, before=shows_evidence)
    camera.takes("reading-edit", "anna", study("finding"), before=pressing("e"))
    camera.takes("reading-reject", "anna", study("finding"), before=pressing("r"))
    camera.takes("reading-cine", "anna", study("cine"))
    camera.takes("reading-none", "anna", study("none"))
    camera.takes("reading-declined", "anna", study("declined"))
    camera.takes("reading-waiting", "anna", study("waiting"))
    camera.takes("reading-whose", "anna", study("whose"))
    camera.takes("keyboard", "anna", study("finding"), before=pressing("?"))
    camera.takes("not-allowed", "rita", "/audit")


def the_others(camera: Camera, digest: str) -> None:
    camera.takes("operations", "anna", "/operations")
    camera.takes("operations-dark", "anna", "/operations", dark=True)
    camera.takes("models", "phil", "/models")
    camera.takes("model", "phil", f"/models/{digest}")
    camera.takes("models-promote", "phil", f"/models/{digest}/promote")
    camera.takes("audit", "audi", "/audit", before=verifies)
    camera.takes("people", "ada", "/people")
    camera.takes("account", "anna", "/account")
    camera.takes("laboratory", "phil", "/laboratory", before=makes_images)


def pressing(*keys: str) -> Prepare:
    return lambda page: ([page.keyboard.press(key) for key in keys], page.wait_for_timeout(500))


def shows_evidence(page: Any) -> None:
    page.keyboard.press("h")
    page.wait_for_selector("#view[data-veiled=true]")


def verifies(page: Any) -> None:
    page.click("#verify")
    page.wait_for_selector(".verdict")


def makes_images(page: Any) -> None:
    page.fill("[name=count]", "1")
    page.click("#make")
    page.wait_for_selector("#take:not([hidden])", timeout=900_000)
    page.wait_for_function("() => [...document.images].every(image => image.complete)")


def in_the_viewer(to: Path) -> None:
    """The shipped reader's report on a synthetic image, opened in OHIF by its link."""
    [file] = images.breast_study(1, seed=3)
    engine = app.open_engine(device="cpu")
    stations = app.file_stations(engine, None)
    study = answers.breast(1, seed=3)
    made = objects.render(study, stations.assess(study), rendered_at=answers.AT)
    with (
        tempfile.TemporaryDirectory() as folder,
        orthanc.running(Path(folder) / "pacs") as pacs,
        ohif.served(pacs) as url,
        ohif.browser() as browser,
    ):
        pacs.upload(file, *(each.data for each in made))
        seat = ohif.Seat(browser, url, {"width": 1600, "height": 1000})
        seat.opens(study.uid, next(each.series_instance_uid for each in made if each.kind == "sr"))
        assert seat.contours(), "the reader found nothing in this image: choose another"
        seat.picture().save(to)
    engine.close()
    print(to.stem, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
