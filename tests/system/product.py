"""The whole product as a clinic runs it: `busgen-cds serve` in a process of its own, with a site of its own.

    with product.running(tmp_path / "site", to=pacs) as busgen:
        pacs.knows("busgen-cds", busgen.ae_title, busgen.port)

`stop()` and `start()` take it away and bring it back with what it kept.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from busgen_cds import app, settings
from busgen_cds.store.people import People, Right
from tests.programs import free_port
from tests.system.orthanc import Orthanc, wait_for

SETTINGS = """\
[site]
name = "Test clinic"
prevalence = 0.3

[listener]
host = "127.0.0.1"
port = {port}
processes = 1
free_bytes = 0
allow = [{{ ae_title = "{sender}" }}]

[study]
silence_seconds = 1

[[nodes]]
name = "pacs"
ae_title = "{sender}"
host = "127.0.0.1"
port = {pacs_port}

[[destinations]]
node = "pacs"

[web]
port = {web_port}
"""


class Product:
    ae_title = "BUSGEN_CDS"

    def __init__(self, folder: Path, to: Orthanc, web_port: int = 0) -> None:
        self.port = free_port()
        self.log = folder.parent / f"{folder.name}.log"
        text = SETTINGS.format(port=self.port, sender=to.ae_title, pacs_port=to.dicom_port, web_port=web_port)
        self.settings = app.found(folder, text, "a passphrase for tests")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from busgen_cds.cli import main; main()", "serve", "-c", str(self.settings)],
                stdout=log,
                stderr=log,
                env=os.environ | {"TCP_NODELAY": "1"},
                start_new_session=True,
            )
        wait_for(self._answers, 240, f"the product did not start; see {self.log}")

    def token(self, *rights: Right) -> str:
        """For a program that asks the pages."""
        with app.opened_site(settings.read(self.settings)) as site:
            people = People(site.database, site.vault)
            owner = people.add("orthanc", "a long passphrase for tests", ["reader"], "test")
            return people.make_token(owner, "orthanc", rights, 30)[0]

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        os.killpg(self._process.pid, how)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
            raise AssertionError(f"the product did not stop within 60 s; see {self.log}") from None
        finally:
            self._process = None

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise AssertionError(f"the product ended: {self.log.read_text(errors='replace')[-2000:]}")
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except OSError:
            return False


@contextmanager
def running(folder: Path, *, to: Orthanc, web_port: int = 0) -> Iterator[Product]:
    busgen = Product(folder, to, web_port)
    try:
        busgen.start()
        yield busgen
    finally:
        busgen.kill()
