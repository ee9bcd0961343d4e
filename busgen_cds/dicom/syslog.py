"""Messages to a syslog server over TLS (RFC 5424 in RFC 5425's frames, as PS3.15 A.6 asks).

Rules:
- Syslog has no answers. A batch counts as taken when the server closed the connection in order after reading ours to
  its end (TLS close_notify both ways): a server that died in between is told again.
- TLS 1.2 or later with the ciphers of BCP 195, the server's certificate checked, ours shown where the site has one.
- Nothing waits without an end.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from busgen_cds.dicom import tls
from busgen_cds.errors import Misconfigured, Transient

SECONDS = 10.0
FACILITY, SEVERITY = 10, 5  # RFC 5424: security and authorization; notice
APP_NAME, MESSAGE_ID = "busgen-cds", "DICOM+RFC3881"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Server:
    host: str
    port: int
    authority: str
    certificate: str = ""
    key: str = ""
    check_host: bool = True

    def __str__(self) -> str:
        return f"the audit repository {self.host}:{self.port}"


def frame(document: bytes, *, at: datetime, host: str, process: int) -> bytes:
    """One message with its length before it."""
    moment = at.isoformat(timespec="milliseconds")
    head = f"<{FACILITY * 8 + SEVERITY}>1 {moment} {_name(host)} {APP_NAME} {process} {MESSAGE_ID} - "
    message = head.encode("ascii") + _BOM + document
    return f"{len(message)} ".encode() + message


def send(frames: Sequence[bytes], to: Server) -> None:
    """All of them, or an exception: Transient when it is to be tried again, Misconfigured when a setting is wrong."""
    context = tls.client(to, to)
    try:
        with socket.create_connection((to.host, to.port), timeout=SECONDS) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with context.wrap_socket(plain, server_hostname=to.host) as connection:
                connection.sendall(b"".join(frames))
                _ends(connection, to)
    except ssl.SSLCertVerificationError as wrong:
        raise Misconfigured(f"The certificate of {to} does not hold: {wrong.verify_message}.") from wrong
    except ssl.SSLError as wrong:
        raise Transient(f"{to} broke the TLS connection: {wrong.reason}.") from wrong
    except OSError as gone:
        raise Transient(f"{to} cannot be reached: {gone.strerror or type(gone).__name__}.") from gone


def _ends(connection: ssl.SSLSocket, to: Server) -> None:
    """Our end is said; the server's follows when it has read everything before it."""
    try:
        with contextlib.closing(connection.unwrap()):
            return
    except (ssl.SSLError, OSError) as cut:
        raise Transient(f"{to} did not end the connection in order: what was sent is sent again.") from cut


def _name(host: str) -> str:
    """RFC 5424 6.2.4: printable ASCII, 255 at most; - when there is none."""
    return "".join(c for c in host if "!" <= c <= "~")[:255] or "-"
