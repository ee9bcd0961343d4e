"""Objects → PACS, byte for byte as they were rendered, and what the PACS says about them.

Rules:
- An object is sent in the transfer syntax it has; only a PACS that takes nothing but implicit little endian gets that.
- What is said of each object is `Sent`: stored, or refused with the PACS's reason. One refused object stops no other.
- A PACS that cannot be reached, is full or breaks off is Transient. One that does not know us, or a certificate that
  does not hold, is Misconfigured and names the setting. Nothing is repeated here: the flow owns the clock.
- Stored is not yet safe: where the PACS offers storage commitment, it is asked (PS3.4 annex J).
- Every socket has TCP_NODELAY and a limit on every wait.
"""

from __future__ import annotations

import http.client
import io
import json
import logging
import secrets
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

from busgen_cds.dicom import reactor
from busgen_cds.dicom.association import CommitmentReport, event_report, event_type
from busgen_cds.dicom.commitment import Commitment, read_report
from busgen_cds.dicom.tls import client
from busgen_cds.errors import Misconfigured, Transient

logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # what it would say, we say with the study and the remedy

FIND = StudyRootQueryRetrieveInformationModelFind
REQUEST_COMMITMENT = 1  # PS3.4 J.3.2: action type


@dataclass(frozen=True)
class Tls:
    """Files in PEM. Without a certificate of our own the PACS is asked for its only."""

    authority: str
    certificate: str = ""
    key: str = ""
    check_host: bool = True


@dataclass(frozen=True)
class Node:
    """Another system, as the site's settings name it. With a `url`, objects go there by STOW-RS."""

    name: str
    ae_title: str = ""
    host: str = ""
    port: int = 0
    calling_ae: str = "BUSGEN_CDS"
    url: str = ""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tls: Tls | None = None
    timeout_seconds: float = 30.0

    def __str__(self) -> str:
        return f"{self.name} ({self.url or f'{self.ae_title}@{self.host}:{self.port}'})"

    def lies_at(self, address: str) -> bool:
        """Whether its host has this address."""
        try:
            found = {str(each[4][0]) for each in socket.getaddrinfo(self.host, None)}
        except OSError:
            return False
        return address.removeprefix("::ffff:") in found


class Sendable(Protocol):
    """A whole Part 10 file and how it is addressed: one of our own objects, or any other."""

    @property
    def sop_class_uid(self) -> str: ...
    @property
    def sop_instance_uid(self) -> str: ...
    @property
    def transfer_syntax_uid(self) -> str: ...
    @property
    def data(self) -> bytes: ...


class Sent(NamedTuple):
    sop_instance_uid: str
    stored: bool
    reason: str = ""


class Instance(NamedTuple):
    """How an object is addressed when it is asked after."""

    sop_class_uid: str
    sop_instance_uid: str


# PS3.4 B.2.3 and PS3.7 annex C: what a C-STORE status means for an operator.
REFUSALS = {
    0x0117: "invalid object instance",
    0x0122: "SOP class not supported",
    0x0124: "not authorised",
    0x0210: "duplicate invocation",
    0x0212: "mistyped argument",
    0xA900: "data set does not match its SOP class",
    0xC000: "cannot be understood",
}
PROCESSING_FAILURE, KNOWN_ALREADY = 0x0110, 0x0111  # to be tried again; stored
_WARNINGS = {0x0001, 0x0107, 0x0116, 0xB000, 0xB006, 0xB007}


def send(objects: Sequence[Sendable], to: Node) -> Iterator[Sent]:
    """Send each object; what the PACS says comes as it is said, so that nothing said is lost when it breaks off."""
    return _stow(objects, to) if to.url else _store(objects, to)


# ---- C-STORE


def _store(objects: Sequence[Sendable], to: Node) -> Iterator[Sent]:
    try:
        with _association(to, _storage_contexts(objects)) as association:
            failed: _Failed | None = None
            for number, each in enumerate(objects, 1):
                try:
                    sent = _store_one(association, each, number, to)
                except _Failed as this:  # it stops no other
                    failed = this
                else:
                    yield sent
            if failed is not None:
                raise failed
    except _NothingAccepted:
        for each in objects:
            yield Sent(each.sop_instance_uid, False, "SOP class not supported: no presentation context accepted")


