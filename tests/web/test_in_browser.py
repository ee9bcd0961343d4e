"""What a person does on the pages, in a real browser: it works, it is recorded, twice is once; nothing is wrong.

Every page opened here is watched: an error in the console, or a request that leaves this machine, fails the test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from busgen_cds.store.cases import Word
from tests import images
from tests.images import breast_study
from tests.web.practice import PASSWORD, Practice, Says

AXE = Path(__file__).parent / "axe" / "axe.min.js"
PATIENCE = 90_000  # milliseconds; a machine may be busy
_seeds = iter(range(1000, 9000, 10))


class Person:
    """Somebody at a browser."""

    def __init__(self, chromium: Any, address: str, name: str, scheme: str = "light") -> None:
        self.address = address
        self.context = chromium.new_context(viewport={"width": 1440, "height": 860}, color_scheme=scheme)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda asked: self._stays_here(asked.url))
        if name:
            self.logs_in(name)

    def _stays_here(self, url: str) -> None:
        if not url.startswith((self.address, "blob:", "data:")):
            self.wrong.append(f"asked elsewhere: {url}")

    def logs_in(self, name: str) -> None:
        self.goes("/login")
        self.page.fill("[name=name]", name)
        self.page.fill("[name=password]", PASSWORD)
        self.page.press("[name=password]", "Enter")
        self.page.wait_for_url(lambda url: "/login" not in url)

    def goes(self, path: str) -> None:
        self.page.goto(self.address + path, wait_until="load")

    def opens(self, study_ref: str) -> None:
        self.goes(f"/studies/{study_ref}")
        self.page.wait_for_selector("#view[data-shown]")

    def sees(self, selector: str) -> str:
        self.page.wait_for_selector(selector)
        return str(self.page.inner_text(selector))

    def presses(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def is_told(self, text: str) -> None:
        self.page.wait_for_selector(f"#said.shown:has-text('{text}')")

    def violations(self) -> list[str]:
        """Serious and critical ones, by axe-core's rules for WCAG 2 A and AA."""
        self.page.evaluate(AXE.read_text())
        options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "resultTypes": ["violations"]}
        found = self.page.evaluate("options => axe.run(document, options)", options)["violations"]
        return [
            f"{each['id']}: {each['nodes'][0]['html'][:200]}"
            for each in found
            if each["impact"] in ("serious", "critical")
        ]

    def done(self, *, expected: int = 0) -> None:
        self.context.close()
        assert len(self.wrong) == expected, self.wrong


@pytest.fixture(scope="module")
def reader(chromium: Any, address: str, practice: Practice) -> Iterator[Person]:
    person = Person(chromium, address, "rita")
    yield person
    person.done()


@pytest.fixture(scope="module")
def operator(chromium: Any, address: str, practice: Practice) -> Iterator[Person]:
    person = Person(chromium, address, "otto")
    yield person
    person.done()


def a_study(practice: Practice, says: Says | None, **images: Any) -> str:
    seed = next(_seeds)
    ref = practice.receives(breast_study(images.pop("n", 1), seed=seed, patient_id=f"PAT-{seed}", **images))
    if says:
        practice.answers(ref, says)
    return ref


def words(practice: Practice, ref: str) -> list[tuple[int, str]]:
    return [(said.word.finding, said.word.word) for said in practice.cases.words(ref)]


def acts_on(practice: Practice, ref: str) -> list[str]:
    from sqlalchemy import text

    query = text("SELECT kind FROM act WHERE study_ref = :ref ORDER BY number")
    with practice.database.reading() as session:
        return list(session.execute(query, {"ref": ref}).scalars())


@pytest.mark.program
def test_agree(practice: Practice, reader: Person) -> None:
    """A reader agrees with one key; the word and the look are recorded; agreeing again changes nothing."""
    ref = a_study(practice, Says("4C"))
    reader.opens(ref)
    reader.presses("a")
    assert "Agreed" in reader.sees(".word.agree")
    reader.presses("a")
    reader.is_told("Kept")
    reader.page.wait_for_timeout(300)
    assert words(practice, ref) == [(1, "agree")]
    assert acts_on(practice, ref)[-2:] == ["result viewed", "finding agreed"]


