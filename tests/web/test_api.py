"""The API and FHIR: rights and scopes on every route, the same answers as results.json, and no failure of ours."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from busgen_cds import web
from busgen_cds.store import audit, checkpoints
from busgen_cds.store.people import RIGHTS, Right
from busgen_cds.web import management
from busgen_cds.web.front import Front
from tests import images
from tests.images import breast_study
from tests.web import explore
from tests.web.conftest import STAFF
from tests.web.practice import BUNDLE, Browser, Practice, Says, served

NOBODY = "0" * 32
# What each call needs, as documented; a call that is not here fails the test.
NEEDS: dict[tuple[str, str], Right | None] = {
    ("get", "/api/v1/studies"): "studies.read",
    ("get", "/api/v1/studies/{study_ref}"): "studies.read",
    ("get", "/api/v1/studies/{study_ref}/frames/{sop_instance_uid}/{frame_number}"): "studies.read",
    ("post", "/api/v1/studies/{study_ref}/words"): "studies.confirm",
    ("post", "/api/v1/studies/{study_ref}/retry"): "studies.retry",
    ("get", "/api/v1/operations"): "operations.read",
    ("get", "/api/v1/nodes"): "operations.read",
    ("post", "/api/v1/nodes/{name}/echo"): "operations.act",
    ("get", "/api/v1/quarantine"): "operations.read",
    ("post", "/api/v1/engine/resume"): "operations.act",
    ("get", "/api/v1/bundle"): "models.read",
    ("get", "/api/v1/shelf"): "models.read",
    ("get", "/api/v1/shelf/{digest}/comparison"): "models.read",
    ("post", "/api/v1/shelf/{digest}/shadow"): "models.act",
    ("post", "/api/v1/shelf/{digest}/promote"): "models.act",
    ("post", "/api/v1/roll-back"): "models.act",
    ("get", "/api/v1/drift"): "models.read",
    ("get", "/api/v1/acts"): "audit.read",
    ("post", "/api/v1/acts/verify"): "audit.read",
    ("get", "/api/v1/acts/export"): "audit.read",
    ("get", "/api/v1/me"): None,
    ("get", "/api/v1/people"): "people.manage",
    ("post", "/api/v1/people"): "people.manage",
    ("patch", "/api/v1/people/{name}"): "people.manage",
    ("get", "/api/v1/tokens"): None,
    ("post", "/api/v1/tokens"): None,
    ("delete", "/api/v1/tokens/{ref}"): None,
    ("get", "/fhir/r4/metadata"): None,
    ("get", "/fhir/r4/{kind}"): "studies.read",
    ("get", "/fhir/r4/{kind}/{ref}"): "studies.read",
}
BODIES: dict[tuple[str, str], Any] = {
    ("post", "/api/v1/studies/{study_ref}/words"): {"revision": 1, "finding": 1, "word": "agree"},
    ("post", "/api/v1/shelf/{digest}/shadow"): {"reads": True},
    ("post", "/api/v1/shelf/{digest}/promote"): {"passphrase": "x", "number": 0},
    ("post", "/api/v1/roll-back"): {"passphrase": "x", "number": 0},
    ("post", "/api/v1/people"): {"name": "xx", "password": "long enough 12345", "roles": ["reader"]},
    ("patch", "/api/v1/people/{name}"): {"disabled": True},
    ("post", "/api/v1/tokens"): {"label": "x", "scopes": [], "days": 1},
}


def token(practice: Practice, name: str) -> dict[str, str]:
    """With all that the person may."""
    owner = next(each for each in practice.people.accounts() if each.name == name)
    secret, _ = practice.people.make_token(owner, "test", owner.rights, 1)
    return {"Authorization": f"Bearer {secret}"}


def call(address: str, route: tuple[str, str], headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.request(route[0], address + filled(route[1]), headers=headers, json=BODIES.get(route), timeout=60)


def filled(path: str) -> str:
    """The address of nothing that is there."""
    return path.format(
        study_ref=NOBODY,
        ref=NOBODY,
        name="nobody",
        sop_instance_uid="2.25.1",
        frame_number=1,
        revision=1,
        finding=1,
        number=1,
        kind="ImagingStudy",
        digest=NOBODY * 2,
    )


def a_study(practice: Practice, seed: int, says: Says, **images: Any) -> str:
    ref = practice.receives(breast_study(images.pop("n", 1), seed=seed, patient_id=f"PAT-{seed}", **images))
    practice.answers(ref, says)
    return ref


def test_every_call_needs_its_right(address: str, practice: Practice) -> None:
    """Each call of the API refuses strangers, and each role that lacks its right; the refusal is recorded."""
    schema = httpx.get(f"{address}/api/v1/openapi.json").json()
    routes = {(method, path) for path, methods in schema["paths"].items() for method in methods}
    assert routes == set(NEEDS)
    tokens = {name: token(practice, name) for name in STAFF}
    for route, right in NEEDS.items():
        if route[1].endswith("/metadata"):
            continue
        assert call(address, route).status_code == 401, route
        assert call(address, route, {"Authorization": "Bearer made-up"}).status_code == 401, route
        for name, roles in STAFF.items():
            if right is not None:
                refused = call(address, route, tokens[name]).status_code == 403
                assert refused == (right not in RIGHTS[roles[0]]), (route, name)
    assert ("refused", "audi") in practice.acts("refused")


def test_a_token_has_its_scopes_only(address: str, practice: Practice, staff: dict[str, Browser]) -> None:
    """A token does not do what its owner may, but only what it was made for, and makes and revokes no token: not a
    stronger one, nor one like it that would outlive its day."""
    owner = next(each for each in practice.people.accounts() if each.name == "otto")
    secret, made = practice.people.make_token(owner, "narrow", ["operations.read"], 1)
    client = httpx.Client(base_url=address, headers={"Authorization": f"Bearer {secret}"}, timeout=60)
    assert client.get("/api/v1/nodes").status_code == 200
    assert client.get("/api/v1/studies").status_code == 403
    assert client.get("/metrics").status_code == 200
    for scopes in (["studies.read"], ["operations.read"]):
        another = {"label": "x", "scopes": scopes, "days": 365}
        assert client.post("/api/v1/tokens", json=another).status_code == 403
    assert client.delete(f"/api/v1/tokens/{made.ref}").status_code == 403
    assert "x" not in [each.label for each in practice.people.tokens(owner)]
    assert not next(each for each in practice.people.tokens(owner) if each.label == "narrow").revoked
    otto = staff["otto"]
    by_form = {"X-Form-Key": otto.form_key}
    fresh = {"label": "by hand", "scopes": ["operations.read"], "days": 1}
    assert otto.post("/api/v1/tokens", json=fresh, headers=by_form).status_code == 201
    assert otto.delete(f"/api/v1/tokens/{made.ref}", headers=by_form).status_code == 204
    assert client.get("/api/v1/nodes").status_code == 401


def test_a_study_by_api(address: str, practice: Practice) -> None:
    """A program finds a study, reads the same answer as in results.json, sees a frame and says a reader's word once."""
    ref = a_study(practice, 11, Says("4B"))
    client = httpx.Client(base_url=address, headers=token(practice, "rita"), timeout=60)
    found = client.get("/api/v1/studies", params={"search": "PAT-11", "view": "all"}).json()
    assert [each["study_ref"] for each in found["studies"]] == [ref]
    study = client.get(f"/api/v1/studies/{ref}").json()
    assert study["notice"] == "Research software, not a diagnosis"
    assert study["answer"]["study"]["birads"] == "4B"
    assert study["answer"]["bundle"]["digest"] == BUNDLE.digest
    assert {each["state"] for each in study["delivered"]} == {"confirmed"}
    where = study["answer"]["findings"][0]["frame"]
    picture = client.get(f"/api/v1/studies/{ref}/frames/{where['sop_instance_uid']}/1")
    assert picture.content.startswith(b"\x89PNG")
    assert client.get(f"/api/v1/studies/{ref}/frames/{where['sop_instance_uid']}/2").status_code == 404
    word = {"revision": 1, "finding": 1, "word": "edit", "birads": "4A", "note": "seen in clinic"}
    for _ in range(2):
        assert client.post(f"/api/v1/studies/{ref}/words", json=word).status_code == 200
    assert len(practice.cases.words(ref)) == 1
    assert practice.acts("finding edited") == [("finding edited", "rita")]


