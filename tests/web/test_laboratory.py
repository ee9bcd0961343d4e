"""The laboratory's page, with a tiny generator of random weights: its images mean nothing, and all else is real."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from busgen_cds import web
from busgen_cds.learning.generator import Sampling
from busgen_cds.learning.studio import Studio
from busgen_cds.operations import pages
from busgen_cds.web import bench
from tests.learning import generators
from tests.web.practice import PASSWORD, Browser, Practice, served
from tests.web.test_in_browser import Person

QUICK = Sampling(steps=3, propose_steps=2, refine_steps=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny network gains nothing from more, and waits for them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(tmp_path_factory.mktemp("generator"))
    generators.tiny().save(folder)
    return folder


@pytest.fixture(scope="module")
def practice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Practice]:
    made = Practice(Path(tmp_path_factory.mktemp("laboratory")))
    for name, role in (("phil", "physicist"), ("rita", "reader"), ("audi", "auditor")):
        made.person(name, role)  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture(scope="module")
def address(practice: Practice, generator: Path) -> Iterator[str]:
    with served(practice.site(studio=lambda: Studio(generator, QUICK))) as where:
        yield where


@pytest.fixture
def phil(address: str) -> Iterator[Browser]:
    with Browser(address) as person:
        assert person.logs_in("phil").status_code == 303
        yield person


def make(person: Browser, **wish: Any) -> str:
    answer = person.does("/laboratory/runs", {"pathology": "malignant", "count": "2", "seed": "5", **wish})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["ref"])


def last_state(person: Browser, ref: str) -> dict[str, Any]:
    """What the stream of events says at its end."""
    with person.stream("GET", f"/laboratory/runs/{ref}/events", timeout=120) as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    state: dict[str, Any] = json.loads(lines[-1].removeprefix("data: "))
    assert state["over"]
    return state


def test_images_come_and_are_taken_away(phil: Browser, practice: Practice) -> None:
    """A physicist asks for images, is told as each is made, and takes them away with masks and labels; acts tell it."""
    ref = make(phil, device="A", box="10,20,60,70")
    state = last_state(phil, ref)
    assert state["problem"] == ""
    assert len(state["pictures"]) == 2
    assert state["pictures"][0]["box"] == [0.1, 0.2, 0.6, 0.7]
    shown = Image.open(io.BytesIO(phil.get(f"/laboratory/runs/{ref}/images/1.png").content))
    answer = phil.get(f"/laboratory/runs/{ref}.zip")
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as package:
        labels = json.loads(package.read("labels.json"))
        assert "SYNTHETIC" in package.read("README.txt").decode()
        assert [each["pathology"] for each in labels] == ["malignant"] * 2
        assert all(each["synthetic"] for each in labels)
        for each in labels:
            image, mask = (np.asarray(Image.open(io.BytesIO(package.read(each[kind])))) for kind in ("image", "mask"))
            assert image.shape == mask.shape
            assert set(np.unique(mask)) <= {0, 255} and each["lesion"] == bool(mask.any())
        first = Image.open(io.BytesIO(package.read("images/01.png")))
    assert np.array_equal(np.asarray(first), np.asarray(shown))
    assert answer.content == phil.get(f"/laboratory/runs/{ref}.zip").content
    assert ("images asked for", "phil") in practice.acts("images")
    assert ("images taken away", "phil") in practice.acts("images")


def test_the_same_wish_is_the_same_image(phil: Browser) -> None:
    """The same wish and seed give the same images again."""
    packages = []
    for _ in range(2):
        ref = make(phil, pathology="benign", count="1")
        last_state(phil, ref)
        packages.append(phil.get(f"/laboratory/runs/{ref}/images/1.png").content)
    assert packages[0] == packages[1]


def test_a_lesion_in_a_healthy_breast(phil: Browser) -> None:
    """A lesion is set into a healthy image that was chosen, where the box says."""
    ref = make(phil, healthy="normal_0", box="35,38,65,62", count="1")
    state = last_state(phil, ref)
    assert state["problem"] == ""
    assert state["pictures"][0]["box"] == [0.35, 0.38, 0.65, 0.62]
    assert phil.get("/laboratory/healthy/normal_0.png").content.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"pathology": "unknown"}, "knows no pathology"),
        ({"device": "unknown"}, "knows no device"),
        ({"box": "1,2,3"}, "A box is"),
        ({"box": "10,,60,"}, "fill in all four, or none"),
        ({"box": "60,20,10,70"}, "must lie in the image"),
        ({"box": "nan,20,70,70"}, "must lie in the image"),
        ({"pathology": "normal", "box": "10,20,60,70"}, "no lesion"),
        ({"healthy": "../../etc/passwd"}, "no such healthy image"),
        ({"count": "17"}, "count"),
    ],
)
def test_wishes_that_cannot_be(phil: Browser, wish: dict[str, str], said: str) -> None:
    """A wish that cannot be granted is refused before anything is made, and says what is wrong."""
    answer = phil.does("/laboratory/runs", {"pathology": "malignant", **wish})
    assert answer.status_code == 422
    assert said in answer.text


def test_who_may(address: str, phil: Browser) -> None:
    """Who may not see models sees no laboratory; what one had made, another does not see; a form needs its key."""
    ref = make(phil, count="1")
    last_state(phil, ref)
    with Browser(address) as rita, Browser(address) as audi:
        rita.logs_in("rita")
        audi.logs_in("audi")
        assert rita.get("/laboratory").status_code == 200
        for place in ("images/1.png", "masks/1.png", "events"):
            assert rita.get(f"/laboratory/runs/{ref}/{place}").status_code == 404
        assert rita.get(f"/laboratory/runs/{ref}.zip").status_code == 404
        assert audi.get("/laboratory").status_code == 403
        assert audi.does("/laboratory/runs", {"pathology": "benign"}).status_code == 403
    assert httpx.get(f"{address}/laboratory", timeout=30).status_code == 303
    assert phil.post("/laboratory/runs", data={"pathology": "benign"}).status_code == 403


class Slow:
    """Makes one image when it is let, and fails when it is told to."""

    def __init__(self) -> None:
        self.go = False

    def problem(self) -> str:
        return ""

    def choices(self) -> dict[str, tuple[str, ...]]:
        return {"pathology": ("benign",)}

    def healthy(self) -> tuple[str, ...]:
        return ()

    def healthy_png(self, name: str) -> bytes:
        raise KeyError(name)

    def make(self, count: int, asked: Any, seed: int, tell: Any) -> Iterator[None]:
        while not self.go:
            time.sleep(0.02)
        if seed == 13:
            raise RuntimeError("a detail")
        yield None


def test_one_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    """One run is made at a time; a failure tells a number and no detail, and lets the next one begin."""
    slow = Slow()
    runs = bench.Bench(lambda: slow)
    first = bench.Run("phil", 1, {}, 13)
    runs.begin(first)
    with pytest.raises(Exception, match="being made"):
        runs.begin(bench.Run("rita", 1, {}, 1))
    slow.go = True
    _wait(first)
    assert "number" in first.problem
    assert "a detail" not in first.problem
    assert first.problem.split()[-1].rstrip(".") in caplog.text
    for _ in range(bench.KEPT_RUNS + 1):
        run = bench.Run("phil", 1, {}, 1)
        runs.begin(run)
        _wait(run)
    assert run.dropped == 1
    with pytest.raises(Exception, match="not kept"):
        runs.run(first.ref, "phil")


def _wait(run: bench.Run) -> None:
    until = time.monotonic() + 30
    while not run.over and time.monotonic() < until:
        time.sleep(0.02)
    assert run.over


def test_without_weights_or_packages(practice: Practice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights the page says what to do; without the training packages there is no page and no link to it."""
    data = {"name": "phil", "password": PASSWORD}
    client = TestClient(web.create(practice.site(studio=lambda: Studio(tmp_path))))
    client.post("/login", data=data)
    page = client.get("/laboratory").text
    assert "No generator yet" in page
    assert "busgen-cds pretrain" in page
    bare = TestClient(web.create(practice.site()))
    assert "/laboratory" not in bare.post("/login", data=data).text
    assert bare.get("/laboratory").status_code == 404
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert pages._studio(None) is None  # type: ignore[arg-type]


