"""A scanner that says exactly what a test wants, byte by byte; independent of the code under test."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterable, Sequence

US_IMAGE = "1.2.840.10008.5.1.4.1.1.6.1"
VERIFICATION = "1.2.840.10008.1.1"
EXPLICIT, IMPLICIT, BIG, DEFLATED = (f"1.2.840.10008.1.2{tail}" for tail in (".1", "", ".2", ".1.99"))
_LONG = {"OB", "OW", "SQ", "UN", "UT"}

Context = tuple[str, Sequence[str]]


class Hung(Exception):
    """The other side said goodbye: by A-ABORT, A-ASSOCIATE-RJ or by closing."""

    def __init__(self, how: str, *details: int) -> None:
        super().__init__(how, *details)
        self.how, self.details = how, details


class Scanner:
    def __init__(
        self, port: int, calling: str = "SCANNER", called: str = "BUSGEN", context: ssl.SSLContext | None = None
    ):
        self.calling, self.called = calling, called
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            self.socket = context.wrap_socket(self.socket)
        self.accepted: dict[int, str] = {}
        self.results: dict[int, int] = {}
        self.most_pdu = 0
        self._message = 0

    def __enter__(self) -> Scanner:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def associate(self, *contexts: Context) -> Scanner:
        self.socket.sendall(self.request(*(contexts or ((US_IMAGE, (EXPLICIT,)), (VERIFICATION, (IMPLICIT,))))))
        kind, body = self.pdu()
        if kind != 2:
            raise Hung("rejected" if kind == 3 else f"pdu {kind}", *body[1:])
        self._read_answer(body[68:])
        return self

    def request(self, *contexts: Context) -> bytes:
        items = item(0x10, b"1.2.840.10008.3.1.1.1")
        for number, (abstract, syntaxes) in enumerate(contexts):
            inner = item(0x30, abstract.encode()) + b"".join(item(0x40, syntax.encode()) for syntax in syntaxes)
            items += item(0x20, bytes((2 * number + 1, 0, 0, 0)) + inner)
        items += item(0x50, item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3"))
        body = struct.pack(">HH", 1, 0) + self.called.encode().ljust(16) + self.calling.encode().ljust(16) + bytes(32)
        return pdu(1, body + items)

    def store(self, uid: str, data: bytes, *, context: int = 1, sop_class: str = US_IMAGE, piece: int = 16000) -> int:
        self.send_store(uid, (data[at : at + piece] for at in range(0, len(data), piece)), context, sop_class)
        return self.response()[0]

    def send_store(self, uid: str, pieces: Iterable[bytes], context: int = 1, sop_class: str = US_IMAGE) -> None:
        self._message += 1
        self.socket.sendall(self.command(context, 0x0001, sop_class, uid, self._message))
        held: bytes | None = None
        for piece in pieces:
            if held is not None:
                self.socket.sendall(value(context, 0, held))
            held = piece
        self.socket.sendall(value(context, 2, held or b""))

    def echo(self, context: int = 3) -> int:
        self._message += 1
        self.socket.sendall(self.command(context, 0x0030, VERIFICATION, "", self._message, data=False))
        return self.response()[0]

    def command(self, context: int, kind: int, sop_class: str, uid: str, message: int, *, data: bool = True) -> bytes:
        fields = [(0x0002, even(sop_class)), (0x0100, struct.pack("<H", kind)), (0x0110, struct.pack("<H", message))]
        fields += [(0x0700, b"\0\0"), (0x0800, struct.pack("<H", 0x0001 if data else 0x0101))]
        if uid:
            fields.append((0x1000, even(uid)))
        raw = b"".join(struct.pack("<HHI", 0, name, len(v)) + v for name, v in fields)
        return value(context, 3, struct.pack("<HHII", 0, 0, 4, len(raw)) + raw)

    def response(self) -> tuple[int, str]:
        """Status and comment."""
        fields = self.command_set()
        return struct.unpack("<H", fields[0x0900])[0], fields.get(0x0902, b"").decode().strip()

    def command_set(self) -> dict[int, bytes]:
        kind, body = self.pdu()
        if kind != 4:
            raise Hung("aborted" if kind == 7 else f"pdu {kind}", *body[2:4])
        raw, found, at = body[6:], {}, 0
        while at < len(raw):
            _, name, length = struct.unpack_from("<HHI", raw, at)
            found[name] = raw[at + 8 : at + 8 + length]
            at += 8 + length
        return found

    def release(self) -> None:
        self.socket.sendall(pdu(5, bytes(4)))
        assert self.pdu()[0] == 6

    def pdu(self) -> tuple[int, bytes]:
        kind, length = struct.unpack(">BxI", self._exactly(6))
        return kind, self._exactly(length)

    def is_hung_up(self, seconds: float) -> bool:
        """Does the other side end it within the time?"""
        self.socket.settimeout(seconds)
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                more = self.socket.recv(count - len(data))
            except ConnectionError:
                more = b""
            if not more:
                raise Hung("closed")
            data += more
        return data

    def _read_answer(self, items: bytes) -> None:
        at = 0
        while at < len(items):
            kind, length = struct.unpack_from(">BxH", items, at)
            body = items[at + 4 : at + 4 + length]
            if kind == 0x21:
                self.results[body[0]] = body[2]
                if body[2] == 0:
                    self.accepted[body[0]] = body[8:].decode()
            if kind == 0x50:
                self.most_pdu = struct.unpack_from(">I", body, 4)[0]
            at += 4 + length


def pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxI", kind, len(body)) + body


def value(context: int, control: int, data: bytes) -> bytes:
    return pdu(4, struct.pack(">IBB", len(data) + 2, context, control) + data)


def item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(body)) + body


def even(text: str) -> bytes:
    raw = text.encode()
    return raw + b"\0" * (len(raw) % 2)


def element(group: int, number: int, vr: str, body: bytes, *, length: int | None = None) -> bytes:
    """Explicit VR little endian; `length` lies when it is given."""
    said = len(body) if length is None else length
    head = struct.pack("<HH", group, number) + vr.encode()
    return head + (struct.pack("<xxI", said) if vr in _LONG else struct.pack("<H", said)) + body


def image(
    uid: str, *, study: str = "1.2.3", patient: str = "P1", sop_class: str = US_IMAGE, pixels: bytes = bytes(64)
) -> bytes:
    """A small data set in explicit VR little endian."""
    return head(uid, study=study, patient=patient, sop_class=sop_class) + element(0x7FE0, 0x0010, "OB", pixels)


def head(uid: str, *, study: str = "1.2.3", patient: str = "P1", sop_class: str = US_IMAGE) -> bytes:
    return b"".join(
        (
            element(0x0008, 0x0016, "UI", even(sop_class)),
            element(0x0008, 0x0018, "UI", even(uid)),
            element(0x0008, 0x0060, "CS", b"US"),
            element(0x0010, 0x0020, "LO", patient.encode() + b" " * (len(patient) % 2)),
            element(0x0020, 0x000D, "UI", even(study)),
            element(0x0020, 0x000E, "UI", even(study + ".1")),
        )
    )
