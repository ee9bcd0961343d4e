"""The acceptor's half of the DICOM upper layer (PS3.8) and its command sets (PS3.7), made for streams.

pynetdicom gathers a data set PDU by PDU in queues before anyone sees it; here bytes are handed on as they come, so
that a cine of any size passes through a fixed buffer and one core receives hundreds of images a second.

Rules:
- No waiting without an end: for the first word, for the next PDU, for the rest of a PDU, and for the rest of a message
  (a peer that sends a byte now and then is as silent as one that sends none).
- No length is believed beyond our own limits.
- A peer that breaks the protocol gets an A-ABORT with the provider's reason, and is Gone.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from busgen_cds.dicom.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
_LONGEST_REQUEST = 1 << 20
_LONGEST_COMMAND = 1 << 16
_BUFFER = 1 << 18

_RQ, _AC, _RJ, _DATA, _RELEASE_RQ, _RELEASE_RP, _ABORT = range(1, 8)
_HEADER = struct.Struct(">BxI")
_PDV = struct.Struct(">IBB")
_ITEM = struct.Struct(">BxH")

# PS3.8 table 9-21, the rejections that we give: (result, source, reason)
CALLING_AE_NOT_RECOGNISED = (1, 1, 3)
CALLED_AE_NOT_RECOGNISED = (1, 1, 7)
CONTEXT_NAME_NOT_SUPPORTED = (1, 1, 2)
VERSION_NOT_SUPPORTED = (1, 2, 2)
LOCAL_LIMIT_EXCEEDED = (2, 3, 2)

# PS3.8 table 9-26: the provider's reasons to abort
UNRECOGNISED_PDU, UNEXPECTED_PDU, INVALID_PARAMETER = 1, 2, 6


class Gone(Exception):
    """The association is over before its work was: the text says how."""


class Released(Exception):
    """The peer asked to release, and was answered."""


class _Violation(Gone):
    def __init__(self, message: str, reason: int) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    first_word_seconds: float = 10  # for the A-ASSOCIATE-RQ, and for a TLS handshake
    idle_seconds: float = 60  # between two PDUs
    pdu_seconds: float = 30  # for the rest of a PDU that has begun
    grace_seconds: float = 30  # after which a message must have come at least at the rate below
    least_bytes_per_second: int = 2048
    most_pdu_bytes: int = 1 << 18  # announced to the peer


class Proposed(NamedTuple):
    """A presentation context as the peer proposes it."""

    id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


class Accepted(NamedTuple):
    """Our answer to a presentation context (PS3.8 table 9-18: 0 accepted, 3 and 4 not supported)."""

    id: int
    result: int
    abstract_syntax: str
    transfer_syntax: str


@dataclass(frozen=True)
class Request:
    calling_ae: str
    called_ae: str
    application_context: str
    version: int
    contexts: tuple[Proposed, ...]
    most_pdu_bytes: int
    roles: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Fragment(NamedTuple):
    """A piece of a message; valid until the next one is asked for."""

    context_id: int
    is_command: bool
    is_last: bool
    data: memoryview


class Wire:
    """One connection, seen as the acceptor's side of an association."""

    def __init__(self, connection: socket.socket, limits: Limits) -> None:
        self._socket, self._limits = connection, limits
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._pdu_left = self._pdv_left = 0
        self._context = self._control = 0
        self._peer_most = 16384
        self._timeout: float | None = None
        self._message_began = 0.0
        self._message_bytes = 0
        self._fresh = True  # the next fragment begins a message

    # -- association -----------------------------------------------------------------------------------------------

    def request(self) -> Request:
        """The A-ASSOCIATE-RQ that must open every association."""
        deadline = time.monotonic() + self._limits.first_word_seconds
        self._need(6, deadline)
        kind, length = _HEADER.unpack_from(self._buffer, self._start)
        if kind != _RQ:
            raise self._violation("It did not begin with a request for an association", UNEXPECTED_PDU)
        if length > _LONGEST_REQUEST:
            raise self._violation("Its request for an association is too long", INVALID_PARAMETER)
        self._start += 6
        try:
            request = parse_request(self._exactly(length, deadline))
        except (struct.error, ValueError, IndexError):
            raise self._violation("Its request for an association cannot be understood", INVALID_PARAMETER) from None
        self._peer_most = max(256, min(request.most_pdu_bytes or _BUFFER, _BUFFER))
        return request

    def accept(self, request: Request, contexts: Sequence[Accepted], roles: Mapping[str, tuple[int, int]]) -> None:
        self.send(build_accept(request, contexts, roles, self._limits.most_pdu_bytes))

    def reject(self, how: tuple[int, int, int]) -> None:
        self._last_word(_HEADER.pack(_RJ, 4) + bytes((0, *how)))

    def abort(self, reason: int | None = None) -> None:
        source = (0, 0) if reason is None else (2, reason)
        self._last_word(_HEADER.pack(_ABORT, 4) + bytes((0, 0, *source)))

    def _last_word(self, data: bytes) -> None:
        """Say it, and give the peer the time to read it: closing with unread bytes would take it back."""
        with contextlib.suppress(OSError, Gone):
            self.send(data)
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(1)
            deadline = time.monotonic() + 1
            while self._socket.recv(65536) and time.monotonic() < deadline:
                pass

    # -- messages --------------------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        """Everything the peer sends, piece by piece; ends by Released or Gone."""
        while True:
            if not self._pdv_left:
                self._next_pdv()
            if self._pdv_left and self._start == self._end:
                self._fill(self._limits.pdu_seconds)
            size = min(self._pdv_left, self._end - self._start)
            data = self._view[self._start : self._start + size]
            self._start += size
            self._pdv_left -= size
            self._watch_rate(size)
            is_last = not self._pdv_left and bool(self._control & 2)
            self._fresh = is_last
            yield Fragment(self._context, bool(self._control & 1), is_last, data)

    def send_message(self, context_id: int, command: bytes, data: bytes | None = None) -> None:
        pdus = self._pdus(context_id, command, 1)
        if data is not None:
            pdus += self._pdus(context_id, data, 0)
        self.send(pdus)

    def send(self, data: bytes) -> None:
        self._wait_at_most(self._limits.idle_seconds)
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise Gone("It does not take our answer") from None
        except OSError as broken:
            raise Gone(f"The connection broke ({broken.strerror or broken})") from None

    # -- inside ----------------------------------------------------------------------------------------------------

    def _pdus(self, context_id: int, message: bytes, control: int) -> bytes:
        most = self._peer_most - 6
        parts = []
        for at in range(0, max(len(message), 1), most):
            piece = message[at : at + most]
            last = 2 if at + most >= len(message) else 0
            parts.append(_HEADER.pack(_DATA, len(piece) + 6) + _PDV.pack(len(piece) + 2, context_id, control | last))
            parts.append(piece)
        return b"".join(parts)

    def _next_pdv(self) -> None:
        while not self._pdv_left:
            if not self._pdu_left:
                self._next_pdu()
            if self._pdu_left < 6:
                raise self._violation("It sent a PDU too short for a value", INVALID_PARAMETER)
            self._need(6, time.monotonic() + self._limits.pdu_seconds)
            length, self._context, self._control = _PDV.unpack_from(self._buffer, self._start)
            self._start += 6
            if length < 2 or length + 4 > self._pdu_left:
                raise self._violation("It sent a value longer than its PDU", INVALID_PARAMETER)
            self._pdu_left -= length + 4
            self._pdv_left = length - 2
            if length == 2:
                return  # an empty value can still be the last of its message

    def _next_pdu(self) -> None:
        if self._end - self._start < 6:
            self._need(6, time.monotonic() + self._limits.idle_seconds)
        kind, length = _HEADER.unpack_from(self._buffer, self._start)
        if kind == _DATA:
            if length > self._limits.most_pdu_bytes:
                raise self._violation(f"It sent a PDU of {length} bytes, more than was agreed", INVALID_PARAMETER)
            self._start += 6
            self._pdu_left = length
            return
        if kind in (_RELEASE_RQ, _ABORT):
            self._need(10, time.monotonic() + self._limits.pdu_seconds)
            self._start += 10
            if kind == _ABORT:
                raise Gone("It aborted the association")
            if not self._fresh:
                raise Gone("It asked to release in the middle of a message")
            self._last_word(_HEADER.pack(_RELEASE_RP, 4) + bytes(4))
            raise Released
        unknown = kind not in range(_RQ, _ABORT + 1)
        raise self._violation(f"It sent a PDU of type {kind}", UNRECOGNISED_PDU if unknown else UNEXPECTED_PDU)

    def _watch_rate(self, size: int) -> None:
        if self._fresh:
            self._message_began, self._message_bytes = time.monotonic(), 0
        self._message_bytes += size
        allowed = self._limits.grace_seconds + self._message_bytes / self._limits.least_bytes_per_second
        if time.monotonic() - self._message_began > allowed:
            self.abort()
            raise Gone("It sends too slowly")

    def _exactly(self, length: int, deadline: float) -> bytes:
        parts, left = [], length
        while left:
            self._need(1, deadline)
            size = min(left, self._end - self._start)
            parts.append(bytes(self._view[self._start : self._start + size]))
            self._start += size
            left -= size
        return b"".join(parts)

    def _need(self, count: int, deadline: float) -> None:
        """At least so many bytes, without a gap, at `_start`."""
        while self._end - self._start < count:
            if self._start and _BUFFER - self._start < count:
                left = bytes(self._view[self._start : self._end])
                self._buffer[: len(left)] = left
                self._start, self._end = 0, len(left)
            self._fill(deadline - time.monotonic())

    def _fill(self, seconds: float) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        if seconds <= 0:
            raise self._silent()
        self._wait_at_most(seconds)
        try:
            count = self._socket.recv_into(self._view[self._end :])
        except TimeoutError:
            raise self._silent() from None
        except OSError as broken:
            raise Gone(f"The connection broke ({broken.strerror or broken})") from None
        if not count:
            raise Gone("It closed the connection")
        self._end += count

    def _wait_at_most(self, seconds: float) -> None:
        # setting a time-out is a system call: differences below a second do not deserve one
        if self._timeout is None or not seconds <= self._timeout <= seconds + 1:
            self._timeout = seconds + 0.5
            self._socket.settimeout(self._timeout)

    def _silent(self) -> Gone:
        self.abort()
        return Gone("It is silent")

    def _violation(self, message: str, reason: int) -> _Violation:
        self.abort(reason)
        return _Violation(message, reason)


