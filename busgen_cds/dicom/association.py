"""One association with a scanner: who may open it, and what is done with what it sends (PS3.4 annexes B and J).

Rules:
- Success for a C-STORE is answered only when `Incoming.keep` has returned: the bytes survive a power cut.
- What arrives is passed on as encoded, while it arrives; nothing is decoded but a few identifiers (`peek`).
- A data set that does not hold together gets an error status and stays in quarantine with the reason.
  Whatever goes wrong with one instance, the next one is received.
- Each outcome of a C-STORE is a row of `STATUSES`; the conformance statement is made from these tables.
"""

from __future__ import annotations

import io
import logging
import struct
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Literal, NamedTuple, Protocol

import pydicom
import pydicom.config
from pydicom import uid as uids
from pydicom.dataset import Dataset

from busgen_cds.arrival import Arrival, Incoming, Kept, NoRoom
from busgen_cds.dicom import identity, peek
from busgen_cds.dicom import upper_layer as ul
from busgen_cds.dicom.commitment import Commitment, Speaker, read_report
from busgen_cds.dicom.upper_layer import Accepted, Command, Fragment, Gone, Proposed, Released, Request, Wire

log = logging.getLogger(__name__)

VERIFICATION = "1.2.840.10008.1.1"
COMMITMENT = "1.2.840.10008.1.20.1"
COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"

# What is stored: the SOP classes that an ultrasound scanner sends, current and retired.
STORED: Mapping[str, str] = {
    "1.2.840.10008.5.1.4.1.1.6.1": "Ultrasound Image Storage",
    "1.2.840.10008.5.1.4.1.1.6": "Ultrasound Image Storage (Retired)",
    "1.2.840.10008.5.1.4.1.1.3.1": "Ultrasound Multi-frame Image Storage",
    "1.2.840.10008.5.1.4.1.1.3": "Ultrasound Multi-frame Image Storage (Retired)",
    "1.2.840.10008.5.1.4.1.1.6.2": "Enhanced US Volume Storage",
    "1.2.840.10008.5.1.4.1.1.7": "Secondary Capture Image Storage",
    "1.2.840.10008.5.1.4.1.1.7.1": "Multi-frame Single Bit Secondary Capture Image Storage",
    "1.2.840.10008.5.1.4.1.1.7.2": "Multi-frame Grayscale Byte Secondary Capture Image Storage",
    "1.2.840.10008.5.1.4.1.1.7.3": "Multi-frame Grayscale Word Secondary Capture Image Storage",
    "1.2.840.10008.5.1.4.1.1.7.4": "Multi-frame True Color Secondary Capture Image Storage",
    "1.2.840.10008.5.1.4.1.1.88.11": "Basic Text SR Storage",
    "1.2.840.10008.5.1.4.1.1.88.22": "Enhanced SR Storage",
    "1.2.840.10008.5.1.4.1.1.88.33": "Comprehensive SR Storage",
    "1.2.840.10008.5.1.4.1.1.88.34": "Comprehensive 3D SR Storage",
    "1.2.840.10008.5.1.4.1.1.88.35": "Extensible SR Storage",
}
_UNCOMPRESSED = (uids.ExplicitVRLittleEndian, uids.ImplicitVRLittleEndian)
_LAST_RESORT = uids.ExplicitVRBigEndian

Outcome = Literal[
    "kept", "no room", "too large", "other class", "other instance", "corrupt", "duplicate", "unsupported", "failed"
]
# PS3.4 table B.2-1 and PS3.7 annex C: what each outcome of a C-STORE is answered with
STATUSES: Mapping[Outcome, int] = {
    "kept": 0x0000,
    "no room": 0xA700,
    "too large": 0xA700,
    "other class": 0xA900,
    "other instance": 0xA900,
    "corrupt": 0xC000,
    "duplicate": 0x0111,
    "unsupported": 0x0122,
    "failed": 0x0110,
}
UNRECOGNISED_OPERATION = 0x0211
REFUSED = "association refused"

_C_STORE, _C_ECHO, _N_EVENT, _N_ACTION, _C_CANCEL = 0x0001, 0x0030, 0x0100, 0x0130, 0x0FFF
_RESPONSE = 0x8000
_LONGEST_ACTION = 16 << 20
_MOST_UNHEARD = 50_000  # instances in reports that a peer has not answered
_UNREADABLE = (AttributeError, ValueError, KeyError, TypeError, struct.error, EOFError, NotImplementedError)


