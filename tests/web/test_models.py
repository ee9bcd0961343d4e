"""The page of models: what is on the shelf, and who may change what is live."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from busgen_cds.store.people import RIGHTS
from tests.images import breast_study
from tests.web.conftest import STAFF
from tests.web.practice import Browser, Practice, Says, served
from tests.web.shelf import PASSPHRASE, Room
from tests.web.test_in_browser import Person

NEEDS = {
    ("get", "/api/v1/shelf"): "models.read",
    ("get", "/api/v1/shelf/{digest}/comparison"): "models.read",
    ("post", "/api/v1/shelf/{digest}/shadow"): "models.act",
    ("post", "/api/v1/shelf/{digest}/promote"): "models.act",
    ("post", "/api/v1/roll-back"): "models.act",
    ("get", "/api/v1/drift"): "models.read",
}


@pytest.fixture(scope="module")
def room(practice: Practice) -> Room:
    made = Room(practice)
    made.weeks(made.shelf.live().digest)
    made.refused("bad")
    made.shelved("waiting")
    digest = made.shadowed("2")
    pairs = [("4A", "4A"), ("4B", "4A"), ("3", "4C"), ("4C", "4C"), ("5", "5")]
    for number, (live, said) in enumerate(pairs):
        ref = practice.receives(breast_study(1, seed=7100 + number, patient_id=f"SHELF-{number}"))
        made.read_beside(digest, ref, Says(live), Says(said))
    return made


@pytest.fixture(scope="module")
def address(room: Room) -> Iterator[str]:
    with served(room.site()) as where:
        yield where


def by_version(room: Room) -> dict[str, str]:
    return {each.version: each.digest for each in room.shelf.listing()}


def token(practice: Practice, name: str) -> dict[str, str]:
    owner = next(each for each in practice.people.accounts() if each.name == name)
    return {"Authorization": f"Bearer {practice.people.make_token(owner, 'test', owner.rights, 1)[0]}"}


def test_who_may(address: str, practice: Practice, room: Room, staff: dict[str, Browser]) -> None:
    """Looking at models needs models.read, changing them models.act, which physicists and admins have alone."""
    digest = by_version(room)["2"]
    assert [role for role, rights in RIGHTS.items() if "models.act" in rights] == ["physicist", "admin"]
    for name, (role,) in STAFF.items():
        headers = token(practice, name)
        for (method, path), right in NEEDS.items():
            body = {"passphrase": "x", "number": 999} if method == "post" else None
            answer = httpx.request(method, address + path.format(digest=digest), headers=headers, json=body, timeout=60)
            assert (answer.status_code == 403) == (right not in RIGHTS[role]), (name, path, answer.text)
        for path in (f"/models/{digest}/promote", "/models/roll-back", f"/models/{digest}/shadow"):
            if "models.act" not in RIGHTS[role]:
                assert staff[name].does(path, {"passphrase": PASSPHRASE, "number": 0, "what": "end"}).status_code == 403
    assert room.shelf.in_shadow() == digest and room.shelf.standing().number == 0


def test_the_api_says_what_the_page_says(address: str, practice: Practice, room: Room) -> None:
    """Shelf, comparison and drift are read by programs as by people."""
    headers, digest = token(practice, "rita"), by_version(room)["2"]
    found = httpx.get(f"{address}/api/v1/shelf", headers=headers, timeout=60).json()
    assert {each["version"]: each["state"] for each in found["bundles"]} == {
        "2": "shadow", "waiting": "shelved", "bad": "refused"
    }  # fmt: skip
    beside = httpx.get(f"{address}/api/v1/shelf/{digest}/comparison", headers=headers, timeout=60).json()
    assert (beside["studies"], beside["same"], beside["up"], beside["down"]) == (5, 3, 1, 1)
    drift = httpx.get(f"{address}/api/v1/drift", headers=headers, timeout=60).json()
    newest = {each["device"]: each for each in drift["weeks"][:3]}
    assert any(figure["alarming"] for figure in newest["Bolt S9"]["figures"])
    assert not any(figure["alarming"] for figure in newest["Acme E10"]["figures"])
    metrics = httpx.get(f"{address}/metrics", headers=token(practice, "otto"), timeout=60).text
    assert 'busgen_drift{device="Bolt S9",figure="images"}' in metrics and 'busgen_shelf{state="refused"} 1' in metrics
    assert ("drift alarm", "watch") in practice.acts("drift alarm")


def test_the_page_says_that_drift_asks(room: Room, staff: dict[str, Browser]) -> None:
    """Beside an alarm the page of models says that adaptation is asked for."""
    assert "Adaptation is asked for by drift of" in staff["phil"].get("/models").text


@pytest.mark.program
def test_promote_and_roll_back(chromium: Any, address: str, practice: Practice, room: Room) -> None:
    """A physicist sees how it did in shadow, promotes with the passphrase, and rolls back; each is one act."""
    digest = by_version(room)["2"]
    phil = Person(chromium, address, "phil")
    phil.goes("/models")
    assert "2 of" not in phil.sees("#shadow") and "60 %" in phil.sees("section:has(> #shadow)")
    assert "Images of Bolt S9" in phil.sees("section:has(> #drift)")
    phil.page.click(f"section:has(> #shelf) a[href='/models/{digest}']")
    assert "BUS-BRA test" in phil.sees("main") and phil.page.locator("img.plot").count() == 1
    phil.page.click("text=Promote…")
    phil.page.fill("[name=passphrase]", "not the passphrase at all")
    phil.page.click("button:has-text('Make it live')")
    assert "does not open" in phil.sees("main")
    assert room.shelf.standing().number == 0 and ("passphrase refused", "phil") in practice.acts("passphrase")
    phil.wrong.clear()  # the browser notes the 409
    phil.goes(f"/models/{digest}/promote")
    phil.page.fill("[name=passphrase]", PASSPHRASE)
    phil.page.click("button:has-text('Make it live')")
    phil.page.wait_for_url(address + "/models")
    assert "site-reader 2" in phil.sees(".live-bundle h2") and digest[:12] in phil.sees(".foot")
    phil.page.click("text=Roll back to reader 1.2")
    phil.page.fill("[name=passphrase]", PASSPHRASE)
    phil.page.click("button:has-text('Roll back')")
    phil.page.wait_for_url(address + "/models")
    assert "reader 1.2" in phil.sees(".live-bundle h2")
    phil.done()
    made = [kind for kind, who in practice.acts("bundle") if who == "phil"]
    assert made.count("bundle promoted") == made.count("bundle rolled back to") == 1


def test_twice_is_once(address: str, practice: Practice, room: Room, staff: dict[str, Browser]) -> None:
    """The same form sent twice is done once; one shown before somebody else spoke changes nothing."""
    digest, person = room.shadowed("3"), staff["ada"]
    number = room.shelf.standing().number
    spoken = {"passphrase": PASSPHRASE, "number": number}
    answers = [person.does(f"/models/{digest}/promote", spoken).status_code for _ in range(2)]
    assert answers == [303, 303] and room.shelf.standing().number == number + 1
    assert [person.does("/models/roll-back", spoken).status_code] == [409]
    back = {"passphrase": PASSPHRASE, "number": number + 1}
    assert [person.does("/models/roll-back", back).status_code for _ in range(2)] == [303, 303]
    assert room.shelf.standing().number == number + 2


def test_rules_are_refused_in_words(address: str, practice: Practice, room: Room) -> None:
    """What the shelf does not allow is refused with the reason: a refused bundle, one that never read along."""
    headers, digests = token(practice, "ada"), by_version(room)
    said = {"passphrase": PASSPHRASE, "number": room.shelf.standing().number}
    answer = httpx.post(f"{address}/api/v1/shelf/{digests['waiting']}/promote", headers=headers, json=said, timeout=60)
    assert answer.status_code == 409 and "needs one that is shadow" in answer.json()["detail"]
    answer = httpx.post(
        f"{address}/api/v1/shelf/{digests['bad']}/shadow", headers=headers, json={"reads": True}, timeout=60
    )
    assert answer.status_code == 409
    gone = httpx.get(f"{address}/api/v1/shelf/{'0' * 64}/comparison", headers=headers, timeout=60)
    assert gone.status_code == 200 and gone.json()["studies"] == 0


def test_guessing_is_slow(address: str, practice: Practice, room: Room, staff: dict[str, Browser]) -> None:
    """The passphrase cannot be guessed by trying: a few wrong ones, and the answer is to wait."""
    digest = room.shadowed("4")
    wrong = {"passphrase": "guessing, guessing", "number": room.shelf.standing().number}
    answers = [staff["phil"].does(f"/models/{digest}/promote", wrong).status_code for _ in range(8)]
    assert answers[-1] == 429 and set(answers) <= {409, 429}


@pytest.mark.program
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_are_accessible(chromium: Any, address: str, room: Room, scheme: str) -> None:
    """Shelf, bundle and confirmation, light and dark: axe-core finds nothing serious, the console is silent."""
    read, along = by_version(room), room.shadowed(f"along-{scheme}")
    phil = Person(chromium, address, "phil", scheme)
    found = {}
    for path in ("/models", f"/models/{read['2']}", f"/models/{read['bad']}", f"/models/{along}/promote"):
        phil.goes(path)
        assert "Research software, not a diagnosis" in phil.sees(".foot")
        if bad := phil.violations():
            found[path] = bad
    phil.done()
    assert found == {}


def test_a_bundle_that_was_altered(address: str, room: Room, staff: dict[str, Browser], tmp_path: Path) -> None:
    """The page of a bundle that no longer verifies says so, and offers nothing that would use it unseen."""
    digest = by_version(room)["waiting"]
    network = room.shelf.folder / digest / "reader.onnx"
    whole = network.read_bytes()
    network.write_bytes(b"another")
    try:
        assert "not the file that was signed" in staff["phil"].get(f"/models/{digest}").text
        assert staff["phil"].does(f"/models/{digest}/shadow", {"what": "begin"}).status_code == 502
    finally:
        network.write_bytes(whole)
