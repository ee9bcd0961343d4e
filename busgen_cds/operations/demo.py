"""The whole product on this machine in one go: a scanner sends a synthetic study, a PACS receives the answer.

Nothing here is special to the demonstration but the scanner, the PACS and where the images come from: the site is made
as `init` makes it, the listener, worker and pages run as `serve` runs them, with the bundle that ships.
"""

from __future__ import annotations

import json
import shutil
import time
from datetime import datetime
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from busgen_cds import app, settings
from busgen_cds.app import Site
from busgen_cds.dicom import archive, files, outbox, synthetic
from busgen_cds.dicom.outbox import Node
from busgen_cds.operations import documents, serving
from busgen_cds.operations.serving import Shown
from busgen_cds.study import Spacing

SENT_AT = datetime(2026, 1, 1, 9, 0)
IMAGES = ("malignant_1", "malignant_4", "normal_4")
WIDTH = 640  # pixels, as a scanner would send
PATIENCE = 120.0  # seconds
PASSPHRASE = "this-is-a-demonstration"  # the promoter's; a site's own is made by `init`
PREVALENCE = 0.30  # close to the calibration's: a diagnostic clinic, not a screening site

_SETTINGS = """\
[site]
name = "Demonstration"
prevalence = {prevalence}

[listener]
host = "127.0.0.1"
port = 0
free_bytes = 0
processes = 1
allow = [{{ ae_title = "DEMO_SCANNER" }}]

[study]
silence_seconds = 1

[[nodes]]
name = "pacs"
ae_title = "{title}"
host = "{host}"
port = {port}

[[destinations]]
node = "pacs"

[web]
port = 0
"""


def run(folder: Path, *, once: bool, tell: Console) -> int:
    """Returns the exit code: 0 when the PACS has the answer."""
    if folder.exists():
        shutil.rmtree(folder)
    with archive.opened(folder / "pacs") as pacs:
        text = _SETTINGS.format(prevalence=PREVALENCE, title=pacs.ae_title, host=pacs.host, port=pacs.port)
        chosen = settings.read(app.found(folder / "site", text, PASSPHRASE))
        tell.print("[bold]1[/]  A site is made, and a PACS stands beside it.")
        with serving.receiving(chosen) as port, serving.reading(chosen) as site, serving.showing(chosen) as shown:
            tell.print("[bold]2[/]  Listener, worker and pages run.")
            _send(Node("scanner", chosen.listener.ae_title, "127.0.0.1", port, calling_ae="DEMO_SCANNER"))
            tell.print(f"[bold]3[/]  The scanner sent a synthetic study of {len(IMAGES)} images; no patient is shown.")
            code = _answer(site, folder / "pacs", tell)
            if not once and code == 0:
                _stay(shown, tell)
    return code


def study() -> list[bytes]:
    """The demonstration's study: generated images, in the size a scanner sends."""
    folder = Path(str(resources.files("busgen_cds") / "demo_images"))
    shown = [Image.open(folder / f"{name}.png").convert("L") for name in IMAGES]
    large = [image.resize((WIDTH, WIDTH * image.height // image.width), Image.Resampling.BICUBIC) for image in shown]
    return synthetic.study([np.asarray(image) for image in large], name="Demo", at=SENT_AT, spacing=Spacing(0.06, 0.06))


def _send(to: Node) -> None:
    for answer in outbox.send([files.open_file(data) for data in study()], to):
        if not answer.stored:
            raise RuntimeError(f"The listener refused a demonstration image: {answer.reason}")


def _answer(site: Site, pacs: Path, tell: Console) -> int:
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        entries = site.results.listing(limit=1)
        if entries and all(each.state == "done" for each in site.results.deliveries.of(entries[0].ref)):
            document = documents.result(site, entries[0].ref)
            tell.print(f"[bold]4[/]  The PACS has the answer, {time.monotonic() - began:.1f} s after the last image:")
            _show(document, sorted(pacs.glob("*.dcm")), tell)
            return 0 if document["outcome"] == "assessed" else 1
        time.sleep(0.05)
    tell.print(f"[bold red]No answer in {PATIENCE:.0f} s.[/] What is in the way:")
    tell.print_json(json.dumps(documents.queue(site)))
    return 1


def _show(document: dict[str, object], kept: list[Path], tell: Console) -> None:
    said = Table(box=None, show_header=False, pad_edge=True)
    study = document["study"]
    assert isinstance(study, dict)
    said.add_row("outcome", f"{document['outcome']} {document['reason'] or ''}")
    if study["probability_of_malignancy"] is not None:
        said.add_row("category", f"[bold]{study['birads'] or 'no lesion found'}[/]")
        said.add_row("malignant", f"{100 * study['probability_of_malignancy']:.1f} % at {PREVALENCE:.0%} prevalence")
    findings = document["findings"]
    assert isinstance(findings, list)
    for number, finding in enumerate(findings, 1):
        size = f"{finding['long_axis_mm']:.0f} × {finding['short_axis_mm']:.0f} mm" if finding["long_axis_mm"] else ""
        said.add_row(f"finding {number}", f"{finding['birads']}, {size}, {finding['orientation'] or ''}")
    bundle = document["bundle"]
    assert isinstance(bundle, dict)
    said.add_row("read by", f"{bundle['name']} {bundle['version']} ({bundle['digest'][:12]})")
    tell.print(said)
    objects = Table("object in the PACS", "kB", box=None, pad_edge=True)
    for path in kept:
        objects.add_row(path.name, f"{path.stat().st_size / 1000:.0f}")
    tell.print(objects)
    tell.print(f"The objects lie in {kept[0].parent}", soft_wrap=True)
    tell.print("[dim]Research software, not a medical device: this is not a diagnosis.[/]")


def _stay(shown: Shown, tell: Console) -> None:
    tell.print(f"[bold]5[/]  Look around: {shown.address}/first with the code {shown.first_code}  (Ctrl-C ends it)")
    serving.until_told()
