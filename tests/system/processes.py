"""A site's listener and worker as processes of their own, for tests that kill them.

    python -m tests.system.processes listen FOLDER PORT
    python -m tests.system.processes work FOLDER NAME PACS_PORT SECONDS_PER_READING   # below 0: each reading ends it

They share nothing but the folder. Everything is the product's own, except the reader.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from busgen_cds.dicom.association import CommitmentReport, CommitmentRequest, Desk, Rules
from busgen_cds.dicom.listener import Listener, ListenerConfig
from busgen_cds.dicom.outbox import Node
from busgen_cds.flows import desk as desks
from busgen_cds.flows.services import Destination, Waits
from busgen_cds.flows.worker import Worker
from tests import hospital

WAITS = Waits(
    silence=1.0, after_close=0.5, first_retry=0.5, longest_retry=5.0, heartbeat=0.5, silent=4.0, sweep=3.0, poll=0.1
)
ROOT = Path(__file__).parent.parent.parent


def listener_desk(folder: str) -> Desk:
    """Made in each of the listener's processes."""
    site = hospital.Site(Path(folder))
    desk = desks.Desk(site.workflows_url, site.results, site.jobs, WAITS)
    return Desk(
        receive=site.inbox.receive,
        arrived=desk.arrived,
        association_closed=desk.association_closed,
        commitment=_commits_nothing,
    )


def listen(folder: str, port: str) -> None:
    desks.prepare(hospital.Site(Path(folder)).workflows_url)
    config = ListenerConfig(rules=Rules(), host="127.0.0.1", port=int(port), processes=2)
    Listener(config, partial(listener_desk, folder)).start()
    _ready()


def work(folder: str, name: str, pacs_port: str, seconds: str) -> None:
    reader = _Counting(Path(folder) / "reads", float(seconds))
    pacs = Node("pacs", "PACS", "127.0.0.1", int(pacs_port), timeout_seconds=10)
    stations = hospital.services(
        hospital.Site(Path(folder)), reader=reader, destinations=[Destination(pacs)], waits=WAITS
    )
    Worker(stations, workflows_url=stations_url(folder), name=name, readings=2).start()
    _ready()


def stations_url(folder: str) -> str:
    return hospital.Site(Path(folder)).workflows_url


class _Counting(hospital.Reader):
    """Leaves a line in a file for each time the model ran."""

    def __init__(self, file: Path, seconds: float) -> None:
        super().__init__()
        self.file, self.seconds = file, seconds

    def __call__(self, study, revision):  # type: ignore[no-untyped-def]
        with self.file.open("a") as file:
            file.write(f"{os.getpid()} {study.uid}\n")
        if self.seconds < 0:
            os._exit(9)  # as when the memory runs out
        return super().__call__(study, revision)


def _ready() -> None:
    print("ready", flush=True)  # noqa: T201
    threading.Event().wait()


def _commits_nothing(request: CommitmentRequest) -> CommitmentReport:
    return CommitmentReport(request, (), tuple((*pair, 0x0112) for pair in request.instances))


@dataclass
class Process:
    """One of them, from outside."""

    arguments: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> Process:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.system.processes", *self.arguments],
                stdout=subprocess.PIPE, stderr=log, cwd=ROOT, process_group=0,
            )  # fmt: skip
        return self

    def is_ready(self, seconds: float = 180) -> Process:
        assert self.process is not None and self.process.stdout is not None
        timer = threading.Timer(seconds, self.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line != b"ready\n":
            raise AssertionError(f"{self.arguments[0]} did not start; see {self.log}:\n{self.log.read_text()[-3000:]}")
        return self

    def kill(self) -> None:
        """With -9: it has no chance to tidy up."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(30)

    @property
    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None


if __name__ == "__main__":
    {"listen": listen, "work": work}[sys.argv[1]](*sys.argv[2:])