def test_a_study_of_two_patients_by_api(address: str, practice: Practice) -> None:
    """A program releases a study of two patients only as that of one whom its images name, and once."""
    study = images.uid("two patients by api")
    for n, patient in enumerate(("API-1", "API-2")):
        ref = practice.receives(images.breast_study(n + 1, seed=97, patient_id=patient, study_uid=study)[n:])
    client = httpx.Client(base_url=address, headers=token(practice, "otto"), timeout=60)
    retry = f"/api/v1/studies/{ref}/retry"
    nobody_said = client.post(retry)
    assert (nobody_said.status_code, "say whose it is" in nobody_said.json()["detail"]) == (503, True)
    assert client.post(retry, json={"patient_id": "API-3"}).status_code == 422
    assert client.post(retry, json={"patient_id": "API-1"}).json() == {"done": ["released"]}
    assert client.post(retry, json={"patient_id": "API-2"}).json() == {"done": []}
    assert practice.patient(ref) == "API-1"


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ({"finding": 1, "word": "reject"}, 422),
        ({"finding": 1, "word": "edit"}, 422),
        ({"finding": 1, "word": "agree", "birads": "3"}, 422),
        ({"finding": 2, "word": "agree"}, 422),
        ({"finding": 0, "word": "agree"}, 422),
        ({"finding": 1, "word": "edit", "contour": [[0, 0], [1, 1]]}, 422),
        ({"finding": 1, "word": "edit", "contour": [[0, 0], [1, 1], [5000, 5]]}, 422),
        ({"finding": 1, "word": "edit", "birads": "6"}, 422),
        ({"finding": 1, "word": "agree", "revision": 7}, 409),
        ({"finding": 1, "word": "maybe"}, 422),
    ],
)
def test_words_that_are_none(address: str, practice: Practice, word: dict[str, Any], status: int) -> None:
    """A word without reason, change, finding or present revision is refused and says what is missing."""
    known = practice.results.search("PAT-21")
    ref = known[0].study_ref if known else a_study(practice, 21, Says("4B"))
    headers = token(practice, "rita")
    answer = httpx.post(
        f"{address}/api/v1/studies/{ref}/words", json={"revision": 1, **word}, headers=headers, timeout=60
    )
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"]
    assert practice.cases.words(ref) == ()