def _store_one(association: Association, each: Sendable, number: int, to: Node) -> Sent:
    dataset = pydicom.dcmread(io.BytesIO(each.data))
    try:
        answer = association.send_c_store(dataset, msg_id=number % 65535 + 1)
    except ValueError:  # pynetdicom: no accepted context for this class and syntax
        return Sent(each.sop_instance_uid, False, "SOP class not supported: its presentation context was not accepted")
    except RuntimeError as gone:
        raise Transient(f"{to} closed the association while objects were sent.") from gone
    status = answer.get("Status") if answer else None
    if status is None:
        raise Transient(f"{to} did not answer a C-STORE within {to.timeout_seconds:g} s.")
    if status == 0 or status == KNOWN_ALREADY or status in _WARNINGS:
        return Sent(each.sop_instance_uid, True)
    if status == PROCESSING_FAILURE:
        raise _Failed(f"{to} failed while it stored an object (0x{status:04X}).")
    if 0xA700 <= status <= 0xA7FF:
        raise Transient(f"{to} is out of resources (0x{status:04X}).")
    return Sent(each.sop_instance_uid, False, f"{_refusal(status)} (0x{status:04X})")


def _refusal(status: int) -> str:
    if 0xA900 <= status <= 0xA9FF:
        return REFUSALS[0xA900]
    if 0xC000 <= status <= 0xCFFF:
        return REFUSALS[0xC000]
    return REFUSALS.get(status, "refused")


def _storage_contexts(objects: Iterable[Sendable]) -> list[PresentationContext]:
    pairs: dict[tuple[str, str], None] = {}
    for each in objects:
        pairs[each.sop_class_uid, each.transfer_syntax_uid] = None
        if each.transfer_syntax_uid == ExplicitVRLittleEndian:
            pairs[each.sop_class_uid, ImplicitVRLittleEndian] = None  # the one syntax every PACS must take
    return [build_context(sop_class, syntax) for sop_class, syntax in pairs]


# ---- STOW-RS (PS3.18 10.5)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Elsewhere our credentials are nobody's business, and what urllib sends there has lost the object."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _stow(objects: Sequence[Sendable], to: Node) -> Iterator[Sent]:
    """One object a request, so that a refused one stops no other."""
    for each in objects:
        code, body = _post(each, to)
        if code in (401, 403):
            raise Misconfigured(f"{to} does not let us in (HTTP {code}): check the credentials of this destination.")
        if 300 <= code < 400:
            raise Misconfigured(f"{to} sends us elsewhere (HTTP {code}): correct the destination's url.")
        if code == 404:
            raise Misconfigured(f"{to} has no STOW-RS service (HTTP 404): check the destination's url.")
        if code >= 500 or code in (408, 425, 429):
            raise Transient(f"{to} answered HTTP {code}.")
        reason = _stow_failure(body)
        stored = code < 300 and not reason
        yield Sent(each.sop_instance_uid, stored, "" if stored else reason or f"HTTP {code}")


def _post(each: Sendable, to: Node) -> tuple[int, bytes]:
    boundary = secrets.token_hex(16)  # nothing that was received can hold it
    head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    body = head + each.data + f"\r\n--{boundary}--\r\n".encode()
    request = urllib.request.Request(to.url.rstrip("/") + "/studies", data=body, method="POST")
    request.add_header("Content-Type", f'multipart/related; type="application/dicom"; boundary={boundary}')
    request.add_header("Accept", "application/dicom+json")
    for name, value in to.headers:
        request.add_header(name, value)
    context = client(to.tls, to) if to.tls else None
    asking = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=context))
    try:
        with asking.open(request, timeout=to.timeout_seconds) as answer:
            return int(answer.status), bytes(answer.read())
    except urllib.error.HTTPError as answer:
        return answer.code, _rest(answer)
    except (OSError, http.client.HTTPException) as gone:
        reason = getattr(gone, "reason", gone)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise Misconfigured(f"The certificate of {to} does not hold: {reason.verify_message}.") from gone
        if isinstance(gone, http.client.HTTPException) and not isinstance(gone, ConnectionError):
            raise Transient(f"{to} broke off its answer ({type(gone).__name__}).") from gone
        raise Transient(f"{to} cannot be reached: {reason}.") from gone


def _rest(answer: urllib.error.HTTPError) -> bytes:
    """The status says enough when the explanation breaks off."""
    try:
        return answer.read()
    except (OSError, http.client.HTTPException):
        return b""


def _stow_failure(body: bytes) -> str:
    """The reason of (0008,1198) Failed SOP Sequence, if the answer has one."""
    try:
        failed = json.loads(body)["00081198"]["Value"]
    except (ValueError, KeyError, TypeError):
        return ""
    codes = [item.get("00081197", {}).get("Value", [0])[0] for item in failed]
    return ", ".join(f"{_refusal(int(code))} (0x{int(code):04X})" for code in codes)


