"""A small archive that keeps what it is sent in a folder: the demonstration's PACS, and a stand-in while installing.

It answers C-ECHO and C-STORE and nothing else, in the clear: it is no place for patients' images.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from busgen_cds.dicom.outbox import Node


@contextmanager
def opened(folder: Path, ae_title: str = "DEMO_PACS") -> Iterator[Node]:
    """An archive on a free port of this machine; each object becomes a file named by its SOP Instance UID."""
    folder.mkdir(parents=True, exist_ok=True)
    entity = AE(ae_title=ae_title)
    entity.add_supported_context(Verification)
    for context in AllStoragePresentationContexts:
        entity.add_supported_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES)

    def keep(event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)  # type: ignore[union-attr]
        part = folder / f".{uid}"
        part.write_bytes(event.encoded_dataset())
        part.rename(folder / f"{uid}.dcm")
        return 0x0000

    handlers = [(evt.EVT_CONN_OPEN, _no_delay), (evt.EVT_C_STORE, keep)]
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)  # type: ignore[arg-type]
    assert server is not None
    try:
        yield Node("pacs", ae_title, "127.0.0.1", int(server.server_address[1]))
    finally:
        server.shutdown()


def _no_delay(event: evt.Event) -> None:
    connected = event.assoc.dul.socket
    if connected and connected.socket:
        connected.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