@dataclass(frozen=True)
class Peer:
    """Who may connect: a title, from these addresses, and with this certificate when it comes by TLS."""

    ae_title: str
    addresses: tuple[str, ...] = ()  # networks such as 10.1.2.0/24; empty: from anywhere
    certificate_sha256: str = ""  # of the DER form, in hexadecimal; empty: it has none, and cannot use TLS


@dataclass(frozen=True)
class Rules:
    """Who may open an association, and how much they may send."""

    ae_title: str = "BUSGEN"
    check_called_ae: bool = False
    peers: tuple[Peer, ...] | None = None  # None: any title (a demo); an empty tuple: nobody
    plain_from: tuple[str, ...] = ("127.0.0.0/8", "::1/128")  # networks that may speak without TLS
    most_data_set_bytes: int = 4 << 30
    limits: ul.Limits = field(default_factory=ul.Limits)


@dataclass(frozen=True)
class Caller:
    """The other end of a connection, before it has said its name."""

    address: str
    secure: bool = False
    certificate_sha256: str = ""


@dataclass(frozen=True)
class Noted:
    """Something about an association that belongs into the record of acts."""

    kind: str
    who: str
    what: str
    address: str
    called: str = ""  # by which title it called us


@dataclass(frozen=True)
class CommitmentRequest:
    """Which instances a scanner wants to delete once we answer for them: (SOP class, SOP instance)."""

    calling_ae: str
    address: str
    transaction_uid: str
    instances: tuple[tuple[str, str], ...] = field(repr=False)


@dataclass(frozen=True)
class CommitmentReport:
    request: CommitmentRequest
    kept: tuple[tuple[str, str], ...] = field(repr=False)
    failed: tuple[tuple[str, str, int], ...] = field(repr=False)  # with PS3.3 C.14.1.1 failure reason


@dataclass(frozen=True)
class Desk:
    """Whom the listener hands things to."""

    receive: Callable[[Arrival], Incoming]
    arrived: Callable[[str], None]
    association_closed: Callable[[frozenset[str]], None]
    commitment: Callable[[CommitmentRequest], CommitmentReport]
    report_later: Callable[[CommitmentReport], bool] = lambda _report: (
        False
    )  # on another association; False: no address
    noted: Callable[[Noted], None] = lambda _noted: None
    # a PACS's word on what we sent it; False: it was another that was asked
    committed: Callable[[Commitment, Speaker], bool] = lambda _word, _speaker: True


class Places(Protocol):
    """How many associations there may be at once; counted over all processes."""

    def take(self, peer: str) -> bool: ...
    def leave(self, peer: str) -> None: ...


class _Answer(NamedTuple):
    outcome: Outcome
    comment: str = ""


def refusal(request: Request, caller: Caller, rules: Rules) -> tuple[str, tuple[int, int, int]] | None:
    """Why this association may not be, with the rejection that says so; None when it may."""
    if not request.version & 1:
        return "unknown protocol version", ul.VERSION_NOT_SUPPORTED
    if request.application_context != ul.APPLICATION_CONTEXT:
        return "unknown application context", ul.CONTEXT_NAME_NOT_SUPPORTED
    if rules.check_called_ae and request.called_ae != rules.ae_title:
        return "it calls another title than ours", ul.CALLED_AE_NOT_RECOGNISED
    if not caller.secure and not _within(caller.address, rules.plain_from):
        return "no plain DICOM from this address", ul.CALLING_AE_NOT_RECOGNISED
    if rules.peers is None:
        return None
    named = [peer for peer in rules.peers if peer.ae_title == request.calling_ae]
    if not named:
        return "its title is not on the list", ul.CALLING_AE_NOT_RECOGNISED
    here = [peer for peer in named if not peer.addresses or _within(caller.address, peer.addresses)]
    if not here:
        return "its title may not come from this address", ul.CALLING_AE_NOT_RECOGNISED
    if not any(_speaks_for(peer, caller) for peer in here):
        why = "its certificate does not speak for its title" if caller.secure else "its title must come by TLS"
        return why, ul.CALLING_AE_NOT_RECOGNISED
    return None


def _speaks_for(peer: Peer, caller: Caller) -> bool:
    """A title that is bound to a certificate is not believed without it: plain DICOM must be no way around."""
    if not caller.secure:
        return not peer.certificate_sha256
    return peer.certificate_sha256.lower() == caller.certificate_sha256


