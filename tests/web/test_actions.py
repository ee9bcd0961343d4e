"""Everything that a person can do on the pages, one by one in a real browser: it works, it is recorded, twice is once,
and another role is refused. A form that is not in the list fails the last test.

What is pressed here is listened to: the request that the browser sent is sent once more as it was, and then by
somebody with another role, from a page of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyotp
import pytest
from fastapi.routing import APIRoute

from busgen_cds.web import application
from tests.images import breast_study
from tests.pacs import Pacs
from tests.web.practice import PASSWORD, Practice, Says, served
from tests.web.shelf import PASSPHRASE, Room
from tests.web.test_in_browser import Person
from tests.web.test_laboratory import Slow

pytestmark = [pytest.mark.program, pytest.mark.slow]

AGAIN = """async ({ url, body }) => {
  const key = JSON.parse(document.body.getAttribute('hx-headers'))['X-Form-Key'];
  const headers = { 'Content-Type': 'application/x-www-form-urlencoded', 'X-Form-Key': key };
  return (await fetch(url, { method: 'POST', headers, body, redirect: 'manual' })).status;
}"""


@dataclass
class House:
    """A practice with a shelf, a node that answers, and a bench that makes one image at a time."""

    practice: Practice
    room: Room
    studio: Slow

    def study(self, says: Says | None) -> str:
        seed = 300 + 10 * len(self.practice.acts("instance received"))
        ref = self.practice.receives(breast_study(1, seed=seed, patient_id=f"PAT-{seed}"))
        if says:
            self.practice.answers(ref, says)
        return ref

    def parked(self) -> str:
        ref = self.study(None)
        self.practice.jobs.begin(ref, "e")
        self.practice.jobs.park(ref, "e", "The disk was full.")
        return ref

    def held(self) -> str:
        ref = self.study(None)
        self.practice.inbox.hold(ref, "Whose images are these?")
        return ref

    def somebody(self, name: str) -> None:
        self.practice.person(name, "reader")

    def locked(self, name: str) -> None:
        self.somebody(name)
        for _ in range(5):
            self.practice.people.log_in(name, "not that")

    def with_second_factor(self, name: str) -> None:
        self.somebody(name)
        key = self.practice.people.new_totp_key()
        self.practice.people.start_second_factor(name, key, pyotp.TOTP(key).at(self.practice.clock()))


@dataclass(frozen=True)
class Deed:
    route: str
    act: str
    does: Callable[[House, Person], object]  # what the person presses
    who: str
    wrong: str | None  # who is refused; None: everybody does this with the own account
    repeats: bool = False  # asking again is another act, and recorded again


def reads(press: Callable[[Person], object]) -> Callable[[House, Person], None]:
    """On the reading page of a study with a finding."""

    def does(house: House, person: Person) -> None:
        person.opens(house.study(Says("4B")))
        press(person)
        person.sees(".word")

    return does


def edits(person: Person) -> None:
    person.presses("e")
    person.page.select_option("#editor-1 select", "4A")
    person.presses("Enter")


def takes_up(make: Callable[[House], str]) -> Callable[[House, Person], None]:
    def does(house: House, person: Person) -> None:
        ref = make(house)
        house.practice.worklist_row(ref)
        person.goes("/worklist?view=stuck")
        person.page.click(f"tr:has(a[href='/studies/{ref}']) button.retry")
        person.page.wait_for_selector(f"tr:has(a[href='/studies/{ref}'])", state="detached")

    return does


def echoes(house: House, person: Person) -> None:
    person.goes("/operations")
    person.page.click("button[aria-label='Echo PACS']")
    person.sees("#echo-1 .good")


def resumes(house: House, person: Person) -> None:
    house.practice.jobs.stop_engine("The bundle's signature does not hold.")
    person.goes("/operations")
    assert "signature does not hold" in person.sees("[role=alert]")
    person.page.click("text=Resume reading")
    person.page.wait_for_selector("text=Resume reading", state="detached")


def verifies(house: House, person: Person) -> None:
    person.goes("/audit")
    person.page.click("#verify")
    assert "The chain holds" in person.sees(".verdict")


def adds(house: House, person: Person) -> None:
    person.goes("/people")
    person.page.fill("form.card [name=name]", "nadia")
    person.page.fill("form.card [name=password]", PASSWORD)
    person.page.check("form.card [value=reader]")
    person.page.click("form.card button")
    person.page.wait_for_selector("td:has-text('nadia')")


def changes(button: str, prepare: Callable[[House, str], object], name: str) -> Callable[[House, Person], None]:
    """On the people's page, in the row of one."""

    def does(house: House, person: Person) -> None:
        prepare(house, name)
        person.goes("/people")
        row = person.page.locator(f"tr:has(td:has-text('{name}'))")
        if button == "Save":
            row.locator("[value=operator]").check()
        row.locator(f"button:has-text('{button}')").click()
        person.page.wait_for_load_state("load")

    return does


def disabled(house: House, name: str) -> None:
    house.somebody(name)
    house.practice.people.set_disabled(name, True, "test")


