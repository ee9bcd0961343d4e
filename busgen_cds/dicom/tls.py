"""What we ask of every TLS connection, as server and as client (BCP 195: RFC 9325)."""

from __future__ import annotations

import ssl
from typing import Protocol

from busgen_cds.errors import Misconfigured

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM"  # forward secrecy and authenticated encryption only


def strict(context: ssl.SSLContext) -> ssl.SSLContext:
    """TLS 1.2 or later, the ciphers above, no renegotiation, no compression."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    return context


class Files(Protocol):
    """Files in PEM; without a certificate of our own the other side alone is asked for one."""

    @property
    def authority(self) -> str: ...
    @property
    def certificate(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def check_host(self) -> bool: ...


def client(files: Files, whom: object) -> ssl.SSLContext:
    """How we call somebody; files that cannot be used are Misconfigured and say for whom they were meant."""
    try:
        context = strict(ssl.create_default_context(cafile=files.authority))
        context.check_hostname = files.check_host
        if files.certificate:
            context.load_cert_chain(files.certificate, files.key or None)
    except (OSError, ssl.SSLError) as wrong:
        raise Misconfigured(f"The TLS files for {whom} cannot be used: {wrong}.") from wrong
    return context