@pytest.mark.program
def test_reject(practice: Practice, reader: Person) -> None:
    """A reader rejects with two keys, or two clicks, and says why."""
    ref = a_study(practice, Says("4B", findings=2), n=2)
    reader.opens(ref)
    reader.presses("r", "3")
    assert "artefact" in reader.sees("[data-finding='1'] .word.reject")
    reader.page.click("[data-reject='2']")
    reader.page.click("#reasons-2 [data-reason='normal structure']")
    assert "normal structure" in reader.sees("[data-finding='2'] .word.reject")
    assert words(practice, ref) == [(1, "reject"), (2, "reject")]
    row = practice.worklist_row(ref)
    assert (row.read, row.word, row.word_by) == (True, "reject", "rita")


@pytest.mark.program
def test_edit(practice: Practice, reader: Person) -> None:
    """A reader drags the contour and changes the category; both are kept, in pixels of the source frame."""
    ref = a_study(practice, Says("4B"))
    reader.opens(ref)
    before = json.loads(reader.page.inner_text("#data"))["findings"][0]["contour"]
    reader.presses("e")
    reader.page.wait_for_selector("#overlay .handle")
    handle = reader.page.locator("#overlay .handle").first.bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    reader.page.mouse.move(x, y)
    reader.page.mouse.down()
    reader.page.mouse.move(x + 30, y - 40, steps=4)
    reader.page.mouse.up()
    reader.page.select_option("#editor-1 select", "4A")
    reader.presses("Enter")
    assert "Edited as 4A, contour redrawn" in reader.sees(".word.edit")
    said = practice.cases.last_words(ref, 1)[1].word
    assert said.birads == "4A"
    assert len(said.contour) > 20
    moved = max(min(((x - a) ** 2 + (y - b) ** 2) ** 0.5 for a, b in before) for x, y in said.contour)
    assert 20 < moved < 90, "the drag was 50 pixels of the screen, and the frame is shown a little larger than it is"
    assert acts_on(practice, ref)[-1] == "finding edited"
    reader.presses("e", "Enter")
    reader.is_told("Nothing was changed")
    reader.presses("Escape")
    assert words(practice, ref) == [(1, "edit")]


@pytest.mark.program
def test_nothing_found_and_declined(practice: Practice, reader: Person) -> None:
    """A study without finding, and one that no computer looked at, get the reader's word as a whole."""
    nothing = a_study(practice, Says(None), tissue="normal")
    reader.opens(nothing)
    assert "No lesion found" in reader.sees(".study-said")
    assert "in 1 of 1 images analysed" in reader.sees(".study-said")
    reader.presses("a")
    reader.sees(".word.agree")
    declined = a_study(practice, Says(declines="unlike anything the bundle has learnt from"))
    reader.opens(declined)
    assert "unlike anything" in reader.sees(".study-said.declined")
    assert reader.sees(".words").split() == ["I", "have", "read", "it", "A"], "nothing to agree with or to reject"
    for overlay in ("contour", "heat", "mask"):
        assert reader.page.is_disabled(f"[data-act={overlay}]"), "there is nothing to lay over the image"
    reader.presses("a")
    reader.sees(".word.agree")
    assert words(practice, nothing) == words(practice, declined) == [(0, "agree")]


@pytest.mark.program
def test_a_newer_revision_is_not_confirmed_unseen(practice: Practice, reader: Person) -> None:
    """A word about a revision that was replaced while it lay open is refused, and the reader is told."""
    ref = a_study(practice, Says("4A"))
    reader.opens(ref)
    practice.answers(ref, Says("3"))
    reader.page.click("[data-word='agree']")
    reader.is_told("A newer revision came")
    assert words(practice, ref) == []
    assert reader.wrong
    reader.wrong.clear()  # the browser itself reports the refusal
    reader.opens(ref)
    assert "category fell" in reader.sees("#panel").lower()
    reader.page.click("text=REV 1")
    reader.page.wait_for_selector("text=Revision 1 was replaced")
    assert reader.page.query_selector("[data-word]") is None