def logs_out(house: House, person: Person) -> None:
    person.goes("/account")
    person.page.click("text=Log out")
    person.page.wait_for_url(lambda url: "/login" in url)


def changes_password(house: House, person: Person) -> None:
    person.goes("/account")
    form = person.page.locator("form[action='/account/password']")
    form.locator("[name=before]").fill(PASSWORD)
    form.locator("[name=password]").fill(PASSWORD + " new")
    form.locator("button").click()
    person.page.wait_for_url(lambda url: "/login" in url)


def sets_second_factor(house: House, person: Person) -> None:
    person.goes("/account")
    form = person.page.locator("form[action='/account/second-factor']")
    key = form.locator("[name=key]").input_value()
    form.locator("[name=before]").fill(PASSWORD)
    form.locator("[name=code]").fill(pyotp.TOTP(key).at(house.practice.clock()))
    form.locator("button").click()
    person.page.wait_for_selector("text=Logging in asks for a code")


def makes_token(house: House, person: Person) -> None:
    person.goes("/account")
    form = person.page.locator("form[action='/account/tokens']")
    form.locator("[name=label]").fill("monitoring")
    form.locator("[value='studies.read']").check()
    form.locator("button").click()
    person.sees("#secret")


def revokes_token(house: House, person: Person) -> None:
    owner = next(each for each in house.practice.people.accounts() if each.name == "rita")
    house.practice.people.make_token(owner, "to go", ["studies.read"], 1)
    person.goes("/account")
    person.page.click("tr:has(td:has-text('to go')) button:has-text('Revoke')")
    person.page.wait_for_selector("tr:has(td:has-text('to go')):has-text('revoked')")


def on_model(version: str, make: Callable[[House, str], str], press: Callable[[Person], object]) -> Any:
    def does(house: House, person: Person) -> None:
        person.goes(f"/models/{make(house, version)}")
        press(person)
        person.page.wait_for_load_state("load")

    return does


def shelved(house: House, version: str) -> str:
    return house.room.shelved(version)


def in_shadow(house: House, version: str) -> str:
    return house.room.shadowed(version)


def promotes(person: Person) -> None:
    person.page.click("text=Promote…")
    person.page.fill("[name=passphrase]", PASSPHRASE)
    person.page.click("button:has-text('Make it live')")
    person.page.wait_for_url(lambda url: url.endswith("/models"))


def withdraws(person: Person) -> None:
    person.page.fill("[name=reason]", "its calibration is off")
    person.page.click("text=Withdraw for good")


def rolls_back(house: House, person: Person) -> None:
    person.goes("/models")
    person.page.click("text=Roll back to")
    person.page.fill("[name=passphrase]", PASSPHRASE)
    person.page.click("button:has-text('Roll back')")
    person.page.wait_for_url(lambda url: url.endswith("/models"))


def has_images_made(house: House, person: Person) -> None:
    person.goes("/laboratory")
    person.page.click("#make")
    person.page.wait_for_function("() => document.querySelector('#state').textContent")


DEEDS = {
    "agree": Deed("/studies/{study_ref}/words", "finding agreed", reads(lambda p: p.presses("a")), "rita", "otto"),
    "reject": Deed(
        "/studies/{study_ref}/words", "finding rejected", reads(lambda p: p.presses("r", "2")), "rita", "phil"
    ),
    "edit": Deed("/studies/{study_ref}/words", "finding edited", reads(edits), "rita", "ada"),
    "retry": Deed("/studies/{study_ref}/retry", "study taken up again", takes_up(House.parked), "otto", "rita"),
    "release": Deed("/studies/{study_ref}/retry", "study released", takes_up(House.held), "otto", "phil"),
    "echo": Deed("/operations/nodes/{name}/echo", "node asked", echoes, "otto", "phil", repeats=True),
    "resume": Deed("/operations/engine/resume", "engine resumed", resumes, "otto", "rita"),
    "verify": Deed("/audit/verify", "record verified", verifies, "audi", "rita", repeats=True),
    "add a person": Deed("/people", "account made", adds, "ada", "rita"),
    "roles": Deed("/people/{name}", "roles changed", changes("Save", House.somebody, "nora"), "ada", "audi"),
    "disable": Deed("/people/{name}", "account disabled", changes("Disable", House.somebody, "nils"), "ada", "otto"),
    "enable": Deed("/people/{name}", "account enabled", changes("Enable", disabled, "nele"), "ada", "phil"),
    "unlock": Deed("/people/{name}", "account unlocked", changes("Unlock", House.locked, "nuri"), "ada", "rita"),
    "take off": Deed(
        "/people/{name}", "second factor removed", changes("Take off", House.with_second_factor, "nino"), "ada", "rita"
    ),
    "make a token": Deed("/account/tokens", "token made", makes_token, "rita", None),
    "revoke a token": Deed("/account/tokens/{ref}/revoke", "token revoked", revokes_token, "rita", None),
    "begin shadow": Deed(
        "/models/{digest}/shadow", "bundle in shadow",
        on_model("5", shelved, lambda p: p.page.click("text=Put into shadow")), "phil", "rita",
    ),
    "end shadow": Deed(
        "/models/{digest}/shadow", "bundle out of shadow",
        on_model("6", in_shadow, lambda p: p.page.click("text=End shadow")), "phil", "otto",
    ),
    "withdraw": Deed(
        "/models/{digest}/withdraw", "bundle withdrawn",
        on_model("7", shelved, withdraws), "phil", "audi",
    ),
    "promote": Deed("/models/{digest}/promote", "bundle promoted", on_model("8", in_shadow, promotes), "phil", "rita"),
    "roll back": Deed("/models/roll-back", "bundle rolled back to", rolls_back, "phil", "otto"),
    "laboratory": Deed("/laboratory/runs", "images asked for", has_images_made, "phil", "audi"),
    "second factor": Deed("/account/second-factor", "second factor set", sets_second_factor, "nick", None),
    "password": Deed("/account/password", "password changed", changes_password, "nell", None),
    "log out": Deed("/logout", "log-out", logs_out, "nate", None),
}  # fmt: skip
WAYS_IN = {"/login", "/first"}  # before there is a person, no role can be wrong: see the last test


