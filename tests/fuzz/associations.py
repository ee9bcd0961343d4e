"""Mutated associations against the real listener with its processes and a real store, over a socket.

Each must have ended within five seconds of our last word. Between them, good senders store as if nothing had been.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from busgen_cds.dicom.association import Desk, Rules
from busgen_cds.dicom.listener import Listener, ListenerConfig
from tests import reception
from tests.dicom import raw
from tests.fuzz import seeds, talk, watch
from tests.fuzz.watch import PATIENCE, Bar, Report
from tests.programs import free_port

PROCESSES = 2
GOOD_EVERY = 250
_ROOT = Path(__file__).parents[2]
# what the listener logs when something went wrong that should not have
_BAD_WORDS = ("Traceback", "ended unasked", "could not be told", "could not be kept", "could not be committed")


def run(count: int, seed: int, findings: Path | None = None, first: int = 0) -> Report:
    report, began = Report("associations", seed, count - first), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="busgen-fuzz-") as base:
        with _listener(Path(base)) as target, contextlib.suppress(KeyboardInterrupt):
            _attack(target, report, range(first, count), seed, findings)
        report.outside += (Path(base) / "outside.txt").read_text().splitlines()
        report.outside += [f"left elsewhere: {each}" for each in watch.files_under(Path(base) / "elsewhere")]
    report.seconds = round(time.monotonic() - began, 1)
    return report


def _attack(target: _Target, report: Report, numbers: range, seed: int, findings: Path | None) -> None:
    seeds.own()
    bar = Bar(len(numbers))
    for number in numbers:
        if number % GOOD_EVERY == 0:
            target.good_sender(number, report)
            target.look(report, number, is_warm=number - numbers.start >= GOOD_EVERY)
        outcome, seconds = target.hears(talk.made(seed, number))
        report.slowest = max(report.slowest, round(seconds, 2))
        if outcome == "late" and target.hears(talk.made(seed, number))[0] == "late":  # the machine may be busy once
            report.hangs.append(_described(seed, number, "not ended after 5 s"))
            _keep(findings, seed, number)
        report.count(outcome)
        report.done += 1
        bar.at(report.done)
    target.good_sender(numbers.stop, report)
    target.look(report, numbers.stop, is_warm=True)


def _described(seed: int, number: int, what: str) -> str:
    return f"{number}: {what}; {', '.join(talk.made(seed, number).what) or 'unaltered'}"


def _keep(findings: Path | None, seed: int, number: int) -> None:
    if findings:
        findings.mkdir(parents=True, exist_ok=True)
        (findings / f"{seed}-{number}.association").write_bytes(b"".join(talk.made(seed, number).pieces))


class _Target:
    def __init__(self, server: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self._server, self._port, self._log = server, port, log
        self._read = 0
        self._members = _children(server.pid)
        self._held: dict[int, int] = {}

    def hears(self, said: talk.Said) -> tuple[str, float]:
        """How it ended, and how long after our last word."""
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE)
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):  # it may have hung up on us already
                for piece in said.pieces:
                    connection.sendall(piece)
                connection.shutdown(socket.SHUT_WR)
            return _ending(connection)

    def good_sender(self, number: int, report: Report) -> None:
        uid = f"1.2.77.{number}"
        try:
            with raw.Scanner(self._port, "GOOD") as scanner:
                began = time.monotonic()
                status = scanner.associate().store(uid, raw.image(uid, pixels=bytes(100_000)))
                scanner.release()
            if status != 0 or time.monotonic() - began > 4 * PATIENCE:
                report.crashes.append(f"before {number}: a good sender got 0x{status:04X}")
        except (raw.Hung, OSError, AssertionError) as turned_away:
            report.crashes.append(f"before {number}: a good sender was turned away ({turned_away!r})")

    def look(self, report: Report, number: int, *, is_warm: bool) -> None:
        """Is everybody still there, of the same size, and silent?"""
        if self._server.poll() is not None:
            raise RuntimeError(f"before {number}: the listener ended with {self._server.returncode}")
        if (now := _children(self._server.pid)) != self._members:
            report.crashes.append(f"before {number}: a process of the listener was replaced")
            self._members = now
        for pid in now if is_warm else ():
            grown = watch.memory(pid) - self._held.setdefault(pid, watch.memory(pid))
            if grown / (1 << 20) > report.growth_mb:
                report.growth_mb, report.largest = round(grown / (1 << 20), 1), f"before {number}"
        text = self._log.read_text(errors="replace")
        for line in text[self._read :].splitlines():
            if any(bad in line for bad in _BAD_WORDS):
                report.crashes.append(f"before {number}: {line[-200:]}")
        self._read = len(text)


def _ending(connection: socket.socket) -> tuple[str, float]:
    began, answered = time.monotonic(), b""
    try:
        while piece := connection.recv(65536):
            answered = answered or piece
            connection.settimeout(max(0.01, PATIENCE - (time.monotonic() - began)))
    except TimeoutError:
        return "late", time.monotonic() - began
    except OSError:
        return "reset", time.monotonic() - began
    return _ANSWERS.get(answered[:1], "closed"), time.monotonic() - began


_ANSWERS = {b"\2": "accepted", b"\3": "rejected", b"\7": "aborted", b"": "closed"}


def _children(pid: int) -> frozenset[int]:
    """The processes that receive; Python's own tracker of resources is not one of them."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return frozenset(int(line.split()[0]) for line in found.stdout.splitlines() if "spawn_main" in line)


@contextmanager
def _listener(base: Path) -> Iterator[_Target]:
    elsewhere, log = base / "elsewhere", base / "listener.log"
    elsewhere.mkdir()
    (base / "outside.txt").touch()
    environment = {**os.environ, "TMPDIR": str(elsewhere), "HOME": str(elsewhere), "PYTHONPATH": str(_ROOT)}
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.associations", str(base), str(port)]
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=elsewhere, env=environment, stdout=subprocess.PIPE, stderr=file)
    try:
        assert server.stdout is not None
        if server.stdout.readline() != b"ready\n":
            raise RuntimeError(f"The listener did not start:\n{log.read_text()}")
        yield _Target(server, port, log)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def desk(base: Path) -> Desk:
    """The desk of `reception`, in a process that tells what it writes elsewhere."""
    made = reception.desk(base / "store")
    descriptor = os.open(base / "outside.txt", os.O_WRONLY | os.O_APPEND)
    watch.only_writes_in(base / "store", lambda what: os.write(descriptor, f"{what}\n".encode()))
    return made


def serve(base: Path, port: int) -> None:
    reception.open_store(base / "store")[0].close()
    config = ListenerConfig(Rules(), "127.0.0.1", port, processes=PROCESSES)
    listener = Listener(config, functools.partial(desk, base), functools.partial(reception.keep_books, base / "store"))
    listener.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    listener.stop(seconds=2)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    from tests.fuzz.associations import serve as _serve  # by its name, so that the listener's processes find it

    _serve(Path(sys.argv[1]), int(sys.argv[2]))
