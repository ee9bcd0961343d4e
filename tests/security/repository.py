"""An audit repository: a syslog server over TLS (RFC 5425) that reads frames, and can be made to fail."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading

from tests.certificates import Authority


class Repository:
    def __init__(self, authority: Authority, port: int = 0) -> None:
        certificate, key, _ = authority.issues("repository")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._context.load_cert_chain(certificate, key)
        self._context.load_verify_locations(authority.path)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._listening = socket.create_server(("127.0.0.1", port))
        self.port = self._listening.getsockname()[1]
        self.messages: list[bytes] = []
        self.dies_after: int | None = None  # messages of a connection, before it is cut without a word
        threading.Thread(target=self._serve, daemon=True).start()

    def goes_down(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._listening.accept()
            except OSError:
                return
            with contextlib.suppress(OSError, ssl.SSLError):
                self._take(plain)

    def _take(self, plain: socket.socket) -> None:
        with self._context.wrap_socket(plain, server_side=True) as connection:
            data = b""
            while piece := connection.recv(65536):
                data += piece
                if self.dies_after is not None and len(_frames(data)) >= self.dies_after:
                    self.messages += _frames(data)[: self.dies_after]
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return  # as when its machine goes off: no close_notify, a reset
            self.messages += _frames(data)
            connection.unwrap()


def _frames(data: bytes) -> list[bytes]:
    """RFC 5425 4.3: MSG-LEN SP SYSLOG-MSG, again and again; what is not whole yet is left out."""
    found, at = [], 0
    while (space := data.find(b" ", at, at + 8)) > 0:
        length = int(data[at:space])
        if space + 1 + length > len(data):
            break
        found.append(data[space + 1 : space + 1 + length])
        at = space + 1 + length
    return found
