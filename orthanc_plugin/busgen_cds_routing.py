# Routes breast ultrasound from Orthanc to BUSGen-CDS and shows in Orthanc Explorer what became of it.
# Copyright (C) 2026 the BUSGen-CDS authors
#
# This program is free software: you can redistribute it and/or modify it under the terms of the GNU Affero
# General Public License as published by the Free Software Foundation, either version 3 of the License, or (at
# your option) any later version. It is distributed in the hope that it will be useful, but WITHOUT ANY WARRANTY;
# without even the implied warranty of MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE. See the file LICENSE
# beside this one, or <https://www.gnu.org/licenses/>.
"""Orthanc sends its stable breast ultrasound to BUSGen-CDS, and says what came back.

Rules:
- Whatever must outlive Orthanc stands in Orthanc: what was sent is metadata of each instance, written only when
  Orthanc's job has succeeded; so is what was refused for good; why a study waits stands at the study; what was
  answered is read from the results in Orthanc. What `Router` remembers besides is found again by a sweep.
- What carries our own manufacturer is never sent: results make a study stable again and would travel for ever.
- Callbacks only put a word into a queue. One thread works through it and speaks to Orthanc over loopback HTTP:
  Orthanc's own calls (`orthanc.RestApiGet`) keep Python's lock while they wait for Orthanc's locks, which
  dead-locks as soon as Orthanc calls back meanwhile.
- An outage, or a refusal that may pass, is kept, shown and retried. An instance whose content is refused is not sent
  again until a person asks. Nothing here can stop Orthanc from starting or storing.
"""

from __future__ import annotations

import fnmatch
import http.client
import json
import queue
import re
import ssl
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import orthanc

MANUFACTURER = "BUSGen-CDS"
NOT_ANALYSED = "NOT ANALYSED"  # how the report of a declined study begins
# User metadata of Orthanc are numbers from 1024; these four are ours.
SENT = "4117"  # at an instance: when the product had taken it
PROBLEM = "4118"  # at a study: why it waits
ASKED = "4119"  # at a study: a person wants it sent although no rule matches
REFUSED = "4120"  # at an instance: why the product will never take it as it is

TAGS = ("Modality", "BodyPartExamined", "StationName", "StudyDescription", "SeriesDescription", "Manufacturer")
DEFAULT_RULES = (
    {"Modality": "US", "BodyPartExamined": "BREAST"},
    {"Modality": "US", "StudyDescription": "*BREAST*"},
    {"Modality": "US", "StudyDescription": "*MAMM*"},
)
UNFINISHED = ("Pending", "Running", "Paused", "Retry")
# Orthanc's words when nobody answered, when the product would not speak with this Orthanc, and when it would be the
# same for every instance (0xA7xx: out of resources).
NO_ANSWER = re.compile(r"connecting to AET(?!.*Rejected)|Peer aborted|Timeout")
REJECTED = re.compile(r"connecting to AET.*Rejected")
SAME_FOR_ALL = re.compile(r"connecting to AET|DIMSE status 0xA7")
# PS3.4 B.2.3, PS3.7 C.5: data set and class do not match, cannot be understood, known with other content.
FOR_GOOD = re.compile(r"DIMSE status 0x(A9|C[0-9A-F]|0111)", re.IGNORECASE)


# What to send: rules, without Orthanc.


class Settings(NamedTuple):
    """The section "BusgenCds" of Orthanc's configuration; deploy/orthanc/orthanc.json says what each field means."""

    modality: str = "busgen-cds"
    rules: tuple[dict[str, Any], ...] = DEFAULT_RULES
    retry_seconds: float = 30
    sweep_days: float = 30
    viewer: str = ""
    pages: str = ""  # address of the product's pages; empty: what it says beside its reports is not asked for
    token_file: str = ""
    url: str = ""  # of this Orthanc's own REST API; empty: at its loopback address
    problem: str = ""


# Each setting's name in Orthanc's configuration, and its field above.
TEXTS = {"Modality": "modality", "Viewer": "viewer", "Pages": "pages", "TokenFile": "token_file", "Url": "url"}
NUMBERS = {"RetrySeconds": "retry_seconds", "SweepDays": "sweep_days"}


