"""A whole site as it runs at a hospital: `busgen-cds serve` in a process, a scanner, a PACS and a reader's browser.

Everything that it may write lies under one folder: its temporary files, home and log too.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
from typer.testing import CliRunner

from busgen_cds import app, cli, settings
from busgen_cds.app import Site
from busgen_cds.errors import Misconfigured
from busgen_cds.store import site_keys
from tests import hospital, images
from tests.pacs import Pacs
from tests.programs import free_port

PASSWORD = "a long enough passphrase 9"
_PATIENCE = 900.0  # seconds: machines that run tests are busy
_SETTINGS = """
[site]
name = "Example"
prevalence = 0.1

[listener]
host = "127.0.0.1"
port = {port}
free_bytes = 0
processes = 1
check_called_ae = false
allow = [{{ ae_title = "US_ROOM_1" }}]

[reader]
device = "cpu"

[study]
silence_seconds = 1

[[nodes]]
name = "pacs"
ae_title = "{pacs.ae_title}"
host = "{pacs.host}"
port = {pacs.port}

[[destinations]]
node = "pacs"

[web]
port = {web}

[record]
checkpoints = "elsewhere/checkpoints"
"""


@dataclass
class Sent:
    """A study with identifiers that nobody else has, and what gives it away."""

    files: list[bytes]
    words: dict[str, str]  # what kind of identifier → it
    pixels: list[bytes]  # pieces of its images that occur nowhere else

    @property
    def uid(self) -> str:
        return self.words["Study Instance UID"]


def telling_study(seed: int) -> Sent:
    ds = images.breast_dataset(seed=seed)
    words = {
        "name": f"Kowalczyk-{seed}^Wilhelmina",
        "patient id": f"PID-{seed}-88421",
        "accession number": f"ACC{seed}77123",
        "birth date": "19530417",
        "referring physician": "Szymborska^Halina",
        "study id": f"SID{seed}9",
        "institution": "Mercy Hospital of Example",
    }
    ds.PatientName, ds.PatientID, ds.AccessionNumber = words["name"], words["patient id"], words["accession number"]
    ds.PatientBirthDate, ds.ReferringPhysicianName = words["birth date"], words["referring physician"]
    ds.StudyID, ds.InstitutionName = words["study id"], words["institution"]
    for name in ("Study Instance UID", "Series Instance UID", "SOP Instance UID"):
        words[name] = images.uid("telling", seed, name)
        setattr(ds, name.replace(" ", ""), words[name])
    shown = np.frombuffer(ds.PixelData, np.uint8).reshape(ds.Rows, ds.Columns)
    left, top, _, bottom = images.REGION
    rows = [shown[y, left + 40 : left + 104].tobytes() for y in range(top + 20, bottom - 20, 37)]
    pixels = [row for row in rows if len(set(row)) > 12]
    assert len(pixels) > 3
    return Sent([images.part10(ds)], words, pixels)


@dataclass
class Running:
    folder: Path
    pacs: Pacs
    port: int
    web: int
    process: subprocess.Popen[bytes] | None = None
    _opened: list[Site] = field(default_factory=list)
    _began_at: int = 0

    @property
    def log(self) -> Path:
        return self.folder / "serve.log"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.web}"

    # -- verbs

    def starts(self) -> Running:
        self._began_at = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "busgen_cds", "serve", "-c", str(self.folder)],
                stdout=log, stderr=log, env=self._environment(), cwd=Path(__file__).parents[2],
            )  # fmt: skip
        self.waits_until(lambda: "Pages: " in self.log.read_text()[self._began_at :], "it does not start")
        return self

    def stops(self) -> None:
        for site in self._opened:
            site.close()
        self._opened.clear()
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(90)
            self.process = None

    def receives(self, sent: Sent) -> None:
        hospital.Scanner(self.port).sends(sent.files)

    def answers(self, sent: Sent) -> list[pydicom.Dataset]:
        """Until the PACS has everything that is said of the study."""
        self.waits_until(lambda: self._is_done(sent), "no answer")
        return self.pacs.of(sent.uid)

    @contextmanager
    def reader(self) -> Iterator[httpx.Client]:
        """A browser, logged in as the first person of the site."""
        found = re.search(r"with the code (\S+)", self.log.read_text())
        form = {"code": found[1] if found else "", "name": "ann.smith", "password": PASSWORD}
        with httpx.Client(base_url=self.address, headers={"Origin": self.address}, timeout=60) as client:
            if client.post("/first", data=form).headers.get("location") != "/worklist":
                assert client.post("/login", data=form).status_code == 303
            yield client

    def runs(self, *arguments: object, code: int = 0) -> str:
        """A command at this site, in this process; what it says."""
        done = CliRunner().invoke(cli.app, [*map(str, arguments), "-c", str(self.folder)], catch_exceptions=True)
        ended = 2 if isinstance(done.exception, Misconfigured) else 1 if done.exception else done.exit_code
        if isinstance(done.exception, SystemExit):
            ended = done.exit_code
        said = f"{done.output}{done.exception or ''}"
        assert ended == code, f"{arguments}: {ended}\n{said}"
        return " ".join(said.split()) if "--json" not in arguments else done.stdout

    def says(self, *arguments: object, code: int = 0) -> Any:
        """The same, as JSON."""
        return json.loads(self.runs(*arguments, "--json", code=code))

    def site(self) -> Site:
        self._opened.append(app.open_site(settings.read(self.folder / settings.FILE)))
        return self._opened[-1]

    def waits_until(self, true: Any, otherwise: str) -> None:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            if true():
                return
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(0.2)
        raise AssertionError(f"{otherwise}:\n{self.log.read_text()[-3000:]}")

    def _is_done(self, sent: Sent) -> bool:
        site = self._opened[0] if self._opened else self.site()
        ref = site.inbox.find_study(sent.uid)
        entry = site.results.current(ref) if ref else None
        return bool(entry) and all(each.state == "done" for each in site.results.deliveries.of(entry.ref))  # type: ignore[union-attr]

    def _environment(self) -> dict[str, str]:
        elsewhere = {name: str(self.folder / name.lower()) for name in ("TMPDIR", "HOME")}
        for path in elsewhere.values():
            Path(path).mkdir(exist_ok=True)
        return {**os.environ, **elsewhere, "USER": "tester", "LOGNAME": "tester"}


@contextmanager
def running(folder: Path) -> Iterator[Running]:
    pacs = Pacs().comes_up()
    port, web = free_port(), free_port()
    app.found(folder, _SETTINGS.format(port=port, web=web, pacs=pacs), site_keys.new_passphrase())
    it = Running(folder, pacs, port, web)
    try:
        yield it.starts()
    finally:
        it.stops()
        pacs.goes_down()


def pieces_of(objects: list[pydicom.Dataset]) -> list[bytes]:
    """Pieces of the pictures that we sent out, as they are in the objects."""
    found = []
    for each in objects:
        if each.Modality not in ("SR", "PR", "SEG") and "PixelData" in each:
            data = bytes(each.PixelData)
            pieces = (data[at : at + 96] for at in range(0, len(data), 9973))
            found += [piece for piece in pieces if len(set(piece)) > 12][:40]
    return found


def bytes_of(ds: pydicom.Dataset) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
