"""The whole product as a clinic runs it: `busgen-cds serve` in a process of its own, with a site of its own.

    with product.running(tmp_path / "site", to=pacs) as busgen:
        pacs.knows("busgen-cds", busgen.ae_title, busgen.port)

`stop()` and `start()` take it away and bring it back with what it kept.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from busgen_cds import app, settings
from busgen_cds.store.people import People, Right
from tests.programs import free_port
from tests.system.daemon import Daemon
from tests.system.orthanc import Orthanc

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


class Product(Daemon):
    ae_title = "BUSGEN_CDS"

    def __init__(self, folder: Path, to: Orthanc, web_port: int = 0) -> None:
        self.port = free_port()
        log = folder.parent / f"{folder.name}.log"
        super().__init__("the product", log, self.port, starts_within=240, stops_within=60)
        text = SETTINGS.format(port=self.port, sender=to.ae_title, pacs_port=to.dicom_port, web_port=web_port)
        self.settings = app.found(folder, text, "a passphrase for tests")

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", "from busgen_cds.cli import main; main()", "serve", "-c", str(self.settings)]

    def token(self, *rights: Right) -> str:
        """For a program that asks the pages."""
        with app.opened_site(settings.read(self.settings)) as site:
            people = People(site.database, site.vault)
            owner = people.add("orthanc", "a long passphrase for tests", ["reader"], "test")
            return people.make_token(owner, "orthanc", rights, 30)[0]


@contextmanager
def running(folder: Path, *, to: Orthanc, web_port: int = 0) -> Iterator[Product]:
    busgen = Product(folder, to, web_port)
    try:
        busgen.start()
        yield busgen
    finally:
        busgen.kill()
