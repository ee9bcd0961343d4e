"""The doors on PostgreSQL, which takes other texts than SQLite and lets writers work side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pyotp
import pytest
from argon2 import PasswordHasher
from starlette.testclient import TestClient

from busgen_cds import web
from busgen_cds.store import audit
from busgen_cds.store.people import FAILURES, People
from tests import postgres
from tests.images import breast_study
from tests.web.practice import PASSWORD, Practice, Says

pytestmark = pytest.mark.program
AT_ONCE = 8


@pytest.fixture(scope="module")
def practice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Practice]:
    with postgres.running("site") as addresses:
        made = Practice(tmp_path_factory.mktemp("practice"), database_url=addresses["site"])
        # hashed in no time: what is tried at once must meet in the database
        made.people = People(made.database, made.vault, made.clock, PasswordHasher(1, 8, 1))
        made.person("eve", "reader", "operator", "physicist", "auditor", "admin")
        yield made
        made.close()


def test_nothing_that_is_sent_makes_it_fail(practice: Practice) -> None:
    """Texts that PostgreSQL cannot hold are refused at pages, API and FHIR, a stranger's log-in among them."""
    study = practice.receives(breast_study(1, seed=83, patient_id="PAT-83"))
    practice.answers(study, Says("4B"))
    client = TestClient(
        web.create(practice.site(secure=True)),
        base_url="https://site.example", follow_redirects=False, raise_server_exceptions=False,
    )  # fmt: skip
    assert client.post("/login", data={"name": "a\0b", "password": "x"}).status_code == 422
    assert client.post("/login", data={"name": "eve", "password": PASSWORD}).status_code == 303
    places = (
        "/audit?who=%00", "/audit?kind=%00", "/studies/%00", "/worklist?search=%00", "/worklist?offset=99999999999",
        f"/studies/{study}?revision=99999999999", "/api/v1/acts?who=%00", "/api/v1/studies?search=%00",
        "/fhir/r4/DiagnosticReport/%00", "/fhir/r4/DiagnosticReport?identifier=%00",
    )  # fmt: skip
    for place in places:
        answer = client.get(place)
        assert answer.status_code < 500 and "SELECT" not in answer.text, place


def test_guesses_at_the_same_moment_are_counted(practice: Practice) -> None:
    """Who tries many passwords at once gets no more tries than who tries them one after the other."""
    practice.person("lock", "reader")
    _at_once(lambda: practice.people.log_in("lock", "wrong and wrong again"))
    acts = audit.entries(practice.database, audit.Wanted(who="lock", kind="log-in refused"))
    assert [each.act.what for each in acts].count("wrong password") == FAILURES


def test_a_code_at_the_same_moment_is_taken_once(practice: Practice) -> None:
    """A code of the second factor that is sent eight times at once opens one session."""
    practice.person("totp", "reader")
    key = practice.people.new_totp_key()
    now = practice.clock()
    practice.people.start_second_factor("totp", key, pyotp.TOTP(key).at(now - timedelta(seconds=30)))
    code, opened = pyotp.TOTP(key).at(now), []
    _at_once(lambda: opened.append(practice.people.log_in("totp", PASSWORD, code)))
    assert len(opened) == AT_ONCE and len([each for each in opened if each]) == 1


def _at_once(does: Callable[[], object]) -> None:
    start = threading.Barrier(AT_ONCE)
    threads = [threading.Thread(target=lambda: (start.wait(), does())) for _ in range(AT_ONCE)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
