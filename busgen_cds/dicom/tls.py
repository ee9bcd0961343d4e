"""What we ask of every TLS connection, as server and as client (BCP 195: RFC 9325)."""

from __future__ import annotations

import ssl

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM"  # forward secrecy and authenticated encryption only


def strict(context: ssl.SSLContext) -> ssl.SSLContext:
    """TLS 1.2 or later, the ciphers above, no renegotiation, no compression."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    return context
