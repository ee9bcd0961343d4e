"""What was acknowledged is there after a kill and after a power cut; proved on real processes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from busgen_cds.dicom.association import Desk
from busgen_cds.dicom.listener import Listener, ListenerConfig
from busgen_cds.errors import Misconfigured
from busgen_cds.store import audit
from tests.dicom import raw
from tests.dicom.raw import Hung, Scanner
from tests.programs import free_port, need
from tests.reception import open_store

ROUNDS = int(os.environ.get("BUSGEN_KILL_ROUNDS", "3"))
IMAGES, ASSOCIATIONS = 200, 4


@contextmanager
def listener(folder: Path, processes: int, *wrapper: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = free_port()
    command = [*wrapper, sys.executable, "-m", "tests.reception", str(folder), str(port), str(processes)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        _wait(port, process)
        yield port, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        assert process.poll() is None
        with contextlib.suppress(OSError), Scanner(port) as scanner:
            scanner.associate()
            scanner.release()
            return
        time.sleep(0.1)
    raise AssertionError("the listener does not answer")


@pytest.mark.program
def test_system_calls_come_in_the_order_that_survives_a_power_cut(tmp_path: Path) -> None:
    """Success is answered after write → fsync → rename → fsync of the directory → commit, as the kernel saw it."""
    need("strace")
    trace = tmp_path / "trace"
    watched = ["-e", "trace=write,fsync,fdatasync,rename,sendto", "-o", str(trace)]
    with listener(tmp_path / "site", 0, "strace", "-f", "-y", *watched) as (port, _), Scanner(port) as scanner:
        assert scanner.associate().store("1.2.3.4", raw.image("1.2.3.4", pixels=bytes(600_000))) == 0
        scanner.release()
    steps = [
        r"write\(\d+<\S*/incoming/(\w{32})>",
        r"fsync\(\d+<\S*/incoming/\w{32}>",
        r"rename\(\S*/incoming/\w{32}\S* \S*/kept/",
        r"fsync\(\d+<\S*/kept/[\d-]{10}>",
        r"fdatasync\(\d+<\S*/site\.db-wal>",
        r"sendto\(\d+<(TCP|socket)",
    ]
    lines = _joined(trace.read_text())
    at = [[n for n, line in enumerate(lines) if re.search(step, line)] for step in steps]
    written, synced, renamed, named, _, _ = at
    committed = next(n for n in at[4] if n > named[-1])
    answered = next(n for n in at[5] if n > renamed[-1])
    assert written[-1] < synced[0] < renamed[0] < named[-1] < committed < answered
    assert len(synced) == len(renamed) == 1


def _joined(text: str) -> list[str]:
    """One line per call, where it began; a call that another thread interrupts is shown in two parts."""
    return [line for line in text.splitlines() if " resumed>" not in line]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_at_any_moment(tmp_path: Path, number: int) -> None:
    """kill -9 of all of the listener at a random moment: every acknowledged image is found, byte for byte."""
    chance = random.Random(number)
    acknowledged: dict[str, bytes] = {}
    with listener(tmp_path, 2) as (port, process):
        senders = [threading.Thread(target=_send, args=(port, n, acknowledged)) for n in range(ASSOCIATIONS)]
        for sender in senders:
            sender.start()
        stop_at = chance.randint(1, IMAGES - 20)
        deadline = time.monotonic() + 200
        while len(acknowledged) < stop_at and time.monotonic() < deadline:
            time.sleep(chance.random() / 100)
        os.killpg(process.pid, signal.SIGKILL)
        for sender in senders:
            sender.join()
    assert stop_at <= len(acknowledged) <= IMAGES
    _found(tmp_path, acknowledged)


def _found(folder: Path, acknowledged: dict[str, bytes]) -> None:
    opened, inbox = open_store(folder)
    inbox.sweep()
    instances = {i.sop_instance_uid: i for study in inbox.studies() for i in inbox.instances(study.ref)}
    for uid, data in acknowledged.items():
        assert inbox.open(instances[uid]).endswith(data)
    files = [path for path in (folder / "inbox").rglob("*") if re.fullmatch("[0-9a-f]{32}", path.name)]
    assert len(files) == len(instances)  # what was not acknowledged and has no row is gone
    assert audit.verify(opened).sound
    opened.close()


def _send(port: int, association: int, acknowledged: dict[str, bytes]) -> None:
    chance = random.Random(association)
    with contextlib.suppress(Hung, OSError), Scanner(port).associate() as scanner:
        for number in range(IMAGES // ASSOCIATIONS):
            uid = f"1.2.3.{association}.{number}"
            data = raw.image(uid, study=f"1.2.{association}.{number // 10}", pixels=chance.randbytes(100_000))
            if scanner.store(uid, data) == 0:
                acknowledged[uid] = data


@pytest.mark.timeout(300)
def test_the_clerk_and_a_process_are_killed(tmp_path: Path) -> None:
    """The clerk and one receiving process are killed: the others go on, replacements come, nothing is lost."""
    acknowledged: dict[str, bytes] = {}
    with listener(tmp_path, 2) as (port, process):
        _send(port, 0, acknowledged)
        for child in _children(process.pid):
            os.kill(child, signal.SIGKILL)
            time.sleep(0.2)
        deadline = time.monotonic() + 120
        while len(acknowledged) < 2 * IMAGES // ASSOCIATIONS and time.monotonic() < deadline:
            _send(port, 1, acknowledged)
            time.sleep(0.5)
        assert len(acknowledged) == 2 * IMAGES // ASSOCIATIONS
    _found(tmp_path, acknowledged)


def _no_desk() -> Desk:
    raise Misconfigured("no key")


@pytest.mark.timeout(200)
def test_a_process_that_cannot_start() -> None:
    """A listener whose processes cannot start says so at once, and listens to nobody."""
    listener = Listener(ListenerConfig(host="127.0.0.1", port=0, processes=1), _no_desk)
    with pytest.raises(Misconfigured, match="could not start"):
        listener.start()


def _children(parent: int) -> list[int]:
    """The listener's processes, the clerk among them."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if f"PPid:\t{parent}\n" in status.read_text() and "spawn_main" in (status.parent / "cmdline").read_text():
                found.append(int(status.parent.name))
    return found
