"""The doors: the headers of every answer, cookies, forms, limits of rate, size and patience."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from busgen_cds import web
from busgen_cds.store.people import FAILURES
from busgen_cds.web import application, auth, serving
from busgen_cds.web.front import CALLS_PER_MINUTE, Limit
from tests.images import breast_study
from tests.web.practice import PASSWORD, Practice, Says, served

EVERYWHERE = {
    "content-security-policy": auth.POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
ENDLESS = {"/events"}  # its first answer is looked at by test_events_carry_the_headers_too


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Practice, str]]:
    """A practice with one study, and somebody who may open every page of it."""
    practice = Practice(Path(tmp_path_factory.mktemp("doors")))
    practice.person("eve", "reader", "operator", "physicist", "auditor", "admin")
    ref = practice.receives(breast_study(1, seed=81, patient_id="PAT-81"))
    practice.answers(ref, Says("4B"))
    yield practice, ref
    practice.close()


def visits(app: Any, ref: str, uid: str) -> list[str]:
    """The address of each page and each call that can be got."""
    given = {"study_ref": ref, "sop_instance_uid": uid, "frame_number": "1", "revision": "1", "finding": "1"}
    given |= {"kind": "DiagnosticReport", "ref": f"{ref}-1", "name": "eve"}
    places = sorted(path.format_map(_Given(given)) for path in _paths(app, "GET") - ENDLESS)
    return [*places, "/static/app.css", "/static/none.css", "/nowhere"]


class _Given(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return "0" * 64


def _paths(app: Any, method: str) -> set[str]:
    described = {path for path, methods in app.openapi()["paths"].items() if method.lower() in methods}
    routes = [route for part in application.PAGES for route in part.router.routes if isinstance(route, Route)]
    return described | {route.path for route in routes if method in (route.methods or ())}


def logged_in(app: Any, **options: Any) -> TestClient:
    client = TestClient(app, base_url="https://site.example", follow_redirects=False, **options)
    answer = client.post("/login", data={"name": "eve", "password": PASSWORD})
    assert answer.status_code == 303
    return client


def check_headers(answer: Any) -> None:
    for name, value in EVERYWHERE.items():
        assert answer.headers.get(name) == value, (answer.url, answer.status_code, name)
    assert answer.headers["strict-transport-security"] == "max-age=31536000", answer.url
    if "/static/" not in str(answer.url):
        assert answer.headers["cache-control"] == "no-store", answer.url
    assert "server" not in answer.headers


def test_headers_of_every_page(whole: tuple[Practice, str]) -> None:
    """Each page, call and file carries every protecting header, for members and strangers, found or not."""
    practice, ref = whole
    app = web.create(practice.site(secure=True))
    uid = practice.screen.slides(ref)[0].source.sop_instance_uid
    member, stranger = logged_in(app), TestClient(app, base_url="https://site.example", follow_redirects=False)
    places = visits(app, ref, uid)
    assert len(places) > 25, places
    seen = set()
    for place in places:
        for client in (member, stranger):
            answer = client.get(place)
            check_headers(answer)
            seen.add(answer.status_code)
    assert {200, 303, 401, 404} <= seen
    assert 500 not in seen
    check_headers(member.post("/account/password", data={}))  # 403: no form key
    check_headers(member.put("/worklist"))  # 405


def test_headers_of_failures_and_of_what_is_too_big(whole: tuple[Practice, str]) -> None:
    """A failure of ours, and a request that is refused unread, carry every protecting header too."""
    practice, ref = whole

    def broken(ref: str) -> Any:
        raise RuntimeError

    app = web.create(practice.site(secure=True, slides=broken))
    client = logged_in(app, raise_server_exceptions=False)
    failed = client.get(f"/studies/{ref}")
    assert failed.status_code == 500
    check_headers(failed)
    check_headers(client.post("/login", content=b"x" * (auth.MOST_BODY + 1)))


def test_policy_is_strict() -> None:
    """The policy allows scripts, styles and connections of our own alone: nothing inline, no eval, no frame."""
    rules = dict(rule.split(" ", 1) for rule in auth.POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert {rules[name] for name in ("script-src", "style-src", "connect-src", "form-action")} == {"'self'"}
    assert rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert "unsafe" not in auth.POLICY
    assert "*" not in auth.POLICY
    assert "http" not in auth.POLICY


def test_pages_hold_nothing_inline(whole: tuple[Practice, str]) -> None:
    """No page has an inline script, style or handler, which the policy would refuse, nor a foreign address."""
    practice, ref = whole
    app = web.create(practice.site(secure=True))
    uid = practice.screen.slides(ref)[0].source.sop_instance_uid
    client = logged_in(app)
    pages = [client.get(place) for place in visits(app, ref, uid)]
    pages = [each for each in pages if each.headers.get("content-type", "").startswith("text/html")]
    assert len(pages) >= 8
    for each in pages:
        text = each.text
        assert " style=" not in text, each.url
        assert "<style" not in text, each.url
        assert " onclick=" not in text, each.url
        assert 'src="http' not in text, each.url
        assert "javascript:" not in text, each.url


def test_the_cookie(whole: tuple[Practice, str]) -> None:
    """The session's cookie is out of scripts' reach, bound to the host, and sent by https from our own pages alone."""
    practice, _ = whole
    client = TestClient(web.create(practice.site(secure=True)), base_url="https://site.example", follow_redirects=False)
    said = client.post("/login", data={"name": "eve", "password": PASSWORD}).headers["set-cookie"]
    name, *rules = said.split("; ")
    assert name.startswith("__Host-busgen=")
    assert {"HttpOnly", "Secure", "Path=/", "SameSite=strict"} <= set(rules)
    assert not any(rule.startswith("Domain") for rule in rules)


def test_every_form_needs_its_key(whole: tuple[Practice, str]) -> None:
    """Each call that changes something is refused without the session's form key, and from another site with it."""
    practice, ref = whole
    app = web.create(practice.site(secure=True))
    client = logged_in(app)
    key = client.get("/account").text.split('name="form_key" value="')[1].split('"')[0]
    given = {"study_ref": ref, "name": "nobody", "ref": "0" * 32}
    before = len(practice.acts())
    tried = sorted(
        (method, path.format_map(_Given(given)))
        for method in sorted(auth.UNSAFE)
        for path in _paths(app, method) - {"/login", "/first"}
    )
    assert len(tried) >= 25 and {method for method, _ in tried} == {"POST", "PATCH", "DELETE"}
    for method, path in tried:
        for headers in (
            {},
            {"X-Form-Key": "0" * 43},
            {"X-Form-Key": key, "Origin": "https://evil.example"},
            {"X-Form-Key": key, "Origin": "null"},
            {"X-Form-Key": key, "Sec-Fetch-Site": "same-site"},
        ):
            assert client.request(method, path, headers=headers).status_code == 403, (method, path, headers)
    assert len(practice.acts()) == before, "nothing was done"