def test_the_pages_do_not_bring_torch() -> None:
    """Starting the pages does not load torch: only the laboratory's page does, when it is first asked for."""
    import subprocess
    import sys

    code = "import sys, busgen_cds.operations.pages; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.program
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(address: str, chromium: Any, scheme: str) -> None:
    """In a real browser a box is drawn into a healthy image, the images come, and the package is downloaded."""
    person = Person(chromium, address, "phil", scheme)
    person.goes("/laboratory")
    assert person.violations() == []
    person.page.check("input[name=healthy][value=normal_1]")
    person.page.fill("[name=count]", "2")
    assert not person.page.locator("#take").is_visible()
    box = person.page.locator("#place").bounding_box()
    assert box
    person.page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    assert person.page.input_value("[name=box]") == "35,38,65,62"
    person.page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.3)
    person.page.mouse.down()
    person.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.7, steps=3)
    person.page.mouse.up()
    drawn = [int(each) for each in person.page.input_value("[name=box]").split(",")]
    assert np.abs(np.array(drawn) - [20, 30, 60, 70]).max() <= 1
    person.page.click("#make")
    person.page.wait_for_selector("#take:not([hidden])")
    assert person.page.locator("#pictures figure").count() == 2
    loaded = "() => [...document.querySelectorAll('#pictures img')].every(i => i.complete && i.naturalWidth > 0)"
    person.page.wait_for_function(loaded)
    assert "2 made" in person.sees("#state")
    with person.page.expect_download() as waiting:
        person.page.click("#take")
    with zipfile.ZipFile(waiting.value.path()) as package:
        assert len(package.namelist()) == 6
    assert person.violations() == []
    person.page.fill("[data-side=left]", "90")
    person.page.click("#make")
    person.is_told("left before right")
    person.page.click("#no-box")
    person.page.fill("[data-side=left]", "10")
    person.page.click("#make")
    person.is_told("fill in all four, or none")
    person.done(expected=2)  # the browser itself notes each refusal
