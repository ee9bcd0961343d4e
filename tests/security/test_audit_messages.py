"""The record of acts as DICOM audit messages: what they say, and that none is lost on the way."""

from __future__ import annotations

import base64
import itertools
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from busgen_cds import settings
from busgen_cds.dicom import audit_message, syslog
from busgen_cds.dicom.audit_message import EVENTS, Event, Origin
from busgen_cds.errors import Misconfigured, Transient
from busgen_cds.operations import housekeeping
from busgen_cds.store import audit, database, forwarding, vault
from busgen_cds.store.audit import Act
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.results import Results
from busgen_cds.store.vault import Vault
from tests.certificates import Authority
from tests.security.repository import Repository
from tests.store.test_rotation import kept

SOURCES = Path(__file__).parents[2] / "busgen_cds"
AT = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
ORIGIN = Origin("Example hospital", "busgen-host", "BUSGEN_CDS")
EVENT = Event(7, AT, "result viewed", "ann", "", "c" * 64, study_ref="f" * 32, detail={"address": "10.0.0.7"})

# PS3.15 A.5.1, the part of the schema that our messages use: element → attributes (! required), children in order
CODED = ({"csd-code!", "codeSystemName!", "originalText!", "displayName"}, "")
SCHEMA: dict[str, tuple[set[str], str]] = {
    "AuditMessage": (
        set(),
        "EventIdentification (ActiveParticipant )+AuditSourceIdentification (ParticipantObjectIdentification )*",
    ),
    "EventIdentification": (
        {"EventActionCode", "EventDateTime!", "EventOutcomeIndicator!"},
        "EventID (EventTypeCode )*(EventOutcomeDescription )?",
    ),
    "EventID": CODED, "EventTypeCode": CODED, "RoleIDCode": CODED, "ParticipantObjectIDTypeCode": CODED,
    "EventOutcomeDescription": (set(), ""),
    "ActiveParticipant": (
        {"UserID!", "UserIsRequestor!", "AlternativeUserID", "UserName", "NetworkAccessPointID",
         "NetworkAccessPointTypeCode"},
        "(RoleIDCode )*",
    ),
    "AuditSourceIdentification": ({"AuditSourceID!", "AuditEnterpriseSiteID"}, "(AuditSourceTypeCode )*"),
    "AuditSourceTypeCode": ({"csd-code!"}, ""),
    "ParticipantObjectIdentification": (
        {"ParticipantObjectID!", "ParticipantObjectTypeCode", "ParticipantObjectTypeCodeRole"},
        "ParticipantObjectIDTypeCode ParticipantObjectName (ParticipantObjectDetail )*",
    ),
    "ParticipantObjectName": (set(), ""), "ParticipantObjectDetail": ({"type!", "value!"}, ""),
}  # fmt: skip
VALUES = {
    "EventActionCode": "CRUDE", "EventOutcomeIndicator": ["0", "4", "8", "12"], "UserIsRequestor": ["true", "false"],
    "NetworkAccessPointTypeCode": "12345", "ParticipantObjectTypeCode": "1234",
    "ParticipantObjectTypeCodeRole": [str(n) for n in range(1, 27)],
}  # fmt: skip


def read(document: bytes) -> Xml.Element:
    """Parsed, and held against the schema."""
    root = Xml.fromstring(document)
    assert root.tag == "AuditMessage"
    for element in root.iter():
        attributes, children = SCHEMA[element.tag]
        required = {name[:-1] for name in attributes if name.endswith("!")}
        assert required <= set(element.attrib) <= {name.rstrip("!") for name in attributes}, element.tag
        assert re.fullmatch(children, "".join(f"{child.tag} " for child in element)), element.tag
        for name, value in element.attrib.items():
            assert value in VALUES.get(name, [value]), (name, value)
    return root


def test_every_kind_of_act_is_said_as_the_schema_asks() -> None:
    """Each kind of act makes a message with the schema's required elements, in order, and its event code."""
    for kind, row in EVENTS.items():
        for said in (EVENT, replace(EVENT, study_uid="1.2.3", patient_id="P<1>&"), replace(EVENT, study_ref="")):
            root = read(audit_message.message(replace(said, kind=kind, what="a reason"), ORIGIN))
            assert root.find("EventIdentification/EventID").get("csd-code") == row.event.value  # type: ignore[union-attr]
            requestors = [each.get("UserIsRequestor") for each in root.iter("ActiveParticipant")]
            assert requestors.count("true") == 1


def test_every_kind_that_the_program_records_is_said() -> None:
    """Whatever the program records is said by the schema, and what touches a patient or the controls as what it is."""
    text = "\n".join(path.read_text() for path in SOURCES.rglob("*.py") if "audit_message" not in path.name)
    kinds = set(re.findall(r'(?:\bAct\(|_act\(\s*session,\s*|_note\()\s*"([a-z][^"{]+)"', text))
    assert len(kinds) > 30
    for kind in kinds:
        read(audit_message.message(replace(EVENT, kind=kind), ORIGIN))
        if re.search("study|result|finding|instance|delivery|case|account|log-in|key|bundle|record|password", kind):
            assert audit_message.row(kind).event != audit_message.ACTIVITY, kind


def test_hostile_names_stay_inside_their_element() -> None:
    """A title or reason with markup, control characters or line breaks is text, and nothing else."""
    hostile = '"/><EventID/>\x00\x1b[2J\r\n<14>1 forged'
    root = read(audit_message.message(replace(EVENT, who=hostile, what=hostile, kind="association refused"), ORIGIN))
    assert len(root.findall(".//EventID")) == 1 and "forged" in root.find("ActiveParticipant").get("UserID", "")  # type: ignore[union-attr]
    framed = syslog.frame(audit_message.message(EVENT, ORIGIN), at=AT, host="bad host\n<1>", process=3)
    head = framed.split(b"\xef\xbb\xbf")[0]
    assert re.fullmatch(rb"\d+ <85>1 2026-01-02T03:04:05\.678\+00:00 badhost<1> busgen-cds 3 DICOM\+RFC3881 - ", head)
    length, _, rest = framed.partition(b" ")
    assert int(length) == len(rest)