def negotiate(proposed: Sequence[Proposed]) -> list[Accepted]:
    """Every transfer syntax is taken, in the order of the peer's preference, for every SOP class that we know."""
    answers = []
    for context in proposed:
        known = context.abstract_syntax in STORED or context.abstract_syntax in (VERIFICATION, COMMITMENT)
        syntax = _choose(context)
        result = 3 if not known else 4 if not syntax else 0
        answers.append(Accepted(context.id, result, context.abstract_syntax, syntax or uids.ImplicitVRLittleEndian))
    return answers


def _choose(context: Proposed) -> str:
    if context.abstract_syntax not in STORED:
        return next((str(syntax) for syntax in _UNCOMPRESSED if syntax in context.transfer_syntaxes), "")
    offered = [syntax for syntax in context.transfer_syntaxes if peek.is_uid(syntax)]
    return next((syntax for syntax in offered if syntax != _LAST_RESORT), offered[0] if offered else "")


def _within(address: str, networks: Sequence[str]) -> bool:
    here = ip_address(address.partition("%")[0])
    here = getattr(here, "ipv4_mapped", None) or here
    return any(here in ip_network(network) for network in networks)


class _Seldom:
    """Lets the same thing through once a while."""

    def __init__(self, seconds: float, most: int = 1000) -> None:
        self._seconds, self._most = seconds, most
        self._seen: dict[Hashable, float] = {}
        self._lock = threading.Lock()

    def take(self, what: Hashable) -> bool:
        now = time.monotonic()
        with self._lock:
            if now - self._seen.get(what, -self._seconds) < self._seconds:
                return False
            if len(self._seen) >= self._most:
                self._seen.clear()
            self._seen[what] = now
        return True


_LOGGED = _Seldom(60)


