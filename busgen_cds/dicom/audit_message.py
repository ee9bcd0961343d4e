"""An act of the record as a DICOM audit message (PS3.15 A.5): what an audit repository of the hospital understands.

Rules:
- Each kind of act has one row in `EVENTS`; a kind that has none yet is sent as an application activity, never dropped.
- Codes are DICOM's (PS3.16 annex D); what DICOM has no code for carries ours, named as ours.
- The act's number and hash travel along, so that what arrived can be held against the record.
- Identifiers stand in it only when they are given: without them a study is named by our opaque reference.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple
from xml.etree import ElementTree as Xml

OURS = "99BUSGEN"


class Code(NamedTuple):
    value: str
    meaning: str
    scheme: str = "DCM"


class Row(NamedTuple):
    """How a kind of act is said: event, its type, action (PS3.15 A.5.2: C, R, U, D, E) and outcome."""

    event: Code
    type: Code | None = None
    action: str = "E"
    outcome: int = 0  # 0 success, 4 minor failure, 8 serious failure, 12 major failure
    about: str = ""  # what `what` names, if it is an object of its own: "account", "node"


@dataclass(frozen=True)
class Event:
    number: int
    at: datetime
    kind: str
    who: str
    what: str
    hash: str
    study_ref: str = ""
    study_uid: str = field(default="", repr=False)
    patient_id: str = field(default="", repr=False)
    detail: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Origin:
    """Who says it."""

    site: str
    host: str
    ae_title: str


ACTIVITY, USED = Code("110100", "Application Activity"), Code("110101", "Audit Log Used")
ACCESSED, TRANSFERRED = Code("110103", "DICOM Instances Accessed"), Code("110104", "DICOM Instances Transferred")
DELETED, EXPORT = Code("110105", "DICOM Study Deleted"), Code("110106", "Export")
ALERT, AUTHENTICATION = Code("110113", "Security Alert"), Code("110114", "User Authentication")
BEGINNING = Code("110102", "Begin Transferring DICOM Instances")
LOGIN, LOGOUT, NODE = Code("110122", "Login"), Code("110123", "Logout"), Code("110126", "Node Authentication")
SOFTWARE, SECURITY = Code("110131", "Software Configuration"), Code("110129", "Security Configuration")
ROLES, ATTRIBUTES = Code("110136", "Security Roles Changed"), Code("110137", "User Security Attributes Changed")
RESTRICTED = Code("110132", "Use of Restricted Function")

SOURCE, DESTINATION = Code("110153", "Source Role ID"), Code("110152", "Destination Role ID")
APPLICATION = Code("110150", "Application")
STUDY_UID = Code("110180", "Study Instance UID")
PATIENT_NUMBER, USER_ID, URI = (
    Code("2", "Patient Number", "RFC-3881"),
    Code("11", "User Identifier", "RFC-3881"),
    Code("12", "URI", "RFC-3881"),
)

EVENTS: Mapping[str, Row] = {
    "association accepted": Row(BEGINNING),
    "association refused": Row(ALERT, NODE, outcome=4),
    "association broken": Row(BEGINNING, outcome=4),
    "transfer broken": Row(TRANSFERRED, action="C", outcome=4),
    "instance received": Row(TRANSFERRED, action="C"),
    "instance received again": Row(TRANSFERRED, action="R"),
    "instance set aside": Row(TRANSFERRED, action="C", outcome=4),
    "instance quarantined": Row(TRANSFERRED, action="C", outcome=4),
    "instance refused": Row(TRANSFERRED, action="C", outcome=4),
    "quarantined discarded": Row(DELETED, action="D"),
    "object sent": Row(TRANSFERRED, action="R"),
    "object confirmed": Row(TRANSFERRED, action="R"),
    "object refused": Row(TRANSFERRED, action="R", outcome=4),
    "object waiting": Row(TRANSFERRED, action="R", outcome=4),
    "delivery parked": Row(TRANSFERRED, action="R", outcome=8),
    "delivery asked for again": Row(TRANSFERRED, action="R"),
    "delivery taken up again": Row(TRANSFERRED, action="R"),
    "result made": Row(ACCESSED, action="C"),
    "category fell": Row(ACCESSED, action="U"),
    "result viewed": Row(ACCESSED, action="R"),
    "images viewed": Row(ACCESSED, action="R"),
    "finding agreed": Row(ACCESSED, action="U"),
    "finding edited": Row(ACCESSED, action="U"),
    "finding rejected": Row(ACCESSED, action="U"),
    "study held": Row(ACCESSED, action="U"),
    "study released": Row(ACCESSED, action="U"),
    "study parked": Row(ACCESSED, outcome=8),
    "study taken up again": Row(ACCESSED),
    "study shredded": Row(DELETED, action="D"),
    "record exported": Row(USED, action="R"),
    "record verified": Row(USED, action="R"),
    "site key changed": Row(ALERT, SECURITY, action="U"),
    "older site keys retired": Row(ALERT, SECURITY, action="D"),
    "engine stopped": Row(ALERT, SOFTWARE, outcome=12),
    "engine resumed": Row(ALERT, SOFTWARE),
    "worker taken over": Row(ACTIVITY),
    "node asked": Row(ACTIVITY, about="node"),
    "log-in": Row(AUTHENTICATION, LOGIN),
    "log-in refused": Row(AUTHENTICATION, LOGIN, outcome=4),
    "password refused": Row(AUTHENTICATION, LOGIN, outcome=4),
    "log-out": Row(AUTHENTICATION, LOGOUT),
    "account made": Row(ALERT, ATTRIBUTES, "C", about="account"),
    "account disabled": Row(ALERT, ATTRIBUTES, "U", about="account"),
    "account enabled": Row(ALERT, ATTRIBUTES, "U", about="account"),
    "account locked": Row(ALERT, ATTRIBUTES, "U", 4, about="account"),
    "account unlocked": Row(ALERT, ATTRIBUTES, "U", about="account"),
    "roles changed": Row(ALERT, ROLES, "U", about="account"),
    "password changed": Row(ALERT, ATTRIBUTES, "U", about="account"),
    "second factor set": Row(ALERT, ATTRIBUTES, "U", about="account"),
    "second factor removed": Row(ALERT, ATTRIBUTES, "U", about="account"),
    "token made": Row(ALERT, ATTRIBUTES, "C"),
    "token revoked": Row(ALERT, ATTRIBUTES, "D"),
    "refused": Row(ALERT, RESTRICTED, outcome=4),
}
_WORDS: tuple[tuple[str, Row], ...] = (
    ("bundle", Row(ALERT, SOFTWARE, "U")),
    ("key", Row(ALERT, SECURITY, "U")),
    ("passphrase", Row(ALERT, SECURITY, "U")),
    ("log-in", Row(AUTHENTICATION, LOGIN)),
    ("account", Row(ALERT, ATTRIBUTES, "U", about="account")),
    ("record", Row(USED, action="R")),
    ("export", Row(EXPORT, action="R")),
    *((word, Row(ACCESSED, action="U")) for word in ("case", "pathology", "study", "result", "finding")),
)


def row(kind: str) -> Row:
    """How a kind is said; what has no row of its own goes by what it is about."""
    if kind in EVENTS:
        return EVENTS[kind]
    return next((found for word, found in _WORDS if word in kind), Row(ACTIVITY))


def message(event: Event, origin: Origin) -> bytes:
    """The XML document (PS3.15 A.5.1), in UTF-8."""
    said = row(event.kind)
    root = Xml.Element("AuditMessage")
    _identification(root, event, said)
    _participants(root, event, said, origin)
    values = {"AuditEnterpriseSiteID": _token(origin.site), "AuditSourceID": origin.host}
    source = Xml.SubElement(root, "AuditSourceIdentification", values)
    Xml.SubElement(source, "AuditSourceTypeCode", {"csd-code": "4"})  # an application server
    _objects(root, event, said)
    return bytes(Xml.tostring(root, "utf-8", xml_declaration=True))


def _identification(root: Xml.Element, event: Event, said: Row) -> None:
    at = event.at.isoformat(timespec="milliseconds")
    made = Xml.SubElement(
        root,
        "EventIdentification",
        EventActionCode=said.action,
        EventDateTime=at,
        EventOutcomeIndicator=str(said.outcome),
    )
    _code(made, "EventID", said.event)
    if said.type:
        _code(made, "EventTypeCode", said.type)
    _code(made, "EventTypeCode", Code(_token(event.kind), event.kind, OURS))
    if said.outcome and event.what:
        Xml.SubElement(made, "EventOutcomeDescription").text = _token(event.what)


def _participants(root: Xml.Element, event: Event, said: Row, origin: Origin) -> None:
    sending = event.kind.startswith(("object", "delivery"))
    transfer = said.event in (TRANSFERRED, BEGINNING)
    if sending and event.detail.get("to"):
        _participant(root, origin.ae_title, requests=True, role=SOURCE, at=origin.host)
        _participant(root, str(event.detail["to"]), requests=False, role=DESTINATION)
        return
    address = str(event.detail.get("address") or "")
    _participant(root, event.who or "unknown", requests=True, role=SOURCE if transfer else None, at=address)
    _participant(root, origin.ae_title, requests=False, role=DESTINATION if transfer else APPLICATION, at=origin.host)


def _participant(root: Xml.Element, user: str, *, requests: bool, role: Code | None, at: str = "") -> None:
    values = {"UserID": _token(user), "UserIsRequestor": str(requests).lower()}
    if at:  # PS3.15 table A.5-2: 1 a machine's name, 2 an IP address
        is_address = ":" in at or at.replace(".", "").isdigit()
        values |= {"NetworkAccessPointID": at, "NetworkAccessPointTypeCode": "2" if is_address else "1"}
    made = Xml.SubElement(root, "ActiveParticipant", values)
    if role:
        _code(made, "RoleIDCode", role)


def _objects(root: Xml.Element, event: Event, said: Row) -> None:
    if event.study_ref:
        id_type = STUDY_UID if event.study_uid else Code("study-reference", "Reference of the study at this site", OURS)
        _object(root, event.study_uid or event.study_ref, id_type, kind="2", role="3", name=event.study_ref)
    if event.patient_id:
        _object(root, event.patient_id, PATIENT_NUMBER, kind="1", role="1", name="")
    if said.about == "account" and event.what:
        _object(root, event.what, USER_ID, kind="1", role="11", name=event.what)
    if said.event == USED:  # PS3.15 table A.5.3.2-1 asks for the log that was used
        _object(root, "record-of-acts", URI, kind="2", role="13", name="Security Audit Log")
    act = {"number": event.number, "hash": event.hash, "what": event.what, "detail": dict(event.detail)}
    made = _object(root, str(event.number), Code("act", "Act of the record", OURS), kind="4", role="26", name="act")
    value = base64.b64encode(json.dumps(act, sort_keys=True, default=str).encode()).decode()
    Xml.SubElement(made, "ParticipantObjectDetail", type="act", value=value)


def _object(root: Xml.Element, identifier: str, id_type: Code, *, kind: str, role: str, name: str) -> Xml.Element:
    made = Xml.SubElement(
        root, "ParticipantObjectIdentification", ParticipantObjectID=_token(identifier), ParticipantObjectTypeCode=kind,
        ParticipantObjectTypeCodeRole=role,
    )  # fmt: skip
    _code(made, "ParticipantObjectIDTypeCode", id_type)
    Xml.SubElement(made, "ParticipantObjectName").text = _token(name)
    return made


def _code(parent: Xml.Element, name: str, code: Code) -> None:
    values = {"csd-code": code.value, "codeSystemName": code.scheme, "originalText": code.meaning}
    Xml.SubElement(parent, name, values)


def _token(text: str) -> str:
    """XML 1.0 has no control characters; what a peer calls itself may."""
    kept = "".join(
        c if c in "\t\n\r" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c > "\uffff" else "?" for c in text
    )
    return " ".join(kept.split())