def test_nothing_that_is_sent_makes_a_page_fail(whole: tuple[Practice, str]) -> None:
    """Whatever a browser sends to a page is answered by it or refused: numbers without end, places that are none,
    nesting without end, days that are in no calendar, keys that are none."""
    practice, _ = whole
    nothing = practice.receives(breast_study(1, seed=82, patient_id="PAT-82"))
    practice.answers(nothing, Says(None))
    client = logged_in(web.create(practice.site(secure=True)), raise_server_exceptions=False)
    key = client.get("/account").text.split('name="form_key" value="')[1].split('"')[0]
    endless = "9" * 30
    for place in (
        f"/audit?before={endless}", "/audit?until=9999-12-31", "/audit/export?since=0001-01-01T00:00%2B23:59",
        "/audit?who=%00&patient=%00", f"/studies/{nothing}?revision={endless}",
        f"/studies/{nothing}/evidence/{endless}/1", f"/studies/{nothing}/frames/%00/{endless}",
        f"/worklist?offset={endless}", "/studies/%ED%A0%80", "/login?next=%ED%A0%80",
    ):  # fmt: skip
        assert client.get(place).status_code < 500, place
    contours = (
        "[" * 40_000,
        "[[NaN,1],[2,3],[3,4]]",
        "[[1,1],[2,-Infinity],[3,4]]",
        f"[[{'9' * 400},1],[2,3],[3,4]]",
    )
    for contour in contours:
        word = {"revision": "1", "finding": "0", "word": "edit", "birads": "3", "contour": contour, "form_key": key}
        assert client.post(f"/studies/{nothing}/words", data=word).status_code == 422, contour[:30]
    assert practice.cases.words(nothing) == ()
    factor = {"key": "!!", "code": "\u0663", "before": PASSWORD, "form_key": key}
    assert client.post("/account/second-factor", data=factor).status_code == 409
    assert client.post("/account/second-factor", data={**factor, "before": "x"}).status_code == 403