class Association:
    """From the first word of a peer to its last."""

    def __init__(self, wire: Wire, caller: Caller, rules: Rules, desk: Desk, places: Places) -> None:
        self._wire, self._caller, self._rules, self._desk, self._places = wire, caller, rules, desk, places
        self._contexts: dict[int, Accepted] = {}
        self._calling, self._called = "", ""
        self._studies: set[str] = set()
        self._fragments: Iterator[Fragment] = iter(())
        self._events = 0
        self._unheard: dict[int, CommitmentReport] = {}  # reports that the peer has not answered, by message id

    def run(self, admitted: Callable[[], None] = lambda: None) -> None:
        request = self._wire.request()
        self._calling, self._called = request.calling_ae, request.called_ae
        refused = refusal(request, self._caller, self._rules)
        if refused is not None:
            self._refuse(*refused)
            return
        place = f"{self._calling}@{self._caller.address}"
        if not self._places.take(place):
            self._refuse("too many associations", ul.LOCAL_LIMIT_EXCEEDED)
            return
        try:
            admitted()
            self._note("association accepted", "")
            self._converse(request)
        finally:
            self._places.leave(place)
            self._report_unheard()
            self._desk.association_closed(frozenset(self._studies))

    def _refuse(self, why: str, how: tuple[int, int, int]) -> None:
        self._note(REFUSED, why)
        if _LOGGED.take((self._caller.address, why)):
            names = (self._calling, self._called, self._caller.address)
            log.warning("Refused %r, who called %r from %s: %s; `busgen-cds queue` says what to do", *names, why)
        self._wire.reject(how)

    def _note(self, kind: str, what: str) -> None:
        self._desk.noted(Noted(kind, self._calling, what, self._caller.address, self._called))

    def _converse(self, request: Request) -> None:
        answers = negotiate(request.contexts)
        self._contexts = {answer.id: answer for answer in answers if answer.result == 0}
        # PS3.4 J.3: a scanner asks for commitment as SCU; a PACS that reports on what we sent it is the SCP
        roles = {sop_class: role for sop_class, role in request.roles.items() if sop_class == COMMITMENT}
        self._wire.accept(request, answers, roles)
        self._fragments = self._wire.fragments()
        try:
            while True:
                self._serve()
        except Released:
            return
        except Gone as gone:
            self._note("association broken", str(gone))

    def _serve(self) -> None:
        """One message."""
        context_id, raw = self._command()
        try:
            command = ul.parse_command(raw)
            kind = ul.number(command, ul.COMMAND_FIELD)
            has_data = ul.number(command, ul.DATA_SET_TYPE) != ul.NO_DATA_SET
            if not kind & _RESPONSE and kind != _C_CANCEL:
                ul.number(command, ul.MESSAGE_ID)
        except (KeyError, ValueError, struct.error):
            self._wire.abort(ul.INVALID_PARAMETER)
            raise Gone("It sent a command that cannot be understood") from None
        context = self._contexts.get(context_id)
        if context is None:
            self._wire.abort(ul.INVALID_PARAMETER)
            raise Gone("It used a presentation context that was not accepted")
        if kind == _C_STORE and has_data:
            self._store(context, command)
        elif kind == _C_ECHO and not has_data:
            self._answer(context, command, 0x0000)
        elif kind == _N_ACTION and has_data and context.abstract_syntax == COMMITMENT:
            self._action(context, command)
        elif kind == _N_EVENT and has_data and context.abstract_syntax == COMMITMENT:
            self._event(context, command)
        else:
            self._other(context, command, kind, has_data)

    def _command(self) -> tuple[int, bytes]:
        parts = bytearray()
        for fragment in self._fragments:
            if not fragment.is_command:
                self._wire.abort(ul.UNEXPECTED_PDU)
                raise Gone("It sent a data set without a command")
            parts += fragment.data
            if len(parts) > ul._LONGEST_COMMAND:
                self._wire.abort(ul.INVALID_PARAMETER)
                raise Gone("It sent a command without an end")
            if fragment.is_last:
                return fragment.context_id, bytes(parts)
        raise Gone("It is over")

    def _data(self, context: Accepted) -> Iterator[memoryview]:
        for fragment in self._fragments:
            if fragment.is_command or fragment.context_id != context.id:
                self._wire.abort(ul.UNEXPECTED_PDU)
                raise Gone("It began another message within a data set")
            yield fragment.data
            if fragment.is_last:
                return

    # -- C-STORE ---------------------------------------------------------------------------------------------------

    def _store(self, context: Accepted, command: Command) -> None:
        arrival = Arrival(
            calling_ae=self._calling,
            address=self._caller.address,
            sop_class_uid=ul.text(command, ul.AFFECTED_SOP_CLASS),
            sop_instance_uid=ul.text(command, ul.AFFECTED_SOP_INSTANCE),
            transfer_syntax_uid=context.transfer_syntax,
            called_ae=self._called,
        )
        transfer = _Transfer(arrival, self._desk, self._rules.most_data_set_bytes)
        if context.abstract_syntax not in STORED or arrival.sop_class_uid not in STORED:
            transfer.refuse(_Answer("unsupported", "This SOP class is not stored here"))
        try:
            for piece in self._data(context):
                transfer.take(piece)
                if transfer.size > 2 * self._rules.most_data_set_bytes:
                    self._wire.abort()
                    raise Gone("It sends a data set without an end")
        except (Gone, Released):
            transfer.abandon()
            self._note("transfer broken", f"after {transfer.size} bytes; not acknowledged, the sender still has it")
            raise
        answer = transfer.end()
        if transfer.kept is not None:
            self._studies.add(transfer.kept.study_ref)
        if answer.outcome not in ("kept", "corrupt"):
            self._note("instance refused", f"{answer.outcome}: {answer.comment}")
        self._answer(context, command, STATUSES[answer.outcome], answer.comment)
        if transfer.kept is not None and answer.outcome == "kept":
            self._desk.arrived(transfer.kept.study_ref)

    def _answer(self, context: Accepted, command: Command, status: int, comment: str = "") -> None:
        fields: dict[int, int | str] = {
            ul.COMMAND_FIELD: ul.number(command, ul.COMMAND_FIELD) | _RESPONSE,
            ul.RESPONDED_TO: ul.number(command, ul.MESSAGE_ID),
            ul.DATA_SET_TYPE: ul.NO_DATA_SET,
            ul.STATUS: status,
        }
        sop_class = ul.text(command, ul.AFFECTED_SOP_CLASS) or ul.text(command, ul.REQUESTED_SOP_CLASS)
        instance = ul.text(command, ul.AFFECTED_SOP_INSTANCE) or ul.text(command, ul.REQUESTED_SOP_INSTANCE)
        if sop_class:
            fields[ul.AFFECTED_SOP_CLASS] = sop_class
        if instance:
            fields[ul.AFFECTED_SOP_INSTANCE] = instance
        if comment:
            fields[ul.ERROR_COMMENT] = comment[:64]  # PS3.7 annex C: LO
        self._wire.send_message(context.id, ul.build_command(fields))

    def _other(self, context: Accepted, command: Command, kind: int, has_data: bool) -> None:
        if has_data:
            for _ in self._data(context):
                pass
        if kind == _N_EVENT | _RESPONSE and len(command.get(ul.RESPONDED_TO, b"")) == 2:
            self._unheard.pop(ul.number(command, ul.RESPONDED_TO), None)
            return
        if kind == _C_CANCEL:
            return
        if kind & _RESPONSE:
            self._wire.abort(ul.UNEXPECTED_PDU)
            raise Gone("It answers what nobody asked")
        self._answer(context, command, UNRECOGNISED_OPERATION)

    # -- storage commitment ----------------------------------------------------------------------------------------

    def _event(self, context: Accepted, command: Command) -> None:
        """A PACS says, on an association of its own, what it keeps of what we sent it."""
        raw = self._all_data(context)
        try:
            word = read_report(_read(raw, context.transfer_syntax))
        except _UNREADABLE:
            self._answer(context, command, 0x0115, "The report on commitment cannot be understood")
            return
        if self._desk.committed(word, Speaker(self._calling, self._caller.address)):
            self._answer(context, command, 0x0000)
        else:
            self._note("commitment not believed", "another system was asked for it")
            self._answer(context, command, 0x0115, "Another system was asked for this")

    def _all_data(self, context: Accepted) -> bytes:
        raw = bytearray()
        for piece in self._data(context):
            raw += piece
            if len(raw) > _LONGEST_ACTION:
                self._wire.abort()
                raise Gone("It speaks of commitment without an end")
        return bytes(raw)

    def _action(self, context: Accepted, command: Command) -> None:
        raw = self._all_data(context)
        try:
            request = self._commitment_request(raw, context.transfer_syntax)
        except _UNREADABLE:
            self._answer(context, command, 0x0115, "The request for commitment cannot be understood")
            return
        report = self._desk.commitment(request)
        self._answer(context, command, 0x0000)
        self._report(context, report)

    def _commitment_request(self, raw: bytes, transfer_syntax: str) -> CommitmentRequest:
        asked = _read(raw, transfer_syntax)
        if not asked:
            raise ValueError("nothing is asked")
        return CommitmentRequest(
            self._calling,
            self._caller.address,
            str(asked.TransactionUID),
            tuple((str(i.ReferencedSOPClassUID), str(i.ReferencedSOPInstanceUID)) for i in asked.ReferencedSOPSequence),
        )

    def _report(self, context: Accepted, report: CommitmentReport) -> None:
        """On the same association, as PS3.4 J.3.3 allows; the answer to it is taken by `_other`."""
        self._events += 1
        self._unheard[self._events] = report
        if sum(len(each.request.instances) for each in self._unheard.values()) > _MOST_UNHEARD:
            self._wire.abort()
            raise Gone("It asks for commitment on and on, and answers no report")
        command = ul.build_command(
            {
                ul.AFFECTED_SOP_CLASS: COMMITMENT,
                ul.COMMAND_FIELD: _N_EVENT,
                ul.MESSAGE_ID: self._events,
                ul.DATA_SET_TYPE: 0x0000,
                ul.AFFECTED_SOP_INSTANCE: COMMITMENT_INSTANCE,
                ul.EVENT_TYPE: event_type(report),
            }
        )
        self._wire.send_message(context.id, command, encode(event_report(report), context.transfer_syntax))

    def _report_unheard(self) -> None:
        """Whoever hung up before it answered a report gets it on another association."""
        for report in self._unheard.values():
            if not self._desk.report_later(report):
                self._note("commitment not reported", "it hung up, and no address is set for reports to it")