def test_operations_and_models_by_api(address: str, practice: Practice) -> None:
    """A program sees nodes, queues, quarantine and the live bundle, and starts a stopped engine again, once."""
    practice.inbox.quarantine(practice.arrival(), [b"?"], "not a DICOM data set")
    practice.jobs.stop_engine("A signature does not hold.")
    client = httpx.Client(base_url=address, headers=token(practice, "otto"), timeout=60)
    assert [each["name"] for each in client.get("/api/v1/nodes").json()] == ["PACS", "RIS"]
    assert client.get("/api/v1/quarantine").json()[0]["reason"] == "not a DICOM data set"
    assert client.get("/api/v1/operations").json()["engine_stopped"] == "A signature does not hold."
    assert client.post("/api/v1/engine/resume").json() == {"done": ["resumed"]}
    assert client.post("/api/v1/engine/resume").json() == {"done": []}
    answer = client.post("/api/v1/nodes/RIS/echo").json()
    assert answer["answers"] is False
    assert "RIS" in answer["said"]
    assert client.post("/api/v1/nodes/elsewhere/echo").status_code == 404
    assert client.get("/api/v1/bundle").json()["digest"] == BUNDLE.digest
    assert practice.acts("engine resumed") == [("engine resumed", "otto")]


def test_the_record_by_api(address: str, practice: Practice) -> None:
    """The auditor's program reads, verifies and exports the record; looking at it is in it."""
    client = httpx.Client(base_url=address, headers=token(practice, "audi"), timeout=60)
    verdict = client.post("/api/v1/acts/verify").json()
    assert verdict["sound"] is True
    newest = client.get("/api/v1/acts", params={"limit": 2}).json()
    assert newest[0]["kind"] == "record verified"
    older = client.get("/api/v1/acts", params={"limit": 1, "before": newest[0]["number"]}).json()
    assert older == newest[1:]
    lines = [json.loads(line) for line in client.get("/api/v1/acts/export").text.splitlines()]
    assert [line["number"] for line in lines] == list(range(1, len(lines) + 1))
    for wrong in ({"since": "yesterday"}, {"until": "9999-12-31"}, {"since": "0001-01-01T00:00+23:59"}):
        assert client.get("/api/v1/acts", params=wrong).status_code == 422, wrong


