"""One process writes the rows for all that receive, so that instances which wait at the same moment share one commit.

Rules:
- It only ever makes things faster: whoever finds no clerk, or loses it while waiting, writes its rows itself.
  Writing a row twice is writing it once, because an instance's reference is its own.
- It answers after the commit, never before.
- It listens on a socket in the inbox's folder, which only the site's account can enter; there is one clerk per inbox.

A packet each way, in JSON: the entry of an instance; its `Kept`, or why not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from busgen_cds.arrival import Arrival, Kept, Peek

log = logging.getLogger(__name__)

_LONGEST = 1 << 16


@dataclass(frozen=True, repr=False)
class Entry:
    """One instance that has its name on the disk and waits for its row."""

    arrival: Arrival
    header: Peek
    ref: str
    key: bytes
    sha256: str
    size: int
    at: datetime

    def to_bytes(self) -> bytes:
        fields = {**dataclasses.asdict(self), "key": self.key.hex(), "at": self.at.isoformat()}
        return json.dumps(fields).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        fields = json.loads(data)
        fields |= {"key": bytes.fromhex(fields["key"]), "at": datetime.fromisoformat(fields["at"])}
        fields |= {"arrival": Arrival(**fields["arrival"]), "header": Peek(**fields["header"])}
        return cls(**fields)


Commit = Callable[[Sequence[Entry]], Sequence[Kept]]


class Line:
    """A receiving process's side: each of its threads has a connection of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._local = threading.local()

    def ask(self, entry: Entry) -> Kept | None:
        """The clerk's answer; None when there is no clerk, or it was lost before it answered."""
        connection = self._connection()
        if connection is None:
            return None
        try:
            connection.send(entry.to_bytes())
            answer = connection.recv(_LONGEST)
        except OSError:
            answer = b""
        if not answer:
            self._hang_up(connection)
            return None
        return _kept(json.loads(answer))

    def _connection(self) -> socket.socket | None:
        connection: socket.socket | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                with _address(self._folder) as address:
                    connection.connect(address)
            except OSError:
                connection.close()
                return None
            self._local.connection = connection
        return connection

    def _hang_up(self, connection: socket.socket) -> None:
        connection.close()
        self._local.connection = None


def serve(folder: Path, commit: Commit) -> None:
    """Until this process ends; returns at once when the inbox has a clerk already."""
    with (folder / "clerk.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (folder / "clerk.sock").unlink(missing_ok=True)
        with _address(folder) as address:
            listening.bind(address)
        listening.listen(256)
        _Clerk(listening, commit).work()


class _Clerk:
    def __init__(self, listening: socket.socket, commit: Commit) -> None:
        self._listening, self._commit = listening, commit
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)

    def work(self) -> None:
        while True:
            waiting = []
            for key, _ in self._selector.select():
                if key.fileobj is self._listening:
                    self._selector.register(self._listening.accept()[0], selectors.EVENT_READ)
                else:
                    waiting += self._take(key.fileobj)
            if waiting:
                self._answer(waiting)

    def _take(self, connection: Any) -> list[tuple[socket.socket, Entry]]:
        try:
            packet = connection.recv(_LONGEST)
        except OSError:
            packet = b""
        if packet:
            return [(connection, Entry.from_bytes(packet))]
        self._selector.unregister(connection)
        connection.close()
        return []

    def _answer(self, waiting: Sequence[tuple[socket.socket, Entry]]) -> None:
        try:
            answers = [dataclasses.asdict(kept) for kept in self._commit([entry for _, entry in waiting])]
        except Exception as failed:  # the sender is told, and the next batch is tried anew
            log.exception("Rows could not be committed")
            answers = [{"failed": type(failed).__name__}] * len(waiting)
        for (connection, _), answer in zip(waiting, answers, strict=True):
            with contextlib.suppress(OSError):
                connection.send(json.dumps(answer).encode())


def _kept(answer: dict[str, Any]) -> Kept:
    if "failed" in answer:
        raise OSError(f"the rows could not be committed ({answer['failed']})")
    return Kept(**answer)


@contextmanager
def _address(folder: Path) -> Iterator[str]:
    """A name short enough for a socket, however deep the folder lies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/clerk.sock"
    finally:
        os.close(descriptor)