def _read(raw: bytes, transfer_syntax: str) -> Dataset:
    return pydicom.dcmread(io.BytesIO(_part10_head(transfer_syntax) + raw), force=True)


def event_type(report: CommitmentReport) -> int:
    """PS3.4 J.3.3.1.2: 1 all are kept, 2 some are not."""
    return 2 if report.failed else 1


def event_report(report: CommitmentReport) -> Dataset:
    answer = Dataset()
    answer.TransactionUID = report.request.transaction_uid
    if report.kept:
        answer.ReferencedSOPSequence = [_reference(*pair) for pair in report.kept]
    if report.failed:
        answer.FailedSOPSequence = [_reference(*failed) for failed in report.failed]
    return answer


def encode(dataset: Dataset, transfer_syntax: str) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, implicit_vr=transfer_syntax == uids.ImplicitVRLittleEndian, little_endian=True)
    return buffer.getvalue()


def _reference(sop_class: str, instance: str, reason: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
    if reason is not None:
        item.FailureReason = reason
    return item


class _Transfer:
    """One data set on its way in: written while it is looked at, then kept, quarantined or let go."""

    def __init__(self, arrival: Arrival, desk: Desk, most: int) -> None:
        self._arrival, self._desk, self._most = arrival, desk, most
        self._reader = peek.Reader(arrival.transfer_syntax_uid, most_inflated=most)
        self._incoming: Incoming | None = None
        self._refused: _Answer | None = None
        self._corrupt = ""
        self.size = 0
        self.kept: Kept | None = None

    def refuse(self, answer: _Answer) -> None:
        self.abandon()
        self._refused = answer

    def take(self, piece: memoryview) -> None:
        self.size += len(piece)
        if self._refused is not None:
            return
        if self.size > self._most:
            self.refuse(_Answer("too large", f"More than {self._most} bytes"))
            return
        self._guarded(lambda: self._write(piece))
        if not self._corrupt and self._refused is None:
            try:
                self._reader.feed(piece)
            except peek.Corrupt as corrupt:
                self._corrupt = str(corrupt)

    def end(self) -> _Answer:
        if self._refused is None and self._incoming is None:
            self._guarded(lambda: self._write(memoryview(b"")))
        if self._refused is not None or self._incoming is None:
            return self._refused or _Answer("failed")
        incoming = self._incoming
        answer = self._judge()
        if answer.outcome == "kept":
            self._guarded(lambda: self._keep(incoming))
            if self.kept is not None and self.kept.outcome == "conflict":
                return _Answer("duplicate", "Other content is kept under this UID; this one is set aside")
        else:
            self._guarded(lambda: incoming.quarantine(answer.comment))
        return self._refused or answer

    def abandon(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.abandon()

    def _write(self, piece: memoryview) -> None:
        if self._incoming is None:
            self._incoming = self._desk.receive(self._arrival)
            self._incoming.write(part10_prefix(self._arrival))
        self._incoming.write(piece)

    def _judge(self) -> _Answer:
        """Does the data set hold together, and is it what the command says it is?"""
        if self._corrupt:
            return _Answer("corrupt", self._corrupt)
        try:
            self.header = self._reader.finish()
        except peek.Corrupt as corrupt:
            return _Answer("corrupt", str(corrupt))
        if self.header.sop_class_uid != self._arrival.sop_class_uid:
            return _Answer("other class", "The data set is of another SOP class than the request")
        if self.header.sop_instance_uid != self._arrival.sop_instance_uid:
            return _Answer("other instance", "The data set is another SOP instance than the request")
        return _Answer("kept")

    def _keep(self, incoming: Incoming) -> None:
        self.kept = incoming.keep(self.header)

    def _guarded(self, step: Callable[[], object]) -> None:
        """What fails for this instance must not end the association, and never passes for success."""
        try:
            step()
        except NoRoom as full:
            self.refuse(_Answer("no room", str(full)))
        except OSError as failed:
            log.error("An instance could not be written: %s", failed.strerror)
            self.refuse(_Answer("no room", "The inbox cannot be written"))
        except Exception as failed:  # noqa: BLE001 – the sender is told that it failed, and keeps its copy
            log.error("An instance could not be kept: %s", type(failed).__name__)
            self.refuse(_Answer("failed", "The inbox failed"))


def part10_prefix(arrival: Arrival) -> bytes:
    """Preamble and file meta group (PS3.10 7.1): the same for the same instance, whoever sends it, and whichever
    version of ours takes it, or one that comes again would be taken for other content."""
    return _part10_head(arrival.transfer_syntax_uid, arrival.sop_class_uid, arrival.sop_instance_uid)


def _part10_head(transfer_syntax: str, sop_class: str = "", instance: str = "") -> bytes:
    elements = struct.pack("<HH2s2xI2s", 2, 1, b"OB", 2, b"\0\1")
    for number, vr, value in (
        (0x0002, b"UI", sop_class),
        (0x0003, b"UI", instance),
        (0x0010, b"UI", transfer_syntax),
        (0x0012, b"UI", identity.IMPLEMENTATION_CLASS_UID),
    ):
        raw = value.encode("latin-1", "replace")
        raw += b"\0" * (len(raw) % 2)
        elements += struct.pack("<HH2sH", 2, number, vr, len(raw)) + raw
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(elements)) + elements