# ---- Storage commitment


def request_commitment(
    objects: Sequence[Instance], of: Node, *, transaction_uid: str, wait_seconds: float
) -> Commitment | None:
    """Ask a PACS to keep these objects for good. Its word may come on this association within the wait, or later on
    one of its own (then the listener hears it): None means that the request was taken and the word is not here yet."""
    heard: list[Commitment] = []
    arrived = threading.Event()

    def on_report(event: evt.Event) -> tuple[int, Dataset | None]:
        report = read_report(event.event_information)
        if report.transaction_uid == transaction_uid:
            heard.append(report)
            arrived.set()
        return 0, None

    contexts = [build_context(StorageCommitmentPushModel, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])]
    try:
        with _association(of, contexts, [(evt.EVT_N_EVENT_REPORT, on_report)]) as association:
            _ask(association, objects, of, transaction_uid)
            arrived.wait(wait_seconds)
    except _NothingAccepted as refused:
        raise Misconfigured(
            f"{of} does not offer storage commitment: set commitment = false for this destination."
        ) from refused
    return heard[0] if heard else None


def report_commitment(report: CommitmentReport, to: Node) -> None:
    """Tell a scanner, on an association of our own, what we keep of what it asked after (PS3.4 J.3.3)."""
    contexts = [build_context(StorageCommitmentPushModel, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])]
    we_provide = build_role(StorageCommitmentPushModel, scu_role=False, scp_role=True)
    try:
        with _association(to, contexts, roles=[we_provide]) as association:
            answer, _ = association.send_n_event_report(
                event_report(report),
                event_type(report),
                StorageCommitmentPushModel,
                StorageCommitmentPushModelInstance,
            )
    except (_NothingAccepted, ValueError) as refused:
        raise Misconfigured(
            f"{to} takes no reports on storage commitment: correct report_to of this sender."
        ) from refused
    except RuntimeError as gone:
        raise Transient(f"{to} closed the association before it was told of storage commitment.") from gone
    if not answer or answer.get("Status") != 0:
        raise Transient(f"{to} did not take a report on storage commitment.")


def _ask(association: Association, objects: Sequence[Instance], of: Node, transaction_uid: str) -> None:
    wanted = Dataset()
    wanted.TransactionUID = transaction_uid
    wanted.ReferencedSOPSequence = [_reference(each) for each in objects]
    try:
        answer, _ = association.send_n_action(
            wanted, REQUEST_COMMITMENT, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
        )
    except RuntimeError as gone:
        raise Transient(f"{of} closed the association before storage commitment was asked for.") from gone
    status = answer.get("Status") if answer else None
    if status != 0:
        said = "nothing" if status is None else f"0x{status:04X}"
        raise Transient(f"{of} answered {said} to a request for storage commitment.")


def _reference(each: Instance) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = each.sop_class_uid
    item.ReferencedSOPInstanceUID = each.sop_instance_uid
    return item


def new_transaction_uid() -> str:
    return str(generate_uid(prefix=None))


# ---- Queries


def patient_ids(study_uid: str, at: Node) -> tuple[str, ...]:
    """Whose study the PACS says it is now; nothing when it does not know the study."""
    wanted = _wanted("STUDY", study_uid)
    wanted.PatientID = ""
    return tuple(sorted({str(found.get("PatientID", "") or "").strip() for found in _find(wanted, at)}))


def patient_id_in(data: bytes) -> str:
    """Whose object a PACS will take this for: what its own bytes say."""
    return str(pydicom.dcmread(io.BytesIO(data), specific_tags=["PatientID"]).get("PatientID", "") or "").strip()


def count_images(study_uid: str, at: Node, *, modality: str = "US") -> int:
    """How many ultrasound instances of the study the PACS holds; what we sent there ourselves is not ultrasound."""
    wanted = _wanted("SERIES", study_uid)
    wanted.Modality = modality
    wanted.SeriesInstanceUID = ""
    wanted.NumberOfSeriesRelatedInstances = None
    series = [found for found in _find(wanted, at) if str(found.get("Modality", modality)) == modality]
    return sum(_count_series(study_uid, found, at) for found in series)


def _count_series(study_uid: str, series: Dataset, at: Node) -> int:
    stated = series.get("NumberOfSeriesRelatedInstances")
    if stated not in (None, ""):
        return int(stated)
    wanted = _wanted("IMAGE", study_uid)  # the count is optional (PS3.4 C.6.2.1): then count the instances
    wanted.SeriesInstanceUID = series.SeriesInstanceUID
    wanted.SOPInstanceUID = ""
    return sum(1 for _ in _find(wanted, at))


