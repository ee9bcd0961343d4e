"""One practice and one browser for the tests of a module: each test takes studies of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.programs import need
from tests.web.practice import Browser, Practice, served

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
]
STAFF: dict[str, tuple[Any, ...]] = {
    "rita": ("reader",),
    "otto": ("operator",),
    "phil": ("physicist",),
    "audi": ("auditor",),
    "ada": ("admin",),
}


@pytest.fixture(scope="module")
def practice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Practice]:
    made = Practice(Path(tmp_path_factory.mktemp("practice")))
    for name, roles in STAFF.items():
        made.person(name, *roles)
    yield made
    made.close()


@pytest.fixture(scope="module")
def address(practice: Practice) -> Iterator[str]:
    with served(practice.site()) as where:
        yield where


@pytest.fixture(scope="module")
def staff(address: str) -> Iterator[dict[str, Browser]]:
    """Everybody, logged in."""
    everybody = {name: Browser(address) for name in STAFF}
    for name, person in everybody.items():
        assert person.logs_in(name).status_code == 303
    yield everybody
    for person in everybody.values():
        person.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    need(CHROMIUM)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