@pytest.mark.program
def test_a_study_that_lies_open_goes_on(practice: Practice, reader: Person) -> None:
    """A page opened before the answer shows it when it comes; one that shows an answer says that a newer one came."""
    ref = a_study(practice, None)
    reader.opens(ref)
    assert "Not answered yet" in reader.sees(".study-said")
    practice.answers(ref, Says("4B"))
    assert "4B" in reader.sees(".study-said .chip.c4b")
    reader.sees("#view[data-shown]")
    reader.presses("e")
    reader.page.wait_for_selector("#overlay .handle")
    practice.answers(ref, Says("5"))
    assert "A newer revision came" in reader.sees("#stuck .problem")
    assert reader.page.query_selector("#overlay .handle"), "what is being drawn is left alone"


@pytest.mark.program
def test_the_image(practice: Practice, reader: Person) -> None:
    """Frames by wheel and keys, zoom, window and overlays do what they say."""
    ref = a_study(practice, Says("4B", frame=4), n=2, cine=8)
    reader.opens(ref)
    page = reader.page
    assert reader.sees("#where") == "Image 1 of 2 · Frame 4 of 8", "it opens where the finding is"
    page.hover("#view")
    page.mouse.wheel(0, 120)
    page.wait_for_selector("#where:has-text('Frame 5 of 8')")
    reader.presses("ArrowUp", "ArrowUp")
    page.wait_for_selector("#where:has-text('Frame 3 of 8')")
    assert page.query_selector("#overlay .line") is None, "no contour on other frames"
    reader.presses("f")
    page.wait_for_selector("#overlay .line")
    reader.presses("c")
    page.wait_for_selector("#overlay .line", state="detached")
    reader.presses("m")
    page.wait_for_selector("#overlay .mask")
    assert page.is_hidden("#caption")
    reader.presses("h")
    page.wait_for_selector("#view[data-veiled=true]")
    said = "Evidence for the score, not the extent of a lesion · warm: malignant, cold: benign"
    assert reader.sees("#caption") == said
    caption, picture = (page.locator(each).bounding_box() for each in ("#caption", "#view"))
    assert caption["y"] + caption["height"] <= picture["y"], "what the scanner wrote into the image stays readable"
    reader.presses("+")
    page.wait_for_selector("#how:has-text('125 %')")
    box = page.locator("#view").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + 100, box["y"] + 240, steps=3)
    page.mouse.up(button="right")
    page.wait_for_selector("#how:has-text('window 148 / 155')")
    reader.presses("0")
    page.wait_for_selector("#how:text-is('100 %')")
    reader.presses("b", "k", "k")
    page.wait_for_selector("#how:has-text('window 118 / 215')")
    reader.presses("d", "l", "l")
    page.wait_for_selector("#how:text-is('100 %')")
    before = page.locator("#overlay .mask").bounding_box()
    reader.presses("Shift+ArrowRight", "Shift+ArrowUp")
    page.wait_for_function(
        """([x, y]) => { const at = document.querySelector('#overlay .mask').getBoundingClientRect();
                        return Math.abs(at.x - x) < 1 && Math.abs(at.y - y) < 1; }""",
        arg=[before["x"] + 40, before["y"] - 40],
    )
    reader.presses("0", " ")
    page.wait_for_selector("#play[aria-pressed=true]")
    page.wait_for_selector("#where:has-text('Frame 7 of 8')")
    reader.presses(" ")
    slider = page.locator("input#frame").bounding_box()
    page.mouse.click(slider["x"] + 2, slider["y"] + slider["height"] / 2)
    page.wait_for_selector("#where:has-text('Frame 1 of 8')")
    page.mouse.move(0, 0)
    reader.presses("ArrowRight")
    page.wait_for_selector("#where:has-text('Image 2 of 2')")
    assert "10 mm" in reader.sees("#scale")