# -- PS3.8 9.3: the request for an association and its acceptance ----------------------------------------------------


def parse_request(body: bytes) -> Request:
    version = int(struct.unpack_from(">H", body)[0])
    called, calling = (_title(body[at : at + 16]) for at in (4, 20))
    if len(body) < 68:
        raise ValueError("too short")
    application, contexts, most, roles = "", [], 0, {}
    for kind, item in _items(body[68:]):
        if kind == 0x10:
            application = _uid(item)
        elif kind == 0x20:
            contexts.append(_context(item))
        elif kind == 0x50:
            for sub, value in _items(item):
                if sub == 0x51:
                    most = int(struct.unpack(">I", value)[0])
                elif sub == 0x54:
                    size = struct.unpack_from(">H", value)[0]
                    roles[_uid(value[2 : 2 + size])] = (value[2 + size], value[3 + size])
    return Request(calling, called, application, version, tuple(contexts), most, roles)


def build_accept(
    request: Request, contexts: Sequence[Accepted], roles: Mapping[str, tuple[int, int]], most_pdu_bytes: int
) -> bytes:
    items = [_item(0x10, APPLICATION_CONTEXT.encode())]
    for context in contexts:
        syntax = _item(0x40, context.transfer_syntax.encode())
        items.append(_item(0x21, bytes((context.id, 0, context.result, 0)) + syntax))
    user = [_item(0x51, struct.pack(">I", most_pdu_bytes)), _item(0x52, IMPLEMENTATION_CLASS_UID.encode())]
    for sop_class, role in roles.items():
        user.append(_item(0x54, struct.pack(">H", len(sop_class)) + sop_class.encode() + bytes(role)))
    user.append(_item(0x55, IMPLEMENTATION_VERSION.encode()))
    titles = request.called_ae.encode("latin-1").ljust(16)[:16] + request.calling_ae.encode("latin-1").ljust(16)[:16]
    body = struct.pack(">HH", 1, 0) + titles + bytes(32) + b"".join(items) + _item(0x50, b"".join(user))
    return _HEADER.pack(_AC, len(body)) + body