def read_settings(section: Any) -> Settings:
    """A mistake switches routing off and is said on every page; Orthanc itself starts all the same."""
    if not isinstance(section, dict):
        return Settings(problem='"BusgenCds" must be a section: {"Modality": …}')
    wrong = [f'no such setting: "{name}"' for name in section if name not in {*TEXTS, *NUMBERS, "Rules"}]
    found: dict[str, Any] = {field: str(section[name]) for name, field in TEXTS.items() if name in section}
    for name in NUMBERS.keys() & section.keys():
        if type(section[name]) in (int, float) and section[name] > 0:
            found[NUMBERS[name]] = float(section[name])
        else:
            wrong.append(f'"{name}" must be a number above 0')
    rules = section.get("Rules", DEFAULT_RULES)
    wrong += complaints(rules)
    return Settings(**found)._replace(rules=() if wrong else tuple(rules), problem="; ".join(wrong))


def complaints(rules: Any) -> Iterator[str]:
    """What is wrong with rules, each with what would be right."""
    if not isinstance(rules, list | tuple):
        yield '"Rules" must be a list'
        return
    for number, rule in enumerate(rules, 1):
        if not isinstance(rule, dict) or not rule:
            yield f"rule {number} must name at least one of {', '.join(TAGS)}"
            continue
        for tag in rule:
            if tag not in TAGS:
                yield f'rule {number}: "{tag}" is not one of {", ".join(TAGS)}'


def matching(rules: Iterable[dict[str, Any]], tags: dict[str, str]) -> int:
    """The number of the first rule that every pattern of holds for these tags; 0 if there is none."""
    for number, rule in enumerate(rules, 1):
        if all(holds(pattern, tags.get(tag, "")) for tag, pattern in rule.items()):
            return number
    return 0


def holds(pattern: Any, value: str) -> bool:
    """A pattern with * and ?, or a list of which one must hold; upper and lower case are one."""
    patterns = pattern if isinstance(pattern, list) else [pattern]
    return any(fnmatch.fnmatchcase(value.strip().upper(), str(one).upper()) for one in patterns)


def ours(tags: dict[str, str]) -> bool:
    return tags.get("Manufacturer", "").strip().upper() == MANUFACTURER.upper()


def verdict(rules: Iterable[dict[str, Any]], tags: dict[str, str]) -> dict[str, Any]:
    """What would happen to a series with these tags, and why: the answer of the rule test."""
    if ours(tags):
        return {"routed": False, "rule": 0, "why": "our own result is never sent back"}
    number = matching(rules, tags)
    why = f"rule {number} matches" if number else "no rule matches"
    return {"routed": bool(number), "rule": number, "why": why}


# How to speak to Orthanc.


class Refused(Exception):
    """Orthanc answered with an error."""

    def __init__(self, status: int, details: str) -> None:
        super().__init__(f"{status}: {details}")
        self.status = status
        self.details = details