def test_without_identifiers_a_study_goes_by_its_reference() -> None:
    """Patient id and Study Instance UID are said only where the site wants it; else our reference stands there."""
    bare = read(audit_message.message(EVENT, ORIGIN))
    ids = [each.get("ParticipantObjectID") for each in bare.iter("ParticipantObjectIdentification")]
    assert ids == ["f" * 32, "7"]
    named = read(audit_message.message(replace(EVENT, study_uid="1.2.3", patient_id="P-1"), ORIGIN))
    assert [e.get("ParticipantObjectID") for e in named.iter("ParticipantObjectIdentification")] == [
        "1.2.3",
        "P-1",
        "7",
    ]


# -- on the way


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "certificates")


def site(folder: Path, authority: Authority, port: int, **more: Any) -> Any:
    """As much of a site as sends its record on."""
    opened, keys = database.open(f"sqlite:///{folder / 'site.db'}"), Vault(vault.new_key())
    certificate, key, _ = authority.issues("busgen")
    said = settings.Syslog(
        host="127.0.0.1", port=port, authority=authority.path, certificate=certificate, key=key, **more
    )
    chosen = settings.Settings(
        site=settings.Site(name="Example", prevalence=0.1), listener=settings.Listener(allow=()),
        record=settings.Record(syslog=said), home=folder,
    )  # fmt: skip
    inbox = Inbox(folder / "inbox", opened, keys)
    return SimpleNamespace(settings=chosen, database=opened, inbox=inbox, results=Results(opened, keys))


def acts(site: Any, count: int) -> None:
    with site.database.transaction() as session:
        audit.record(session, *(Act("result viewed", "ann", f"{n}", "f" * 32) for n in range(count)))


def numbers(repository: Repository) -> list[int]:
    """Of the acts, as they arrived."""
    found = []
    for message in repository.messages:
        root = read(message.partition(b"\xef\xbb\xbf")[2])
        value = root.findall(".//ParticipantObjectDetail")[-1].get("value", "")
        found.append(json.loads(base64.b64decode(value))["number"])
    return found


def test_acts_reach_the_repository(tmp_path: Path, authority: Authority) -> None:
    """Every act arrives over TLS, in order, once, with the hash that it has in the record."""
    repository = Repository(authority)
    ours = site(tmp_path, authority, repository.port)
    acts(ours, 450)
    assert housekeeping.send_record(ours) == 450 and housekeeping.send_record(ours) == 0
    assert numbers(repository) == list(range(1, 451))
    hashes = {each.hash for each in audit.entries(ours.database, audit.Wanted())}
    for message in repository.messages[::50]:
        value = Xml.fromstring(message.partition(b"\xef\xbb\xbf")[2]).findall(".//ParticipantObjectDetail")[-1]
        assert json.loads(base64.b64decode(value.get("value", "")))["hash"] in hashes


def test_a_repository_that_is_away_or_dies_misses_nothing(tmp_path: Path, authority: Authority) -> None:
    """Acts wait in the record while the server is away; one that dies in between is told again; none is missing."""
    repository = Repository(authority)
    port = repository.port
    repository.goes_down()
    ours = site(tmp_path, authority, port)
    acts(ours, 30)
    with pytest.raises(Transient, match="cannot be reached"):
        housekeeping.send_record(ours)
    assert forwarding.progress(ours.database, f"127.0.0.1:{port}").behind == 30
    repository = Repository(authority, port)
    repository.dies_after = 10
    with pytest.raises(Transient):
        housekeeping.send_record(ours)
    assert forwarding.progress(ours.database, f"127.0.0.1:{port}").behind == 30
    repository.dies_after = None
    acts(ours, 5)
    assert housekeeping.send_record(ours) == 35
    arrived = numbers(repository)
    assert sorted(set(arrived)) == list(range(1, 36)) and arrived[-35:] == list(range(1, 36))
    assert [n for n, _ in itertools.groupby(arrived[-35:])] == list(range(1, 36))


def test_only_the_right_repository_is_told(tmp_path: Path, authority: Authority) -> None:
    """A server whose certificate another authority vouches for is told nothing, and the setting is named."""
    repository = Repository(Authority(tmp_path / "theirs", "stranger"))
    ours = site(tmp_path, authority, repository.port)
    acts(ours, 1)
    with pytest.raises(Misconfigured, match="certificate of the audit repository"):
        housekeeping.send_record(ours)
    assert repository.messages == []


def test_identifiers_travel_only_when_asked_for(tmp_path: Path, authority: Authority) -> None:
    """With `identifiers` a study's patient and UID travel; without, nothing that was sent to us does."""
    repository = Repository(authority)
    ours = site(tmp_path, authority, repository.port)
    kept(ours.inbox, "1.2.840.99.1", "PATIENT-4711")
    housekeeping.send_record(ours)
    assert not any(b"PATIENT-4711" in each or b"1.2.840.99.1" in each for each in repository.messages)
    (tmp_path / "named").mkdir()
    named = site(tmp_path / "named", authority, repository.port, identifiers=True)
    kept(named.inbox, "1.2.840.99.1", "PATIENT-4711")
    housekeeping.send_record(named)
    assert b"PATIENT-4711" in repository.messages[-1] and b"1.2.840.99.1" in repository.messages[-1]