def test_a_day_of_the_record_is_a_day_of_the_clinic(practice: Practice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record's day has the 25 hours that it has at the clinic when its clocks go back; a time of day is a time."""
    monkeypatch.setenv("TZ", "Europe/Warsaw")
    time.tzset()
    try:
        for hour, what in ((21, "before"), (22, "first"), (46, "last"), (47, "after")):  # the 25th begins at 22:00 UTC
            at = datetime(2026, 10, 24, tzinfo=UTC) + timedelta(hours=hour)
            with practice.database.transaction() as session:
                audit.record(session, audit.Act("clocks", "ada", what), at=at)

        def found(since: str, until: str) -> list[str]:
            front = Front(practice.site())
            wanted = management.wanted(front, "", "clocks", "", since, until)
            return [act["what"] for act in reversed(management.acts(front, wanted, 10))]

        assert found("2026-10-25", "2026-10-25") == ["first", "last"]
        assert found("2026-10-24T23:30+02:00", "2026-10-25T00:30") == ["first"]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_cut_tail_shows_on_the_page_and_by_api(tmp_path: Path) -> None:
    """The page and the API hold the record against its checkpoints: whoever cuts its tail is found there too."""
    practice, folder = Practice(tmp_path), tmp_path / "elsewhere"
    practice.person("audi", "auditor")
    with served(practice.site(checkpoints=lambda: checkpoints.kept(folder))) as where:
        client, browser = httpx.Client(base_url=where, headers=token(practice, "audi"), timeout=60), Browser(where)
        browser.logs_in("audi")
        assert client.post("/api/v1/acts/verify").json()["checkpoints"] == 0
        assert "a cut tail would not show" in browser.does("/audit/verify").text
        checkpoints.export(practice.database, folder, checkpoints.signer(tmp_path / "keys" / "record.key"))
        whole = client.post("/api/v1/acts/verify").json()
        assert (whole["sound"], whole["checkpoints"]) == (True, 1)
        assert "as far as 1 signed checkpoint says" in browser.does("/audit/verify").text
        before = checkpoints.kept(folder)[0].number
        with practice.database.transaction() as session:
            session.execute(sa.text("DELETE FROM act WHERE number > :n"), {"n": before - 3})
        assert audit.verify(practice.database).sound, "the chain alone does not show it"
        cut = client.post("/api/v1/acts/verify").json()
        assert (cut["sound"], cut["first_bad"]) == (False, before - 2)
        assert "A signed checkpoint names entry" in browser.does("/audit/verify").text
        browser.close()
    practice.close()


def test_whatever_shows_a_study_is_an_act(address: str, practice: Practice) -> None:
    """A report found by FHIR, and a picture alone, are looks at a study: both stand in the record, once each."""
    ref = a_study(practice, 43, Says("4B"))
    client = httpx.Client(base_url=address, headers=token(practice, "rita"), timeout=60)

    def looks() -> list[str]:
        acts = audit.entries(practice.database, audit.Wanted(who="rita"))
        return [each.act.kind for each in acts if each.act.study_ref == ref]

    where = practice.screen.slides(ref)[0].source.sop_instance_uid
    for _ in range(2):
        assert client.get(f"/api/v1/studies/{ref}/frames/{where}/1").status_code == 200
    assert looks() == ["images viewed"]
    for _ in range(2):
        found = client.get("/fhir/r4/DiagnosticReport", params={"patient.identifier": "PAT-43"}).json()
        assert found["entry"]
    assert looks() == ["images viewed", "result viewed"]


def test_a_look_that_could_not_be_recorded(practice: Practice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees a study while the record cannot be written; who asks again is recorded then."""
    ref, app = a_study(practice, 45, Says("4B")), web.create(practice.site())
    client = TestClient(app, raise_server_exceptions=False)
    page = f"/api/v1/studies/{ref}/frames/{practice.screen.slides(ref)[0].source.sop_instance_uid}/1"
    with monkeypatch.context() as patched:
        patched.setattr(app.state.front, "note", lambda _: 1 / 0)
        assert client.get(page, headers=token(practice, "rita")).status_code == 500
    assert client.get(page, headers=token(practice, "rita")).status_code == 200
    acts = audit.entries(practice.database, audit.Wanted(who="rita"))
    assert [each.act.kind for each in acts if each.act.study_ref == ref] == ["images viewed"]


def test_an_evidence_map_is_a_look(practice: Practice, staff: dict[str, Browser]) -> None:
    """Who asks for an evidence map alone has seen something of the study: that stands in the record, once; what is not
    there was not seen."""
    ref, rita = a_study(practice, 44, Says("4B")), staff["rita"]

    def looks() -> list[str]:
        acts = audit.entries(practice.database, audit.Wanted(who="rita"))
        return [each.act.kind for each in acts if each.act.study_ref == ref]

    assert rita.get(f"/studies/{ref}/evidence/1/9").status_code == 404
    assert rita.get(f"/studies/{ref}/evidence/2/1").status_code == 404
    assert looks() == []
    for _ in range(2):
        assert rita.get(f"/studies/{ref}/evidence/1/1").content.startswith(b"\x89PNG")
    assert looks() == ["images viewed"]


def test_a_refusal_keeps_no_identifier(address: str, practice: Practice) -> None:
    """Somebody who may not see a study leaves no identifier in the record by asking for it: acts are not sealed."""
    told = "1.2.840.99999.7"
    asked = httpx.get(f"{address}/api/v1/studies/{NOBODY}/frames/{told}/1", headers=token(practice, "audi"), timeout=60)
    assert asked.status_code == 403
    details = [str(each.act.detail) for each in audit.entries(practice.database, audit.Wanted(kind="refused"))]
    assert any("{sop_instance_uid}" in each for each in details) and not any(told in each for each in details)


def test_people_by_api(address: str, practice: Practice) -> None:
    """An administrator's program adds and disables an account; nobody takes the last administrator away."""
    client = httpx.Client(base_url=address, headers=token(practice, "ada"), timeout=60)
    new = {"name": "nova", "password": "Correct horse 7 battery", "roles": ["reader"]}
    assert client.post("/api/v1/people", json=new).status_code == 201
    assert client.post("/api/v1/people", json=new).status_code == 409
    changed = client.patch("/api/v1/people/nova", json={"roles": ["reader", "operator"], "disabled": True}).json()
    assert changed[0]["disabled"] is True
    assert client.patch("/api/v1/people/ada", json={"disabled": True}).status_code == 409
    assert client.get("/api/v1/me").json()["roles"] == ["admin"]


def test_fhir(address: str, practice: Practice) -> None:
    """FHIR says a preliminary report by a device, with category, probability and size, for the right patient."""
    ref = a_study(practice, 31, Says("4C"))
    client = httpx.Client(base_url=f"{address}/fhir/r4", headers=token(practice, "rita"), timeout=60)
    found = client.get("/DiagnosticReport", params={"patient.identifier": "PAT-31"})
    assert found.headers["content-type"].startswith("application/fhir+json")
    report = found.json()["entry"][0]["resource"]
    assert report["status"] == "preliminary"
    assert report["subject"] == {"identifier": {"value": "PAT-31"}}
    assert report["performer"][0]["type"] == "Device"
    assert BUNDLE.digest[:12] in report["performer"][0]["display"]
    assert "not a diagnosis" in report["conclusion"]
    assert client.get(f"/DiagnosticReport/{report['id']}").json() == report
    observation = client.get(f"/{report['result'][0]['reference']}").json()
    assert observation["status"] == "preliminary"
    assert observation["valueCodeableConcept"]["coding"][0]["code"] == "MA.II.A.5.4C"
    assert observation["component"][0]["valueQuantity"] == {
        "value": 82.0, "unit": "%", "system": "http://unitsofmeasure.org", "code": "%",
    }  # fmt: skip
    assert observation["bodySite"]["text"] == "Breast, side not stated"
    study = client.get(f"/ImagingStudy/{ref}").json()
    assert study["numberOfInstances"] == 1
    uid = practice.inbox.study_uid(ref)
    assert study["identifier"][0]["value"] == f"urn:oid:{uid}"
    for asked in (uid, f"urn:oid:{uid}", f"urn:dicom:uid|urn:oid:{uid}"):
        assert [each["resource"] for each in search(client, "ImagingStudy", identifier=asked)] == [study]
    assert client.get("/Patient").status_code == 404
    assert client.get("/ImagingStudy/none").json()["resourceType"] == "OperationOutcome"
    assert client.get("/metadata").json()["fhirVersion"] == "4.0.1"


def test_fhir_search_passes_over_nothing(address: str, practice: Practice) -> None:
    """A search that FHIR asks in words we do not know is refused by name: it must never answer with other patients."""
    a_study(practice, 33, Says("4C"))
    client = httpx.Client(base_url=f"{address}/fhir/r4", headers=token(practice, "rita"), timeout=60)
    refused = client.get("/DiagnosticReport", params={"patient": "PAT-33"})
    assert refused.status_code == 400
    [issue] = refused.json()["issue"]
    assert "does not know patient; it knows identifier, patient.identifier" in issue["diagnostics"]
    found = client.get("/DiagnosticReport", params={"patient.identifier": "PAT-33", "_format": "json"}).json()
    assert [each["resource"]["subject"]["identifier"]["value"] for each in found["entry"]] == ["PAT-33"]


def test_fhir_of_what_was_not_found_or_not_analysed(address: str, practice: Practice) -> None:
    """Nothing found is said as what was looked at, declined as NOT ANALYSED; neither says "negative"."""
    nothing = a_study(practice, 41, Says(None, left_out=1), tissue="normal", n=2)
    declined = a_study(practice, 42, Says(declines="unlike anything learnt"))
    client = httpx.Client(base_url=f"{address}/fhir/r4", headers=token(practice, "rita"), timeout=60)
    report = client.get(f"/DiagnosticReport/{nothing}-1").json()
    assert report["conclusion"].startswith("No lesion found in 2 of 3 images analysed")
    assert "result" not in report and "conclusionCode" not in report
    report = client.get(f"/DiagnosticReport/{declined}-1").json()
    assert report["conclusion"].startswith("NOT ANALYSED: unlike anything learnt")
    assert "negative" not in json.dumps(report).lower()


def test_fhir_searches_for_what_was_asked(address: str, practice: Practice) -> None:
    """A search by patient finds that patient's studies alone, also beside another identifier, and says what it took."""
    refs = [a_study(practice, seed, Says("4A")) for seed in (45, 46)]
    client = httpx.Client(base_url=f"{address}/fhir/r4", headers=token(practice, "rita"), timeout=60)
    accession = f"ACC-{refs[0][:6]}"
    assert [each["resource"]["id"] for each in search(client, "ImagingStudy", identifier=accession)] == [refs[0]]
    both = {"identifier": accession, "patient.identifier": "urn:ids|PAT-45"}
    assert [each["resource"]["id"] for each in search(client, "ImagingStudy", **both)] == [refs[0]]
    assert not search(client, "ImagingStudy", **{**both, "patient.identifier": "PAT-46"})
    assert not search(client, "ImagingStudy", **{"patient.identifier": accession})
    page = client.get("/ImagingStudy", params={"_count": 1}).json()
    links = {each["relation"]: each["url"] for each in page["link"]}
    assert client.get(links["self"]).json()["entry"] == page["entry"]
    assert client.get(links["next"]).json()["entry"] != page["entry"]


def test_fhir_leaves_out_what_is_not_known(address: str, practice: Practice) -> None:
    """No resource and no list of them holds a null, an empty text or an empty list, which FHIR forbids."""
    for seed, says in enumerate((Says("4C"), Says(None), Says(declines="too few images")), 47):
        a_study(practice, seed, says)
    practice.receives(breast_study(1, seed=50, patient_id=""))  # nobody's, and without an answer
    client = httpx.Client(base_url=f"{address}/fhir/r4", headers=token(practice, "rita"), timeout=60)
    for kind in ("ImagingStudy", "DiagnosticReport", "Observation"):
        assert not list(empty(client.get(f"/{kind}", params={"_count": 100}).json()))
    assert not list(empty(client.get("/Observation", params={"identifier": "nothing has this"}).json()))


def search(client: httpx.Client, kind: str, **asked: str) -> list[Any]:
    return list(client.get(f"/{kind}", params=asked).json().get("entry", []))


def empty(value: Any, at: str = "") -> Iterator[str]:
    """Where nothing stands."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        yield from [at] if value is None or value == "" else []
        return
    yield from [at] if not value else []
    for name, each in parts:
        yield from empty(each, f"{at}.{name}")


def test_metrics(address: str, practice: Practice) -> None:
    """Prometheus reads queues, workers, disk and latency; no study and no person is in it."""
    ref = a_study(practice, 51, Says("4A"))
    text = httpx.get(f"{address}/metrics", headers=token(practice, "otto"), timeout=60).text
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert values['busgen_studies{state="unread"}'] >= 1
    assert values['busgen_answer_seconds_bucket{le="+Inf"}'] == values["busgen_answer_seconds_count"] >= 1
    assert values["busgen_disk_free_bytes"] > 0
    assert ref not in text
    assert "PAT-" not in text


def test_health_and_ready(address: str, practice: Practice) -> None:
    """/health says that it lives; /ready names what keeps work away, and nothing more."""
    assert httpx.get(f"{address}/health", timeout=60).text == "alive\n"
    practice.jobs.leave("w")
    answer = httpx.get(f"{address}/ready", timeout=60)
    assert (answer.status_code, answer.json()) == (503, {"ready": False, "failing": ["worker"]})
    practice.jobs.beat("w")
    answer = httpx.get(f"{address}/ready", timeout=60)
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "failing": []})


@pytest.mark.slow
def test_nothing_makes_the_api_fail(tmp_path: Path) -> None:
    """Whatever is sent to the API by its own description, it never fails, and answers as described."""
    with explore.practice(tmp_path) as (made, headers, known):
        found = explore.explore(web.create(made.site()), headers, known, examples=5, start=1)
    assert not found.wrong, found.wrong
    assert found.operations == {f"{method.upper()} {path}" for method, path in NEEDS}
    assert found.statuses[200] > 20, "what is explored must reach beyond the door"


# -- the way in


def test_forms_need_their_session(staff: dict[str, Browser], practice: Practice, address: str) -> None:
    """A form without its session's key, or from another site, changes nothing."""
    rita = staff["rita"]
    path = "/account/tokens"
    data = {"label": "x", "days": "1", "scopes": "studies.read", "ref": "a" * 32}
    assert rita.post(path, data=data).status_code == 403
    assert rita.post(path, data={**data, "form_key": staff["otto"].form_key}).status_code == 403
    elsewhere = {"Origin": "https://evil.example"}
    assert rita.post(path, data={**data, "form_key": rita.form_key}, headers=elsewhere).status_code == 403
    crossing = {"Sec-Fetch-Site": "cross-site"}
    assert rita.post(path, data={**data, "form_key": rita.form_key}, headers=crossing).status_code == 403
    api = rita.post("/api/v1/tokens", json={"label": "x", "scopes": ["studies.read"], "days": 1})
    assert api.status_code == 403, "a session's cookie alone does not change anything by API either"
    owner = next(each for each in practice.people.accounts() if each.name == "rita")
    assert all(each.label != "x" for each in practice.people.tokens(owner))
    answer = httpx.post(f"{address}/login", data={"name": "rita", "password": "x"}, headers=elsewhere, timeout=60)
    assert answer.status_code == 403


# What strangers may ask for: how to log in, what the API is, whether the machine lives.
OPEN = frozenset(
    {
        ("get", "/first"),
        ("post", "/first"),
        ("get", "/login"),
        ("post", "/login"),
        ("get", "/login/provider"),
        ("get", "/login/back"),
        ("get", "/health"),
        ("get", "/ready"),
        ("get", "/api/v1/openapi.json"),
        ("get", "/fhir/r4/metadata"),
    }
)
# What each page and each deed needs; None: that somebody is logged in.
PAGES: dict[tuple[str, str], Right | None] = {
    ("get", "/"): None,
    ("post", "/logout"): None,
    ("get", "/account"): None,
    ("post", "/account/password"): None,
    ("post", "/account/second-factor"): None,
    ("post", "/account/tokens"): None,
    ("post", "/account/tokens/{ref}/revoke"): None,
    ("get", "/worklist"): "studies.read",
    ("get", "/events"): "studies.read",
    ("get", "/studies/{study_ref}"): "studies.read",
    ("get", "/studies/{study_ref}/stuck"): "studies.read",
    ("get", "/studies/{study_ref}/frames/{sop_instance_uid}/{frame_number}"): "studies.read",
    ("get", "/studies/{study_ref}/evidence/{revision}/{finding}"): "studies.read",
    ("post", "/studies/{study_ref}/words"): "studies.confirm",
    ("post", "/studies/{study_ref}/retry"): "studies.retry",
    ("get", "/operations"): "operations.read",
    ("get", "/metrics"): "operations.read",
    ("post", "/operations/nodes/{name}/echo"): "operations.act",
    ("post", "/operations/engine/resume"): "operations.act",
    ("get", "/models"): "models.read",
    ("get", "/models/{digest}"): "models.read",
    ("get", "/models/{digest}/plots/{name}"): "models.read",
    ("get", "/models/roll-back"): "models.act",
    ("post", "/models/roll-back"): "models.act",
    ("get", "/models/{digest}/promote"): "models.act",
    ("post", "/models/{digest}/promote"): "models.act",
    ("post", "/models/{digest}/shadow"): "models.act",
    ("post", "/models/{digest}/withdraw"): "models.act",
    ("get", "/laboratory"): "models.read",
    ("get", "/laboratory/healthy/{name}.png"): "models.read",
    ("post", "/laboratory/runs"): "models.read",
    ("get", "/laboratory/runs/{ref}/events"): "models.read",
    ("get", "/laboratory/runs/{ref}/images/{number}.png"): "models.read",
    ("get", "/laboratory/runs/{ref}/masks/{number}.png"): "models.read",
    ("get", "/laboratory/runs/{ref}.zip"): "models.read",
    ("get", "/audit"): "audit.read",
    ("post", "/audit/verify"): "audit.read",
    ("get", "/audit/export"): "audit.read",
    ("get", "/people"): "people.manage",
    ("post", "/people"): "people.manage",
    ("post", "/people/{name}"): "people.manage",
}


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    """Every way into the application, described or not."""
    return {
        (method.lower(), each.path or "")
        for each in iter_route_contexts(app.routes)
        for method in (each.methods or {"anything"}) - {"HEAD"}
    }


def test_every_route_says_what_it_needs(practice: Practice) -> None:
    """Nothing is reached that the tables above do not name: a new page fails here until it says whom it is for."""
    app = web.create(practice.site())
    known = OPEN | set(PAGES) | set(NEEDS) | {("anything", "/static")}
    assert routes_of(app) == known
    app.add_api_route("/new", lambda: "a page without a right", include_in_schema=False)
    assert routes_of(app) - known == {("get", "/new")}


def test_pages_need_their_right(staff: dict[str, Browser], address: str) -> None:
    """Each page and each deed is refused to every role that lacks its right and to no other; strangers are sent to
    the log-in."""
    for method, path in PAGES:
        answer = httpx.request(method, address + filled(path), timeout=60)
        assert answer.headers.get("location", "").startswith("/login") or answer.status_code == 401, (method, path)
    for name, person in staff.items():
        for (method, path), right in PAGES.items():
            if right is None:
                continue
            data = {"form_key": person.form_key} if method == "post" else None
            with person.stream(method, filled(path), data=data) as answer:  # events never end
                refused = answer.status_code == 403 and f"“{right}”" in answer.read().decode()
            assert refused == (right not in RIGHTS[STAFF[name][0]]), (name, method, path, answer.status_code)


def test_headers(staff: dict[str, Browser], address: str) -> None:
    """Pages allow no inline or foreign script, no frame and no cache; the session's cookie is out of scripts' reach."""
    answer = staff["rita"].get("/worklist")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "server" not in answer.headers
    assert " style=" not in answer.text
    assert "onclick" not in answer.text
    cookie = httpx.post(
        f"{address}/login", data={"name": "rita", "password": "Correct horse 7 battery"}, timeout=60
    ).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()


def test_behind_https(practice: Practice) -> None:
    """Where pages are reached by https, the cookie travels by nothing else and browsers are told to stay there."""
    from starlette.testclient import TestClient

    client = TestClient(web.create(practice.site(secure=True)), base_url="https://site.example")
    data = {"name": "rita", "password": "Correct horse 7 battery"}
    answer = client.post("/login", data=data, follow_redirects=False)
    assert answer.headers["set-cookie"].startswith("__Host-busgen=")
    assert "Secure" in answer.headers["set-cookie"]
    assert "max-age" in answer.headers["strict-transport-security"]


def test_log_in_leads_nowhere_else(address: str) -> None:
    """After logging in one is led to a page of ours, never to another host."""
    for place, led in (("/audit", "/audit"), ("//evil.example", ""), ("https://evil.example", ""), ("/\\evil", "")):
        data = {"name": "audi", "password": "Correct horse 7 battery", "next": place}
        answer = httpx.post(f"{address}/login", data=data, timeout=60)
        assert answer.headers["location"] == (led or "/audit")


def test_guessing_is_slow(practice: Practice) -> None:
    """One address cannot try passwords for ever, whatever names it uses."""
    from starlette.testclient import TestClient

    client = TestClient(web.create(practice.site()))
    answers = {client.post("/login", data={"name": f"n{i}", "password": ""}).status_code for i in range(2)}
    front = client.app.state.front  # type: ignore[attr-defined]
    while front.log_ins.take("testclient"):
        pass
    answers.add(client.post("/login", data={"name": "rita", "password": "Correct horse 7 battery"}).status_code)
    assert answers == {401, 429} or answers == {422, 429}


def test_first_start(tmp_path: Any) -> None:
    """A new site shows what to do; its first account needs the code from the terminal, and is made once."""
    from starlette.testclient import TestClient

    empty = Practice(tmp_path)
    client = TestClient(web.create(empty.site(first_code="K7-PX")), follow_redirects=False)
    assert client.get("/worklist").headers["location"].startswith("/login")
    assert client.get("/login").headers["location"] == "/first"
    assert "no account yet" in client.get("/first").text
    data = {"name": "ada", "password": "Correct horse 7 battery", "code": "guess"}
    assert client.post("/first", data=data).status_code == 403
    assert client.post("/first", data={**data, "code": "K7-PX", "password": "short"}).status_code == 409
    assert client.post("/first", data={**data, "code": "K7-PX"}).status_code == 303
    assert client.post("/first", data={**data, "code": "K7-PX", "name": "eve"}).status_code == 409
    page = client.get("/worklist")
    assert "No study has come yet" in page.text
    closed = TestClient(web.create(empty.site()), follow_redirects=False)
    assert closed.post("/first", data={**data, "code": ""}).status_code in (403, 422)
    empty.close()


def test_without_a_bundle(tmp_path: Any) -> None:
    """Without a live bundle every page says that nothing is read."""
    from starlette.testclient import TestClient

    empty = Practice(tmp_path)
    empty.bundle = None
    empty.person("phil", "physicist")
    client = TestClient(web.create(empty.site()))
    client.post("/login", data={"name": "phil", "password": "Correct horse 7 battery"})
    assert "No bundle is live: nothing is read." in client.get("/worklist").text
    assert "No bundle is live" in client.get("/models").text
    empty.close()


def test_a_failure_of_ours_is_a_number(practice: Practice, caplog: pytest.LogCaptureFixture) -> None:
    """A failure of ours shows a number that stands in the log too, and no detail; nobody's id is in the log."""
    from starlette.testclient import TestClient

    def broken(ref: str) -> Any:
        raise RuntimeError("a detail")

    ref = a_study(practice, 61, Says("4A"))
    app = web.create(practice.site(slides=broken))
    client = TestClient(app, raise_server_exceptions=False)
    client.post("/login", data={"name": "rita", "password": "Correct horse 7 battery"})
    answer = client.get(f"/studies/{ref}")
    assert answer.status_code == 500
    assert "a detail" not in answer.text
    assert "content-security-policy" in answer.headers
    number = answer.text.split("number ")[1][:8]
    assert number in caplog.text
    assert ref not in caplog.messages[-1]