class Api:
    """Orthanc's REST API over loopback HTTP, which leaves Python's lock free while it waits."""

    def __init__(self, url: str, token: str) -> None:
        self.address = urlsplit(url)
        self.token = token

    def get(self, path: str) -> Any:
        return json.loads(self.ask("GET", path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return json.loads(self.ask("POST", path, json.dumps(body)) or b"null")

    def put(self, path: str, text: str) -> None:
        self.ask("PUT", path, text)

    def metadata(self, resource: str, number: str) -> str:
        """One metadata of a resource such as "studies/…"; empty if it has none, or is gone."""
        try:
            return self.ask("GET", f"/{resource}/metadata/{number}").decode()
        except Refused as refused:
            if refused.status == 404:
                return ""
            raise

    def clear(self, resource: str, number: str) -> None:
        if self.metadata(resource, number):
            self.ask("DELETE", f"/{resource}/metadata/{number}")

    def ask(self, method: str, path: str, body: str | None = None) -> bytes:
        connection = self.connect()
        try:
            connection.request(method, path, body and body.encode(), {"Authorization": self.token})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            raise Refused(answer.status, explanation(content))
        return content

    def connect(self) -> http.client.HTTPConnection:
        host, port = self.address.hostname or "127.0.0.1", self.address.port
        if self.address.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=60)
        # Its own certificate names the outside address, not loopback.
        trusting = ssl._create_unverified_context()
        return http.client.HTTPSConnection(host, port, timeout=60, context=trusting)


def explanation(answer: bytes) -> str:
    try:
        said = json.loads(answer)
        return str(said.get("Details") or said.get("Message") or "")
    except (ValueError, AttributeError):
        return answer[:200].decode(errors="replace")


# What a study is, to us.


class Series(NamedTuple):
    tags: dict[str, str]
    instances: tuple[str, ...]


def series_of(api: Api, study: dict[str, Any]) -> Iterator[Series]:
    for identifier in study["Series"]:
        found = api.get(f"/series/{identifier}")
        yield Series({**study["MainDicomTags"], **found["MainDicomTags"]}, tuple(found["Instances"]))


def for_us(settings: Settings, series: Series, asked: bool) -> bool:
    """Whether a series goes to the product: by a rule, or because a person asked for the study."""
    if settings.problem or ours(series.tags):
        return False
    return bool(matching(settings.rules, series.tags)) or (asked and series.tags.get("Modality") == "US")


class Outgoing(NamedTuple):
    """A study's instances that are for the product, by how far they are."""

    sent: dict[str, str]  # instance to when it was sent
    unsent: tuple[str, ...]
    refused: dict[str, str]  # instance to why it is not sent again by itself


def outgoing(api: Api, settings: Settings, identifier: str) -> Outgoing:
    study = api.get(f"/studies/{identifier}")
    asked = bool(api.metadata(f"studies/{identifier}", ASKED))
    wanted = [i for series in series_of(api, study) if for_us(settings, series, asked) for i in series.instances]
    marks = {instance: api.metadata(f"instances/{instance}", SENT) for instance in wanted}
    refused = {i: api.metadata(f"instances/{i}", REFUSED) for i in wanted if not marks[i]}
    return Outgoing(
        {i: mark for i, mark in marks.items() if mark},
        tuple(i for i, why in refused.items() if not why),
        {i: why for i, why in refused.items() if why},
    )


def jobs(api: Api, settings: Settings) -> list[dict[str, Any]]:
    """Orthanc's jobs that send to the product, in the order they were made."""
    title = ae_title(api, settings)
    return sorted((job for job in api.get("/jobs?expand") if sends_to(title, job)), key=lambda job: job["CreationTime"])


def ae_title(api: Api, settings: Settings) -> str:
    try:
        return str(api.get(f"/modalities/{settings.modality}/configuration")["AET"])
    except Refused as refused:
        if refused.status != 404:
            raise
        raise Refused(404, f'add "{settings.modality}" to DicomModalities: Orthanc does not know it') from refused


def sends_to(title: str, job: dict[str, Any]) -> bool:
    return bool(job["Type"] == "DicomModalityStore" and job["Content"].get("RemoteAet") == title)


def instances_of(job: dict[str, Any]) -> list[str]:
    return list(job["Content"].get("ParentResources", []))


# The one thread that routes.


class Router:
    """Works through what Orthanc reports, one thing at a time; `news` is all that other threads touch."""

    def __init__(self, api: Api, settings: Settings) -> None:
        self.api = api
        self.settings = settings
        self.news: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.waiting: set[str] = set()  # studies that the product has not taken; a sweep finds them again
        self.settled: set[str] = set()  # finished jobs whose end is already written down; writing it again is harmless
        self.next_try = 0.0
        self.outage = ""  # why the last try reached nobody

    def run(self) -> None:
        while True:
            kind, resource = self.next()
            if kind == "stop":
                return
            try:
                self.attend(kind, resource)
            except (OSError, http.client.HTTPException) as broken:
                orthanc.LogWarning(f"BUSGen-CDS: Orthanc's own REST API does not answer, trying again: {broken}")
                time.sleep(1)
                self.news.put((kind, resource))
            except Exception:  # noqa: BLE001 – the thread must outlive a defect, and its trace is what to report
                orthanc.LogError("BUSGen-CDS: this is a defect:\n" + traceback.format_exc())

    def attend(self, kind: str, resource: str) -> None:
        try:
            getattr(self, kind)(resource)
        except Refused as refused:
            self.refused(kind, resource, refused)

    def next(self) -> tuple[str, str]:
        """What Orthanc reported; when there is nothing and the time has come, another try for all that wait."""
        while True:
            left = max(0.0, self.next_try - time.monotonic()) if self.waiting else None
            try:
                return self.news.get(timeout=left)
            except queue.Empty:
                if self.waiting:
                    return "retry", ""

    def started(self, _: str) -> None:
        """Finish what an earlier Orthanc was stopped in: mark what its jobs had sent, route what it had not."""
        if self.settings.problem:
            orthanc.LogError(f"BUSGen-CDS: nothing is routed, correct the configuration: {self.settings.problem}")
            return
        self.sweep()  # first: it is remembered whatever becomes of the rest
        self.in_flight()

    def sweep(self) -> None:
        """Every recent study is looked at once more, at the next try."""
        self.waiting.update(self.recent())

    def recent(self) -> Iterator[str]:
        since = (datetime.now(UTC) - timedelta(days=self.settings.sweep_days)).strftime("%Y%m%dT%H%M%S")
        start, page = 0, 500
        while studies := self.api.get(f"/studies?expand&since={start}&limit={page}"):
            yield from (study["ID"] for study in studies if study.get("LastUpdate", since) >= since)
            start += page

    def stable(self, study: str) -> None:
        self.route(study, self.in_flight())

    def finished(self, identifier: str) -> None:
        self.in_flight()
        if identifier not in self.settled and identifier not in self.api.get("/jobs"):
            self.sweep()  # Orthanc has forgotten how this job ended, and whose it was

    def in_flight(self) -> set[str]:
        """The instances that jobs are still sending, after the end of every finished job has been written down."""
        while True:
            listed = jobs(self.api, self.settings)
            self.settled &= {job["ID"] for job in listed}
            finished = [job for job in listed if job["State"] not in UNFINISHED and job["ID"] not in self.settled]
            if not finished:
                return {instance for job in listed if job["State"] in UNFINISHED for instance in instances_of(job)}
            for job in finished:
                try:
                    self.settle(job)
                except Refused as refused:  # it holds up no other; its studies are found again by a sweep
                    orthanc.LogError(f"BUSGen-CDS: job {job['ID']}: {refused}")
                    self.sweep()
                self.settled.add(job["ID"])

    def settle(self, job: dict[str, Any]) -> None:
        if job["State"] == "Success":
            self.succeeded(job)
        else:
            self.failed(job)

    def route(self, study: str, flying: set[str]) -> None:
        try:
            unsent = outgoing(self.api, self.settings, study).unsent
        except Refused as refused:
            if refused.status != 404:
                raise
            unsent = ()  # deleted meanwhile
        if not unsent:
            self.waiting.discard(study)
            self.api.clear(f"studies/{study}", PROBLEM)
        self.send([instance for instance in unsent if instance not in flying])

    def send(self, instances: list[str]) -> None:
        """One job of Orthanc's: one association, in which the first refusal ends it."""
        if instances:
            self.api.post(
                f"/modalities/{self.settings.modality}/store",
                {"Resources": instances, "Asynchronous": True, "Synchronous": False, "Permissive": False},
            )

    def succeeded(self, job: dict[str, Any]) -> None:
        for instance in instances_of(job):
            if self.study_of(instance):
                self.api.put(f"/instances/{instance}/metadata/{SENT}", job["CompletionTime"])

    def failed(self, job: dict[str, Any]) -> None:
        """What it did not bring there: another Orthanc, before its restart, may have seen to some of it already."""
        reason = job.get("ErrorDetails") or job["ErrorDescription"]
        studies = {instance: self.study_of(instance) for instance in instances_of(job)}  # empty: deleted meanwhile
        instances = [i for i, study in studies.items() if study and not self.is_marked(i)]
        if len(instances_of(job)) > 1 and not SAME_FOR_ALL.search(reason):
            for instance in instances:  # so that the one that is refused holds up no other
                self.send([instance])
            return
        if FOR_GOOD.search(reason):
            for instance in instances:
                self.api.put(f"/instances/{instance}/metadata/{REFUSED}", reason)
                orthanc.LogWarning(f"BUSGen-CDS: instance {instance} is not sent again until asked for: {reason}")
            return
        for study in {studies[instance] for instance in instances}:
            self.keep_waiting(study, reason)

    def is_marked(self, instance: str) -> bool:
        return any(self.api.metadata(f"instances/{instance}", mark) for mark in (SENT, REFUSED))

    def keep_waiting(self, study: str, reason: str) -> None:
        before = noted(self.api, study)
        since = before["since"] if before else datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self.api.put(f"/studies/{study}/metadata/{PROBLEM}", json.dumps({"reason": reason, "since": since}))
        except Refused as refused:
            if refused.status != 404:
                raise
            self.waiting.discard(study)  # deleted meanwhile
            return
        orthanc.LogWarning(
            f"BUSGen-CDS: study {study} waits, retried every {self.settings.retry_seconds:g} s: {reason}"
        )
        if not self.waiting:
            self.next_try = time.monotonic() + self.settings.retry_seconds
        self.waiting.add(study)

    def retry(self, _: str) -> None:
        """One echo asks for all that wait: an outage must not fill Orthanc with jobs that cannot succeed."""
        self.next_try = time.monotonic() + self.settings.retry_seconds  # whatever comes of this one
        try:
            self.api.post(f"/modalities/{self.settings.modality}/echo", {})
            self.outage = ""
        except Refused as refused:
            self.outage = refused.details
        if not self.outage:
            flying = self.in_flight()
            for study in sorted(self.waiting):
                try:
                    self.route(study, flying)
                except Refused as refused:  # it holds up no other
                    self.refused("stable", study, refused)

    def refused(self, kind: str, resource: str, refused: Refused) -> None:
        """Orthanc itself would not: kept at the study where there is one, and said in the log in any case."""
        orthanc.LogError(f"BUSGen-CDS: {refused.details or refused}")
        if kind == "stable":
            self.keep_waiting(resource, refused.details or str(refused))

    def study_of(self, instance: str) -> str:
        """Orthanc's id of an instance's study; empty if it is no instance, or was deleted meanwhile."""
        try:
            return str(self.api.get(f"/instances/{instance}/study")["ID"])
        except Refused as refused:
            if refused.status == 404:
                return ""
            raise


# What became of a study.


def noted(api: Api, study: str) -> dict[str, str] | None:
    """Why a study waits, and since when; what somebody else wrote in that place is no reason."""
    try:
        said = json.loads(api.metadata(f"studies/{study}", PROBLEM) or "null")
    except ValueError:
        return None
    return said if isinstance(said, dict) and {"reason", "since"} <= said.keys() else None


def status(api: Api, settings: Settings, identifier: str, outage: str = "") -> dict[str, Any]:
    """The badge: one state, one line of text, and what they were made from."""
    study_uid = api.get(f"/studies/{identifier}")["MainDicomTags"]["StudyInstanceUID"]
    images = outgoing(api, settings, identifier)
    answer = newest_answer(api, identifier)
    problem = noted(api, identifier) if images.unsent else None
    if outage and images.unsent:
        problem = {"since": "", **(problem or {}), "reason": outage}
    said = asked_product(settings, study_uid) if images.sent and not images.unsent and not answer else None
    sent_since = [mark for mark in images.sent.values() if answer and mark[:15] > answer["received"]]
    state, text = said or describe(settings, images, answer, problem, len(sent_since))
    return {
        "study": identifier,
        "state": state,
        "text": text,
        "answer": answer,
        "problem": problem,
        "images": {
            "sent": len(images.sent),
            "unsent": len(images.unsent) + len(images.refused),
            "sent_since_answer": len(sent_since),
        },
        "viewer": viewer_link(settings, study_uid, answer),
    }


def viewer_link(settings: Settings, study_uid: str, answer: dict[str, Any] | None) -> str:
    """Where the viewer shows the study: at our newest report, where there is one."""
    if not settings.viewer:
        return ""
    asked = {"StudyInstanceUIDs": study_uid} | ({"initialSeriesInstanceUID": answer["series"]} if answer else {})
    return f"{settings.viewer.rstrip('/')}/viewer?{urlencode(asked)}"


def asked_product(settings: Settings, study_uid: str) -> tuple[str, str] | None:
    """What the product says of a study that it sent no report of: not for us, or stuck, with its reason."""
    if not settings.pages or settings.problem:
        return None
    try:
        rows = product_rows(settings, study_uid)
    except (OSError, ValueError, KeyError, http.client.HTTPException) as failed:
        return "waiting", f"waiting for the AI; its pages cannot be asked: {failed}"
    if rows and rows[0]["outcome"] == "not-for-us":
        return "not for us", f"not for us: {rows[0]['reason']}"
    if rows and rows[0]["stuck"]:
        return "waiting", f"waiting, the AI needs a person: {rows[0]['reason']}"
    return None


def product_rows(settings: Settings, study_uid: str) -> list[dict[str, Any]]:
    """The product's worklist, searched for this study (right studies.read)."""
    address = urlsplit(settings.pages)
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = kind(address.hostname or "127.0.0.1", address.port, timeout=5)
    try:
        token = Path(settings.token_file).read_text().strip()
        asked = f"{address.path}/api/v1/studies?{urlencode({'view': 'all', 'search': study_uid})}"
        connection.request("GET", asked, headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise OSError(f"HTTP {answer.status}")
    return list(json.loads(content)["studies"])


def describe(
    settings: Settings, images: Outgoing, answer: dict[str, Any] | None, problem: Any, sent_since: int
) -> tuple[str, str]:
    if settings.problem:
        return "refused", f"nothing is routed: {settings.problem}"
    waits = why_waiting(images, problem)
    if answer:
        more = f"; {waits[1]}" if waits else (f"; {sent_since} sent since" if sent_since else "")
        state = "not analysed" if answer["says"].startswith(NOT_ANALYSED) else "delivered"
        return waits[0] if waits else state, f"AI: {answer['says']}, delivered {clock(answer['received'])}{more}"
    if waits:
        return waits
    if images.sent:
        return "waiting", f"waiting for the AI since {clock(max(images.sent.values()))}"
    return "not routed", "not for the AI: no rule matches"


def why_waiting(images: Outgoing, problem: Any) -> tuple[str, str] | None:
    """Why some of a study's images have not been taken; None if all have."""
    if not images.unsent:
        return ("refused", f"refused: {next(iter(images.refused.values()))}") if images.refused else None
    if not problem:
        return "waiting", f"{len(images.unsent)} waiting to be sent"
    if NO_ANSWER.search(problem["reason"]):
        return "waiting", f"waiting, the AI cannot be reached: {problem['reason']}"
    if REJECTED.search(problem["reason"]):
        where = "`busgen-cds queue` on its machine says why"
        return "refused", f"refused: the AI does not accept this Orthanc; {where}: {problem['reason']}"
    return "refused", f"refused: {problem['reason']}"


def newest_answer(api: Api, identifier: str) -> dict[str, Any] | None:
    """Our newest report in the study: what it says, and when Orthanc received it (UTC)."""
    reports = [
        (
            int(series.tags.get("SeriesNumber") or 0),
            api.metadata(f"instances/{instance}", "ReceptionDate"),
            instance,
            series.tags["SeriesInstanceUID"],
        )
        for series in series_of(api, api.get(f"/studies/{identifier}"))
        if ours(series.tags) and series.tags.get("Modality") == "SR"
        for instance in series.instances
    ]
    if not reports:
        return None
    number, received, instance, series_uid = max(reports)
    says = in_short(api.get(f"/instances/{instance}/simplified-tags").get("ContentSequence", []))
    return {"says": says, "received": received, "instance": instance, "series": series_uid, "series_number": number}


def in_short(content: list[dict[str, Any]]) -> str:
    """A report's most suspicious category, or that it found nothing, or that it did not analyse the study."""
    items = list(walk(content))
    for item in items:
        if str(item.get("TextValue", "")).startswith(NOT_ANALYSED):
            return str(item["TextValue"])
    categories = [code(item, "ConceptCodeSequence")["CodeMeaning"] for item in items if is_category(item)]
    return max((meaning.split(" ")[0] for meaning in categories), default="no lesion found")


def is_category(item: dict[str, Any]) -> bool:
    name = code(item, "ConceptNameCodeSequence")
    return (name.get("CodeValue"), name.get("CodingSchemeDesignator")) == ("111005", "DCM")


def code(item: dict[str, Any], sequence: str) -> dict[str, str]:
    return next(iter(item.get(sequence) or []), {})


def walk(content: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for item in content:
        yield item
        yield from walk(item.get("ContentSequence", []))


def clock(stamp: str) -> str:
    """Orthanc's UTC time stamp on this machine's clock; with its date unless it is today's."""
    then = datetime.strptime(stamp[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC).astimezone()
    today = then.date() == datetime.now().astimezone().date()
    return then.strftime("%H:%M" if today else "%Y-%m-%d %H:%M")


# The doors: Orthanc's callbacks, its REST API, its Explorer.

CONFIGURATION = json.loads(orthanc.GetConfiguration())
SETTINGS = read_settings(CONFIGURATION.get("BusgenCds", {}))
LOOPBACK = f"{'https' if CONFIGURATION.get('SslEnabled') else 'http'}://127.0.0.1:{CONFIGURATION.get('HttpPort', 8042)}"
API = Api(SETTINGS.url or LOOPBACK, orthanc.GenerateRestApiAuthorizationToken())
ROUTER = Router(API, SETTINGS)
NEWS = {
    orthanc.ChangeType.ORTHANC_STARTED: "started",
    orthanc.ChangeType.ORTHANC_STOPPED: "stop",
    orthanc.ChangeType.STABLE_STUDY: "stable",
    orthanc.ChangeType.JOB_SUCCESS: "finished",
    orthanc.ChangeType.JOB_FAILURE: "finished",
}


def on_change(change: int, _level: int, resource: str) -> None:
    kind = NEWS.get(change)
    if kind and (kind in ("started", "stop") or not SETTINGS.problem):
        ROUTER.news.put((kind, resource))


def on_status(output: orthanc.RestOutput, _uri: str, **request: Any) -> None:
    """GET: the badge of a study."""
    answer(output, request, "GET", lambda: status(API, SETTINGS, request["groups"][0], ROUTER.outage))


def on_send(output: orthanc.RestOutput, _uri: str, **request: Any) -> None:
    """POST: send a study now, all of it, also when no rule matches it."""
    answer(output, request, "POST", lambda: send_all(request["groups"][0]))


def on_rules(output: orthanc.RestOutput, _uri: str, **request: Any) -> None:
    """GET: the rules in force. POST: what they, or the rules given, would do with a study or with tags."""
    if request["method"] == "GET":
        answer(output, request, "GET", lambda: {"rules": SETTINGS.rules, "problem": SETTINGS.problem})
    else:
        answer(output, request, "POST", lambda: try_rules(json.loads(request["body"])))


def on_overview(output: orthanc.RestOutput, _uri: str, **request: Any) -> None:
    """GET: which studies wait, and why."""
    answer(output, request, "GET", overview)


def send_all(study: str) -> dict[str, Any]:
    API.put(f"/studies/{study}/metadata/{ASKED}", "1")
    images = outgoing(API, SETTINGS, study)
    for instance in images.sent:
        API.clear(f"instances/{instance}", SENT)
    for instance in images.refused:
        API.clear(f"instances/{instance}", REFUSED)
    ROUTER.news.put(("stable", study))
    return {"study": study, "asked": True}


def try_rules(asked: Any) -> dict[str, Any]:
    if not isinstance(asked, dict) or not isinstance(asked.get("tags", {}), dict):
        raise Refused(400, 'ask with {"tags": {…}} or {"study": "Orthanc id"}, and "rules": […] to try others')
    rules = asked.get("rules", SETTINGS.rules)
    if wrong := "; ".join(complaints(rules)):
        raise Refused(400, wrong)
    if "study" not in asked:
        return verdict(rules, {tag: str(value) for tag, value in asked.get("tags", {}).items()})
    found = series_of(API, API.get(f"/studies/{asked['study']}"))
    return {"series": [{**verdict(rules, s.tags), "tags": {t: s.tags.get(t, "") for t in TAGS}} for s in found]}


def overview() -> dict[str, Any]:
    waiting = [(study, noted(API, study)) for study in sorted(ROUTER.waiting)]
    return {
        "modality": SETTINGS.modality,
        "problem": SETTINGS.problem or ROUTER.outage,
        "waiting": [{"study": study, **why} for study, why in waiting if why],
        "retry_seconds": SETTINGS.retry_seconds,
    }


def answer(output: orthanc.RestOutput, request: dict[str, Any], method: str, make: Any) -> None:
    if request["method"] != method:
        output.SendMethodNotAllowed(method)
        return
    try:
        said, http_status = make(), 200
    except Refused as refused:
        unknown = "Orthanc has no such study" if refused.status == 404 else f"Orthanc answered {refused.status}"
        said, http_status = {"error": refused.details or unknown}, refused.status
    except ValueError as unreadable:
        said, http_status = {"error": str(unreadable)}, 400
    text = json.dumps(said, indent=1)
    if http_status == 200:
        output.AnswerBuffer(text, "application/json")
    else:
        output.SetHttpHeader("Content-Type", "application/json")
        output.SendHttpStatus(http_status, text, len(text.encode()))


# Orthanc Explorer is jQuery Mobile: pages are elements that fire events. Text goes in as text, never as markup.
EXPLORER = """
$('#study').live('pagebeforecreate', function () {
  var badge = $('<p>').attr('id', 'busgen-badge').attr('role', 'status')
    .css({'margin': '8px 0', 'padding': '8px 12px', 'border-radius': '4px', 'color': '#fff', 'font-weight': 'bold',
      'text-shadow': 'none', 'overflow-wrap': 'anywhere'});
  var send = $('<a>').attr({'id': 'busgen-send', 'data-role': 'button', 'href': '#', 'data-icon': 'forward'})
    .text('Send to the AI');
  var view = $('<a>').attr({'id': 'busgen-view', 'data-role': 'button', 'href': '#', 'target': '_blank',
    'data-icon': 'search'}).text('Open in the viewer');
  badge.add(send).add(view).insertBefore($('#study-delete').closest('ul'));
  send.click(function (event) {
    event.preventDefault();
    $.ajax({url: '../busgen-cds/studies/' + $.mobile.pageData.uuid + '/send', type: 'POST', data: '',
      success: refresh, error: function () { show({state: 'refused', text: 'AI: could not be asked'}); }});
  });
});
var COLOURS = {'delivered': '#1b5e20', 'not analysed': '#4a2a86', 'waiting': '#8a5300',
  'refused': '#a31515', 'not routed': '#555', 'not for us': '#37474f'};
function show(status) {
  $('#busgen-badge').text(status.text).css('background', COLOURS[status.state]).attr('data-state', status.state);
}
function refresh() {
  if (!$.mobile.pageData || !$.mobile.pageData.uuid || !$('#busgen-badge').is(':visible')) { return; }
  var uuid = $.mobile.pageData.uuid;
  $.ajax({url: '../busgen-cds/studies/' + uuid, dataType: 'json', cache: false, success: function (status) {
    show(status);
    $('#busgen-view').toggle(!!status.viewer).attr('href', status.viewer);
  }});
}
$('#study').live('pageshow', refresh);
setInterval(refresh, 5000);
"""

orthanc.RegisterOnChangeCallback(on_change)
orthanc.RegisterRestCallback("/busgen-cds", on_overview)
orthanc.RegisterRestCallback("/busgen-cds/rules", on_rules)
orthanc.RegisterRestCallback("/busgen-cds/studies/([^/]+)", on_status)
orthanc.RegisterRestCallback("/busgen-cds/studies/([^/]+)/send", on_send)
orthanc.ExtendOrthancExplorer("(function () {" + EXPLORER + "})();")
threading.Thread(target=ROUTER.run, name="busgen-cds", daemon=True).start()