def test_calls_are_limited(whole: tuple[Practice, str]) -> None:
    """A caller of the API is slowed down, a stranger by address; who waits is served again."""
    practice, _ = whole
    app = web.create(practice.site(secure=True))
    owner = practice.people.accounts()[0]
    secret, _ = practice.people.make_token(owner, "busy", ["studies.read"], 1)
    client = TestClient(app, base_url="https://site.example")
    app.state.front.calls = Limit(per_minute=60)
    for headers, good in (({"Authorization": f"Bearer {secret}"}, 200), ({}, 401)):
        answers = [client.get("/api/v1/me", headers=headers) for _ in range(140)]
        assert {each.status_code for each in answers} == {good, 429}
        assert {each.headers["retry-after"] for each in answers if each.status_code == 429} == {"5"}
    time.sleep(1.2)
    assert client.get("/api/v1/me", headers={"Authorization": f"Bearer {secret}"}).status_code == 200
    assert CALLS_PER_MINUTE <= 6000


def test_log_ins_are_limited(whole: tuple[Practice, str]) -> None:
    """One address that tries many names is slowed down; one name that is tried often is locked."""
    practice, _ = whole
    app = web.create(practice.site(secure=True))
    practice.person("lock", "reader")
    client = TestClient(app, base_url="https://site.example", follow_redirects=False)
    for _ in range(FAILURES):
        assert client.post("/login", data={"name": "lock", "password": "wrong"}).status_code == 401
    assert client.post("/login", data={"name": "lock", "password": PASSWORD}).status_code == 401
    app.state.front.log_ins = Limit(per_minute=3)
    answers = [client.post("/login", data={"name": f"n{i}", "password": "x"}) for i in range(5)]
    assert [each.status_code for each in answers] == [401, 401, 401, 429, 429]
    assert answers[-1].headers["retry-after"] == "60"


def test_an_address_is_believed_from_a_named_proxy_alone(whole: tuple[Practice, str]) -> None:
    """Who claims to come from elsewhere shares the limit of where the request really comes from."""
    practice, _ = whole
    site = practice.site()
    for proxies, expected in (((), {401, 429}), (("127.0.0.1",), {401})):
        with served(site, proxies=proxies, log_ins=2) as address:
            answers = {
                httpx.post(
                    f"{address}/login", data={"name": "x", "password": "x"}, timeout=60,
                    headers={"X-Forwarded-For": f"10.0.0.{i}"},
                ).status_code
                for i in range(4)
            }  # fmt: skip
        assert answers == expected, proxies


def test_too_big(whole: tuple[Practice, str]) -> None:
    """More than a mebibyte is refused: unread where it is said beforehand, while it comes where it is not."""
    practice, _ = whole
    with served(practice.site()) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as line:
            line.sendall(b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
            assert b" 413 " in line.recv(100).splitlines()[0] + b" ", "before a byte of it came"
        pieces = (b"name=" + b"x" * 65536 for _ in range(40))
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        assert httpx.post(f"{address}/login", content=pieces, headers=headers, timeout=60).status_code == 413
        with socket.create_connection((host, int(port)), timeout=20) as line:
            line.sendall(b"GET / HTTP/1.1\r\nX-Long: " + b"x" * 65_000)
            assert b" 400 " in line.recv(100)


def test_the_silent_are_let_go(whole: tuple[Practice, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who connects and says nothing, half a head or half a body is let go; meanwhile others are served at once."""
    practice, _ = whole
    monkeypatch.setattr(serving, "FIRST_WORD", 1.5)
    with served(practice.site(), slowest=1.5) as address:
        host, port = address.removeprefix("http://").split(":")
        head = b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        words = (b"", b"GET / HT", head, head + b"Content-Length: 100\r\n\r\nname=")
        lines = [socket.create_connection((host, int(port)), timeout=20) for _ in range(100) for _ in words]
        began = time.monotonic()
        for number, line in enumerate(lines):
            line.sendall(words[number % len(words)])
        assert httpx.get(f"{address}/health", timeout=20).text == "alive\n"
        answers = [line.recv(4096) for line in lines]
        assert time.monotonic() - began < 18
        assert {answer.split(b" ")[1] for answer in answers[3::4]} == {b"408"}
        assert not any((*answers[0::4], *answers[1::4], *answers[2::4]))
        for line in lines:
            line.close()


def test_events_carry_the_headers_too(whole: tuple[Practice, str]) -> None:
    """The stream of news has the headers of a page and is no way around a session."""
    practice, _ = whole
    with served(practice.site()) as address:
        assert httpx.get(f"{address}/events", timeout=20).status_code == 303
        with httpx.Client(base_url=address, timeout=20) as client:
            client.post("/login", data={"name": "eve", "password": PASSWORD})
            with client.stream("GET", "/events") as stream:
                assert stream.headers["content-type"].startswith("text/event-stream")
                for name, value in EVERYWHERE.items():
                    assert stream.headers[name] == value