def _context(item: bytes) -> Proposed:
    abstract, transfer = "", []
    for kind, value in _items(item[4:]):
        if kind == 0x30:
            abstract = _uid(value)
        elif kind == 0x40:
            transfer.append(_uid(value))
    return Proposed(item[0], abstract, tuple(transfer))


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        kind, length = _ITEM.unpack_from(data, at)
        if at + 4 + length > len(data):
            raise ValueError("an item is longer than what holds it")
        yield kind, data[at + 4 : at + 4 + length]
        at += 4 + length


def _item(kind: int, value: bytes) -> bytes:
    return _ITEM.pack(kind, len(value)) + value


def _title(raw: bytes) -> str:
    title = raw.decode("latin-1").strip(" \0")
    if not title.isprintable():  # PS3.5 table 6.2-1: no control characters in an AE
        raise ValueError("no title")
    return title


def _uid(raw: bytes) -> str:
    return raw.decode("ascii").strip(" \0")


# -- PS3.7 6.3 and annex E: command sets, implicit VR little endian --------------------------------------------------

AFFECTED_SOP_CLASS, REQUESTED_SOP_CLASS = 0x0002, 0x0003
COMMAND_FIELD, MESSAGE_ID, RESPONDED_TO, DATA_SET_TYPE = 0x0100, 0x0110, 0x0120, 0x0800
STATUS, ERROR_COMMENT = 0x0900, 0x0902
AFFECTED_SOP_INSTANCE, REQUESTED_SOP_INSTANCE = 0x1000, 0x1001
EVENT_TYPE, ACTION_TYPE = 0x1002, 0x1008
NO_DATA_SET = 0x0101

Command = Mapping[int, bytes]


def parse_command(data: bytes) -> Command:
    """Element number of group 0000 → its value as encoded."""
    found, at = {}, 0
    while at < len(data):
        group, element, length = struct.unpack_from("<HHI", data, at)
        if group or at + 8 + length > len(data):
            raise ValueError("not a command set")
        found[element] = data[at + 8 : at + 8 + length]
        at += 8 + length
    return found


def number(command: Command, element: int) -> int:
    return int(struct.unpack("<H", command[element])[0])


def text(command: Command, element: int) -> str:
    return command.get(element, b"").decode("latin-1").strip(" \0")


def build_command(fields: Mapping[int, int | str]) -> bytes:
    elements = b"".join(_command_element(name, fields[name]) for name in sorted(fields))
    return struct.pack("<HHII", 0, 0, 4, len(elements)) + elements


def _command_element(name: int, value: int | str) -> bytes:
    if isinstance(value, int):
        return struct.pack("<HHIH", 0, name, 2, value)
    raw = value.encode("latin-1", "replace")
    if len(raw) % 2:
        raw += b" " if name == ERROR_COMMENT else b"\0"
    return struct.pack("<HHI", 0, name, len(raw)) + raw