@pytest.mark.program
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_small_screen(chromium: Any, address: str, practice: Practice, scheme: str) -> None:
    """On 1280 pixels the list's tools stand in one line, and the edge of a field stands out from the page (3:1)."""
    a_study(practice, Says("4C"))
    person = Person(chromium, address, "rita", scheme)
    person.page.set_viewport_size({"width": 1280, "height": 800})
    person.goes("/worklist")
    tools = [person.page.locator(each) for each in (".tabs", "#search", "#order", "#live")]
    for each in tools:
        each.wait_for()  # on a busy machine the page may still be drawing them
    tops = [each.bounding_box() for each in tools]
    assert max(each["y"] for each in tops) < min(each["y"] + each["height"] for each in tops)
    edge, card = person.page.evaluate(
        """() => { const at = getComputedStyle(document.getElementById('search'));
                   return [at.borderTopColor, at.backgroundColor].map(c => c.match(/\\d+/g).map(Number)); }"""
    )
    light, dark = sorted((luminance(edge), luminance(card)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 2.1, 1.4.11
    person.done()


def luminance(colour: list[int]) -> float:
    """WCAG 2.1's relative luminance of an sRGB colour."""
    linear = [(v / 12.92) if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (each / 255 for each in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.program
def test_the_list_is_live(practice: Practice, reader: Person) -> None:
    """A study that comes while the worklist lies open appears by itself; keys lead to it."""
    reader.goes("/worklist")
    reader.page.wait_for_selector("#live.on")
    ref = a_study(practice, Says("5"))
    reader.page.wait_for_selector(f"a.open[href='/studies/{ref}']")
    reader.presses("j")
    assert reader.page.evaluate("document.activeElement.className") == "open"
    reader.presses("Enter")
    reader.page.wait_for_selector("#panel")
    reader.presses("u")
    reader.page.wait_for_selector("#worklist")
    reader.presses("/")
    patient = practice.patient(ref)
    reader.page.keyboard.type(patient)
    reader.presses("Enter")
    reader.page.wait_for_url(lambda url: "search=" in url)
    assert reader.page.locator("tr[data-row]").count() == 1


@pytest.mark.program
def test_many_tabs(practice: Practice, reader: Person) -> None:
    """More tabs than a browser has connections: the one in sight is live, one that comes back shows what it missed."""
    tabs = [reader.context.new_page() for _ in range(8)]
    for tab in tabs:
        tab.goto(f"{reader.address}/worklist")
        tab.wait_for_selector("#live.on")
        if tab is not tabs[-1]:
            in_sight(tab, False)
    ref = a_study(practice, Says("5"))
    tabs[-1].wait_for_selector(f"a.open[href='/studies/{ref}']")
    assert not tabs[0].query_selector(f"a.open[href='/studies/{ref}']")
    in_sight(tabs[0], True)
    tabs[0].wait_for_selector(f"a.open[href='/studies/{ref}']")
    for tab in tabs:
        tab.close()


def in_sight(tab: Any, shown: bool) -> None:
    """Chromium without a screen takes every tab for visible."""
    tab.evaluate(
        """hidden => {
          Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        not shown,
    )


@pytest.mark.program
def test_retry_what_is_stuck(practice: Practice, operator: Person, reader: Person) -> None:
    """What is stuck stands out with its reason; an operator takes it up again, once; a reader has no such button."""
    ref = a_study(practice, None)
    practice.jobs.begin(ref, "e")
    practice.jobs.park(ref, "e", "The disk was full.")
    reader.goes("/worklist?view=stuck")
    assert "The disk was full." in reader.sees(f"tr:has(a[href='/studies/{ref}'])")
    assert reader.page.query_selector("button.retry") is None
    operator.goes("/worklist?view=stuck")
    operator.page.click(f"tr:has(a[href='/studies/{ref}']) button.retry")
    operator.is_told("Taken up again: reading")
    operator.page.wait_for_selector(f"tr:has(a[href='/studies/{ref}'])", state="detached")
    again = f"htmx.ajax('POST', '/studies/{ref}/retry', {{target: '#said', swap: 'textContent'}})"
    operator.page.evaluate(again)
    operator.is_told("not stuck any more")
    assert acts_on(practice, ref).count("study taken up again") == 1
    job = practice.jobs.of(ref)
    assert job is not None
    assert (job.state, job.attempt) == ("waiting", 2)


@pytest.mark.program
def test_release_what_is_held(practice: Practice, operator: Person) -> None:
    """A held study is released by an operator, and by whom is recorded."""
    ref = a_study(practice, Says("4A"))
    practice.inbox.hold(ref, "Two patient ids under one Study Instance UID.")
    operator.goes("/worklist?view=stuck")
    operator.page.click(f"tr:has(a[href='/studies/{ref}']) button:has-text('Release')")
    operator.is_told("released")
    assert practice.inbox.held(ref) is None
    assert ("study released", "otto") in practice.acts("study released")


@pytest.mark.program
def test_release_as_the_study_of_one_patient(practice: Practice, operator: Person, reader: Person) -> None:
    """A study of two patients is released on its page as that of one whom its images name, once, by an operator."""
    seed, study = next(_seeds), images.uid("of two patients")
    practice.receives(breast_study(2, seed=seed, patient_id="P-ONE", study_uid=study))
    ref = practice.receives(breast_study(3, seed=seed, patient_id="P-TWO", study_uid=study)[2:])
    practice.worklist_row(ref)
    reader.opens(ref)
    assert "in 2 images" in reader.sees(".whose li:has-text('P-ONE')")
    assert reader.page.query_selector(".whose button") is None
    operator.goes("/worklist?view=stuck")
    operator.page.click(f"tr:has(a[href='/studies/{ref}']) a:has-text('Whose is it?')")
    operator.page.once("dialog", lambda asked: asked.accept())
    operator.page.click("button:has-text('Release as P-TWO’s')")
    operator.is_told("released")
    operator.page.wait_for_selector(".whose", state="detached")
    assert practice.inbox.held(ref) is None
    assert practice.patient(ref) == "P-TWO"
    again = f"htmx.ajax('POST', '/studies/{ref}/retry', {{target: '#said', values: {{patient: 'P-ONE'}}}})"
    operator.page.evaluate(again)
    operator.is_told("not stuck any more")
    assert practice.patient(ref) == "P-TWO"
    assert acts_on(practice, ref).count("study released") == 1


@pytest.mark.program
def test_echo(practice: Practice, operator: Person) -> None:
    """A node is asked by a button and its answer shown: that it answers, or why not."""
    from tests.pacs import Pacs

    pacs = Pacs().comes_up()
    practice.pacs = pacs.node
    try:
        operator.goes("/operations")
        operator.page.click("button[aria-label='Echo PACS']")
        assert "answers in" in operator.sees("#echo-1 .good")
        operator.page.click("button[aria-label='Echo RIS']")
        assert "RIS" in operator.sees("#echo-2 .bad")
    finally:
        pacs.goes_down()
        practice.pacs = None
    assert practice.acts("node asked").count(("node asked", "otto")) == 2


@pytest.mark.program
def test_people_and_tokens(chromium: Any, address: str, practice: Practice) -> None:
    """An administrator adds, changes and disables a person; a person makes a token that is shown once."""
    ada = Person(chromium, address, "ada")
    ada.goes("/people")
    form = ada.page.locator("form.card")
    form.locator("[name=name]").fill("newcomer")
    form.locator("[name=password]").fill(PASSWORD)
    form.locator("[value=reader]").check()
    form.locator("button").click()
    ada.page.wait_for_selector("td:has-text('newcomer')")
    row = ada.page.locator("tr:has(td:has-text('newcomer'))")
    row.locator("[value=operator]").check()
    row.locator("button:has-text('Save')").click()
    ada.page.wait_for_selector("tr:has(td:has-text('newcomer')) [value=operator]:checked")
    ada.page.locator("tr:has(td:has-text('newcomer')) button:has-text('Disable')").click()
    ada.page.wait_for_selector("tr:has(td:has-text('newcomer')) button:has-text('Enable')")
    ada.goes("/account")
    form = ada.page.locator("form[action='/account/tokens']")
    form.locator("[name=label]").fill("monitoring")
    form.locator("[value='operations.read']").check()
    form.locator("button").click()
    secret = ada.sees("#secret").strip()
    person = practice.people.of_token(secret)
    assert person is not None
    assert person.rights == {"operations.read"}
    ada.goes("/account")
    assert secret not in ada.page.content()
    kinds = [kind for kind, who in practice.acts() if who == "ada"]
    assert {"account made", "roles changed", "account disabled", "token made"} <= set(kinds)
    ada.done()


@pytest.mark.program
def test_audit_page(chromium: Any, address: str, practice: Practice) -> None:
    """The auditor filters by patient, verifies the chain, and takes the record away as a file."""
    ref = a_study(practice, Says("4A"))
    practice.cases.say(Word(ref, 1, 1, "agree", "rita"), findings=1)
    auditor = Person(chromium, address, "audi")
    auditor.goes("/audit")
    auditor.page.fill("[name=patient]", practice.patient(ref))
    auditor.presses("Enter")
    auditor.page.wait_for_url(lambda url: "patient=" in url)
    kinds = auditor.page.locator("#acts td:nth-child(4)").all_inner_texts()
    assert kinds[0] == "finding agreed"
    assert "instance received" in kinds
    assert set(auditor.page.locator("#acts td:nth-child(6)").all_inner_texts()) == {ref[:8]}
    auditor.page.click("#verify")
    assert "The chain holds." in auditor.sees(".verdict")
    with auditor.page.expect_download() as waiting:
        auditor.page.click("text=Export")
    lines = Path(waiting.value.path()).read_text().splitlines()
    assert {json.loads(line)["study_ref"] for line in lines} == {ref}
    assert {"record verified", "record exported"} <= {kind for kind, _ in practice.acts("record")}
    auditor.done()


@pytest.mark.program
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible(chromium: Any, address: str, practice: Practice, scheme: str) -> None:
    """On every page, light and dark: axe-core finds nothing serious, the console is silent, and it says what it is."""
    one = a_study(practice, Says("4C", findings=2, left_out=1), n=2)
    practice.answers(one, Says("4B"))
    stuck = a_study(practice, Says("4A", sent="parked"))
    practice.inbox.quarantine(practice.arrival(), [b"not DICOM"], "not a DICOM data set")
    found: dict[str, list[str]] = {}

    def look(person: Person, path: str) -> None:
        person.goes(path)
        said = person.sees(".foot")
        assert "Research software, not a diagnosis" in said
        assert "9f2c4e7ab01d" in said
        if bad := person.violations():
            found[path] = bad

    everybody = {
        "": ["/login", "/first"],
        "rita": ["/worklist", f"/studies/{one}", "/worklist?search=nobody", "/account", "/audit"],
        "otto": ["/operations", f"/studies/{stuck}"],
        "phil": ["/models"],
        "audi": ["/audit"],
        "ada": ["/people"],
    }
    for name, paths in everybody.items():
        person = Person(chromium, address, name, scheme)
        for path in paths:
            look(person, path)
        if name == "rita":
            assert any("403" in each for each in person.wrong), "the audit page is not for readers"
            person.wrong.clear()
        person.done()
    assert found == {}