def _wanted(level: str, study_uid: str) -> Dataset:
    wanted = Dataset()
    wanted.QueryRetrieveLevel = level
    wanted.StudyInstanceUID = study_uid
    return wanted


def _find(wanted: Dataset, at: Node) -> list[Dataset]:
    found = []
    try:
        with _association(at, [build_context(FIND, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])]) as association:
            for status, answer in association.send_c_find(wanted, FIND):
                code = status.get("Status") if status else None
                if code is None or code not in (0x0000, 0xFF00, 0xFF01):
                    said = "nothing" if code is None else f"0x{code:04X}"
                    raise Transient(f"{at} answered {said} to a C-FIND.")
                if answer is not None:
                    found.append(answer)
    except _NothingAccepted as refused:
        raise Misconfigured(f"{at} does not answer queries (C-FIND): choose another query node.") from refused
    except RuntimeError as gone:
        raise Transient(f"{at} closed the association during a C-FIND.") from gone
    return found


def echo(node: Node) -> float:
    """Seconds that a C-ECHO took."""
    began = time.monotonic()
    try:
        with _association(node, [build_context(Verification)]) as association:
            answer = association.send_c_echo()
    except _NothingAccepted as refused:
        raise Misconfigured(f"{node} does not accept C-ECHO.") from refused
    except RuntimeError as gone:
        raise Transient(f"{node} closed the association during a C-ECHO.") from gone
    if not answer or answer.get("Status") != 0:
        raise Transient(f"{node} did not answer a C-ECHO with success.")
    return time.monotonic() - began


# ---- Associations


class _Failed(Transient):
    """A PACS failed at one object, and may take it later."""


class _NothingAccepted(Exception):
    """The peer answered, and takes none of the presentation contexts proposed."""


@contextmanager
def _association(
    node: Node,
    contexts: list[PresentationContext],
    handlers: Sequence[tuple[Any, Any]] = (),
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
) -> Iterator[Association]:
    entity = AE(ae_title=node.calling_ae)
    entity.connection_timeout = entity.acse_timeout = min(10.0, node.timeout_seconds)
    entity.dimse_timeout = entity.network_timeout = node.timeout_seconds
    tls = (client(node.tls, node), node.host) if node.tls else None
    try:
        association = entity.associate(
            node.host,
            node.port,
            contexts=contexts,
            ae_title=node.ae_title,
            tls_args=tls,
            ext_neg=list(roles),
            evt_handlers=[(evt.EVT_CONN_OPEN, _no_delay), (evt.EVT_CONN_OPEN, reactor.stands_still), *handlers],
        )
    except OSError as wrong:
        raise Misconfigured(f"The address of {node} cannot be used: {wrong}.") from wrong
    if not association.is_established:
        raise _why_not(association, node)
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def _no_delay(event: evt.Event) -> None:
    connected = event.assoc.dul.socket
    if connected and connected.socket:
        connected.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _why_not(association: Association, node: Node) -> Exception:
    if association.rejected_contexts and not association.accepted_contexts:
        return _NothingAccepted()
    if not association.is_rejected and node.tls:
        _shake_hands(node, node.tls)  # pynetdicom keeps the reason to itself
    if not association.is_rejected:
        return Transient(
            f"{node} cannot be reached, or does not answer: check host, port, firewall, and that our title "
            f"{node.calling_ae!r} is known there."
        )
    answer = association.acceptor.primitive
    source, reason = (answer.result_source, answer.diagnostic) if answer else (0, 0)
    if source == 1 and reason == 3:  # PS3.8 table 9-21
        return Misconfigured(f"{node} does not know our AE title {node.calling_ae!r}: enter it there.")
    if source == 1 and reason == 7:
        return Misconfigured(f"{node} says that it is not {node.ae_title!r}: set ae_title of this destination.")
    return Transient(f"{node} rejected the association (source {source}, reason {reason}).")


def _shake_hands(node: Node, tls: Tls) -> None:
    """Whatever is wrong with the certificates is a setting to change, here or there."""
    try:
        with socket.create_connection((node.host, node.port), timeout=min(10.0, node.timeout_seconds)) as connection:
            client(tls, node).wrap_socket(connection, server_hostname=node.host).close()
    except ssl.SSLCertVerificationError as wrong:
        raise Misconfigured(f"The certificate of {node} does not hold: {wrong.verify_message}.") from wrong
    except ssl.SSLError as wrong:
        raise Misconfigured(f"{node} does not speak TLS with us: {wrong.reason}.") from wrong
    except OSError:
        return