@pytest.fixture(scope="module")
def house(practice: Practice) -> Iterator[House]:
    for name in ("nick", "nell", "nate"):
        practice.person(name, "reader")
    pacs = Pacs().comes_up()
    practice.pacs = pacs.node
    made = House(practice, Room(practice), Slow())
    yield made
    made.studio.go = True
    pacs.goes_down()
    practice.pacs = None


@pytest.fixture(scope="module")
def address(house: House) -> Iterator[str]:
    with served(replace(house.room.site(), studio=lambda: house.studio)) as where:
        yield where


@pytest.fixture(scope="module")
def people(chromium: Any, address: str) -> Iterator[Callable[[str], Person]]:
    """Each at a browser of their own, logged in when first asked for."""
    known: dict[str, Person] = {}

    def find(name: str) -> Person:
        if name not in known:
            known[name] = Person(chromium, address, name)
        return known[name]

    yield find
    for each in known.values():
        each.context.close()


@pytest.mark.parametrize("name", DEEDS)
def test_deed(house: House, people: Callable[[str], Person], name: str) -> None:
    """Each thing that a person does on the pages works, is recorded once when sent twice, and is refused to others."""
    deed, person = DEEDS[name], people(DEEDS[name].who)
    sent: list[Any] = []

    def listen(request: Any) -> None:
        if request.method == "POST":
            sent.append((request.url, request.post_data or ""))

    def count() -> int:
        return house.practice.acts(deed.act).count((deed.act, deed.who))

    before = count()
    person.page.on("request", listen)
    deed.does(house, person)
    person.page.remove_listener("request", listen)
    assert count() == before + 1
    assert person.wrong == []
    [(url, body)] = sent
    if person.page.evaluate("() => document.body.hasAttribute('hx-headers')"):  # else it has ended the session itself
        status = person.page.evaluate(AGAIN, {"url": url, "body": body})
        assert status in (0, 200, 303, 409, 422), status  # 0: a redirect that is not followed
    person.wrong.clear()
    assert count() == before + (2 if deed.repeats else 1)
    if deed.wrong:
        refused = people(deed.wrong)
        refused.goes("/account")
        acts = len(house.practice.acts())
        assert refused.page.evaluate(AGAIN, {"url": url, "body": body}) == 403
        assert [kind for kind, _ in house.practice.acts()][acts:] == ["refused"]
        refused.wrong.clear()  # the browser itself reports the refusal


def test_every_form_is_in_the_list(house: House) -> None:
    """Whatever a page can change has its place in the list above."""
    forms = {
        route.path
        for part in application.PAGES
        for route in part.router.routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ())
    }
    assert forms == {deed.route for deed in DEEDS.values()} | WAYS_IN


def test_ways_in(chromium: Any, tmp_path: Path) -> None:
    """The first account is made once, with the terminal's code; logging in works, fails in words, is recorded."""
    own = Practice(tmp_path)
    with served(own.site(first_code="K7-PX")) as where:
        anna, eve = Person(chromium, where, ""), Person(chromium, where, "")
        for person, name in ((anna, "anna"), (eve, "eve")):
            person.goes("/")
            person.page.fill("[name=code]", "K7-PX")
            person.page.fill("[name=name]", name)
            person.page.fill("[name=password]", PASSWORD)
        anna.page.click("text=Make the first account")
        assert "No study has come yet" in anna.sees("main")
        eve.page.click("text=Make the first account")
        assert "already" in eve.sees("[role=alert]")
        assert own.acts("account made") == [("account made", "first start")]
        eve.goes("/login")
        eve.page.fill("[name=name]", "anna")
        eve.page.fill("[name=password]", "something else 12")
        eve.page.click("button:has-text('Log in')")
        assert "wrong" in eve.sees("[role=alert]")
        eve.wrong.clear()  # the browser notes both refusals
        eve.logs_in("anna")
        kinds = [kind for kind, _ in own.acts("log")]
        assert kinds.count("log-in") == 2 and len(kinds) == 3, kinds
        anna.done()
        eve.done()
    own.close()
